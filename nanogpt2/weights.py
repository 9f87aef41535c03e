"""Checkpoints <-> GPT: OpenAI's and transformers' safetensors in, transformers' folder out.

A safetensors file is an 8-byte header length, a JSON header {name: dtype, shape, offsets} and the
tensors' bytes. GPT-2's files differ in small ways, all of which are read here:

- names with or without the prefix `transformer.`;
- `h.N.attn.bias` and `h.N.attn.masked_bias`: the causal mask, which is no parameter; left out;
- `lm_head.weight`: the tied output head; must equal `wte.weight`;
- projections stored [in, out] (TensorFlow's order, transformers' Conv1D); torch's Linear is
  [out, in], so they are transposed on the way in and out;
- F32, F16 or BF16, in one file or sharded with an index, aligned or not.

Every name, shape and type is checked from the headers before a tensor is read, so a wrong file
leaves nothing half-loaded. Pickles are never opened.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanogpt2 import hub
from nanogpt2.config import PICKLES, PRESETS, GPTConfig, check_model
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")
READABLE_DTYPES = ("F32", "F16", "BF16")
WRITTEN_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def load_model(
    name: str | Path, device: str = "cpu", dtype: str = "float32", dropout: float = 0.0
) -> GPT:
    """Load a GPT in eval mode.

    `name` is one of config.MODEL_NAMES, a folder or a .safetensors file; `dtype` one of float32,
    bfloat16 and float16; `dropout` is for training it further. Raises ValueError or OSError, in one
    line that names the file or the tensor.
    """
    source = find_checkpoint(name)
    stored = _read_headers(source.files)
    config = source.config or _config_from_shapes(stored, source.files[0])
    with torch.device("meta"):
        model = GPT(replace(config, dropout=dropout))
    _check_tensors(stored, model)
    state = {
        ours: _read_tensor(stored[ours], ours, device, getattr(torch, dtype))
        for ours in model.state_dict()
    }
    _check_tied_head(stored, state["wte.weight"])
    model.load_state_dict(state, assign=True)
    return model.eval()


def choose_device(name: str) -> str:
    """Return the device to run on; auto is cuda if there is one. Raises ValueError for none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there.get(name, True):
        raise ValueError(f"{name!r} is not on this machine")
    return name


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Return the tokenizer of a model named as for `load_model`.

    Raises ValueError where the vocabulary is neither GPT-2's nor the byte-level one.
    """
    source = find_checkpoint(name)
    config = source.config or _config_from_shapes(_read_headers(source.files), source.files[0])
    tokenizer = next(
        (t for t in (gpt2_tokenizer(), byte_tokenizer()) if t.vocab_size == config.vocab_size), None
    )
    if tokenizer is None:
        raise ValueError(
            f"no tokenizer here has a vocabulary of {config.vocab_size} "
            "(GPT-2's has 50257, the byte-level one 257)"
        )
    if name not in PRESETS:
        _check_vocabulary(source.files[0].parent, tokenizer)
    return tokenizer


def _check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the folder's own tokenizer files state other tokens."""
    stated: dict[str, Any] = {}
    path = folder / "vocab.json"
    if path.exists():
        stated = _read_json(path)
    elif (path := folder / "tokenizer.json").exists():
        model = _read_json(path).get("model")
        stated = model.get("vocab", {}) if isinstance(model, dict) else {}
    if not isinstance(stated, dict):
        raise ValueError(f"{str(path)!r} states no vocabulary")
    if stated and stated != {
        token: i for token, i in tokenizer.vocabulary.items() if token in stated
    }:
        raise ValueError(f"{str(path)!r} is another vocabulary of {tokenizer.vocab_size} tokens")


def save_model(model: GPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that `load_model` and transformers' GPT2LMHeadModel.from_pretrained load.

    With a tokenizer, or GPT-2's 50257 ids, AutoTokenizer.from_pretrained loads it too. Tensors keep
    their dtype and bits. Each file appears whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None and model.config.vocab_size == gpt2_tokenizer().vocab_size:
        tokenizer = gpt2_tokenizer()
    texts = _config_files(model)
    if tokenizer is not None:
        texts |= _tokenizer_files(tokenizer, model.config.block_size)
    for name, text in texts.items():
        with _whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    with _whole(folder / "model.safetensors") as path:
        _write_tensors(path, model.state_dict())


# ---- where a checkpoint's files are


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model, and its shape where something states it."""

    files: tuple[Path, ...]
    config: GPTConfig | None


def find_checkpoint(name: str | Path) -> Checkpoint:
    """Find a model's files by its name or path and read its config.json.

    Raises ValueError for what is no checkpoint, OSError for what cannot be read or downloaded.
    """
    check_model(name)
    if name in PRESETS:
        return Checkpoint((hub.fetch_weights(str(name)),), PRESETS[str(name)])
    if name == "demo":
        return _in_folder(Path(str(files("nanogpt2").joinpath("assets/demo"))))
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    return Checkpoint((path,), _read_config(path.parent))


def _in_folder(folder: Path) -> Checkpoint:
    config = _read_config(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return Checkpoint((single,), config)
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if (
            not isinstance(shards, dict)
            or not shards
            or not all(
                isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
            )
        ):
            raise ValueError(f"{str(index)!r} has no weight_map of tensors to files beside it")
        return Checkpoint(tuple(folder / shard for shard in sorted(set(shards.values()))), config)
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            check_model(file)
    raise ValueError(f"{str(folder)!r} holds no model.safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} is no JSON object")
    return value


def _read_config(folder: Path) -> GPTConfig | None:
    """Read config.json, and generation_config.json's token ids; None where there is none.

    Raises ValueError for a model that is not GPT-2's architecture.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    stated = _read_json(path)
    required = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * stated["n_embd"] if isinstance(stated.get("n_embd"), int) else None),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    }
    for key, allowed in required.items():
        if key in stated and stated[key] not in allowed:
            raise ValueError(f"{str(path)!r}: {key} must be {allowed[0]!r}, not {stated[key]!r}")
    theirs = {"n_positions": "block_size"}
    ours = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "layer_norm_epsilon")
    options = {theirs.get(key, key): stated[key] for key in ours if key in stated}
    ids: dict[str, Any] = {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    } | stated
    if (folder / "generation_config.json").exists():
        ids |= _read_json(folder / "generation_config.json")
    try:
        config = GPTConfig(**options)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            options[key] = _known_ids(ids[key], config.vocab_size)
        return replace(config, **options)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def _known_ids(value: Any, vocab_size: int) -> Any:
    """A token id, several or none, without those outside the vocabulary."""
    ids = value if isinstance(value, list) else [value]
    known = tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)
    return None if not known else known[0] if len(known) == 1 else known


