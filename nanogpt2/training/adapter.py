"""An adapter: what LoRA learned, apart from the model it was learned on. PEFT's format.

    adapter_config.json         rank, alpha, which layers, the name of the model it belongs to
    adapter_model.safetensors   base_model.model.NAME.lora_A.weight (r, in), lora_B (out, r), where
                                NAME is the layer's in transformers; a classifier's score.weight

At rank 8 it is 4.7 MB beside the 124M model's 498 MB. `PeftModel.from_pretrained` reads what is
written here, and PEFT's own adapters of the same layers are read. Only settings that change what is
computed count; any that is not known to be without effect is refused rather than ignored, and a
dropout for training is not taken over.

This file does not know how A and B came about.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.model import GPT
from nanogpt2.training.lora import add_lora, lora_layers

LAYERS = ("c_attn", "c_fc", "c_proj")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# what an adapter's settings must be where they are stated
REQUIRED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # the others change the weights of the model too
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

    `base_name` is the name or path of the model they belong to. Raises ValueError for a model
    without LoRA.
    """
    layer = next(iter(lora_layers(model).values()), None)
    if layer is None:
        raise ValueError("the model has no LoRA to save")
    config = {
        "peft_type": "LORA",
        # with SEQ_CLS PEFT takes the head too
        "task_type": "SEQ_CLS" if isinstance(model, GPTClassifier) else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": layer.rank,
        "lora_alpha": layer.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(LAYERS),
        "bias": "none",
        # transformers stores the weights of these layers as [in, out]
        "fan_in_fan_out": True,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_file.write(folder / TENSORS, _tensors(model))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: Model, folder: str | Path) -> None:
    """Give a plain model the LoRA of a folder, ready to go on learning.

    Raises ValueError, leaving the model as it was, for an adapter of other layers, of another
    model, or with settings that are unknown here; OSError for a file that cannot be read.
    """
    rank, alpha = _read_config(Path(folder) / CONFIG)
    path = Path(folder) / TENSORS
    with tensor_file.opened(path) as file:
        stored = dict(file.read([entry.name for entry in file.entries]))
    # the same model without numbers, to hold the file against
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
    """All that an adapter of this model holds, by its names there."""
    prefix = PREFIX if isinstance(model, GPTClassifier) else f"{PREFIX}transformer."
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        found[f"{prefix}{name}.lora_A.weight"] = layer.lora_a
        found[f"{prefix}{name}.lora_B.weight"] = layer.lora_b
    if isinstance(model, GPTClassifier):
        found[f"{PREFIX}score.weight"] = model.score.weight
    return {name: parameter.detach() for name, parameter in found.items()}


def _read_config(path: Path) -> tuple[int, float]:
    """Return rank and alpha. Raises ValueError for a setting that means another computation."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(stated, dict):
        raise ValueError(f"{str(path)!r} is no JSON object")
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
            raise ValueError(f"{str(path)!r}: {key} is not known here: {value!r:.60}")
    return rank, alpha


def _check_tensors(path: Path, stored: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError for the first tensor that is missing, unexpected or of a wrong shape."""
    for name, tensor in expected.items():
        if name not in stored:
            raise ValueError(f"{str(path)!r}: tensor {name} is missing")
        if stored[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(stored[name].shape)}"
            raise ValueError(f"{str(path)!r}: tensor {name} must be {shapes}")
    for name in stored:
        if name not in expected:
            raise ValueError(f"{str(path)!r}: tensor {name} has no place in this model")
