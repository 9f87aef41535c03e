"""A run stopped at any step goes on as if it had not been: to the bit, whatever it trains."""

import hashlib
import itertools
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from reference import TINY, backward, settings, update
from torch.optim.swa_utils import AveragedModel
from transformers import GPT2LMHeadModel

import train
from nanogpt2.checkpoints.load import load_model, new_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, TrainConfig, parse
from nanogpt2.data.loader import WindowBatches
from nanogpt2.model import GPT
from nanogpt2.training.distributed import World
from nanogpt2.training.run_folder import RunFolder
from nanogpt2.training.trainer import Trainer

STEPS = 60
WAYS = {"full": [], "lora": ["--lora_rank", "2"], "classify": ["--task", "classify"]}
SETTINGS = [
    (dtype, dropout, accumulation, way, optimizer)
    for dtype, dropout, accumulation, way, optimizer in itertools.product(
        ("float32", "bfloat16"), ("0", "0.1"), ("1", "4"), WAYS, ("adamw", "muon")
    )
]
# each value of each setting with each of the next one's
SOME = [
    ("float32", "0.1", "1", "full", "muon"),
    ("bfloat16", "0.1", "4", "lora", "adamw"),
    ("bfloat16", "0", "1", "classify", "muon"),
    ("float32", "0", "4", "classify", "adamw"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A small model to begin with, a text and labelled texts."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(1)
    shape = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256}
    save_model(new_model(GPTConfig(**(TINY.__dict__ | shape))), folder / "init")
    sheep = [f"{i} sheep jumped over the fence. " for i in range(150)]
    (folder / "book.txt").write_text("".join(sheep))
    records = [{"text": line, "label": "odd" if i % 2 else "even"} for i, line in enumerate(sheep)]
    (folder / "sheep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def command(inputs, out, dtype, dropout, accumulation, way, optimizer, *more):
    data = inputs / ("sheep.jsonl" if way == "classify" else "book.txt")
    argv = [str(data), "--init", str(inputs / "init"), "--out", str(out), *WAYS[way]]
    argv += ["--dtype", dtype, "--dropout", dropout, "--grad_accum", accumulation]
    argv += ["--optimizer", optimizer, "--batch_size", "2", "--block_size", "8", "--lr", "0.01"]
    return [*argv, "--steps", str(STEPS), "--eval_every", "20", *more]


def run(*argv):
    """train.py in this process; its exit code."""
    try:
        config = RunFolder(Path(argv[argv.index("--out") + 1])).check(parse(TrainConfig, argv))
        train.main(config)
    except SystemExit as stopped:
        return stopped.code
    return 0


def stop_after(monkeypatch, steps):
    """Have a signal arrive as the loop has come to this step of its own."""

    class Stop:
        def __init__(self):
            self.left = steps

        @property
        def received(self):
            self.left -= 1
            return None if self.left > 0 else 15

    monkeypatch.setattr(train.terminal, "Signals", Stop)


def outcome(out):
    """All that a run computed: hex floats, and the digests of the weights it left."""
    kept = ("step", "loss", "lr", "grad_norm", "val_loss", "val_accuracy")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [[float(line[k]).hex() for k in kept if line.get(k) is not None] for line in lines]
    weights = (out / "model.safetensors").read_bytes()
    return rows, hashlib.sha256(weights).hexdigest()


def stopped_twenty_times(inputs, out, monkeypatch, setting, *more):
    """Run to the end with twenty stops at random steps."""
    rng = random.Random(repr(setting))
    stops = sorted(rng.sample(range(1, STEPS), 20))
    done = 0
    for stop in stops:
        stop_after(monkeypatch, stop - done)
        resume = ["--resume"] if done else []
        assert run(*command(inputs, out, *setting, *more, *resume)) == 143
        done = stop
    monkeypatch.undo()
    assert run(*command(inputs, out, *setting, *more, "--resume")) == 0


@pytest.mark.parametrize("setting", SOME, ids="-".join)
def test_twenty_stops_change_no_bit(inputs, tmp_path, monkeypatch, setting):
    assert run(*command(inputs, tmp_path / "whole", *setting)) == 0
    stopped_twenty_times(inputs, tmp_path / "stopped", monkeypatch, setting)
    rows, digest = outcome(tmp_path / "whole")
    assert len(rows) == STEPS
    assert outcome(tmp_path / "stopped") == (rows, digest)


@pytest.mark.marathon
@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s not in SOME], ids=lambda setting: "-".join(setting)
)
def test_twenty_stops_change_no_bit_whatever_is_trained(inputs, tmp_path, monkeypatch, setting):
    assert run(*command(inputs, tmp_path / "whole", *setting)) == 0
    stopped_twenty_times(inputs, tmp_path / "stopped", monkeypatch, setting)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


