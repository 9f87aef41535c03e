"""Checkpoints <-> models: OpenAI's and transformers' safetensors in, transformers' folder out.

GPT-2's files differ in small ways, all of which are read here:

- names with or without the prefix `transformer.`;
- `h.N.attn.bias` and `h.N.attn.masked_bias`: the causal mask, which is no parameter; left out;
- `lm_head.weight`: the tied output head; must equal `wte.weight`;
- `score.weight`: a classifier's head; such a file is not read as a model that writes;
- projections stored [in, out] (TensorFlow's order, transformers' Conv1D); torch's Linear is
  [out, in], so they are transposed on the way in and out;
- F32, F16 or BF16, in one file or sharded with an index, aligned or not;
- I8, in a file of its own name, with a scale for each output: written here by quantize.py.

Every name, shape and type is checked from the headers, and config.json against them, before a model
is made or a tensor read, so a wrong file leaves nothing half-loaded. Pickles are never opened.
The files' own formats are header.py's and folder.py's.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import (
    MANIFEST,
    THEIR_NAMES,
    WEIGHTS,
    WEIGHTS_INT8,
    Checkpoint,
    check_vocabulary,
    config_files,
    find_checkpoint,
    read_labels,
    tokenizer_files,
)
from nanogpt2.checkpoints.header import StoredTensor
from nanogpt2.checkpoints.tensors import TensorFile
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config import PRESETS, GPTConfig
from nanogpt2.config.flags import show
from nanogpt2.cpu.inference_model import (
    EMBEDDING,
    MATRICES,
    InferenceGPT,
    check_scheme,
)
from nanogpt2.cpu.prepacked import SCALE, can_multiply
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer

TRANSPOSED = tuple(name for name in MATRICES if name != EMBEDDING)
MASKS = (".attn.bias", ".attn.masked_bias")
PREFIX = "transformer."
POSITIONS = "wpe.weight"
HEAD = "lm_head.weight"
SCORE = "score.weight"
READABLE_DTYPES = ("F32", "F16", "BF16")
NARROW = "I8"  # of a matrix that has a scale
DTYPES = ("float32", "bfloat16", "float16")

M = TypeVar("M", GPT, GPTClassifier)


def load_model(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    dropout: float | None = None,
    quantize: str | None = None,
    kernels: str = "auto",
) -> GPT:
    """Load a GPT in eval mode.

    `name` is one of config.MODEL_NAMES, a folder or a .safetensors file; `dtype` one of float32,
    bfloat16 and float16; `dropout` is given to train it further; `quantize`, fp16 or int8, makes it
    one for generating only, on a CPU, which a file of int8 always is: it is mapped into memory, as
    by `load_generator`; `kernels`, torch or triton, is what computes, by default triton on a GPU.
    Raises ValueError or OSError, in one line that names the file or the tensor.
    """
    return _load(GPT, name, device, dtype, dropout, quantize, kernels)


def load_generator(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str | None = None,
    kernels: str = "auto",
) -> GPT:
    """Load a GPT to generate with as fast as may be; arguments and errors as for `load_model`.

    In float32 on a CPU its file is mapped into memory: while it is in use the file may be replaced
    or deleted, but must not be written over, nor the model's weights.
    """
    return _load(GPT, name, device, dtype, None, quantize, kernels, generates=True)


def load_classifier(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    dropout: float | None = None,
    kernels: str = "auto",
) -> GPTClassifier:
    """Load a classifier in eval mode: ours, or transformers' GPT2ForSequenceClassification.

    Arguments and errors are those of `load_model`.
    """
    return _load(GPTClassifier, name, device, dtype, dropout, None, kernels)


def is_classifier(name: str | Path) -> bool:
    """Tell which of the two a model named as for `load_model` is; with the same errors."""
    with _opened(find_checkpoint(name)) as opened:
        return SCORE in _by_our_names(opened)


def new_model(config: GPTConfig, device: str = "cpu") -> GPT:
    """Make a model with random weights, in train mode. Raises ValueError where it does not fit."""
    with _memory_for(config, device, torch.float32):
        return GPT(config).to(device)


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
    with _opened(source) as opened:
        config = _config(source, _by_our_names(opened))
    tokenizer = next(
        (t for t in (gpt2_tokenizer(), byte_tokenizer()) if t.vocab_size == config.vocab_size), None
    )
    if tokenizer is None:
        raise ValueError(
            f"no tokenizer here has a vocabulary of {config.vocab_size} "
            "(GPT-2's has 50257, the byte-level one 257)"
        )
    if name not in PRESETS:
        check_vocabulary(source.files[0].parent, tokenizer)
    return tokenizer


def save_model(model: Model, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that `load_model` and transformers' GPT2LMHeadModel.from_pretrained load.

    A classifier's is for `load_classifier` and GPT2ForSequenceClassification. With a tokenizer, or
    GPT-2's 50257 ids, AutoTokenizer.from_pretrained loads it too. Tensors keep their dtype and
    bits. Each file appears whole or not at all. Raises ValueError for a dtype that is not one of
    load_model's and for a model with LoRA, OSError for what cannot be written.
    """
    state = dict(model.stored()) if isinstance(model, InferenceGPT) else model.state_dict()
    if any(name.endswith(("lora_a", "lora_b")) for name in state):
        raise ValueError("the model has LoRA: save what merged(model) returns, or its adapter")
    labels = model.labels if isinstance(model, GPTClassifier) else ()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None and model.config.vocab_size == gpt2_tokenizer().vocab_size:
        tokenizer = gpt2_tokenizer()
    texts = config_files(model.config, dtype, labels)
    if tokenizer is not None:
        texts |= tokenizer_files(tokenizer, model.config.block_size, pads=bool(labels))
    for name, text in texts.items():
        with _whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    prefix = "" if labels else PREFIX
    theirs = {
        prefix + name: tensor.t() if name.endswith(TRANSPOSED) else tensor
        for name, tensor in state.items()
    }
    narrow = any(tensor.dtype == torch.int8 for tensor in state.values())
    with _whole(folder / (WEIGHTS_INT8 if narrow else WEIGHTS)) as path:
        tensor_file.write(path, theirs)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` once it is written; `path` is never half there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


# ---- what is stored, and whether it is this model


def _load(
    kind: type[M],
    name: str | Path,
    device: str,
    dtype: str,
    dropout: float | None,
    quantize: str | None,
    kernels: str,
    generates: bool = False,
) -> M:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    source = find_checkpoint(name)
    with _opened(source) as opened:
        stored = _by_our_names(opened)
        if any(entry.dtype == NARROW for entry in stored.values()):
            if quantize == "fp16":
                raise ValueError(f"quantize must be int8, which {str(name)!r} is, not 'fp16'")
            if dropout is not None:
                raise ValueError(f"{str(name)!r} is int8, which generates but cannot be trained")
            quantize = "int8"
        if quantize is not None:
            check_scheme(quantize, torch.device(device).type, getattr(torch, dtype))
            if kernels in ("triton", "reference"):
                raise ValueError(f"kernels must be auto or torch for narrow weights, not {kernels}")
        config = replace(_config(source, stored), dropout=dropout or 0.0)
        labels = read_labels(source, stored[SCORE].shape) if SCORE in stored else ()
        with _memory_for(config, device, getattr(torch, dtype)):
            with torch.device("meta"), _Undrawn():
                gpt = GPT(config)
                model = GPTClassifier(gpt, labels) if labels else gpt
            if not isinstance(model, kind):
                is_one = "a classifier, which writes no texts: --classify, --task classify"
                is_none = f"no classifier: it has no tensor {SCORE}"
                raise ValueError(f"{str(name)!r} is {is_one if labels else is_none}")
            _check_tensors(stored, model, opened[0].path)
            model.use_kernels(kernels, device)
            few = generates and model.kernels == "torch" and device == "cpu" and dtype == "float32"
            packs = quantize is not None or (few and can_multiply())
            if packs:
                state = _map_state(source, opened, stored)
                release = partial(_release, opened)
                return InferenceGPT(gpt, state, quantize, release)  # type: ignore[return-value]
            state = _read_state(source, opened, stored, device, getattr(torch, dtype))
    names = {name.removeprefix(PREFIX): name for name in model.state_dict()}
    model.load_state_dict({names[ours]: tensor for ours, tensor in state.items()}, assign=True)
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Inside, torch.nn.init leaves tensors as they are.

    A checkpoint's values come later, and to draw on the meta device torch imports its compiler,
    which takes as long as torch itself.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # a type's slots, called through here too, have no module
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@contextmanager
def _opened(source: Checkpoint) -> Iterator[list[TensorFile]]:
    with ExitStack() as stack:
        yield [stack.enter_context(tensor_file.opened(path)) for path in source.files]


def _by_our_names(opened: list[TensorFile]) -> dict[str, StoredTensor]:
    """What is stored, masks left out. Raises ValueError for a name that is there twice."""
    found: dict[str, StoredTensor] = {}
    for entry in (entry for file in opened for entry in file.entries):
        ours = entry.name.removeprefix(PREFIX)
        if ours.endswith(MASKS):
            continue
        if ours in found:
            raise ValueError(f"{str(entry.file)!r}: tensor {show(entry.name)} is there twice")
        found[ours] = entry
    return found


def _config(source: Checkpoint, stored: Mapping[str, StoredTensor]) -> GPTConfig:
    """The model's shape, as config.json and the tensors agree on it.

    Without a config.json it is the preset's whose shapes these are: the number of heads cannot be
    read off tensors. Raises ValueError where they disagree.
    """
    file = source.files[0]
    sizes = _sizes(file, stored)
    if source.config is None:
        for preset in PRESETS.values():
            if all(getattr(preset, name) == size for name, size in sizes.items()):
                return preset
        raise ValueError(
            f"{str(file)!r} has no config.json beside it and is of no known size "
            f"({', '.join(PRESETS)})"
        )
    for name, size in sizes.items():
        stated = getattr(source.config, name)
        if stated != size:
            raise ValueError(
                f"{str(file.parent / 'config.json')!r}: {THEIR_NAMES.get(name, name)} is {stated}, "
                f"but {size} by the tensors of {file.name}"
            )
    return source.config


def _sizes(file: Path, stored: Mapping[str, StoredTensor]) -> dict[str, int]:
    """What can be read off the tensors, by GPTConfig's names."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in stored:
            raise ValueError(f"{str(file)!r}: tensor {name} is missing")
        if len(stored[name].shape) != 2:
            raise ValueError(f"{str(file)!r}: tensor {name} must be a matrix")
    vocab_size, n_embd = stored["wte.weight"].shape
    blocks = {name.split(".")[1] for name in stored if name.startswith("h.")}
    return {
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "block_size": stored["wpe.weight"].shape[0],
        "n_layer": len(blocks),
    }


def _check_tensors(stored: Mapping[str, StoredTensor], model: nn.Module, first: Path) -> None:
    """Raise ValueError for the first tensor that is missing, unexpected or of a wrong kind."""
    expected = {
        name.removeprefix(PREFIX): tuple(
            tensor.t().shape if name.endswith(TRANSPOSED) else tensor.shape
        )
        for name, tensor in model.state_dict().items()
    }
    for name in expected:
        if name not in stored:
            raise ValueError(f"{str(first)!r}: tensor {name} is missing")
    expected[HEAD] = expected["wte.weight"]
    outputs = {name: len(tensor) for name, tensor in model.state_dict().items()}
    for name, found in stored.items():
        if found.dtype == NARROW and name in outputs and name.endswith(MATRICES):
            expected[name + SCALE] = (outputs[name],)
            if name + SCALE not in stored:
                raise ValueError(f"{str(first)!r}: tensor {name + SCALE} is missing")
    for name, found in stored.items():
        where = f"{str(found.file)!r}: tensor {show(found.name)}"
        if name not in expected:
            raise ValueError(f"{where} is no part of GPT-2")
        if found.shape != expected[name]:
            raise ValueError(f"{where} must be {expected[name]}, not {found.shape}")
        narrow = found.dtype == NARROW and name + SCALE in expected
        if found.dtype not in READABLE_DTYPES and not narrow:
            raise ValueError(f"{where} must be {', '.join(READABLE_DTYPES)}, not {found.dtype}")


# ---- reading


def _map_state(
    source: Checkpoint, opened: list[TensorFile], stored: Mapping[str, StoredTensor]
) -> dict[str, Tensor]:
    """All the tensors, by our names and in our order of axes: matrices are views of their files.

    Raises ValueError where a file is not what its manifest, or it itself, states.
    """
    state: dict[str, Tensor] = {}
    ours_of = _parameters(stored)
    for file in opened:
        for name, tensor in file.mapped(ours_of, _stated_digest(source, file)):
            ours = ours_of[name]
            if not ours.endswith(MATRICES):
                # positions are looked up in the file, as tokens are
                tensor = tensor.to(torch.float32, copy=ours != POSITIONS)
            _put(state, ours, tensor.t() if ours.endswith(TRANSPOSED) else tensor, file.path)
    return state


def _read_state(
    source: Checkpoint,
    opened: list[TensorFile],
    stored: Mapping[str, StoredTensor],
    device: str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The same, read: each tensor in memory of its own."""
    state: dict[str, Tensor] = {}
    ours_of = _parameters(stored)
    # what is copied anyway passes through
    passing = {
        entry.name
        for ours, entry in stored.items()
        if ours.endswith(TRANSPOSED) or tensor_file.DTYPES[entry.dtype] != dtype
    }
    if HEAD in stored and EMBEDDING in stored:
        passing.add(max((stored[HEAD], stored[EMBEDDING]), key=lambda e: e.start).name)
    for file in opened:
        for name, tensor in file.read(ours_of, _stated_digest(source, file), passing):
            ours = ours_of[name]
            tensor = tensor.t() if ours.endswith(TRANSPOSED) else tensor
            if name in passing and ours not in state:
                tensor = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
            _put(state, ours, tensor.to(device, dtype), file.path)
    return state


def _parameters(stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """The names in the files -> ours. GPT-2's output head is its embedding."""
    return {entry.name: EMBEDDING if ours == HEAD else ours for ours, entry in stored.items()}


def _stated_digest(source: Checkpoint, file: TensorFile) -> str | None:
    """What the manifest states of a file. Raises ValueError where it, and the file, state none."""
    sha256 = source.sha256_of(file.path)
    if source.manifest is not None and sha256 is None and file.sha256 is None:
        raise ValueError(
            f"{str(file.path)!r} states no SHA-256, nor does {MANIFEST} beside it; "
            f"where that is meant, delete {MANIFEST}"
        )
    return sha256


def _put(state: dict[str, Tensor], name: str, tensor: Tensor, file: Path) -> None:
    """Keep the first of a name. Raises ValueError where the second is another."""
    first = state.setdefault(name, tensor)
    wide = torch.promote_types(first.dtype, tensor.dtype)
    if first is not tensor and not torch.equal(first.to(wide), tensor.to(wide)):
        raise ValueError(
            f"{str(file)!r}: tensor {HEAD} must equal {EMBEDDING}: GPT-2's head is tied"
        )


def _release(opened: list[TensorFile], tensor: Tensor) -> None:
    for file in opened:
        file.release(tensor)


# ---- memory


@contextmanager
def _memory_for(config: GPTConfig, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Raise ValueError where the parameters do not fit, before they are made if that is certain."""
    needed = config.n_parameters * dtype.itemsize
    room = _memory_of(device)
    line = f"{config.n_parameters:,} parameters take {needed / 1e9:,.1f} GB"
    if needed > room:
        raise ValueError(f"{line}; {device} has {room / 1e9:,.1f} GB")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for a processor's memory
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise ValueError(f"{line}; {device} has not that much free") from None


def _memory_of(device: str) -> int:
    """All the memory of a device, in bytes, whoever uses it now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
