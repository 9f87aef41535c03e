"""A run's state on disk: whole or not there at all."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import TINY, settings

from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training.distributed import World
from nanogpt2.training.learner import Learner
from nanogpt2.weights import load_model


def trained(seed=0, steps=2):
    """A learner with a past."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, vocab_size=257, bos_token_id=256, eos_token_id=256))
    learner = Learner(settings(), model, World("cpu"))
    for _ in range(steps):
        learner.backward(torch.randint(257, (2, 5)), torch.randint(257, (2, 5)), 1.0, last=True)
        learner.step(lr=1e-2)
    return learner


def save(folder, step, seed=0):
    learner = trained(seed)
    made = learner.exported(), byte_tokenizer(), learner.tensors()
    return store.save_checkpoint(folder, *made, {"step": step})


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert store.latest_checkpoint(tmp_path / "none") is None
    for step in (1, 9, 10):
        save(tmp_path, step)
    (tmp_path / "step-11.tmp").mkdir()
    assert store.latest_checkpoint(tmp_path).name == "step-10"
    (tmp_path / "step-12").mkdir()
    assert store.latest_checkpoint(tmp_path).name == "step-10"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "training.safetensors", "state.json", "config.json", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    assert store.latest_checkpoint(tmp_path).name == "step-1"


def test_every_bit_of_a_small_checkpoint_counts(tmp_path):
    """The manifest's own bits too: a flip there names another file, size or digest."""
    path = save(tmp_path, 1)
    for name in ("state.json", "manifest.json", "generation_config.json"):
        whole = (path / name).read_bytes()
        for bit in range(0, len(whole) * 8, 7):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            (path / name).write_bytes(data)
            still_whole = store.is_whole(path)
            # white space between two JSON tokens may turn into another white space
            assert not still_whole or json.loads(data) == json.loads(whole)
        (path / name).write_bytes(whole)
    assert store.is_whole(path)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        saved = save(tmp_path, step)
        if step == 2:
            store.mark_best(saved)
    (tmp_path / "step-9.tmp").mkdir()
    (tmp_path / "mine").mkdir()
    store.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        "mine",
        "step-2",
        "step-4",
        "step-5",
    ]
    store.mark_best(tmp_path / "step-5")
    store.prune(tmp_path, keep=2)
    assert sorted(p.name for p in store.checkpoints(tmp_path)) == ["step-4", "step-5"]
    assert load_model(tmp_path / "best").config.vocab_size == 257


def test_publishing_leaves_an_open_model_as_it_was(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    first, second = save(checkpoints, 1, seed=1), save(checkpoints, 2, seed=2)
    store.publish(first, tmp_path)
    assert (
        not (tmp_path / "state.json").exists() and not (tmp_path / "training.safetensors").exists()
    )
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        before = file.get_tensor("transformer.wte.weight").clone()
        store.publish(second, tmp_path)
        assert torch.equal(file.get_tensor("transformer.wte.weight"), before)
    assert not torch.equal(load_model(tmp_path).wte.weight, before)
    assert store.is_whole(first) and store.is_whole(second)


KILL_POINTS = [
    "save_model",
    "save_file",
    "write_text",
    "_digest",
    "_sync",
    "rename",
    "publish",
    "prune",
]


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_kill_at_any_point_of_a_save_loses_nothing(tmp_path, point):
    """The process is killed by SIGKILL as it reaches `point` in the second commit."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import checkpoint as store
from test_checkpoint import trained
learner = trained()
out = Path({str(tmp_path)!r})
made = (learner.exported(), byte_tokenizer(), learner.tensors())
store.commit(out, *made, {{"step": 1}}, is_best=True, keep=1)
print("committed", flush=True)
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
owner = Path if {point!r} in ("rename", "write_text") else store
setattr(owner, {point!r}, die)
store.commit(out, *made, {{"step": 2}}, is_best=True, keep=1)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == -9 and ran.stdout == "committed\n", ran.stderr
    latest = store.latest_checkpoint(tmp_path / "checkpoints")
    assert latest.name == ("step-2" if point in ("publish", "prune") else "step-1")
    for folder in (latest, tmp_path, tmp_path / "checkpoints/best"):
        assert load_model(folder).config.n_layer == 2
    # the next save clears up
    learner = trained()
    made = (learner.exported(), byte_tokenizer(), learner.tensors())
    store.commit(tmp_path, *made, {"step": 3}, is_best=True, keep=1)
    assert [p.name for p in store.checkpoints(tmp_path / "checkpoints")] == ["step-3"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
