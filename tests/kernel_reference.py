"""What the kernels' tests share: the measure of an error, launches as they are recorded, and what a
compiled kernel needs of a chip.

A process interprets its kernels or compiles them, never both: `record_launches` and `compile_for`
are for one that is started without TRITON_INTERPRET (tests/kernel_table.py).
"""

import contextlib
import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# what one rounding to the dtype may cost, with some room for sums of rounded values: fp32 has 24
# bits of mantissa, fp16 11, bf16 8
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# name -> the target and the shared memory in bytes that one program may have
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


def rms_ratio(result, reference):
    """RMS of the difference / RMS of the reference; the absolute RMS where the reference is 0."""
    reference = reference.double().to(result.device)
    difference = (result.double() - reference).pow(2).mean().sqrt()
    scale = reference.pow(2).mean().sqrt()
    return (difference / torch.where(scale > 0, scale, 1.0)).item()


def assert_close(result, reference, dtype=None, factor=1):
    """The RMS ratio is within the dtype's tolerance, times `factor`; a NaN is never close."""
    error = rms_ratio(result, reference)
    assert error <= factor * TOLERANCE[dtype or result.dtype], error


def gradients(function, *inputs, grad=None):
    """The function's first result and the gradients of all its floating-point inputs.

    grad: that of the first result, or of each of a tuple of results; by default 1.
    """
    inputs = [
        x.detach().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    results = function(*inputs)
    leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    return results, torch.autograd.grad(results, leaves, grad)


@dataclass
class Launch:
    """One kernel with the types, constants and alignments that it was launched with."""

    kernel: object
    signature: dict
    constexprs: dict
    attrs: dict
    options: dict = field(default_factory=dict)


@contextlib.contextmanager
def record_launches():
    """Yield a list that gets each Triton launch made inside, none of which runs."""
    launches = []

    def run(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        options = {k: kwargs.pop(k) for k in list(kwargs) if k not in names}
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        launch = Launch(kernel, {}, {}, {}, options)
        for i, name in enumerate(names):
            value = bound.arguments[name]
            kind, aligned = _kind(value)
            if kernel.params[i].do_not_specialize:
                kind, aligned = kernel.params[i].annotation_type or "i32", False
            if kernel.params[i].is_constexpr or kind == "constexpr":
                launch.signature[name], launch.constexprs[name] = "constexpr", value
            else:
                launch.signature[name] = kind
                if aligned:
                    launch.attrs[(i,)] = [["tt.divisibility", 16]]
        launches.append(launch)

    original = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        yield launches
    finally:
        triton.JITFunction.run = original


def _kind(value):
    """The type Triton gives an argument, and whether it knows that 16 divides it."""
    if torch.is_tensor(value):
        return POINTERS[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, TensorDescriptor):
        dtype = POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{dtype}{value.block_shape}>".replace(" ", ""), False
    if value is None or type(value) in (bool, str) or (type(value) is int and value == 1):
        return "constexpr", False
    if type(value) is int:
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    assert type(value) is float, value
    return "fp32", False


def compile_for(kernel, signature, constexprs, target, attrs=None, **options):
    """Compile for a name of TARGETS -> {"registers", "spills", "shared", "sass"}.

    Registers a thread and bytes of local memory come from the cubin, by Triton's own cuobjdump, and
    the machine's instructions by its nvdisasm; for gfx942 from the notes in the assembly, and no
    instructions.
    """
    source = triton.compiler.ASTSource(kernel, signature, constexprs, attrs or {})
    compiled = triton.compile(source, target=TARGETS[target][0], options=options)
    usage = _nvidia_usage if "cubin" in compiled.asm else _amd_usage
    return usage(compiled) | {"shared": compiled.metadata.shared}


def _nvidia_usage(compiled):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        commands = ["cuobjdump", "-res-usage"], ["nvdisasm", "-c"]
        found, sass = (
            subprocess.run(
                [str(tools / tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in commands
        )
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}
    return {
        "registers": usage["REG"],
        "spills": usage["STACK"] + usage["LOCAL"],
        "sass": instructions(sass),
    }


@dataclass
class Sass:
    """A kernel's instructions, and the [first, end) of its innermost loops."""

    lines: list
    loops: list

    def count(self, *names, within=None):
        """The number of instructions whose names start so."""
        first, end = within or (0, len(self.lines))
        return sum(_name(line).startswith(names) for line in self.lines[first:end])


def instructions(text):
    """nvdisasm's text -> Sass. A loop ends with a branch back to the label where it begins."""
    lines, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            lines.append(found[1])
    loops = []
    for end, line in enumerate(lines, 1):
        to = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        # a branch to itself follows the end of every kernel
        if to and labels[to[1]] < end - 1:
            loops.append((labels[to[1]], end))
    inner = [
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    ]
    return Sass(lines, inner)


def _name(line):
    return re.sub(r"^@!?U?P\w+ ", "", line).split()[0]


def distance(body):
    """How many instructions of a loop separate a wide load from the first use of what it loads.

    The least over the loads of 8 bytes a thread and more; None without one.
    """
    found = []
    for at, line in enumerate(body):
        load = re.search(r"\bLDG\.\S*\.(64|128)\S* R(\d+)", line)
        if load is None:
            continue
        registers = [f"R{int(load[2]) + i}" for i in range(int(load[1]) // 32)]
        for steps in range(1, len(body)):
            other = body[(at + steps) % len(body)]
            operands = other.split(None, 1)[-1].split(",")
            # what a store names first it reads, what others name first they write
            read = operands if re.search(r"\b(ST|RED|ATOM)", other) else operands[1:]
            if re.search(rf"\b({'|'.join(registers)})\b", ",".join(read)):
                found.append(steps)
                break
    return min(found, default=None)


def _amd_usage(compiled):
    found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
    spills = int(found["vgpr_spill_count"])
    return {"registers": int(found["vgpr_count"]), "spills": spills, "sass": None}
