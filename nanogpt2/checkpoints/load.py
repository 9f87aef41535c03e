"""Open a checkpoint once: its config, labels, tokenizer, tensors, and the models made of them.

Opening checks every name, shape and type from the headers, and config.json against them. Only then
is a model made or a tensor read, so a wrong file leaves nothing half-loaded. No code of
a pickle is run. The names are in names.py, the formats in tensors.py and folder.py.
"""

import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from nanogpt2 import terminal
from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import (
    current,
    find_files,
    labels_of,
    with_stated,
)
from nanogpt2.checkpoints.header import StoredTensor
from nanogpt2.checkpoints.names import (
    DTYPES,
    NARROW,
    SCORE,
    SECOND_HEAD,
    Undrawn,
    agreed_config,
    by_our_names,
    check_tensors,
    check_unused,
    unpadded,
)
from nanogpt2.checkpoints.pickled import as_conv1d
from nanogpt2.checkpoints.state import map_state, read_state
from nanogpt2.checkpoints.tokenizer_files import is_chat
from nanogpt2.checkpoints.vocabulary import Vocabulary, by_size, read_vocabulary, unpadded_size
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, official_name
from nanogpt2.cpu.inference_model import EMBEDDING, InferenceGPT, check_scheme
from nanogpt2.cpu.prepacked import runs_prepacked
from nanogpt2.devices import as_usual, memory_of
from nanogpt2.memory import is_out_of_memory
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


class TooLittleMemoryError(ValueError, MemoryError):
    """The model would fit this machine, but something else takes its memory."""


