"""llm.c's checkpoints, gpt2_124M.bin and model_*.bin: a header, then all parameters in one order.

    256 int32    20240326, version, block_size, vocab_size, n_layer, n_head, n_embd, padded rows
    wte          (padded rows, C): the padding is left out here
    wpe          (block_size, C)
    of all blocks ln_1, c_attn, attn.c_proj, ln_2, c_fc, mlp.c_proj: each weight, then each bias
    ln_f         weight, bias

Matrices are stored [out, in]. Version 3 is float32, 5 bfloat16; 1 is an early float32 without
padding. Numbers are little-endian. Source: write_model in llm.c's train_gpt2.py, and train_gpt2.cu.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from nanogpt2.checkpoints.header import SIZES, Layout, StoredTensor
from nanogpt2.checkpoints.names import POSITIONS, TRANSPOSED
from nanogpt2.config import MOST_LAYERS
from nanogpt2.cpu.inference_model import EMBEDDING

MAGIC = 20240326
HEADER = 256 * 4  # bytes
# outputs and inputs of each part of a block, in widths of the model; a norm has no inputs
BLOCK = {
    "ln_1": (1, 0),
    "attn.c_attn": (3, 1),
    "attn.c_proj": (1, 1),
    "ln_2": (1, 0),
    "mlp.c_fc": (4, 1),
    "mlp.c_proj": (1, 4),
}
VERSIONS = {1: "F32", 3: "F32", 5: "BF16"}
STATED = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
# other files of llm.c and of its relatives
OTHERS = {
    20240327: "llm.c's state for debugging",
    20240328: "llm.c's tokenizer",
    20240520: "llm.c's tokens",
    20240522: "llm.c's evaluation data",
    20240801: "tokens of Llama 3",
    20240803: "an llm.c checkpoint of Llama 3",
}


class LlmcLayout(Layout):
    """The tensors of an llm.c checkpoint, found by its header."""

    KIND = "llm.c checkpoint"

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        """Read the header. Raises ValueError for another file, version or size."""
        super().__init__(path, file)
        head = file.read(HEADER)
        magic, version, *sizes = struct.unpack("<8i", head[:32].ljust(32, b"\0"))
        if magic in OTHERS:
            raise ValueError(f"{str(path)!r} holds {OTHERS[magic]}, not a GPT-2")
        if magic != MAGIC:
            raise ValueError(
                f"{str(path)!r} is neither of torch.save (a zip file) nor an llm.c checkpoint; "
                "other pickles are never loaded"
            )
        if version not in VERSIONS:
            raise ValueError(
                f"{str(path)!r}: version must be 3 (float32), 5 (bfloat16) or 1, not {version}"
            )
        self.stated = dict(zip(STATED, sizes, strict=False))
        padded = sizes[5] if version > 1 else sizes[1]
        if min(sizes[:5]) < 1 or padded < sizes[1] or sizes[2] > MOST_LAYERS:
            raise self.broken(f"its header: {self.stated}, {padded} rows")
        self.entries, end = [], HEADER
        width = SIZES[VERSIONS[version]]
        for name, shape in _shapes(self.stated):
            size = math.prod(shape) * width
            entry = StoredTensor(path, name, VERSIONS[version], shape, end, end + size)
            self.entries.append(entry.transposed() if name.endswith(TRANSPOSED) else entry)
            end += size
            if name == EMBEDDING:
                # the padding is no token's
                end += (padded - sizes[1]) * shape[1] * width
        if end != self.size:
            raise self.broken(f"by its header it has {end:,} bytes, not {self.size:,}")


def _shapes(stated: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor's name and shape [out, in], in the file's order."""
    C = stated["n_embd"]
    yield EMBEDDING, (stated["vocab_size"], C)
    yield POSITIONS, (stated["n_positions"], C)
    for kind, (out, width) in BLOCK.items():
        for i in range(stated["n_layer"]):
            yield f"h.{i}.{kind}.weight", (out * C, width * C) if width else (C,)
        for i in range(stated["n_layer"]):
            yield f"h.{i}.{kind}.bias", (out * C,)
    for end in ("weight", "bias"):
        yield f"ln_f.{end}", (C,)
