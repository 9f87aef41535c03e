"""The oracle: transformers' GPT-2 with random weights, and files in the official layout."""

import json
import os
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList
from transformers.utils import logging

from nanogpt2.checkpoints.load import load_model
from nanogpt2.config import PRESETS, GPTConfig, TrainConfig
from nanogpt2.cpu import prepared
from nanogpt2.cpu.tuning import ROWS, Timing
from nanogpt2.generation import GenerationOutput, generate
from nanogpt2.model import GPT

logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent
# seconds after which a process counts as hung, however busy the machine; no test is about time
HUNG = 1800
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


def settings(**options) -> TrainConfig:
    """What `train.py` hands on, its automatic values filled in: for a TINY model."""
    filled = {"data": "pydocs", "batch_size": 4, "block_size": 8, "steps": 10, "lr": 1e-2}
    filled |= {"warmup": 0, "dtype": "float32", "eval_every": 5, "save_every": 5}
    return TrainConfig(**(filled | {"lora_alpha": 8.0} | options))


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


# ---- the same generation twice


def prompts(B: int, T: int, seed: int = 0, vocab_size: int = TINY.vocab_size) -> torch.Tensor:
    """Random ids, the vocabulary's last one left out: int64 (B, T)."""
    return torch.randint(vocab_size - 1, (B, T), generator=torch.Generator().manual_seed(seed))


def left_padded(
    B: int, T: int, seed: int = 0, pad: int = 0, vocab_size: int = TINY.vocab_size
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 1 to T tokens, the first one full, and their mask: both (B, T)."""
    ids, rng = prompts(B, T, seed, vocab_size), random.Random(seed)
    mask = torch.ones_like(ids)
    for row in range(1, B):
        pads = rng.randrange(T)
        ids[row, :pads], mask[row, :pads] = pad, 0
    return ids, mask


def their_output(theirs: GPT2LMHeadModel, ids, mask, seed: int, **options):
    """What transformers' generate returns, scores included, for a global seed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # transformers warns of flags that greedy decoding does not use
        warnings.simplefilter("ignore")
        return theirs.generate(
            ids,
            attention_mask=mask,
            return_dict_in_generate=True,
            output_scores=True,
            **{name: _as_theirs(name, value) for name, value in options.items()},
        )


def _as_theirs(name: str, value):
    if name == "logits_processor":
        return LogitsProcessorList(value)
    return list(value) if name.endswith("token_id") and isinstance(value, tuple) else value


def our_output(ours: GPT, ids, mask, seed: int, **options) -> GenerationOutput:
    """What our generate returns for the same call."""
    torch.manual_seed(seed)
    return generate(ours, ids, mask, output_scores=True, **options)


def assert_same_output(found: GenerationOutput, expected, beams: bool) -> None:
    """Token for token; processed rows with one -inf mask and within 1e-4; beams by their rows."""
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.scores) == len(expected.scores)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(ours.isneginf(), theirs.isneginf())
        # a row with nothing left to allow, renormalised, is not a number in both
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4, equal_nan=True)
    if beams:
        torch.testing.assert_close(
            found.sequences_scores,
            expected.sequences_scores,
            rtol=1e-5,
            atol=1e-4,
            equal_nan=True,
        )
        assert torch.equal(found.beam_indices, expected.beam_indices)


def assert_parity(models, ids, mask=None, seed: int = 0, **options) -> GenerationOutput:
    """Both models' output for one call, compared; returns ours."""
    ours, theirs = models
    mask = torch.ones_like(ids) if mask is None else mask
    expected = their_output(theirs, ids, mask, seed, **options)
    found = our_output(ours, ids, mask, seed, **options)
    assert_same_output(found, expected, beams=options.get("num_beams", 1) > 1)
    return found


# ---- layouts


def force_layout(name: str) -> None:
    """Make one layout the fastest and free: each matrix that may take it is laid out at once."""
    prepared.table_for = lambda products: {
        p.shape: {n: Timing(dict.fromkeys(ROWS, 1.0 if n == name else 2.0), 0.0) for n in p.layouts}
        for p in products
    }


# ---- files


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


# ---- one step of a Trainer, as train.py takes it


def backward(trainer, x, y, loss_weight: float = 1.0, last: bool = True) -> torch.Tensor:
    """Add the gradients of a micro-batch's mean loss times `loss_weight`; return that product."""
    with trainer.exchanging_gradients(last):
        with trainer.precision():
            loss = trainer.forward(x, y) * loss_weight
        trainer.scaled(loss).backward()
    return loss.detach()


def update(trainer, lr: float, apply: bool = True) -> None:
    """Update the weights by the gradients unless told not to; drop the gradients."""
    trainer.set_rate(lr)
    trainer.update(torch.tensor(apply))
    trainer.finish_step(updated=apply)


def run_script(
    script: str, *arguments: str, cwd: Path, stdin: bytes = b"", **environment
) -> subprocess.CompletedProcess:
    """Run train.py or sample.py as a user does; warnings are errors there too."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / script), *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=HUNG,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def run_module(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run python -m MODULE as a user does; warnings are errors there too."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", module, *arguments],
        cwd=cwd,
        capture_output=True,
        timeout=HUNG,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


__all__ = ["PRESETS", "ROOT", "TINY"]
