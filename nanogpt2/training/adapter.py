"""LoRA adapters on disk, without their base model, in PEFT's format.

    adapter_config.json         rank, alpha, the layers, the name of the base model
    adapter_model.safetensors   base_model.model.NAME.lora_A.weight (r, in), lora_B (out, r), where
                                NAME is the layer's in transformers; a classifier's score.weight

At rank 8 an adapter takes 4.7 MB, the 124M model 498 MB. `PeftModel.from_pretrained` reads these
files, and `load_adapter` reads PEFT's own adapters of the same layers. A setting that may change
the computation is an error, never ignored. The training dropout is not taken over.

This file does not know how A and B were trained.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import Replaces, current_text, name_for_others
from nanogpt2.checkpoints.replace import replace_set
from nanogpt2.checkpoints.save import unwrapped
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config import repository_of
from nanogpt2.model import GPT
from nanogpt2.training.lora import add_lora, lora_layers

LAYERS = ("c_attn", "c_fc", "c_proj")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# the allowed values of settings, when adapter_config.json states them
REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # other values also change the base model's weights
    "init_lora_weights": (True, False, "gaussian"),
    "modules_to_save": (None, ["score"], ["classifier", "score"]),
}
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
)


def save_adapter(model: Model, folder: str | Path, base_name: str) -> None:
    """Write A and B, and a classifier's head.

    `base_name` is the name or path of the base model; PEFT finds it by the repository or the
    absolute path that is written. The adapter replaces an earlier one in the folder as `save_model`
    does. Raises ValueError for a model without LoRA.
    """
    model = unwrapped(model)
    layer = next(iter(lora_layers(model).values()), None)
    if layer is None:
        raise ValueError("the model has no LoRA layers to save")
    config = {
        "peft_type": "LORA",
        # SEQ_CLS makes PEFT load the head too
        "task_type": "SEQ_CLS" if isinstance(model, GPTClassifier) else "CAUSAL_LM",
        "base_model_name_or_path": name_for_others(base_name),
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(LAYERS),
        "bias": "none",
        # transformers stores the weights of these layers as [in, out]
        "fan_in_fan_out": True,
        "inference_mode": True,
    }
    if (found := repository_of(base_name)) is not None:
        config["revision"] = found[1]
    texts = {CONFIG: json.dumps(config, indent=2) + "\n"}
    replace_set(Path(folder), texts, [CONFIG], TENSORS, _tensors(model))


def load_adapter(model: Model, folder: str | Path) -> None:
    """Add the LoRA layers in a folder to a plain model, ready for further training.

    Raises ValueError, and leaves the model unchanged, for an adapter of other layers, of another
    model, or with unknown settings. Raises OSError for an unreadable file.
    """
    path = Path(folder) / TENSORS
    with tensor_file.opened(path) as file:
        rank, alpha = _read_config(Path(folder) / CONFIG, file.replaces)
        stored = dict(file.read([entry.name for entry in file.entries]))
    # the same model without weights: the names and shapes to expect in the file
    with torch.device("meta"):
        gpt = GPT(model.config)
        outline = GPTClassifier(gpt, model.labels) if isinstance(model, GPTClassifier) else gpt
    try:
        add_lora(outline, rank, alpha)
    except ValueError as error:
        raise ValueError(f"{str(path.parent / CONFIG)!r}: {error}") from None
    _check_tensors(path, stored, _tensors(outline))
    add_lora(model, rank, alpha)
    for name, tensor in _tensors(model).items():
        tensor.copy_(stored[name])


def _tensors(model: Model) -> dict[str, Tensor]:
    """Collect the tensors of this model's adapter, by their names in the file."""
    prefix = PREFIX if isinstance(model, GPTClassifier) else f"{PREFIX}transformer."
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        found[f"{prefix}{name}.lora_A.weight"] = layer.lora_a
        found[f"{prefix}{name}.lora_B.weight"] = layer.lora_b
    if isinstance(model, GPTClassifier):
        found[f"{PREFIX}score.weight"] = model.score.weight
    return {name: parameter.detach() for name, parameter in found.items()}


def _read_config(path: Path, replaces: Replaces) -> tuple[int, float]:
    """Return rank and alpha. Raises ValueError for a setting that changes the computation."""
    try:
        stated = json.loads(current_text(path, replaces) or path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(stated, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object: {stated!r:.60}")
    rank, alpha, layers = (stated.pop(key, None) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{str(path)!r}: r must be a whole number >= 1, not {rank!r}")
    if type(alpha) not in (int, float):
        raise ValueError(f"{str(path)!r}: lora_alpha must be a number, not {alpha!r}")
    if not isinstance(layers, list) or {*map(str, layers)} != {*LAYERS}:
        wanted = ", ".join(LAYERS)
        raise ValueError(f"{str(path)!r}: target_modules must be {wanted}, not {layers!r:.60}")
    for key, value in stated.items():
        if key in REQUIRED and value not in REQUIRED[key]:
            raise ValueError(
                f"{str(path)!r}: {key} must be {REQUIRED[key][0]!r}, not {value!r:.60}"
            )
        if key not in REQUIRED and key not in WITHOUT_EFFECT and value:
            raise ValueError(f"{str(path)!r}: {key} is not supported: {value!r:.60}")
    return rank, alpha


def _check_tensors(path: Path, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError for the first missing, unexpected or wrongly shaped tensor."""
    for name, tensor in expected.items():
        if name not in stored:
            raise ValueError(f"{str(path)!r}: tensor {name} is missing")
        if stored[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(stored[name].shape)}"
            raise ValueError(f"{str(path)!r}: tensor {name} must be {shapes}")
    for name in stored:
        if name not in expected:
            raise ValueError(f"{str(path)!r}: tensor {name} is unexpected: this model lacks it")
