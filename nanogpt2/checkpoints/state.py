"""A checkpoint's tensors: mapped or read, by our names and in our order of axes.

names.py has checked their names, shapes and types. This file makes no model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import MANIFEST, ModelFiles
from nanogpt2.checkpoints.header import StoredTensor
from nanogpt2.checkpoints.names import POSITIONS, TRANSPOSED
from nanogpt2.checkpoints.tensors import TensorFile
from nanogpt2.cpu.inference_model import EMBEDDING, HEAD, MATRICES, TABLES
from nanogpt2.cpu.prepacked import SCALE


def map_state(
    source: ModelFiles,
    opened: Sequence[TensorFile],
    stored: Mapping[str, StoredTensor],
    vocab_size: int,
) -> dict[str, Tensor]:
    """Map all tensors: matrices and positions are views of their files, the rest float32 copies.

    vocab_size: rows of the embedding to take; those behind them are padding.
    Raises ValueError where a file does not have the SHA-256 that its manifest, or itself, states.
    """
    state: dict[str, Tensor] = {}
    ours_of = _parameters(source, stored)
    for file in opened:
        for name, tensor in file.mapped(ours_of, _stated_digest(source, file)):
            ours = ours_of[name]
            tensor = _without_padding(ours, tensor, vocab_size)
            by_columns = ours.endswith(TRANSPOSED) and tensor.t().is_contiguous()
            tensor = tensor if by_columns else tensor.contiguous()
            if not ours.endswith(MATRICES):
                # position lookups read the file, as token lookups do
                tensor = tensor.to(torch.float32, copy=ours != POSITIONS)
            _put(state, ours, tensor.t() if ours.endswith(TRANSPOSED) else tensor, file)
    return state


def read_state(
    source: ModelFiles,
    opened: Sequence[TensorFile],
    stored: Mapping[str, StoredTensor],
    device: str,
    dtype: torch.dtype,
    vocab_size: int,
) -> dict[str, Tensor]:
    """Read all tensors, each into memory of its own; arguments and errors as for `map_state`."""
    state: dict[str, Tensor] = {}
    ours_of = _parameters(source, stored)
    # a tensor that is copied anyway goes through one shared buffer
    passing = {
        entry.name
        for ours, entry in stored.items()
        if ours.endswith(TRANSPOSED) or entry.strides or tensor_file.DTYPES[entry.dtype] != dtype
    }
    if HEAD in stored and EMBEDDING in stored and _is_tied(source):
        passing.add(max((stored[HEAD], stored[EMBEDDING]), key=lambda e: e.start).name)
    for file in opened:
        for name, tensor in file.read(ours_of, _stated_digest(source, file), passing):
            ours = ours_of[name]
            tensor = _without_padding(ours, tensor, vocab_size)
            tensor = tensor.t() if ours.endswith(TRANSPOSED) else tensor
            if name in passing and ours not in state:
                tensor = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
            _put(state, ours, tensor.to(device, dtype), file)
    return state


def _parameters(source: ModelFiles, stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Map the files' names to ours. A tied head is the embedding."""
    head = EMBEDDING if _is_tied(source) else HEAD
    return {entry.name: head if ours == HEAD else ours for ours, entry in stored.items()}


def _is_tied(source: ModelFiles) -> bool:
    return source.config is None or source.config.tie_word_embeddings


def _without_padding(name: str, tensor: Tensor, vocab_size: int) -> Tensor:
    """Return the rows of the vocabulary, of a tensor with a row for each id."""
    return tensor[:vocab_size] if name.removesuffix(SCALE) in TABLES else tensor


def _stated_digest(source: ModelFiles, file: TensorFile) -> str | None:
    """Return the digest in the manifest. Raises ValueError where manifest and file have none."""
    sha256 = source.sha256_of(file.path)
    if source.manifest is not None and sha256 is None and file.sha256 is None:
        raise ValueError(
            f"{str(file.path)!r} states no SHA-256, nor does {MANIFEST} beside it; "
            f"where that is meant, delete {MANIFEST}"
        )
    return sha256


def _put(state: dict[str, Tensor], name: str, tensor: Tensor, file: TensorFile) -> None:
    """Keep the first tensor of a name. Raises ValueError where the second differs from it."""
    first = state.setdefault(name, tensor)
    wide = torch.promote_types(first.dtype, tensor.dtype)
    if first is not tensor and not torch.equal(first.to(wide), tensor.to(wide)):
        raise ValueError(
            f"{str(file.path)!r}: tensor {HEAD} must equal {EMBEDDING}, "
            "unless config.json states tie_word_embeddings false"
        )