MORE = [
    ["--ema", "0.9"],
    ["--ema", "0.9", "--lora_rank", "2"],
    ["--schedule", "wsd", "--warmup", "9"],
    ["--activation_checkpointing"],
]


@pytest.mark.slow
@pytest.mark.parametrize("more", MORE, ids=" ".join)
def test_stops_change_no_bit_of_what_else_there_is(inputs, tmp_path, monkeypatch, more):
    setting = ("float32", "0.1", "1", "full", "adamw")
    assert run(*command(inputs, tmp_path / "whole", *setting, *more)) == 0
    stopped_twenty_times(inputs, tmp_path / "stopped", monkeypatch, setting, *more)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def without(prefix):
    """restore() that does not see the tensors of one kind."""
    restore = Trainer.restore

    def forgetful(self, tensors, micro_batch):
        kept = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        restore(self, kept, micro_batch)

    return forgetful


@pytest.mark.parametrize("forgotten", ["optimizer", "generators", "data position", "schedule"])
def test_what_is_not_restored_shows(inputs, tmp_path, monkeypatch, forgotten):
    """The controls: were one of these left out, the comparison above would fail."""
    setting = ("float32", "0.1", "1", "full", "adamw")
    assert run(*command(inputs, tmp_path / "whole", *setting)) == 0
    stop_after(monkeypatch, 25)
    assert run(*command(inputs, tmp_path / "stopped", *setting)) == 143
    monkeypatch.undo()
    if forgotten == "optimizer":
        monkeypatch.setattr(Trainer, "restore", without("optimizer."))
    elif forgotten == "generators":
        monkeypatch.setattr(Trainer, "restore", without("rng."))
    elif forgotten == "data position":
        rows = WindowBatches.rows

        def from_the_start(self, first, count):
            return rows(self, first - 25 * 2, count)

        monkeypatch.setattr(WindowBatches, "rows", from_the_start)
    else:
        rate = train.learning_rate
        monkeypatch.setattr(train, "learning_rate", lambda step, *others: rate(step - 25, *others))
    assert run(*command(inputs, tmp_path / "stopped", *setting, "--resume")) == 0
    assert outcome(tmp_path / "stopped") != outcome(tmp_path / "whole")


def test_the_best_is_remembered_over_a_stop(inputs, tmp_path, monkeypatch):
    losses = iter([9.0, 1.0, 2.0, 3.0])
    setting = command(inputs, tmp_path / "out", "float32", "0", "1", "full", "adamw")
    stop_after(monkeypatch, 25)
    monkeypatch.setattr(train, "validate", lambda *arguments: {"val_loss": next(losses)})
    assert run(*setting) == 143
    monkeypatch.setattr(train.terminal, "Signals", NeverStopped)
    assert run(*setting, "--resume") == 0
    assert (tmp_path / "out/checkpoints/best").resolve().name == "step-20"


@pytest.mark.parametrize("way", WAYS)
def test_the_formulas_train_as_pytorch_does(inputs, tmp_path, capfd, way):
    """train.py --kernels reference: the same losses within rounding."""
    losses = []
    for kernels in ("torch", "reference"):
        setting = command(inputs, tmp_path / kernels, "float32", "0.1", "2", way, "adamw")
        assert run(*setting, "--kernels", kernels, "--steps", "4", "--eval_every", "2") == 0
        lines = (tmp_path / kernels / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)[name] for line in lines for name in ("loss", "grad_norm")])
    assert "kernels: reference " in capfd.readouterr().err
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


class NeverStopped:
    received = None


def learner_of(model=None, **options):
    torch.manual_seed(0)
    return Trainer(settings(**options), model or GPT(TINY), World("cpu"))