# ---- reading


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, under the name it has there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}") from None


def _read_headers(paths: tuple[Path, ...]) -> dict[str, StoredTensor]:
    """Read what is stored, masks left out, by our names. Raises ValueError for an unusable type."""
    found: dict[str, StoredTensor] = {}
    for path in paths:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                ours = name.removeprefix("transformer.")
                if ours.endswith(MASKS):
                    continue
                part = file.get_slice(name)
                if part.get_dtype() not in READABLE_DTYPES:
                    readable = ", ".join(READABLE_DTYPES)
                    raise ValueError(
                        f"{str(path)!r}: tensor {name} must be {readable}, not {part.get_dtype()}"
                    )
                if ours in found:
                    raise ValueError(f"{str(path)!r}: tensor {name} is there twice")
                found[ours] = StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
    return found


def _config_from_shapes(stored: Mapping[str, StoredTensor], path: Path) -> GPTConfig:
    """The preset whose shapes these are: the number of heads cannot be read off tensors."""
    depth = sum(name.endswith("ln_1.weight") for name in stored)
    for config in PRESETS.values():
        shapes = {
            "wte.weight": (config.vocab_size, config.n_embd),
            "wpe.weight": (config.block_size, config.n_embd),
        }
        if depth == config.n_layer and all(
            name in stored and stored[name].shape == shape for name, shape in shapes.items()
        ):
            return config
    raise ValueError(
        f"{str(path)!r} has no config.json beside it and is of no known size ({', '.join(PRESETS)})"
    )


def _check_tensors(stored: Mapping[str, StoredTensor], model: nn.Module) -> None:
    """Raise ValueError for the first tensor that is missing, unexpected or of a wrong shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    where = str(next(iter(stored.values())).file) if stored else "the file"
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{where!r}: tensor {name} is missing")
        shape = shape[::-1] if name.endswith(TRANSPOSED) else shape
        found = stored[name]
        if found.shape != shape:
            raise ValueError(
                f"{str(found.file)!r}: tensor {found.name} must be {shape}, not {found.shape}"
            )
    for name, found in stored.items():
        if name not in expected and name != "lm_head.weight":
            raise ValueError(f"{str(found.file)!r}: tensor {found.name} is no part of GPT-2")


def _read_tensor(stored: StoredTensor, ours: str, device: str, dtype: torch.dtype) -> Tensor:
    # a file of its own for each tensor: the pages read so far are unmapped, so loading takes the
    # model's memory and not the file's too
    with _opened(stored.file) as file:
        tensor = file.get_tensor(stored.name)
        if ours.endswith(TRANSPOSED):
            tensor = tensor.t()
        # a copy: the file's bytes may be unaligned, and must not change under the model
        return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)


def _check_tied_head(stored: Mapping[str, StoredTensor], wte: Tensor) -> None:
    head = stored.get("lm_head.weight")
    if head is None:
        return
    same_shape = head.shape == tuple(wte.shape)
    if not same_shape or not torch.equal(
        _read_tensor(head, "lm_head.weight", str(wte.device), wte.dtype), wte
    ):
        raise ValueError(
            f"{str(head.file)!r}: tensor {head.name} must equal wte.weight: GPT-2's head is tied"
        )


# ---- writing


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once it is written; `path` is never half there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write our tensors as transformers names and lays them out.

    The library's writer wants them all in memory, transposed; this one holds one at a time.
    """
    theirs = {
        f"transformer.{name}": tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in state.items()
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in theirs.items():
        end = start + tensor.numel() * tensor.element_size()
        dtype = WRITTEN_DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    # spaces up to a multiple of 8, so that the data is aligned
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in theirs.values():
            raw = tensor.detach().cpu().contiguous().view(torch.uint8)
            file.write(raw.numpy().data)


def _config_files(model: GPT) -> dict[str, str]:
    """config.json and generation_config.json as transformers writes them for GPT-2."""
    c = model.config
    eos = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    ids = {"bos_token_id": c.bos_token_id, "eos_token_id": eos}
    if c.pad_token_id is not None:
        ids["pad_token_id"] = c.pad_token_id
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "layer_norm_epsilon": c.layer_norm_epsilon,
        "initializer_range": 0.02,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    } | ids
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(ids, indent=2) + "\n",
    }


def _tokenizer_files(tokenizer: Tokenizer, block_size: int) -> dict[str, str]:
    """What AutoTokenizer needs; for GPT-2's vocabulary OpenAI's own two files."""
    end = "<|endoftext|>"
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "vocab.json": tokenizer.encoder_json(),
        "merges.txt": tokenizer.merges or "#version: 0.2\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }
