"""Training beside a plain transformers loop: the same batches, the same losses.

The long versions, on real texts, are benchmarks/bench_finetune.py and bench_classify.py.
"""

from pathlib import Path

import pytest
import torch
from reference import TINY, hf_model, settings

import train
from benchmarks import harness, peers
from nanogpt2.checkpoints.load import load_classifier, load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.data.examples import Examples
from nanogpt2.data.loader import make_batches, validation_batches
from nanogpt2.training.distributed import World
from nanogpt2.training.optim import learning_rate
from nanogpt2.training.trainer import Trainer
from nanogpt2.training.validation import validate

STEPS = 20


@pytest.fixture
def ids():
    return torch.randint(TINY.vocab_size, (400,)).numpy()


@pytest.fixture
def folder(tmp_path):
    hf_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def curves(config, trainer, peer, batches):
    """Losses of all steps, ours and theirs, which one optimizer's settings made."""
    ours, theirs = [], []
    for step in range(1, config.steps + 1):
        ours.append(train.take_step(config, trainer, batches, step)["loss"])
        x, y = batches.rows((step - 1) * config.batch_size, config.batch_size)
        lr = learning_rate(step, config.steps, config.warmup, config.lr, config.schedule)
        theirs.append(peer.step(x, y, lr))
    return ours, theirs


@pytest.mark.parametrize("peer", [peers.Transformers, peers.NanoGPT])
def test_fine_tuning(folder, ids, peer):
    config = settings(steps=STEPS, warmup=3, lr=3e-3)
    trainer = Trainer(config, load_model(folder), World("cpu"))
    peer = peer(folder, weight_decay=config.weight_decay)
    batches = make_batches(ids[:300], config.block_size, config.seed)
    ours, theirs = curves(config, trainer, peer, batches)
    assert ours == pytest.approx(theirs, abs=1e-4) and ours[-1] < ours[0] - 0.5
    held_out = validation_batches(ids[300:], 3, config.block_size)
    found = validate(trainer, held_out)["val_loss"]
    assert found == pytest.approx(peer.validation_loss(held_out), abs=1e-4)


def test_classification(folder, ids, tmp_path):
    torch.manual_seed(0)
    save_model(GPTClassifier(load_model(folder), ("a", "b", "c")), tmp_path / "start")
    lengths = torch.randint(1, 12, (40,)).tolist()
    stops = torch.tensor(lengths).cumsum(0).numpy()
    # the last id is what transformers pads with
    ids = ids % (TINY.vocab_size - 1)
    texts = Examples(ids, stops - lengths, stops, ids[stops - 1] % 3, ("a", "b", "c"))
    config = settings(task="classify", steps=STEPS)
    trainer = Trainer(config, load_classifier(tmp_path / "start"), World("cpu"))
    peer = peers.TransformersClassifier(tmp_path / "start", weight_decay=config.weight_decay)
    ours, theirs = curves(config, trainer, peer, make_batches(texts, config.block_size, 0))
    assert ours == pytest.approx(theirs, abs=1e-4) and ours[-1] < ours[0] - 0.1
    held_out = validation_batches(texts, 3, config.block_size)
    found = validate(trainer, held_out)
    assert found["val_loss"] == pytest.approx(peer.validation_loss(held_out), abs=1e-4)
    answers = peer.answers(held_out)
    assert found["val_accuracy"] == sum(a == b for a, b in answers) / len(answers)


def test_the_harness_times_only_what_agrees(capsys, monkeypatch, tmp_path):
    assert harness.assert_equal({"a": [1.0, 2.0], "b": [1.0, 2.02]}, "a", 0.1) == pytest.approx(
        0.01
    )
    with pytest.raises(AssertionError, match="b: number 1 is 3"):
        harness.assert_equal({"a": [1.0, 2.0], "b": [1.0, 3.0]}, "a", 0.1)
    calls = []
    times = harness.interleave({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=5)
    # all take turns
    assert [set(calls[i : i + 3]) for i in range(0, 15, 3)] == [set("abc")] * 5
    assert all(0 <= t.least <= t.median <= t.most and t.rounds == 5 for t in times.values())
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    harness.report("x", "X", harness.rig(), harness.table(["a"], [[1]]), {"seconds": times})
    assert "| a |\n| --- |\n| 1 |" in Path(tmp_path / "results/x.md").read_text()
    assert (tmp_path / "results/x.json").exists()
    assert capsys.readouterr().out.splitlines()[-1].startswith('{"benchmark": "x", "rig"')
