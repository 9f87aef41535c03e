"""--to gguf: model.gguf for llama.cpp and the programs built on it, by the gguf package.

Tensors bear GGUF's names and stay [out, in], as our Linear layers are: GGUF lists the sizes from
the innermost one. As llama.cpp's own converter does, only matrices take the type asked for;
positions, norms and biases stay F32. A Q8_0 block is 32 numbers of a row with one scale.

The check reads the file again, widens every tensor and compares it with the model: equal for F32;
for the others within half a step of the type. Where xllamacpp is installed, llama.cpp continues
ten prompts greedily. Its GELU reads a table of 16-bit numbers, so that its logits differ by a few
1e-3 even in F32, and its products round by the type: where two tokens are nearly equal, it may take
the other one. MARGINS says how near.

Sources: ggml docs/gguf.md; the gguf package; llama.cpp conversion/gpt2.py.
"""

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt2 import terminal
from nanogpt2.checkpoints.names import POSITIONS
from nanogpt2.checkpoints.tokenizer_files import CHAT_TEMPLATE
from nanogpt2.export.counterpart import CheckError, agreement, answers, is_installed
from nanogpt2.export.prompts import NEW, Continuation, continuation, prompts_for
from nanogpt2.export.source import Source
from nanogpt2.tokenizer import END_OF_TEXT, Tokenizer

FILE = "model.gguf"
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# our dtype -> GGUF's type and its number as the type of a whole file
TYPES = {
    "float32": ("F32", 0),
    "float16": ("F16", 1),
    "bfloat16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
}
# how much the model may prefer its own token where llama.cpp first takes another one, relative to
# the largest logit; float32: GELU's 16-bit numbers are right to 2^-11, in each of two logits, twice
MARGINS = {"float32": 2e-3, "float16": 4e-3, "bfloat16": 1e-2, "q8_0": 4e-2}
KINDS = ("USER_DEFINED", "CONTROL")  # of an added token: not special, special
BLOCK = 32
ROWS = 4096  # rows of a matrix that are converted at once


def name_of(ours: str) -> str:
    """Return GGUF's name of a parameter: h.3.attn.c_attn.weight -> blk.3.attn_qkv.weight."""
    place, _, kind = ours.rpartition(".")
    if place.startswith("h."):
        _, layer, part = place.split(".", 2)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[place]}.{kind}"