class Checkpoint:
    """An open checkpoint; close it, use `with`, or drop it. Its models outlive it.

    name: as given. config: the shape, without the rows that pad the vocabulary. labels: a
    classifier's, empty for a language model. tensors: the headers' entries, by our names.
    """

    name: str | Path
    config: GPTConfig
    labels: tuple[str, ...]
    tensors: dict[str, StoredTensor]

    def __init__(self, name: str | Path) -> None:
        self.name = name
        self._source = find_files(name)
        with ExitStack() as stack:
            enter = stack.enter_context
            self._opened = [enter(tensor_file.opened(path)) for path in self._source.files]
            as_conv1d([file.layout for file in self._opened])
            entries = [entry for file in self._opened for entry in file.entries]
            self.tensors = by_our_names(entries)
            for file in self._opened:
                self._source = current(self._source, file.replaces)
                self._source = with_stated(self._source, file.path, file.layout.stated)
            self.config = agreed_config(self._source, self.tensors)
            check_unused(entries, self.config)
            head = self.tensors.get(SCORE)
            self.labels = () if head is None else labels_of(self._source, head.shape)
            if self.labels:
                # no head for tokens
                self.config = replace(self.config, tie_word_embeddings=True)
            self._source = replace(self._source, config=self.config)
            check_tensors(self.tensors, self.config, self.labels, self._source.files[0])
            self.config = unpadded(self.config, self._vocabulary_size())
            self.close = weakref.finalize(self, stack.pop_all().close)
        if any(entry.name.startswith(SECOND_HEAD) for entry in entries):
            name = str(self._source.files[0].parent)
            terminal.note_once(f"{name!r}: its second head, {SECOND_HEAD}*, is left out")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer by the folder's files, or without any by the size of the vocabulary.

        Raises ValueError for files that cannot be read, and for a size that tells nothing.
        """
        if self._vocabulary is not None:
            eos = self._source.stated.get("eos_token_id")
            ids = eos if isinstance(eos, list) else [eos]
            return self._vocabulary.tokenizer(next((i for i in ids if type(i) is int), None))
        if (tokenizer := by_size(self.config.vocab_size)) is None:
            raise ValueError(
                f"no tokenizer here has a vocabulary of {self.config.vocab_size} "
                "(GPT-2's has 50257, the byte-level one 257)"
            )
        return tokenizer

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        """The folder's files of a tokenizer; None without any, or where they are of another model.

        Raises ValueError for files that cannot be read.
        """
        if official_name(self.name) is not None or not self._source.is_settled:
            return None
        rows, stated = self.tensors[EMBEDDING].shape[0], self._source.stated
        folder = self._source.files[0].parent
        return read_vocabulary(folder, rows, stated.get("tokenizer_class"))

    def _vocabulary_size(self) -> int:
        """Return how many ids there are; all rows where that is unknown."""
        rows = self.config.vocab_size
        with suppress(ValueError, OSError):
            # `tokenizer` reports a damaged file
            known = self._vocabulary
            return unpadded_size(rows) if known is None else min(rows, known.vocab_size)
        return rows

    @property
    def is_chat(self) -> bool:
        """True if `--task chat` trained the model: its tokenizer's files have that template."""
        return official_name(self.name) is None and is_chat(self._source.files[0].parent)

    def model(
        self,
        device: str = "cpu",
        dtype: str = "float32",
        dropout: float | None = None,
        quantize: str | None = None,
        kernels: str = "auto",
    ) -> GPT:
        """Make a GPT; arguments and errors as for `load_model`."""
        return self._with_options(self._gpt(device, dtype, dropout, quantize, kernels))

    def generator(
        self,
        device: str = "cpu",
        dtype: str = "float32",
        quantize: str | None = None,
        kernels: str = "auto",
    ) -> GPT:
        """Make the fastest GPT for generating; arguments and errors as for `load_generator`."""
        return self._with_options(self._gpt(device, dtype, None, quantize, kernels, generates=True))

    def classifier(
        self,
        device: str = "cpu",
        dtype: str = "float32",
        dropout: float | None = None,
        kernels: str = "auto",
    ) -> GPTClassifier:
        """Make a classifier; arguments and errors as for `load_classifier`."""
        _check_dtype(dtype)
        if not self.labels:
            raise ValueError(f"{str(self.name)!r} is no classifier: it has no tensor {SCORE}")
        if self._is_narrow():
            raise ValueError(f"{str(self.name)!r} is int8, which a classifier cannot be")
        with as_usual(device), memory_for(self.config, device, getattr(torch, dtype)):
            with torch.device("meta"), Undrawn():
                model = GPTClassifier(self._empty(dropout), self.labels)
            model.use_kernels(kernels, device)
            state = self._read(device, getattr(torch, dtype))
        score = state.pop(SCORE)
        model.transformer.load_state_dict(state, assign=True)
        model.score.load_state_dict({"weight": score}, assign=True)
        return model.eval()

    def _with_options(self, model: GPT) -> GPT:
        model.generation_options = self._source.generation
        return model

    def _gpt(
        self,
        device: str,
        dtype: str,
        dropout: float | None,
        quantize: str | None,
        kernels: str,
        generates: bool = False,
    ) -> GPT:
        _check_dtype(dtype)
        wanted: torch.dtype = getattr(torch, dtype)
        if self._is_narrow():
            if quantize == "fp16":
                raise ValueError(f"quantize must be int8, which {str(self.name)!r} is, not 'fp16'")
            if dropout is not None:
                raise ValueError(
                    f"{str(self.name)!r} is int8, which generates but cannot be trained"
                )
            quantize = "int8"
        if quantize is not None:
            check_scheme(quantize, torch.device(device).type, wanted)
            if kernels in ("triton", "reference"):
                raise ValueError(f"kernels must be auto or torch for narrow weights, not {kernels}")
        if self.labels:
            raise ValueError(
                f"{str(self.name)!r} is a classifier, which writes no texts: --classify, "
                "--task classify"
            )
        with as_usual(device), memory_for(self.config, device, wanted):
            with torch.device("meta"), Undrawn():
                model = self._empty(dropout)
            model.use_kernels(kernels, device)
            if quantize is not None or (
                generates and runs_prepacked(model.kernels, device, wanted)
            ):
                rows = self.config.vocab_size
                state = map_state(self._source, self._opened, self.tensors, rows)
                # without self: the model must not keep the checkpoint open
                release = partial(_release, self._opened)
                return InferenceGPT(model, state, quantize, release)
            state = self._read(device, wanted)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _read(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        rows = self.config.vocab_size
        return read_state(self._source, self._opened, self.tensors, device, dtype, rows)

    def _is_narrow(self) -> bool:
        return any(entry.dtype == NARROW for entry in self.tensors.values())

    def _empty(self, dropout: float | None) -> GPT:
        return GPT(replace(self.config, dropout=dropout or 0.0))


def _release(opened: list[tensor_file.TensorFile], tensor: Tensor) -> None:
    """Give the pages of a mapped tensor back to the system."""
    for file in opened:
        file.release(tensor)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Open a model by one of config.MODEL_NAMES, its repository, folder or .safetensors file.

    Raises ValueError or OSError, in one line that names the file or the tensor.
    """
    while True:
        target = os.path.realpath(name)
        try:
            return Checkpoint(name)
        except (ValueError, OSError):
            # a run may have moved its link `best` and deleted the target: open the new one
            if os.path.realpath(name) == target:
                raise


def load_model(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    dropout: float | None = None,
    quantize: str | None = None,
    kernels: str = "auto",
) -> GPT:
    """Load a GPT in eval mode.

    name: as for `open_checkpoint`. dtype: float32, bfloat16 or float16. dropout: given to train the
    model further. quantize: fp16 or int8, for generating only, on a CPU; an int8 file stays int8.
    Both map the file into memory, as `load_generator` does. kernels: as for `GPT.use_kernels`.
    Raises ValueError or OSError, in one line that names the file or the tensor.
    """
    _check_dtype(dtype)
    with open_checkpoint(name) as checkpoint:
        return checkpoint.model(device, dtype, dropout, quantize, kernels)


def load_generator(
    name: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    quantize: str | None = None,
    kernels: str = "auto",
) -> GPT:
    """Load the fastest GPT for generating; arguments and errors as for `load_model`.

    In float32 on a CPU the file is mapped into memory. While the model is in use the file may be
    replaced or deleted, but neither the file nor the model's weights may be overwritten.
    """
    _check_dtype(dtype)
    with open_checkpoint(name) as checkpoint:
        return checkpoint.generator(device, dtype, quantize, kernels)


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
    _check_dtype(dtype)
    with open_checkpoint(name) as checkpoint:
        return checkpoint.classifier(device, dtype, dropout, kernels)


def is_classifier(name: str | Path) -> bool:
    """Return True for a classifier, False for a language model; errors as for `load_model`."""
    with open_checkpoint(name) as checkpoint:
        return bool(checkpoint.labels)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Return the tokenizer of a model named as for `load_model`.

    Raises ValueError for files that cannot be read; without any, for a vocabulary whose size is
    neither GPT-2's nor the byte-level one's.
    """
    with open_checkpoint(name) as checkpoint:
        return checkpoint.tokenizer


def new_model(config: GPTConfig, device: str = "cpu") -> GPT:
    """Make a model with random weights, in train mode. Raises ValueError for too little memory."""
    with memory_for(config, device, torch.float32):
        return GPT(config).to(device)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


@contextmanager
def memory_for(config: GPTConfig, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Raise ValueError if the device is too small for the parameters.

    Raises TooLittleMemoryError if allocating them fails.
    """
    needed = config.n_parameters * dtype.itemsize
    total = memory_of(device)
    line = f"{config.n_parameters:,} parameters take {needed / 1e9:,.1f} GB"
    if needed > total:
        raise ValueError(f"{line}; {device} has {total / 1e9:,.1f} GB")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TooLittleMemoryError(f"{line}; {device} has not that much free") from None
