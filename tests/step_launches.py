"""Count the launches of a decoding step, and the variants of its kernels that a text compiles.

    python tests/step_launches.py [--mistake NAME]

No GPU is needed: Triton's launches are recorded and not run, as in kernel_table.py. The table goes
to stdout as one JSON object. --mistake: one of MISTAKES, and the table of the first way alone.
"""

import argparse
import json
from collections import Counter
from itertools import count

import torch
from kernel_reference import record_launches
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt2.config import PRESETS, GenerationConfig, GPTConfig
from nanogpt2.cuda import ops as step_ops
from nanogpt2.cuda.decoder import CUDADecoder
from nanogpt2.generation.replay import Rows
from nanogpt2.generation.request import Request
from nanogpt2.kernels import decode_attention, decode_linear, layer_norm, sampling
from nanogpt2.model import GPT

SAMPLED = {"do_sample": True, "noise": "counter", "seed": 3}
WAYS = {
    "greedy": {},
    "greedy, penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampled": SAMPLED | {"temperature": 0.7, "top_k": 50, "no_repeat_ngram_size": 2},
    "sampled, top_p": SAMPLED | {"top_p": 0.9},
}
NEW_TOKENS = 300
PROMPTS = (7, 23)
# SMs of an H100 or H200
PROCESSORS = 132


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations that launch a kernel: no views, no allocations, none of ours."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = [each.alias_info for each in function._schema.returns]
        is_view = any(info is not None and not info.is_write for info in reads)
        allocates = "empty" in function.name()
        if not (is_view or allocates or function.namespace == "nanogpt2"):
            self.launched[function.name()] += 1
        return function(*args, **(kwargs or {}))


def text_of(config, prompt, length=NEW_TOKENS, **options):
    """The buffers of a text of one row after its prompt, with a decoder that has read the prompt.

    The weights hold nothing: no launch reads them.
    """
    with torch.device("meta"):
        model = GPT(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.kernels = "triton"
    ids = torch.zeros(1, prompt, dtype=torch.int64)
    shape = (1, prompt + length, config.vocab_size, 1)
    request = Request(GenerationConfig(**options), ids, ids == 0, ids[0, :1], *shape)
    rows = Rows(request)
    # as generation/engine.py does
    rows._decoder = CUDADecoder(model, 1, 1, min(config.block_size, prompt + length))
    rows._decoder._fill(prompt)
    return rows


def step(rows):
    """One step, launched kernel by kernel, as before its capture."""
    rows._decoder.replay(rows.NAME, rows._choose_from)


def launches(options):
    """By name, those of one step of the 124M."""
    rows = text_of(PRESETS["gpt2"], 100, **options)
    with record_launches() as found:
        # the first step compiles, too
        step(rows)
        found.clear()
        with Operations() as operations:
            step(rows)
        # as it is without a dispatch mode
        mode = len(found)
        found.clear()
        step(rows)
    assert mode == len(found), "a dispatch mode changes the launches"
    return Counter(launch.kernel.__name__ for launch in found) + operations.launched


def variants(options):
    """For each of two texts: [tokens in the cache, kernel] of every variant not met before."""
    config = GPTConfig(977, 512, 2, 2, 32, bos_token_id=0, eos_token_id=0)
    known, found = set(), []
    for prompt in PROMPTS:
        rows, new = text_of(config, prompt, **options), []
        for number in range(NEW_TOKENS):
            with record_launches() as made:
                step(rows)
            for launch in made:
                key = repr((launch.kernel.__name__, launch.signature, launch.constexprs))
                key += repr((launch.attrs, launch.options))
                if key not in known:
                    new.append([prompt + number, launch.kernel.__name__])
                known.add(key)
        found.append(new)
    return found


def prepare():
    """Let the CPU's tensors stand for a GPU's, and its one processor for a GPU's many."""
    for room in (decode_attention, decode_linear, layer_norm, sampling):
        room.INTERPRETED = True
    right = decode_attention.step_splits
    decode_attention.step_splits = lambda rows, n_head, positions, _: right(
        rows, n_head, positions, PROCESSORS
    )


def changing_splits():
    """The splits change from call to call."""
    calls = count()
    decode_attention.step_splits = lambda *_: 1 << next(calls) // 2 % 7


def compile_late():
    """A bucket's kernel is compiled when the text reaches it."""
    CUDADecoder._compile_buckets = lambda self: None


def copy_once():
    """A step copies its result."""
    right = CUDADecoder.step
    CUDADecoder.step = lambda self, bucket: right(self, bucket).clone()


def add_residuals_apart():
    """A product's residual is added by a launch of its own."""
    right = step_ops.decode_linear

    def apart(*arguments, residual=None, **options):
        y = right(*arguments, **options)
        return y if residual is None else y + residual

    step_ops.decode_linear = apart


MISTAKES = {
    "changing splits": changing_splits,
    "compile late": compile_late,
    "copy once": copy_once,
    "add residuals apart": add_residuals_apart,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mistake", choices=MISTAKES, help="make a check fail")
    mistake = parser.parse_args().mistake
    prepare()
    if mistake:
        MISTAKES[mistake]()
    table = {
        name: {"launches": launches(options), "variants": variants(options)}
        for name, options in [*WAYS.items()][: 1 if mistake else None]
    }
    print(json.dumps(table))
