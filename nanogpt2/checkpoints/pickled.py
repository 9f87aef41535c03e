"""What torch.save wrote: pytorch_model.bin, nanoGPT's ckpt.pt, minGPT's model.pt.

archive.py finds the pickle and the storages in the file. The pickle is never run as it is. First
its instructions are listed: each global that it wants must be one of GLOBALS, which make tensors
only. Then torch.load(weights_only=True) reads it from a clean copy whose storages are empty, onto
the meta device. The result is a shape, strides and a place in the file for each tensor, and no
memory was allocated. tensors.py reads or maps the bytes, as it does those of safetensors. So an
optimizer in the file costs nothing.

These are read:

- a state dict, or one under `model`, `state_dict` or `model_state_dict`, beside anything;
- nanoGPT's `model_args`, the shape: its GELU is exact, and with `bias` false its layer norms and
  linear layers have none, which are zeros here: the same function;
- names with `_orig_mod.` (torch.compile) and `module.` (DistributedDataParallel);
- projections stored [out, in], as torch's Linear does; told by the shape of c_attn.weight;
- tensors that share bytes, and transposed ones.

Sources: torch/_weights_only_unpickler.py; model.py and train.py of nanoGPT and minGPT.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from nanogpt2.checkpoints.archive import (
    OPCODES,
    PUTS,
    ZIP,
    Archive,
    clean_zip,
    opcodes,
    read_old,
    read_zip,
)
from nanogpt2.checkpoints.header import MOST_AXES, Layout, StoredTensor
from nanogpt2.checkpoints.names import PREFIX, TRANSPOSED
from nanogpt2.config import MOST_LAYERS
from nanogpt2.config.flags import show
from nanogpt2.memory import is_out_of_memory

STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
GLOBALS = frozenset(
    [
        "collections OrderedDict",
        "torch Size",
        "torch device",
        "torch.nn.parameter Parameter",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_parameter_with_state",
        *(f"torch {name}Storage" for name in STORAGES.split()),
        *(str(dtype).replace(".", " ") for dtype in NAMES),
    ]
)
# nested deeper, hashing a key would overflow the stack; with more parts, it would never end
DEEPEST, MOST_PARTS = 1000, 2**26
STATES = ("model", "state_dict", "model_state_dict")
# nanoGPT's names of the shape, by config.json's
MODEL_ARGS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
}
OTHER_ARGS = ("bias", "dropout")
# the biases of nanoGPT's blocks, and their sizes in widths of the model
BIASES = {
    "ln_1": 1,
    "attn.c_attn": 3,
    "attn.c_proj": 1,
    "ln_2": 1,
    "mlp.c_fc": 4,
    "mlp.c_proj": 1,
}


class PickleLayout(Layout):
    """The tensors of a file of torch.save, found without reading or running it."""

    KIND = "file of torch.save"

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Read the file's structure. Raises ValueError for one that is broken or unsafe."""
        super().__init__(path, file)
        with warnings.catch_warnings():
            # of other pickle protocols, of odd texts and of attributes of tensors
            warnings.simplefilter("ignore")
            archive, keys, loaded = self._load(file)
            tensors, model_args = self._tensors(loaded)
            try:
                entries = [*_entries(path, tensors, archive, keys)]
            except ValueError as error:
                raise self.broken(str(error)) from None
        if model_args is not None:
            self.stated = self._stated(model_args)
            if model_args.get("bias") is False:
                entries += _zero_biases(path, entries, self.stated)
        self.is_linear = _is_linear(entries)
        self.entries = sorted(entries, key=lambda entry: (entry.start, entry.end))

    def _load(self, file: IO[bytes]) -> tuple[Archive, dict[int, str], Any]:
        """Return the file's parts, the keys of `clean_zip`, and the object on the meta device."""
        is_zip = file.read(len(ZIP)) == ZIP
        try:
            archive = read_zip(file) if is_zip else read_old(file)
            _check_opcodes(archive.pickle)
            clean, keys = clean_zip(archive)
        except _ForbiddenError as error:
            raise ValueError(f"{str(self.path)!r} is a pickle {error}") from None
        except ValueError as error:
            raise self.broken(str(error)) from None
        try:
            with _without_bytes():
                return archive, keys, torch.load(clean, map_location="meta", weights_only=True)
        # what the instructions do to each other can raise anything
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self.broken(f"torch.load: {_first_line(error)}") from None

    def _tensors(self, loaded: Any) -> tuple[dict[str, Tensor], Any]:
        """Return the state dict and nanoGPT's model_args; raises ValueError for anything else."""
        model_args = None
        if isinstance(loaded, dict):
            # past attributes that a pickle may give a dictionary
            whole = dict(dict.items(loaded))
            states = [whole[key] for key in STATES if isinstance(whole.get(key), dict)]
            state = dict(dict.items(states[0])) if states else whole
            model_args = whole.get("model_args") if states else None
        else:
            raise ValueError(
                f"{str(self.path)!r} holds a {type(loaded).__name__}, not tensors by their names: "
                "save the model's state_dict()"
            )
        tensors: dict[str, Tensor] = {}
        for key, value in state.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise ValueError(
                    f"{str(self.path)!r}: {show(key)} is no tensor: save the model's state_dict()"
                )
            name = key.replace("_orig_mod.", "").removeprefix("module.")
            if name in tensors:
                raise ValueError(f"{str(self.path)!r}: tensor {show(name)} is there twice")
            tensors[name] = value
        return tensors, model_args

    def _stated(self, model_args: Any) -> dict[str, Any]:
        """Return nanoGPT's model_args by config.json's names."""
        args = dict(dict.items(model_args)) if isinstance(model_args, dict) else {}
        unknown = [name for name in args if name not in (*MODEL_ARGS.values(), *OTHER_ARGS)]
        missing = [name for name in MODEL_ARGS.values() if type(args.get(name)) is not int]
        if missing or unknown:
            what = (
                f"have {show(unknown[0])}, unknown to nanoGPT" if unknown else f"lack {missing[0]}"
            )
            raise ValueError(f"{str(self.path)!r}: its model_args {what}")
        if not 1 <= args["n_layer"] <= MOST_LAYERS:
            raise ValueError(f"{str(self.path)!r}: n_layer must be 1 to {MOST_LAYERS:,}")
        shape = {theirs: args[name] for theirs, name in MODEL_ARGS.items()}
        return shape | {"activation_function": "gelu"}