def batch(rows=2):
    ids = torch.randint(TINY.vocab_size, (rows, 6))
    return ids[:, :-1], ids[:, 1:].clone()


def test_the_average_is_kept_and_exported():
    trainer = learner_of(ema=0.75)
    expected = None
    for _ in range(4):
        backward(trainer, *batch(), 1.0, last=True)
        update(trainer, lr=0.1)
        state = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        # the first update is taken as it is
        expected = expected or state
        expected = {n: 0.75 * p + 0.25 * state[n] for n, p in expected.items()}
    assert isinstance(trainer.average, AveragedModel)
    for name, parameter in trainer.exported().named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], msg=name)
        assert not torch.equal(parameter, trainer.model.get_parameter(name)), name


def test_recomputed_activations_give_the_same_gradients():
    x, y = batch()
    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = GPT(replace(TINY, dropout=0.5))
        trainer = learner_of(model, activation_checkpointing=recompute)
        backward(trainer, x, y, 1.0, last=True)
        grads.append([p.grad for p in trainer.parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_tied_embeddings_gradient_is_the_sum_of_both():
    """And that of what is looked up is never as large as the embedding."""
    parts = [batch(), batch()]
    torch.manual_seed(0)
    plain = GPT(TINY)
    for x, y in parts:
        plain(x, y).backward()
    trainer = learner_of()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        for x, y in parts:
            backward(trainer, x, y, 1.0, last=True)
    for name, parameter in plain.named_parameters():
        ours = trainer.parameters[name].grad
        assert (ours - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name
    (dense,) = (e for e in profiled.key_averages() if e.key == "aten::embedding_dense_backward")
    # of the positions, once in each part
    assert dense.count == 2
    with torch.no_grad():
        assert torch.equal(trainer.eval_model(parts[0][0]), plain(parts[0][0]))


def test_float16_survives_an_overflow():
    trainer = learner_of(dtype="float16")
    x, y = batch()
    backward(trainer, x, y, 1.0, last=True)
    assert 0 < trainer.clip_gradients() < 100
    update(trainer, lr=0.0)
    scale = trainer.scaler.get_scale()
    weights = [p.detach().clone() for p in trainer.parameters.values()]
    backward(trainer, x, y, 1e6, last=True)
    assert not math.isfinite(trainer.clip_gradients())
    update(trainer, lr=1.0, apply=False)
    assert trainer.scaler.get_scale() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.parameters.values(), strict=True))


def test_float16_gradients_are_those_of_float32():
    x, y = batch(rows=7)
    grads = []
    for dtype in ("float32", "float16"):
        torch.manual_seed(3)
        trainer = learner_of(GPT(TINY), dtype=dtype)
        backward(trainer, x, y, 1.0, last=True)
        trainer.clip_gradients()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values()]))
    # 11 bits of mantissa
    assert (grads[0] - grads[1]).norm() < 2e-3 * grads[0].norm()


def test_what_is_exported_after_lora_is_plain(tmp_path):
    trainer = learner_of(lora_rank=2)
    backward(trainer, *batch(), 1.0, last=True)
    update(trainer, lr=0.1)
    save_model(trainer.exported(), tmp_path)
    ids = batch()[0]
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), trainer.model(ids))
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()(ids).logits
        torch.testing.assert_close(theirs, trainer.model(ids), atol=1e-4, rtol=1e-4)


def test_a_classifier_learns_with_lora_head_included():
    torch.manual_seed(0)
    trainer = learner_of(GPTClassifier(GPT(TINY), ("a", "b")), lora_rank=2)
    assert "score.weight" in trainer.parameters
    assert all("lora_" in n or n == "score.weight" for n in trainer.parameters)


