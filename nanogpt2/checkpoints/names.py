"""The tensors of a GPT-2 file: their names, shapes and types, checked from the headers alone.

Files of GPT-2 differ in small ways. All of these are read:

- names with or without the prefix `transformer.`;
- `h.N.attn.bias` and `h.N.attn.masked_bias`: the causal mask, not a parameter; skipped;
- `lm_head.weight`: the output head; must equal `wte.weight` where it is tied;
- `score.weight`: a classifier's head; such a file cannot generate text;
- `multiple_choice_head.*`: GPT2DoubleHeadsModel's second head; skipped;
- projections stored [in, out] (TensorFlow's order, transformers' Conv1D); torch's Linear is
  [out, in], so reading and writing transpose them;
- F32, F16 or BF16, in one file or sharded with an index, aligned or not;
- I8, in a file with a name of its own, with one scale for each output: quantize.py writes it.

This file reads no tensor's values.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nanogpt2.checkpoints.folder import (
    THEIR_NAMES,
    ModelFiles,
    config_of,
    known_ids,
    mingpt_heads,
)
from nanogpt2.checkpoints.header import StoredTensor
from nanogpt2.checkpoints.vocabulary import PADDED
from nanogpt2.config import PRESETS, GPTConfig
from nanogpt2.config.flags import show
from nanogpt2.cpu.inference_model import EMBEDDING, HEAD, MATRICES, TABLES
from nanogpt2.cpu.prepacked import SCALE
from nanogpt2.model import GPT

TRANSPOSED = tuple(name for name in MATRICES if name not in TABLES)
MASKS = (".attn.bias", ".attn.masked_bias")
PREFIX = "transformer."
POSITIONS = "wpe.weight"
SCORE = "score.weight"
SECOND_HEAD = "multiple_choice_head."
# the first words of tensors whose models are not supported
HEADS = {"classifier": "GPT2ForTokenClassification", "qa_outputs": "GPT2ForQuestionAnswering"}
READABLE_DTYPES = ("F32", "F16", "BF16")
NARROW = "I8"  # a matrix of this type has a scale
DTYPES = ("float32", "bfloat16", "float16")


class Undrawn(TorchFunctionMode):
    """Inside, torch.nn.init leaves tensors unchanged.

    The checkpoint overwrites them anyway. Drawing on the meta device would import torch's
    compiler, which takes as long as importing torch.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # slots of a type also come through here; they have no __module__
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def by_our_names(entries: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Index the tensors in use by our names. Raises ValueError for a duplicate."""
    found: dict[str, StoredTensor] = {}
    for entry in entries:
        ours = entry.name.removeprefix(PREFIX)
        if ours.endswith(MASKS) or entry.name.startswith(SECOND_HEAD):
            continue
        if ours in found:
            raise ValueError(f"{str(entry.file)!r}: tensor {show(entry.name)} is there twice")
        found[ours] = entry
    return found


def check_unused(entries: Iterable[StoredTensor], config: GPTConfig) -> None:
    """Raise ValueError for a mask or a second head that is too large, before it is read."""
    for entry in entries:
        size = math.prod(entry.shape)
        is_mask, is_head = entry.name.endswith(MASKS), entry.name.startswith(SECOND_HEAD)
        most = (config.block_size if is_mask else config.n_embd) ** 2
        if (is_mask or is_head) and size > most:
            raise ValueError(
                f"{str(entry.file)!r}: tensor {show(entry.name)} must have {most:,} numbers at "
                f"most, not {size:,}"
            )


def agreed_config(source: ModelFiles, stored: Mapping[str, StoredTensor]) -> GPTConfig:
    """Return the model's shape, on which config.json and the tensors agree.

    Without a config.json, the preset with these shapes, its vocabulary padded or not: tensors do
    not show the number of heads.
    Raises ValueError where they disagree.
    """
    file = source.files[0]
    sizes = _sizes(file, stored)
    if source.config is None:
        if (heads := mingpt_heads(source.stated)) is not None:
            return config_of(source, sizes, heads)
        rows = sizes["vocab_size"]
        for preset in PRESETS.values():
            shape = replace(preset, vocab_size=rows) if rows in PADDED else preset
            if all(getattr(shape, name) == size for name, size in sizes.items()):
                return shape
        raise ValueError(
            f"{str(file)!r} has no config.json beside it, to state n_head, and is of no known size "
            f"({', '.join(PRESETS)})"
        )
    for name, size in sizes.items():
        stated = getattr(source.config, name)
        if stated != size:
            raise ValueError(
                f"{str(file.parent / source.stated_by)!r}: {THEIR_NAMES.get(name, name)} is "
                f"{stated}, but {size} by the tensors of {file.name}"
            )
    return source.config


def unpadded(config: GPTConfig, vocab_size: int) -> GPTConfig:
    """Return the shape for the ids below `vocab_size`: the rows behind them are padding."""
    if vocab_size == config.vocab_size:
        return config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: known_ids(getattr(config, name), vocab_size) for name in names}
    return replace(config, vocab_size=vocab_size, **ids)


def _sizes(file: Path, stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Read the sizes that tensors show, by GPTConfig's names."""
    for name in (EMBEDDING, POSITIONS):
        if name not in stored:
            raise ValueError(f"{str(file)!r}: tensor {name} is missing")
        if len(stored[name].shape) != 2:
            raise ValueError(f"{str(file)!r}: tensor {name} must be a matrix")
    vocab_size, n_embd = stored[EMBEDDING].shape
    blocks = {name.split(".")[1] for name in stored if name.startswith("h.")}
    sizes = {
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "block_size": stored[POSITIONS].shape[0],
        "n_layer": len(blocks),
    }
    mlp = stored.get("h.0.mlp.c_fc.weight")
    if mlp is not None and len(mlp.shape) == 2 and mlp.shape[0] == n_embd:
        sizes["mlp_width"] = mlp.shape[1]
    return sizes


def _model_shapes(config: GPTConfig, labels: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter."""
    # all blocks have the shapes of the first one
    with torch.device("meta"), Undrawn():
        model = GPT(replace(config, n_layer=1))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block = {name: shapes.pop(name) for name in [*shapes] if name.startswith("h.0.")}
    for i in range(config.n_layer):
        shapes |= {name.replace("h.0.", f"h.{i}.", 1): shape for name, shape in block.items()}
    return shapes | ({SCORE: (len(labels), config.n_embd)} if labels else {})


def check_tensors(
    stored: Mapping[str, StoredTensor], config: GPTConfig, labels: tuple[str, ...], first: Path
) -> None:
    """Raise ValueError for the first tensor that is missing, unexpected, misshapen or mistyped.

    first: the file to name for a missing tensor.
    """
    shapes = _model_shapes(config, labels)
    expected = {n: s[::-1] if n.endswith(TRANSPOSED) else s for n, s in shapes.items()}
    for name in expected:
        if name not in stored:
            raise ValueError(f"{str(first)!r}: tensor {name} is missing")
    expected[HEAD] = expected[EMBEDDING]
    for name, found in stored.items():
        if found.dtype == NARROW and name in shapes and name.endswith(MATRICES):
            expected[name + SCALE] = shapes[name][:1]
            if name + SCALE not in stored:
                raise ValueError(f"{str(first)!r}: tensor {name + SCALE} is missing")
    for name, found in stored.items():
        where = f"{str(found.file)!r}: tensor {show(found.name)}"
        if name not in expected and (kind := HEADS.get(name.split(".")[0])):
            raise ValueError(f"{where} is the head of {kind}, which is not supported")
        if name not in expected:
            raise ValueError(f"{where} is no part of GPT-2")
        if found.shape != expected[name]:
            raise ValueError(f"{where} must be {expected[name]}, not {found.shape}")
        narrow = found.dtype == NARROW and name + SCALE in expected
        if found.dtype not in READABLE_DTYPES and not narrow:
            raise ValueError(f"{where} must be {', '.join(READABLE_DTYPES)}, not {found.dtype}")