def _without_bytes() -> AbstractContextManager[Any]:
    """Return the context in which torch.load makes meta tensors and reads no storage."""
    if hasattr(torch.serialization, "_is_meta_location"):
        return nullcontext()
    # before PyTorch 2.12 map_location="meta" would read them
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:100]


# ---- the pickle


class _ForbiddenError(ValueError):
    """A pickle that wants more than tensors."""


def _check_opcodes(pickle: bytes) -> None:
    """Raise ValueError for a pickle that wants more than tensors, or that torch.load cannot end."""
    texts = ["", ""]
    for code in opcodes(pickle):
        wanted = code.argument if code.name in ("GLOBAL", "INST") else None
        # later protocols name a global by the two texts before it
        wanted = " ".join(texts[-2:]) if code.name == "STACK_GLOBAL" else wanted
        if wanted is not None and wanted not in GLOBALS:
            raise _ForbiddenError(
                f"that wants {show(wanted.replace(' ', '.', 1))}: only tensors are loaded, "
                "no code is run; save the model's state_dict() alone"
            )
        if isinstance(code.argument, str):
            texts = [texts[-1], code.argument]
    _check_nesting(pickle)


def _check_nesting(pickle: bytes) -> None:
    """Raise ValueError for other instructions than torch.load's, and for values nested too deep."""
    # of each value its depth and its parts; of a mark nothing
    stack: list[tuple[int, int] | None] = []
    memo: dict[int, tuple[int, int] | None] = {}
    for code in opcodes(pickle):
        if code.name not in OPCODES:
            raise ValueError(f"its pickle has {code.name}: save it again by torch.save's defaults")
        taken: list[tuple[int, int]] = []
        try:
            if code.to_mark:
                while (value := stack.pop()) is not None:
                    taken.append(value)
            for _ in range(code.takes):
                # a mark here fails below
                taken.append(stack.pop() or (DEEPEST, 0))
            if code.name in PUTS:
                memo[code.argument] = stack[-1]
            if code.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[code.argument])
            elif code.name == "MARK":
                stack.append(None)
            elif code.makes:
                depth = 1 + max((depth for depth, _ in taken), default=0)
                parts = 1 + sum(parts for _, parts in taken)
                if depth > DEEPEST or parts > MOST_PARTS:
                    raise ValueError("its pickle is nested too deep")
                stack.append((depth, parts))
        except LookupError:
            raise ValueError(f"its pickle takes a value too many at {code.place}") from None


