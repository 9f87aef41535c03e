"""--to llmc: gpt2_124M.bin, named by its size, and gpt2_tokenizer.bin, as llm.c reads them.

    256 int32: 20240326, version, max_seq_len, V, L, H, C, Vp, zeros
    the tensors one after the other, each parameter of all layers together, matrices [out, in]

Version 3 is float32, version 5 bfloat16. Vp is V rounded up to a multiple of 128; the rows of the
embedding above V are zeros. The tokenizer:

    256 int32: 20240328, 2, tokens, the id that ends a text, zeros
    of each token one byte with its length, then its bytes

The check reads the file again: equal bit for bit.

Source: llm.c train_gpt2.py, llmc/tokenizer.h.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt2.export.counterpart import CheckError
from nanogpt2.export.source import Source
from nanogpt2.tokenizer import Tokenizer

MODEL, TOKENIZER = 20240326, 20240328
VERSIONS = {"float32": 3, "bfloat16": 5}
TOKENIZER_VERSION = 2
PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
KINDS = ("weight", "bias")
MULTIPLE = 128
LONGEST = 255  # bytes of a token


def write(source: Source, folder: Path) -> None:
    """Write the model, and the tokenizer where there is one."""
    c = source.model.config
    sizes = (c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, _padded(c.vocab_size))
    with _file(source, folder).open("wb") as file:
        file.write(_header(MODEL, VERSIONS[source.dtype], *sizes))
        for _, tensor in laid_out(source):
            file.write(_bytes(tensor))
    if source.tokenizer is not None:
        (folder / "gpt2_tokenizer.bin").write_bytes(_tokenizer(source.tokenizer))


def laid_out(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in the file's order and type, the embedding with its rows of zeros."""
    state, dtype = dict(source.tensors()), getattr(torch, source.dtype)
    c = source.model.config
    blocks = [f"h.{n}.{part}.{kind}" for part in PARTS for kind in KINDS for n in range(c.n_layer)]
    names = ["wte.weight", "wpe.weight", *blocks, "ln_f.weight", "ln_f.bias"]
    for name in names:
        yield name, state[name].to(dtype)
        if name == "wte.weight":
            rows = _padded(c.vocab_size) - c.vocab_size
            yield "wte's rows of zeros", torch.zeros(rows, c.n_embd, dtype=dtype)


def _tokenizer(tokenizer: Tokenizer) -> bytes:
    """Return gpt2_tokenizer.bin. Raises ValueError for a token that is too long."""
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    longest = max(map(len, tokens))
    if longest > LONGEST:
        raise ValueError(f"has a token of {longest} bytes; --to llmc holds {LONGEST}")
    head = _header(TOKENIZER, TOKENIZER_VERSION, len(tokens), tokenizer.end_of_text)
    return head + b"".join(bytes([len(token)]) + token for token in tokens)


def _file(source: Source, folder: Path) -> Path:
    return folder / f"gpt2_{round(source.model.config.n_parameters / 1e6)}M.bin"


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // MULTIPLE) * MULTIPLE


def _header(*numbers: int) -> bytes:
    whole = torch.zeros(256, dtype=torch.int32)
    whole[: len(numbers)] = torch.tensor(numbers)
    return bytes(_bytes(whole))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def check(source: Source, folder: Path) -> dict[str, Any]:
    """Read the model's file again. Raises CheckError where it differs."""
    count = 0
    with _file(source, folder).open("rb") as file:
        file.seek(256 * 4)
        for name, tensor in laid_out(source):
            data = _bytes(tensor)
            if file.read(len(data)) != data:
                raise CheckError(f"tensor {name} is another after it was read again")
            count += 1
        if file.read(1):
            raise CheckError("there is more in the file than was to be written")
    return {"tensors_equal": count}
