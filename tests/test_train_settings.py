"""What train.py's settings do to a run, from its command line to its files."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, book, metrics, numbers, run

import train
from nanogpt2.checkpoints.load import load_model
from nanogpt2.model import GPT
from nanogpt2.training.optim import learning_rate

__all__ = ["book"]  # the fixture

BASE = ["book.txt", *SMALL, "--lr", "0.01", "--steps", "10", "--dropout", "0.1"]
TASKS = {
    "lm": ["book.txt"],
    "chat": ["chat.jsonl", "--task", "chat"],
    "classify": ["labels.jsonl", "--task", "classify"],
}


@pytest.fixture
def records(book):
    chat = [{"prompt": f"{i} sheep", "completion": " baa" * (i % 5 + 1)} for i in range(40)]
    labels = [{"text": f"{i} sheep", "label": ["odd", "even"][i % 2 == 0]} for i in range(40)]
    for name, rows in (("chat", chat), ("labels", labels)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def stop_after(monkeypatch, steps):
    """Have a signal arrive in this step."""

    class Stop:
        left = steps

        @property
        def received(self):
            self.left -= 1
            return None if self.left > 0 else 15

    monkeypatch.setattr(train.terminal, "Signals", Stop)


# ---- --dry_run


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "2"], ["--grad_accum", "4", "--ema", "0.9"]])
@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_says_what_would_be_and_writes_nothing(capsys, records, task, flags):
    size = ["--block_size", "16", "--batch_size", "4"]
    init = [*SMALL]
    if flags and "lora" in flags[0]:
        assert run("book.txt", *SMALL, "--steps", "1", "--out", "base") == 0
        init = ["--init", "base"]
    capsys.readouterr()
    before = {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")}
    assert run(*TASKS[task], *init, *size, *flags, "--steps", "50", "--dry_run") == 0
    out, err = capsys.readouterr()
    in_a_step = 16 if "--grad_accum" in flags else 4
    assert "parameters, " in out and "GB of memory" in out
    assert f"50 steps of {in_a_step} x 16 tokens: " in out and "epochs of" in out
    assert "minutes at " in out and "tokens/s" in out
    assert "error" not in err
    assert {p: p.is_file() and p.read_bytes() for p in Path().rglob("*")} == before
    # the tokens and their counts are kept for the run to come, and nothing else
    kept = [p for p in Path("~/.cache/nanogpt2").expanduser().rglob("*") if p.is_file()]
    assert kept and all(p.suffix in (".tokens", ".json") for p in kept)


def test_a_dry_run_of_a_run_that_could_not_be_is_refused(capsys, book):
    assert run("book.txt", *SMALL, "--dry_run", "--block_size", "9000") == 2
    assert capsys.readouterr().out == ""


# ---- precision and memory


def test_float16_skips_a_step_that_overflows_and_resumes_bit_for_bit(book, monkeypatch):
    forward = GPT.forward

    def overflow(self, idx, targets=None):
        loss = forward(self, idx, targets)
        if self.training and loss.requires_grad:
            calls.append(1)
            if len(calls) == 4:
                loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(GPT, "forward", overflow)
    argv = [*BASE, "--dtype", "float16", "--save_every", "1", "--keep", "99"]
    calls = []
    assert run(*argv, "--out", "whole") == 0
    rows = metrics("whole")
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [4]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.1

    def saved(step):
        return load_file(f"whole/checkpoints/step-{step}/training.safetensors")

    def weights(step):
        return load_file(f"whole/checkpoints/step-{step}/model.safetensors")

    assert all(torch.equal(weights(4)[name], w) for name, w in weights(3).items())
    assert not all(torch.equal(weights(5)[name], w) for name, w in weights(4).items())
    assert saved(4)["scaler.scale"] == saved(3)["scaler.scale"] / 2

    with monkeypatch.context() as patch:
        calls = []
        stop_after(patch, 6)
        assert run(*argv, "--out", "stopped") == 143
    assert run(*argv, "--out", "stopped", "--resume") == 0
    found = [{k: v for k, v in row.items() if k in ("loss", "grad_norm")} for row in rows]
    resumed = metrics("stopped")
    assert found == [{k: row[k] for k in ("loss", "grad_norm")} for row in resumed]
    assert Path("whole/model.safetensors").read_bytes() == (
        Path("stopped/model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("task", TASKS)
def test_recomputing_activations_changes_no_bit(records, task):
    argv = [*TASKS[task], *BASE[1:], "--grad_accum", "2"]
    assert run(*argv, "--out", "kept") == 0
    assert run(*argv, "--out", "again", "--activation_checkpointing") == 0
    assert numbers("kept") == numbers("again")


def test_what_is_kept_with_ema_is_the_average(book):
    argv = [*BASE, "--save_every", "1", "--keep", "99"]
    assert run(*argv, "--out", "plain") == 0
    assert run(*argv, "--out", "ema", "--ema", "0.9") == 0
    average = None
    for step in range(1, 11):
        state = load_model(f"plain/checkpoints/step-{step}").state_dict()
        average = average or state
        average = {n: 0.9 * average[n] + 0.1 * state[n] for n in state}
        found = load_model(f"ema/checkpoints/step-{step}").state_dict()
        for name, expected in average.items():
            torch.testing.assert_close(found[name], expected)
    # the training itself is the same, what is validated is not
    a, b = metrics("plain"), metrics("ema")
    assert [row["loss"] for row in a] == [row["loss"] for row in b]
    assert a[-1]["val_loss"] != b[-1]["val_loss"]
    assert all(torch.equal(load_model("ema").state_dict()[n], w) for n, w in found.items())


# ---- how it learns


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_every_optimizer_and_schedule_learns(book, optimizer, schedule):
    argv = ["book.txt", *SMALL, "--lr", "0.01", "--steps", "20", "--warmup", "3"]
    assert run(*argv, "--optimizer", optimizer, "--schedule", schedule) == 0
    rows = metrics()
    assert [row["lr"] for row in rows] == [
        learning_rate(step, 20, 3, 0.01, schedule) for step in range(1, 21)
    ]
    # 0.01 by the third step; each learns, none ends at 0
    assert rows[2]["lr"] == 0.01 and 0 < rows[-1]["lr"] <= 0.01
    assert (rows[-1]["lr"] == 0.01) == (schedule == "constant")
    assert rows[-1]["val_loss"] < rows[0]["loss"] - 0.5
    assert all(math.isfinite(row["grad_norm"]) for row in rows)


# ---- what is seen of it changes nothing


def test_samples_on_the_way_change_nothing(capsys, book):
    assert run(*BASE, "--out", "quiet") == 0
    capsys.readouterr()
    assert run(*BASE, "--out", "talking", "--sample_every", "3", "--prompt", "7 sheep") == 0
    err = capsys.readouterr().err
    for step in (3, 6, 9):
        assert f"step {step}:\n7 sheep" in err
    assert numbers("talking") == numbers("quiet")


def test_tensorboard_reads_what_metrics_hold(book, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*BASE, "--out", "plain") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run(*BASE, "--tensorboard") == 143
    assert run(*BASE, "--tensorboard", "--resume") == 0
    assert numbers() == numbers("plain")
    events = EventAccumulator("out/tensorboard").Reload()
    for name in ("loss", "val_loss", "lr"):
        (tag,) = (tag for tag in events.Tags()["scalars"] if tag.split("/")[-1] == name)
        found = {event.step: event.value for event in events.Scalars(tag)}
        expected = {row["step"]: row[name] for row in metrics() if name in row}
        assert found == pytest.approx(expected, rel=1e-6)
