"""The parts of a run: optimizer, schedule, checkpoints, the run's folder."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference import TINY

from nanogpt2.config import TrainConfig
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training.optim import learning_rate, make_optimizer
from nanogpt2.training.run_folder import RunFolder
from nanogpt2.weights import load_model


def test_decay_falls_on_matrices_only():
    model = GPT(TINY)
    optimizer = make_optimizer(model, lr=1.0, weight_decay=0.25)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        bare = name.endswith("bias") or "ln_" in name
        assert decays[id(p)] == (0.0 if bare else 0.25), name


def test_the_schedule_warms_up_and_falls():
    rates = [learning_rate(step, steps=100, warmup=10, peak=2.0) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert all(a > b > 0 for a, b in pairwise(rates[9:]))
    assert rates[54] == pytest.approx(1.0, abs=0.03) and rates[-1] < 0.001
    assert learning_rate(1, steps=1, warmup=0, peak=2.0) == pytest.approx(1.0)
    assert learning_rate(5, steps=5, warmup=9, peak=9.0) == 5.0


# ---- checkpoints


def trained(seed=0, steps=2):
    """A model and an optimizer with a past."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, vocab_size=257, bos_token_id=256, eos_token_id=256))
    optimizer = make_optimizer(model, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(torch.randint(257, (2, 5)), torch.randint(257, (2, 5))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(folder, step, seed=0, **state):
    model, optimizer = trained(seed)
    return store.save_checkpoint(folder, step, model, byte_tokenizer(), optimizer, state)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    path = store.save_checkpoint(
        tmp_path, 2, model, byte_tokenizer(), optimizer, {"best": math.inf}
    )
    torch.manual_seed(99)
    again = load_model(path)
    resumed = make_optimizer(again, lr=1e-2, weight_decay=0.1)

    def go_on(model, optimizer):
        model.train()
        for _ in range(3):
            model(torch.randint(257, (2, 5)), torch.randint(257, (2, 5))).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.rand(())

    assert store.restore(path, resumed) == {"step": 2, "best": math.inf}
    draw = go_on(again, resumed)
    store.restore(path, make_optimizer(GPT(model.config), 1.0, 0.0))
    assert go_on(model, optimizer) == draw
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


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
    ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"],
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
        not (tmp_path / "state.json").exists() and not (tmp_path / "optimizer.safetensors").exists()
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
from test_training import trained
model, optimizer = trained()
out = Path({str(tmp_path)!r})
made = (model, byte_tokenizer(), optimizer, {{"best": 1.0}})
store.commit(out, 1, *made, is_best=True, keep=1)
print("committed", flush=True)
def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)
owner = Path if {point!r} in ("rename", "write_text") else store
setattr(owner, {point!r}, die)
store.commit(out, 2, *made, is_best=True, keep=1)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == -9 and ran.stdout == "committed\n", ran.stderr
    latest = store.latest_checkpoint(tmp_path / "checkpoints")
    assert latest.name == ("step-2" if point in ("publish", "prune") else "step-1")
    for folder in (latest, tmp_path, tmp_path / "checkpoints/best"):
        assert load_model(folder).config.n_layer == 2
    # the next save clears up
    store.commit(
        tmp_path, 3, *trained()[:1], byte_tokenizer(), trained()[1], {}, is_best=True, keep=1
    )
    assert [p.name for p in store.checkpoints(tmp_path / "checkpoints")] == ["step-3"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


# ---- the run's folder


def settings(tmp_path, **options):
    options = {"data": "pydocs", "init": "demo", "out": str(tmp_path / "out")} | options
    return TrainConfig(**options, given=tuple(options))


def begun(tmp_path, **options):
    config = settings(tmp_path, **options)
    folder = RunFolder(tmp_path / "out")
    folder.lock()
    folder.start(config, corpus_sha256="abc", before={"val_loss": 1.0})
    folder.close()
    return folder


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "out")
    assert folder.check(settings(tmp_path)) == settings(tmp_path)
    assert not (tmp_path / "out").exists()
    begun(tmp_path)
    with pytest.raises(ValueError, match=r"already holds run\.json"):
        folder.check(settings(tmp_path))
    folder.check(settings(tmp_path, overwrite=True))


def test_a_model_of_somebody_elses_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"already holds model\.safetensors"):
        RunFolder(tmp_path / "out").check(settings(tmp_path))
    inside = settings(tmp_path, overwrite=True, init=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--init"):
        RunFolder(tmp_path / "out").check(inside)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    folder = begun(tmp_path)
    folder.log({"step": 1})
    folder.close()
    save(folder.checkpoints, 1)
    (tmp_path / "out/notes.txt").write_text("mine")
    folder = RunFolder(tmp_path / "out")
    folder.start(settings(tmp_path, overwrite=True), corpus_sha256="def")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock",
        "notes.txt",
        "run.json",
    ]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "out").check(settings(tmp_path))


def test_resuming_takes_what_the_run_was_told(tmp_path):
    begun(tmp_path, lr=0.5, steps=7)
    folder = RunFolder(tmp_path / "out")
    config = folder.check(settings(tmp_path, resume=True, save_every=3, lr=0.5))
    assert (config.lr, config.steps, config.save_every, config.resume) == (0.5, 7, 3, True)
    with pytest.raises(ValueError, match=r"--lr 0\.5.*cannot change to 0\.25"):
        folder.check(settings(tmp_path, resume=True, lr=0.25))
    with pytest.raises(ValueError, match="no run to --resume"):
        RunFolder(tmp_path / "other").check(settings(tmp_path, resume=True))
    folder.check_corpus(config, "abc")
    with pytest.raises(ValueError, match="another text"):
        folder.check_corpus(config, "def")
    whole = json.loads((tmp_path / "out/run.json").read_text())
    unknown = whole | {"config": whole["config"] | {"warmth": 3}}
    for damaged in ("{", "[]", "null", "{}", '{"config": []}', json.dumps(unknown), "[" * 100_000):
        (tmp_path / "out/run.json").write_text(damaged)
        with pytest.raises(ValueError, match="damaged"):
            folder.check(settings(tmp_path, resume=True))


def test_metrics_are_cut_to_the_step(tmp_path):
    folder = begun(tmp_path)
    for step in range(1, 6):
        folder.log({"step": step})
    folder.close()
    path = tmp_path / "out/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    RunFolder(tmp_path / "out").cut_metrics(3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_two_trainers_do_not_share_a_folder(tmp_path):
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    first.lock()
    with pytest.raises(ValueError, match="in use"):
        second.lock()
    first.close()
    second.lock()
    second.close()