def write(source: Source, folder: Path) -> None:
    """Write model.gguf, one tensor in memory at a time. Raises ValueError for what cannot be."""
    import gguf
    from gguf.quants import quant_shape_to_byte_shape

    c, tokenizer = source.model.config, source.tokenizer
    if tokenizer is None:
        raise ValueError("has no vocabulary, which --to gguf needs")
    if c.block_size == 1:
        raise ValueError("has n_positions 1; llama.cpp needs 2")
    state = dict(source.tensors())
    inner = state["h.0.mlp.c_fc.weight"].size(0)
    for of, width in (("n_embd", c.n_embd), ("n_inner", inner)):
        if source.dtype == "q8_0" and width % BLOCK:
            raise ValueError(f"has {of} {width}, which --dtype q8_0 needs in multiples of {BLOCK}")
    writer = gguf.GGUFWriter(folder / FILE, "gpt2")
    writer.add_name(source.name)
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.layer_norm_epsilon)
    writer.add_file_type(TYPES[source.dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, source, tokenizer)
    kinds = {name: _kind(name, tensor.dim(), source.dtype) for name, tensor in state.items()}
    for name, tensor in state.items():
        shape = quant_shape_to_byte_shape(tensor.shape, kinds[name])
        writer.add_tensor_info(
            name_of(name), shape, np.dtype(np.uint8), math.prod(shape), kinds[name]
        )
    # an open file is closed even where a write failed
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in state.items():
            writer.write_tensor_data(_narrowed(tensor.numpy(), kinds[name]))


def _kind(name: str, axes: int, dtype: str) -> Any:
    """Return the gguf package's type of a parameter."""
    from gguf import GGMLQuantizationType

    wide = axes == 1 or name == POSITIONS
    return GGMLQuantizationType[TYPES["float32" if wide else dtype][0]]


def _narrowed(array: np.ndarray, kind: Any) -> np.ndarray:
    """Return an array's bytes in GGUF's type, a few rows at a time: the copies stay small."""
    from gguf import quants

    if kind.name == "F32":
        return array.view(np.uint8)
    shape = quants.quant_shape_to_byte_shape(array.shape, kind)
    data = np.empty(shape, np.uint8)
    # a number beyond F16's range becomes infinite, which the check finds
    with np.errstate(over="ignore"):
        for start in range(0, len(array), ROWS):
            rows = quants.quantize(array[start : start + ROWS], kind)
            data[start : start + ROWS] = rows.view(np.uint8)
    return data


def _add_vocabulary(writer: Any, source: Source, tokenizer: Tokenizer) -> None:
    """Add the tokens, their kinds and the merges. Rows of the embedding without a token are unused.

    llama.cpp wants one merge at least. Of a byte-level vocabulary that is one that never applies.
    """
    from gguf import TokenType

    if not getattr(tokenizer, "shows_merges", True):
        raise ValueError("has a vocabulary that is no byte-level BPE, which --to gguf needs")
    c, added = source.model.config, getattr(tokenizer, "added", ())
    text_of = {i: text for text, i in tokenizer.vocabulary.items()}
    text_of |= {token.id: token.content for token in added}
    kind_of = {token.id: KINDS[token.special] for token in added}
    kind_of = kind_of or {tokenizer.end_of_text: KINDS[True]}
    tokens = [text_of.get(i, f"[PAD{i}]") for i in range(c.vocab_size)]
    kinds = [kind_of.get(i, "NORMAL" if i in text_of else "UNUSED") for i in range(c.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType[kind] for kind in kinds])
    writer.add_token_merges(tokenizer.merges.splitlines()[1:] or [f"{END_OF_TEXT} {END_OF_TEXT}"])
    # without these llama.cpp would take token 11
    writer.add_bos_token_id(tokenizer.end_of_text if c.bos_token_id is None else c.bos_token_id)
    first, *others = dict.fromkeys(_ends(source))
    writer.add_eos_token_id(first)
    if others[:1]:
        writer.add_eot_token_id(others[0])
    if others[1:]:
        terminal.note(f"note: llama.cpp holds two ends of a text: {others[1:]} will not end one")
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        terminal.note(
            "note: llama.cpp knows no lstrip, rstrip or single_word: texts with added tokens may "
            "have other ids there"
        )
    writer.add_add_bos_token(False)
    if source.is_chat:
        writer.add_chat_template(CHAT_TEMPLATE)


def _ends(source: Source) -> list[int]:
    """Return the ids that end a text: config.json's, then <|endoftext|>."""
    assert source.tokenizer is not None
    stated = source.model.config.eos_token_id
    ids = () if stated is None else stated if isinstance(stated, tuple) else (stated,)
    return [*ids, source.tokenizer.end_of_text]


def check(source: Source, folder: Path) -> dict[str, Any]:
    """Read the file again, then run llama.cpp. Raises CheckError where it differs."""
    count, difference = compare(source, folder / FILE)
    figures: dict[str, Any] = {"tensors_equal": count, "largest_rounding": difference}
    if not is_installed("xllamacpp"):
        return figures | {"llama.cpp": None}
    c = source.model.config
    prompts = prompts_for(source.model, source.tokenizer, NEW)
    new = max(1, min(NEW, c.block_size - max(map(len, prompts))))
    ours = [continuation(source.model, prompt, new) for prompt in prompts]
    ends = _ends(source)
    del source.model
    found = answers(
        "with_llama_cpp", folder, {"prompts": prompts, "new": new, "context": c.block_size}
    )
    figures["llama.cpp"] = f"xllamacpp {found['version']}"
    theirs = [_whole(mine, row, ends) for mine, row in zip(ours, found["tokens"], strict=True)]
    return figures | agreement(ours, theirs, "llama.cpp", MARGINS[source.dtype])


def _whole(ours: Continuation, theirs: np.ndarray, ends: list[int]) -> list[int]:
    """Return as many of llama.cpp's tokens as the model has: it ends a text at an end token.

    Where the model chose an end token too, its own tokens follow.
    """
    found = theirs[theirs >= 0].tolist()
    own = ours.tokens[len(found) :]
    if not ({*found[-1:], *own[:1]} & {*ends}):
        own = ends[-1:] * len(own)
    return [*found, *own]


def compare(source: Source, file: Path) -> tuple[int, float]:
    """Return the number of tensors and the largest difference of a number, read again.

    Raises CheckError for a tensor that is missing, or further from the model's than its type.
    """
    from gguf import GGUFReader, quants

    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    largest = 0.0
    # not by the reader's mapping: its pages would count beside the model
    with file.open("rb") as data:
        for name, ours in source.tensors():
            found = stored.pop(name_of(name), None)
            if found is None or found.shape.tolist() != list(ours.shape)[::-1]:
                raise CheckError(f"tensor {name} is missing in what was written")
            data.seek(found.data_offset)
            for rows in np.array_split(ours.numpy(), max(1, len(ours) // ROWS)):
                kind = found.tensor_type
                shape = quants.quant_shape_to_byte_shape(rows.shape, kind)
                again = np.fromfile(data, np.uint8, math.prod(shape)).reshape(shape)
                difference = np.abs(quants.dequantize(again, kind) - rows)
                if not (difference <= _allowed(rows, kind.name)).all():
                    raise CheckError(f"tensor {name} is another after it was read again")
                largest = max(largest, float(difference.max()))
    if stored:
        raise CheckError(f"tensor {next(iter(stored))} was not to be written")
    return len(source.model.state_dict()), largest


def _allowed(rows: np.ndarray, kind: str) -> np.ndarray:
    """Return by how much each number may differ in a type: half a step."""
    size = np.abs(rows)
    if kind == "Q8_0":
        blocks = size.reshape(*size.shape[:-1], -1, BLOCK)
        # 127 steps to the largest; the scale itself is an F16
        step = blocks.max(axis=-1, keepdims=True) / 127
        allowed = step / 2 + 127 * (step * 2.0**-11 + 2.0**-25)
        return np.broadcast_to(allowed, blocks.shape).reshape(size.shape)
    relative, least = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}[kind]
    return size * relative + least