@settings_of_hypothesis(max_examples=25, deadline=None)
@given(st.data())
def test_accumulated_gradients_are_the_big_batchs(data):
    """Every target counts the same, in whichever micro-batch it is and however many stand there."""
    rows = data.draw(st.integers(2, 6))
    cut = data.draw(st.integers(1, rows - 1))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    x, y = batch(rows)
    for row in y:
        # a completion of its own length at the end of each row
        row[: data.draw(st.integers(0, len(row) - 1))] = -100
    grads = []
    for parts in ([slice(0, rows)], [slice(0, cut), slice(cut, rows)]):
        trainer = learner_of()
        total = int((y != -100).sum())
        losses = [
            backward(trainer, x[part], y[part], int((y[part] != -100).sum()) / total, last=True)
            for part in parts
        ]
        grads.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values()]))
        grads.append(torch.stack(losses).sum())
    whole, loss, parted, parted_loss = grads
    assert (whole - parted).norm() <= 1e-6 * whole.norm()
    assert abs(loss - parted_loss) <= 1e-6 * abs(loss)


# what torch's compiler imports warns of itself
@pytest.mark.filterwarnings("default")
@pytest.mark.marathon
def test_compiled_steps_are_the_same_within_rounding(inputs, tmp_path):
    """It needs a C++ compiler, which not everybody has."""
    setting = ("float32", "0", "1", "full", "adamw")
    assert run(*command(inputs, tmp_path / "plain", *setting)) == 0
    assert run(*command(inputs, tmp_path / "compiled", *setting, "--compile")) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").open()]
        for out in ("plain", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---- the tensors of a checkpoint are exactly those of the run

KINDS = [{}, {"optimizer": "muon"}, {"ema": 0.5, "lora_rank": 2}, {"dtype": "float16"}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_missing_malformed_and_unknown_tensors_are_named(options):
    trainer = learner_of(**options)
    backward(trainer, *batch(), 1.0, last=True)
    trainer.clip_gradients()
    update(trainer, lr=0.1)
    tensors = trainer.tensors()
    trainer.check(tensors, step=1)
    for name, tensor in tensors.items():
        for wrong in (None, tensor.double(), tensor.new_zeros(*tensor.shape, 2)):
            found = {n: t for n, t in tensors.items() if n != name}
            found |= {} if wrong is None else {name: wrong}
            with pytest.raises(ValueError, match=f": {re.escape(name)} must be "):
                trainer.check(found, step=1)
    for name in ("optimizer.wte.weight.other", "rng.cpu.2", "rng.cpu.-1", "rng.gpu.0", "other"):
        with pytest.raises(ValueError, match="must be "):
            trainer.check(tensors | {name: tensors["rng.cpu.0"]}, step=1)
    with pytest.raises(ValueError, match="optimizer"):
        trainer.check({n: t for n, t in tensors.items() if "optimizer" not in n}, step=1)


def test_float16_may_have_updated_nothing_yet():
    """Every step so far overflowed: there is no optimizer's state, and the scale shows it."""
    trainer = learner_of(dtype="float16")
    backward(trainer, *batch(), 1e6, last=True)
    trainer.clip_gradients()
    update(trainer, lr=1.0, apply=False)
    trainer.check(trainer.tensors(), step=1)
    with pytest.raises(ValueError, match="not absent"):
        trainer.check(trainer.tensors(), step=2)


def test_another_number_of_processes_is_said_in_one_note(capsys, monkeypatch):
    trainer = learner_of()
    backward(trainer, *batch(), 1.0, last=True)
    update(trainer, lr=0.1)
    tensors = trainer.tensors()
    trainer.restore(tensors, 1)
    monkeypatch.setattr("nanogpt2.training.trainer.wrap", lambda model: model)
    assert capsys.readouterr().err == ""
    two = Trainer(settings(), GPT(TINY), World("cpu", 0, 2))
    two.check(tensors, step=1)
    two.restore(tensors, 1)
    assert capsys.readouterr().err.count("\n") == 1
    tensors["rng.cpu.1"] = tensors["rng.cpu.0"]
    trainer.check(tensors, step=1)
    trainer.restore(tensors, 1)
    assert "generators of 2 processes, this run has 1" in capsys.readouterr().err


def test_a_broken_generator_is_an_error():
    trainer = learner_of()
    backward(trainer, *batch(), 1.0, last=True)
    update(trainer, lr=0.1)
    tensors = trainer.tensors()
    tensors["rng.cpu.0"] = torch.full_like(tensors["rng.cpu.0"], 255)
    with pytest.raises(ValueError, match=r"rng\.cpu\.0"):
        trainer.check(tensors, step=1)
