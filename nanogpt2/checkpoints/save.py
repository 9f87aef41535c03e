"""A model -> the folder that transformers and `load_model` read. The formats are in other files."""

from pathlib import Path
from typing import Any

import torch

from nanogpt2.checkpoints.folder import (
    TIED,
    WEIGHTS,
    WEIGHTS_INT8,
    config_files,
)
from nanogpt2.checkpoints.names import DTYPES, PREFIX, TRANSPOSED
from nanogpt2.checkpoints.replace import replace_set
from nanogpt2.checkpoints.tokenizer_files import tokenizer_files
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.cpu.inference_model import HEAD, InferenceGPT
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer, gpt2_tokenizer


def save_model(
    model: Model, folder: str | Path, tokenizer: Tokenizer | None = None, chat: bool = False
) -> None:
    """Write a folder that `load_model` and transformers' GPT2LMHeadModel.from_pretrained load.

    `load_classifier` and GPT2ForSequenceClassification load a classifier's folder. With a
    tokenizer, or GPT-2's 50257 ids, AutoTokenizer.from_pretrained loads the folder too. Tensors
    keep their dtype and bits. chat: add the template of conversations that `--task chat` trains.
    What torch.compile or DistributedDataParallel wrapped is unwrapped.
    The model replaces an earlier one in the folder at a single moment, even where the process is
    killed or the power fails; other files in the folder stay. Raises ValueError for a dtype that
    load_model lacks and for a model with LoRA, TypeError for another kind of model, OSError for a
    file that cannot be written.
    """
    model = unwrapped(model)
    state = dict(model.stored()) if isinstance(model, InferenceGPT) else model.state_dict()
    # a compiled part of a model
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    if any(name.endswith(("lora_a", "lora_b")) for name in state):
        raise ValueError("the model has LoRA: save what merged(model) returns, or its adapter")
    labels = model.labels if isinstance(model, GPTClassifier) else ()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if tokenizer is None and model.config.vocab_size == gpt2_tokenizer().vocab_size:
        tokenizer = gpt2_tokenizer()
    texts = config_files(model.config, dtype, labels, getattr(model, "generation_options", None))
    if tokenizer is not None:
        texts |= tokenizer_files(tokenizer, model.config.block_size, chat)
    theirs = {}
    for name, tensor in state.items():
        prefix = "" if labels or name.startswith(HEAD) else PREFIX
        theirs[prefix + name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    narrow = any(tensor.dtype == torch.int8 for tensor in state.values())
    file, other = (WEIGHTS_INT8, WEIGHTS) if narrow else (WEIGHTS, WEIGHTS_INT8)
    replace_set(Path(folder), texts, TIED, file, theirs, stale=other)


def unwrapped(model: Any) -> Model:
    """Return the model within torch.compile's and DistributedDataParallel's wrappers.

    Raises TypeError for a model of another kind.
    """
    inner = model
    while not isinstance(inner, GPT | GPTClassifier):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise TypeError(f"expected a GPT or a GPTClassifier, not {type(model).__name__}")
    return inner
