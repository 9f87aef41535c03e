"""The oracle of LoRA: PEFT on transformers' models. PEFT is an extra, so functions import it."""

import warnings

import torch
from torch import nn

from nanogpt2.training.lora import add_lora, lora_layers


def adapted(model, rank=4, alpha=6.0):
    """Our model with LoRA whose A and B are both random."""
    add_lora(model, rank, alpha)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.3)
    return model


def quietly(function, *arguments, **options):
    """Call PEFT, which uses what transformers has deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return function(*arguments, **options)


def peft_config(task="CAUSAL_LM", **options):
    """The same layers; A and B are random."""
    from peft import LoraConfig

    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options
    layers = ["c_attn", "c_proj", "c_fc"]
    return LoraConfig(target_modules=layers, fan_in_fan_out=True, task_type=task, **options)


def peft_twin(theirs, ours):
    """transformers' model with PEFT's LoRA that has our A and B."""
    from peft import get_peft_model

    theirs = quietly(get_peft_model, theirs, peft_config())
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            a, b = peft_pair(theirs, name)
            a.copy_(layer.lora_a)
            b.copy_(layer.lora_b)
    return theirs


def peft_pair(theirs, name):
    """PEFT's A and B for our layer `name`."""
    layer = theirs.base_model.model.transformer.get_submodule(name.removeprefix("transformer."))
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