# ---- the tensors


def _entries(
    path: Path, tensors: Mapping[str, Tensor], archive: Archive, keys: Mapping[int, str]
) -> Iterator[StoredTensor]:
    """Find each tensor's bytes in the file. Raises ValueError for one that is not plainly there."""
    found = {name: keys.get(_place_of(tensor), "") for name, tensor in tensors.items()}
    places = archive.places({found[name]: t.dtype.itemsize for name, t in tensors.items()})
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_neg() or tensor.is_conj():
            raise ValueError(f"tensor {show(name)} is no plain tensor")
        place, width = places.get(found[name]), tensor.dtype.itemsize
        # past attributes that a pickle may give a tensor
        size = Tensor.untyped_storage(tensor).nbytes()
        # before PyTorch 2.12 a storage without bytes counts each byte as a number
        if place is None or size not in (place.size, place.size * width):
            raise ValueError(f"tensor {show(name)} has no storage of its size")
        shape, strides = (*map(int, tensor.shape),), (*map(int, Tensor.stride(tensor)),)
        first = int(Tensor.storage_offset(tensor))
        count = math.prod(shape)
        span = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        span = span if count else 0
        if len(shape) > MOST_AXES or count > span:
            raise ValueError(f"tensor {show(name)} repeats its numbers: save its clone()")
        start = place.start + first * width
        end = start + span * width
        if first < 0 or end > place.start + place.size:
            raise ValueError(f"tensor {show(name)} reaches past its storage")
        dtype = NAMES.get(tensor.dtype, str(tensor.dtype))
        is_plain = Tensor.is_contiguous(tensor)
        yield StoredTensor(path, name, dtype, shape, start, end, None if is_plain else strides)


def _place_of(tensor: Tensor) -> int:
    """Return the place of a tensor's storage in the clean zip file, as torch.load notes it."""
    storage = Tensor.untyped_storage(tensor) if tensor.layout == torch.strided else None
    return int(getattr(storage, "_checkpoint_offset", -1))


def _zero_biases(
    path: Path, entries: list[StoredTensor], stated: Mapping[str, Any]
) -> list[StoredTensor]:
    """Return the biases that a model of nanoGPT with `bias` false lacks: zeros, without bytes."""
    names = {entry.name.removeprefix(PREFIX) for entry in entries}
    blocks = range(stated["n_layer"])
    sizes = {f"h.{i}.{name}.bias": size for i in blocks for name, size in BIASES.items()}
    sizes["ln_f.bias"] = 1
    return [
        StoredTensor(path, name, "F32", (size * stated["n_embd"],), 0, 0)
        for name, size in sizes.items()
        if name not in names
    ]


def _is_linear(entries: list[StoredTensor]) -> bool:
    """Tell whether projections are [out, in]: c_attn.weight makes three vectors of one."""
    return any(
        entry.name.endswith("attn.c_attn.weight")
        and len(entry.shape) == 2
        and entry.shape[0] == 3 * entry.shape[1]
        for entry in entries
    )


def as_conv1d(layouts: Sequence[Layout]) -> None:
    """Turn projections stored [out, in] into views [in, out], as transformers' Conv1D stores them.

    layouts: of all files of a model: one of several may have no c_attn.weight to tell it by.
    """
    if any(layout.is_linear for layout in layouts):
        for layout in layouts:
            layout.entries[:] = [
                e.transposed() if e.name.endswith(TRANSPOSED) and len(e.shape) == 2 else e
                for e in layout.entries
            ]
