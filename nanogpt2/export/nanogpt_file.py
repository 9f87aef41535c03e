"""--to nanogpt: ckpt.pt, from which nanoGPT's sample.py and train.py resume.

A pickle of tensors and plain values, as torch.load(weights_only=True) reads it:

    model        nanoGPT's names: transformer.wte.weight, ..., and lm_head.weight, the embedding
    model_args   n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout
    optimizer    AdamW before its first step, in nanoGPT's two groups; train.py wants one
    iter_num, best_val_loss, config

Matrices are [out, in], as torch's Linear has them. The check reads it again: equal bit for bit.

nanoGPT computes the exact GELU. GPT-2's is the tanh formula, which differs from it by up to 5e-4.
nanoGPT takes OpenAI's weights as they are all the same, and so does this file, with a note.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt2 import terminal
from nanogpt2.checkpoints.names import HEAD, PREFIX
from nanogpt2.cpu.inference_model import EMBEDDING
from nanogpt2.export.counterpart import CheckError
from nanogpt2.export.source import Source

FILE = "ckpt.pt"
# nanoGPT's defaults; train.py sets its own rate at each step
ADAMW: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95)}
DECAY = 0.1
NO_LOSS_YET = 1e9


def write(source: Source, folder: Path) -> None:
    """Write ckpt.pt."""
    c = source.model.config
    if getattr(c, "activation_function", "gelu_new") != "gelu":
        terminal.note("note: nanoGPT's GELU is exact, this model's the tanh formula, close to it")
    state = state_of(source)
    args = {name: getattr(c, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    content = {
        "model": state,
        "optimizer": _fresh_optimizer([t for name, t in state.items() if name != HEAD]),
        "model_args": args | {"bias": True, "vocab_size": c.vocab_size, "dropout": 0.0},
        "iter_num": 0,
        "best_val_loss": NO_LOSS_YET,
        "config": {},
    }
    with (folder / FILE).open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch's writer, closing after a write that failed, fails once more
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def state_of(source: Source) -> dict[str, Tensor]:
    """Return the tensors by nanoGPT's names."""
    state = {PREFIX + name: tensor for name, tensor in source.tensors()}
    return state | {HEAD: state[PREFIX + EMBEDDING]}


def _fresh_optimizer(tensors: list[Tensor]) -> dict[str, Any]:
    """Return the state of an AdamW without a step: matrices decay, vectors do not."""
    groups = [
        {"params": [t for t in tensors if t.dim() >= 2], "weight_decay": DECAY},
        {"params": [t for t in tensors if t.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **ADAMW).state_dict()


def check(source: Source, folder: Path) -> dict[str, Any]:
    """Read the file again, mapped. Raises CheckError where it differs."""
    again = torch.load(folder / FILE, map_location="cpu", weights_only=True, mmap=True)["model"]
    expected = state_of(source)
    for name, tensor in expected.items():
        if name not in again or not torch.equal(tensor, again.pop(name)):
            raise CheckError(f"tensor {name} is another after it was read again")
    if again:
        raise CheckError(f"tensor {next(iter(again))} was not to be written")
    return {"tensors_equal": len(expected)}
