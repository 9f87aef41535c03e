"""The oracle: transformers' GPT-2 with random weights, and files in the official layout."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from nanogpt2.config import PRESETS, GPTConfig
from nanogpt2.model import GPT
from nanogpt2.weights import load_model

logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
# mutually distinct, so that a wrong axis cannot pass
TINY = GPTConfig(
    vocab_size=61,
    block_size=37,
    n_layer=2,
    n_head=3,
    n_embd=24,
    bos_token_id=60,
    eos_token_id=60,
)


def hf_model(config: GPTConfig = TINY, seed: int = 0, **options) -> GPT2LMHeadModel:
    """A transformers model whose every tensor is random: biases and layer norms too."""
    theirs = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    model = GPT2LMHeadModel(theirs).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # sharp enough that no two scores are nearly equal
            std = 0.3 if p.dim() > 1 and config.n_embd < 100 else 0.05
            p.copy_(torch.randn(p.shape, generator=generator) * std)
            if "ln_" in name and name.endswith("weight"):
                p.add_(1)
    return model


def twins(folder: Path, config: GPTConfig = TINY, seed: int = 0) -> tuple[GPT, GPT2LMHeadModel]:
    """Our model and transformers', with the same random weights."""
    theirs = hf_model(config, seed)
    theirs.save_pretrained(folder)
    return load_model(folder), theirs


def official_tensors(config: GPTConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights as OpenAI's release names and shapes them: no prefix, masks, [in, out]."""
    tensors = {}
    for name, tensor in hf_model(config, seed).transformer.state_dict().items():
        tensors[name] = tensor.clone().contiguous()
    mask = torch.ones(config.block_size, config.block_size).tril()
    for layer in range(config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = mask[None, None].clone()
    return tensors


def write_official_file(path: Path, tensors: dict[str, torch.Tensor], header_length: int) -> None:
    """A safetensors file by hand, its JSON header padded with spaces to `header_length` bytes."""
    # by ascending size, as the official header's length needs
    names = sorted(tensors, key=lambda name: (tensors[name].numel(), name))
    header: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        size = tensors[name].numel() * 4
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= header_length
    with path.open("wb") as file:
        file.write(struct.pack("<Q", header_length) + text.ljust(header_length))
        for name in names:
            file.write(tensors[name].numpy().tobytes())


def rewrite(source: Path, target: Path, change) -> None:
    """Copy a model folder; `change` maps the tensors by name to those to write."""
    from safetensors.torch import load_file

    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_text(file.read_text())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")


def run_script(
    script: str, *arguments: str, cwd: Path, stdin: bytes = b"", timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """Run train.py or sample.py as a user does; warnings are errors there too."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / script), *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


__all__ = ["PRESETS", "ROOT", "TINY"]
