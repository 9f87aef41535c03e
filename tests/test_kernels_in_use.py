"""The model by Triton's kernels beside the model by PyTorch: training, decoding, what is asked for.

Without a GPU in Triton's interpreter. What is counted are the registered operations that ran, so a
test fails where PyTorch quietly takes over.
"""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_reference import bf16_dots, kept  # noqa: F401
from kernel_reference import DEVICE, rms_ratio
from reference import ROOT, backward, left_padded, prompts, settings, update
from test_sample import run as run_sample
from test_train import metrics, numbers
from test_train import run as run_train
from test_trainer import stop_after
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import train
from nanogpt2 import evaluate, ops
from nanogpt2.checkpoints.load import load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, parse
from nanogpt2.generation import generate
from nanogpt2.kernels.attention import attention_ref
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import snapshot
from nanogpt2.training import trainer as trainers
from nanogpt2.training.distributed import World
from nanogpt2.training.trainer import Trainer

SHAPE = GPTConfig(61, 20, n_layer=2, n_head=2, n_embd=32, bos_token_id=60, eos_token_id=60)
# fp32 sums of some hundred terms in another order; a GPU's products may be three of TF32
BOUND = 1e-5


# on a machine with a GPU kernels are compiled, on others interpreted: the same tests of either
@pytest.fixture(params=[*["cpu"][: DEVICE == "cpu"], pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    # the interpreter computes with numpy, which would warn of what a GPU computes in silence
    with np.errstate(all="ignore"):
        yield request.param


class Calls(TorchDispatchMode):
    """Counts the kernels' operations inside, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "nanogpt2":
            self.count[function.name().removeprefix("nanogpt2::")] += 1
        return function(*args, **(kwargs or {}))


def pair(device, dropout=0.0, dtype=torch.float32, **shape):
    """The same random model twice: by PyTorch, by Triton."""
    model = GPT(GPTConfig(**(SHAPE.__dict__ | {"dropout": dropout} | shape))).to(device, dtype)
    with torch.no_grad():
        for p in model.parameters():
            # sharp enough that no two scores are nearly equal
            p.add_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.05))
    other = copy.deepcopy(model)
    other.use_kernels("triton")
    assert (model.kernels, other.kernels) == ("torch", "triton")
    return model, other


def batch(device, B=2, T=7):
    ids = torch.randint(SHAPE.vocab_size, (2, B, T), device=device)
    ids[1, 0, :3] = -100
    return ids.unbind()


def assert_same_gradients(ours, theirs, bound=BOUND):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert rms_ratio(p.grad, q.grad) < bound, name


# ---- training


def test_training(device):
    """Logits, the loss and every gradient, all by kernels where there is one."""
    model, ours = pair(device)
    x, y = batch(device)
    with Calls() as calls:
        loss = ours(x, y)
        loss.backward()
    assert calls.count == {
        "layer_norm_fwd": 5,
        "layer_norm_bwd": 5,
        "attention_qkv": 2,
        "attention_qkv_backward": 2,
        "gelu_fwd": 2,
        "gelu_bwd": 2,
        "linear_cross_entropy": 1,
    }
    with Calls() as calls:
        expected = model(x, y)
        expected.backward()
    assert not calls.count
    with torch.no_grad():
        assert rms_ratio(ours(x), model(x)) < BOUND
    assert rms_ratio(loss.detach(), expected.detach()) < BOUND
    assert_same_gradients(ours, model)


def test_dropout(device, monkeypatch):
    """PyTorch with the attention's mask that the kernel draws, every other mask being the same."""
    model, ours = pair(device, dropout=0.3)
    x, y = batch(device)

    def self_attention(qkv, mask, dropout, kernels):
        if kernels == "triton":
            return by_kernels(qkv, mask, dropout, kernels)
        B, T, _, H, _ = qkv.shape
        seed = torch.randint(2**63 - 1, (1,), device=device)
        keep = kept(B, H, T, dropout, int(seed))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        return attention_ref(q, k, v, keep=keep, dropout=dropout).transpose(1, 2)

    by_kernels = ops.self_attention
    monkeypatch.setattr(ops, "self_attention", self_attention)
    losses = []
    for each in (model, ours):
        torch.manual_seed(7)
        losses.append(each.train()(x, y))
        losses[-1].backward()
    assert rms_ratio(losses[1].detach(), losses[0].detach()) < BOUND
    assert_same_gradients(ours, model)
    # another draw, and none in eval mode
    torch.manual_seed(8)
    assert not torch.equal(ours(x, y), losses[1])
    ours.eval()
    assert torch.equal(ours(x), ours(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(device, dropout):
    """What is computed twice draws the same masks twice."""
    losses, models = [], []
    for again in (False, True):
        torch.manual_seed(5)
        _, model = pair(device, dropout=dropout, n_layer=1)
        config = settings(activation_checkpointing=again, kernels="triton")
        trainer = Trainer(config, model, World(device, 0, 1))
        x, y = batch(device)
        torch.manual_seed(6)
        losses.append(backward(trainer, x, y, 1.0, last=True))
        models.append(model)
    assert torch.equal(*losses)
    # on a GPU the gradient of the queries is added up in any order
    assert_same_gradients(*models, bound=BOUND if device == "cuda" else 1e-30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.usefixtures("bf16_dots")
def test_autocast(device, dtype):
    """As far from PyTorch's as two roundings of the products to that dtype."""
    model, ours = pair(device, n_layer=1)
    x, y = batch(device)
    with torch.autocast(device, getattr(torch, dtype)), Calls() as calls:
        losses = model(x, y), ours(x, y)
    for loss in losses:
        loss.backward()
    assert calls.count["attention_qkv"] == calls.count["linear_cross_entropy"] == 1
    bound = {"bfloat16": 4e-2, "float16": 5e-3}[dtype]
    assert rms_ratio(losses[1].detach(), losses[0].detach()) < bound
    assert_same_gradients(ours, model, bound)


def test_left_padding(device):
    """A AttentionMetadata says where rows start: their real tokens are those of the row alone."""
    model, ours = pair(device, n_layer=1)
    x, _ = batch(device)
    start = torch.tensor([3, 0], dtype=torch.int32, device=device)
    positions = (torch.arange(7, device=device) - start[:, None]).clamp(min=0)
    hidden = ours.hidden_states(x, positions, mask=ops.AttentionMetadata(start)).detach()
    alone = model.hidden_states(x[:1, 3:]).detach()
    assert rms_ratio(hidden[:1, 3:], alone) < BOUND
    assert rms_ratio(hidden[1:], model.hidden_states(x[1:]).detach()) < BOUND
    with pytest.raises(ValueError, match=r'mask must be .* kernels "torch"'):
        model.hidden_states(x, positions, mask=ops.AttentionMetadata(start))


def test_a_mask_of_ones_own_is_pytorchs(device):
    model, ours = pair(device, n_layer=1)
    x, _ = batch(device)
    mask = torch.ones(7, 7, dtype=torch.bool, device=device).tril()
    mask[5, 2] = False
    with Calls() as calls:
        found = ours.hidden_states(x, mask=mask)
    assert "attention_qkv" not in calls.count and calls.count["layer_norm_fwd"] == 3
    assert rms_ratio(found.detach(), model.hidden_states(x, mask=mask).detach()) < BOUND


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_keeps_the_graph_whole(device, backend):
    _, ours = pair(device, n_layer=1)
    x, y = batch(device)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    gradients = []
    for forward in (compiled, ours):
        ours.zero_grad()
        forward(x, y).backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert rms_ratio(found, expected) < BOUND


def test_a_compiler_gets_plain_layer_norms_and_gelus(device):
    """Inductor fuses them with their neighbours; only attention and the loss stay kernels."""
    _, ours = pair(device, n_layer=2)
    x, y = batch(device)
    torch._dynamo.reset()
    with torch.autocast(device, torch.bfloat16):
        explained = torch._dynamo.explain(ours)(x, y)
    assert explained.graph_break_count == 0 and len(explained.graphs) == 1
    names = [str(node.target) for node in explained.graphs[0].graph.nodes]
    kernels = [name for name in names if "nanogpt2" in name]
    assert len([name for name in kernels if "attention_qkv" in name]) == 2
    assert len([name for name in kernels if "linear_cross_entropy" in name]) == 1
    assert len(kernels) == 3, kernels


class Operations(Calls):
    """Counts all operations but views; refuses those that make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_assert_async")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        assert name not in self.WAITS, name
        views = (r.alias_info is not None and not r.alias_info.is_write
                 for r in function._schema.returns)  # fmt: skip
        if not any(views) and "empty" not in name and name != "_unsafe_view":
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("bf16_dots")
def test_operations_of_a_training_step(device):
    """Under autocast, a layer: no addition of its own, one cast a weight and one a gradient.

    And nothing waits for the device, so the pass can be captured.
    """
    found = []
    for layers in (1, 2):
        _, ours = pair(device, n_layer=layers)
        x, y = batch(device)
        with Operations() as operations:
            with torch.autocast(device, torch.bfloat16):
                loss = ours(x, y)
            loss.backward()
        found.append(operations.count)
    found[1].subtract(found[0])
    layer = {name: count for name, count in found[1].items() if count}
    assert layer == {
        "layer_norm_fwd": 2,
        "layer_norm_bwd": 2,
        "attention_qkv": 1,
        "attention_qkv_backward": 1,
        "gelu_fwd": 1,
        "gelu_bwd": 1,
        # c_attn and both c_proj with their biases, c_fc without; two products back for each
        "addmm": 3,
        "mm": 9,
        # four weights and three biases, there and back
        "_to_copy": 14,
        "sum": 3,
    }


class Counts(Operations):
    WAITS = ()


@pytest.mark.usefixtures("bf16_dots")
def test_a_weight_is_cast_once_a_step(device, monkeypatch):
    """However many micro-batches; the gradients are those of casts for each.

    The embedding, which is the head as well, adds up the same numbers in another order.
    """
    counts, models = [], []
    for keeps in (False, True):
        torch.manual_seed(5)
        _, model = pair(device, n_layer=1)
        trainer = Trainer(settings(dtype="bfloat16", kernels="triton"), model, World(device, 0, 1))
        monkeypatch.setattr(trainers, "KEEPS_CASTS", (device,) if keeps else ())
        torch.manual_seed(6)
        x, y = (t.cpu() for t in batch(device))
        with Counts() as operations:
            train.add_gradients(trainer, [(x, y), (x, y)], 22.0)
        assert not torch.is_autocast_enabled(device)
        counts.append(operations.count["_to_copy"])
        models.append(model)
    # seven of the layer's, and the head's
    assert counts[0] - counts[1] == 8
    assert_same_gradients(*models)


# ---- a whole step of training


class Step(TorchDispatchMode):
    """Notes the operations inside and what the host reads, in order; how often a weight is cast."""

    def __init__(self, weights):
        super().__init__()
        self._weights, self.events, self.casts = {p.data_ptr() for p in weights}, [], 0

    @property
    def reads(self):
        return [name for name in self.events if name in (*Operations.WAITS, *Reads.NAMES)]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        self.events.append(name)
        self.casts += name == "_to_copy" and args[0].data_ptr() in self._weights
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes reads that are no operation on a CPU."""

    NAMES = ("tolist", "cpu", "numpy")

    def __init__(self, step):
        super().__init__()
        self._step = step

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            self._step.events.append(name)
        return function(*args, **(kwargs or {}))


def learner(device, monkeypatch, capturable=True, **options):
    """The same Trainer each time, whose step is a GPU's on a CPU as well; its batches."""
    torch.manual_seed(5)
    _, model = pair(device, n_layer=1)
    if capturable:
        monkeypatch.setattr(trainers, "CAPTURABLE", ("cpu", "cuda"))
        monkeypatch.setattr(trainers, "KEEPS_CASTS", ("cpu", "cuda"))
    # a CPU's own code, which reads what a CPU need not wait for
    monkeypatch.setattr(trainers.cpu_training, "install", lambda *args, **kwargs: None)
    rows = [each.cpu() for each in batch(device, B=1)]
    # counted on the host, where the batches are
    monkeypatch.setattr(train, "count_targets", lambda y: 4)
    # a rate that float32 holds, so that it may be a tensor
    filled = {"batch_size": 1, "lr": 2**-8, "schedule": "constant", "kernels": "triton"}
    config = settings(**(filled | options))
    trainer = Trainer(config, model, World(device, 0, 1))
    return trainer, SimpleNamespace(rows=lambda first, count: rows)


def taken(trainer, batches, number=1):
    """Take one step of train.py, watched."""
    step = Step(trainer.parameters.values())
    with Reads(step), step:
        figures = train.take_step(trainer.config, trainer, batches, number)
    return figures, step


def assert_waits_once(step):
    """The host reads once, and after the update."""
    assert len(step.reads) == 1, step.reads
    assert "_fused_adamw_" in step.events
    assert "_fused_adamw_" not in step.events[step.events.index(step.reads[0]) :]


@pytest.mark.usefixtures("bf16_dots")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_waits_once_when_all_is_queued(device, monkeypatch, dtype):
    trainer, batches = learner(device, monkeypatch, dtype=dtype, grad_accum=2)
    before = trainer.model.wte.weight.detach().clone()
    for number in (1, 2):
        _, step = taken(trainer, batches, number)
        assert_waits_once(step)
    assert not torch.equal(trainer.model.wte.weight, before)


def read_norm(trainer, monkeypatch):
    clip = trainer.clip_gradients

    def reading():
        norm = clip()
        assert norm.item() >= 0
        return norm

    monkeypatch.setattr(trainer, "clip_gradients", reading)


def read_fit(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "is_capturable", False)


def read_loss(trainer, monkeypatch):
    total = World.total
    monkeypatch.setattr(
        World, "total", lambda world, tensor: total(world, tensor + tensor.tolist())
    )


@pytest.mark.parametrize("mistake", [read_norm, read_fit, read_loss], ids=lambda f: f.__name__)
def test_a_step_that_waits_before_is_found(device, monkeypatch, mistake):
    trainer, batches = learner(device, monkeypatch)
    mistake(trainer, monkeypatch)
    _, step = taken(trainer, batches)
    with pytest.raises(AssertionError):
        assert_waits_once(step)


@pytest.mark.usefixtures("bf16_dots")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_device_updates_as_the_host_does(device, monkeypatch, dtype):
    """The same bits, after a rate that changes."""
    models, figures = [], []
    for capturable in (False, True):
        with monkeypatch.context() as patch:
            if not capturable:
                patch.setattr(trainers, "CAPTURABLE", ())
            trainer, batches = learner(device, patch, capturable, dtype=dtype, warmup=2)
            assert trainer.is_capturable == capturable
            steps = [taken(trainer, batches, number)[0] for number in range(1, 5)]
        figures.append([(row["loss"], row["grad_norm"]) for row in steps])
        models.append(trainer.model)
    assert figures[0] == figures[1]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("number", [1, 3])
def test_the_device_updates_nothing_by_what_is_not_finite(device, monkeypatch, what, number):
    """Not a weight, not the optimizer's state."""
    trainer, batches = learner(device, monkeypatch, ema=0.5)
    for earlier in range(1, number):
        taken(trainer, batches, earlier)
    forward = trainer.forward

    def broken(x, y):
        loss = forward(x, y)
        if what == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    def state():
        slots = {name: tensor.clone() for name, tensor in trainer._slots()}
        averaged = trainer.eval_model.named_parameters()
        return slots | {**trainer.parameters} | {f"average.{name}": p for name, p in averaged}

    before = {name: tensor.detach().clone() for name, tensor in state().items()}
    trainer.forward = broken
    with pytest.raises(FloatingPointError, match=f"step {number} .* before the update"):
        taken(trainer, batches, number)
    after = state()
    # weights, averages, and from the second step on three slots
    assert len(before) == len(trainer.parameters) * (2 if number == 1 else 5)
    for name, tensor in after.items():
        # the first step makes the state, of zeros
        assert torch.equal(tensor, before.get(name, torch.zeros_like(tensor))), name
    # and the next step is as if the broken one had not been
    trainer.forward = forward
    trainer.drop_gradients()
    assert taken(trainer, batches, number)[0]["loss"] > 0


@pytest.mark.usefixtures("bf16_dots")
def test_a_weight_is_cast_once_a_step_of_any_number_of_parts(device, monkeypatch):
    """And again in the next step, after the update."""
    counts, losses = {}, {}
    for accumulated, keeps in ((1, True), (4, True), (4, False)):
        trainer, batches = learner(device, monkeypatch, dtype="bfloat16", grad_accum=accumulated)
        monkeypatch.setattr(trainers, "KEEPS_CASTS", (device,) if keeps else ())
        steps = [taken(trainer, batches, number) for number in (1, 2)]
        counts[accumulated, keeps] = [step.casts for _, step in steps]
        losses[accumulated, keeps] = [figures["loss"] for figures, _ in steps]
    # the layer's four weights and three biases, and the head
    once = counts[1, True]
    assert once[0] >= 8 and once == [once[0]] * 2
    assert counts[4, True] == once
    assert counts[4, False] == [4 * n for n in once]
    # a copy that outlived the update would show here
    assert losses[4, True] == pytest.approx(losses[4, False], rel=1e-6)
    first, second = losses[4, True]
    assert abs(first - second) > 1e-3


def test_a_stream_is_the_sum(device):
    """What the blocks pass on, its norm, and what a second computation makes of it."""
    x, branch, more = torch.randn(3, 2, 5, 32, device=device)
    weight, bias = torch.randn(2, 32, device=device)
    stream = ops.residual_stream(x, "triton") + branch
    y = ops.layer_norm(stream, weight, bias, 1e-5, "triton")
    torch.testing.assert_close(stream.sum, x + branch)
    torch.testing.assert_close(y, ops.layer_norm(x + branch, weight, bias, 1e-5))
    assert torch.equal(y, ops.layer_norm(stream, weight, bias, 1e-5, "triton"))
    # no norm in between
    torch.testing.assert_close((ops.Stream(x) + branch + more).x, x + branch)
    leaves, spec = tree_flatten((stream, 3))
    assert [leaves[0] is x, leaves[1] is branch, leaves[2]] == [True, True, 3]
    assert tree_unflatten(leaves, spec)[0].branch is branch
    assert ops.residual_stream(x, "torch") is x


def test_twenty_steps(device):
    """AdamW divides by the gradients' size, so that rounding grows: losses within 1e-4."""
    losses = []
    for kernels in ("torch", "triton"):
        torch.manual_seed(3)
        shape = {"n_layer": 1, "n_head": 1, "n_embd": 16}
        model = GPT(GPTConfig(**(SHAPE.__dict__ | shape))).to(device)
        model.use_kernels(kernels)
        trainer = Trainer(settings(lr=1e-3, kernels=kernels), model, World(device, 0, 1))
        x, y = batch(device, T=4)
        with Calls() as calls:
            for _ in range(20):
                loss = backward(trainer, x, y, 1.0, last=True)
                trainer.clip_gradients()
                update(trainer, 1e-3)
                losses.append(loss.item())
        assert calls.count["attention_qkv_backward"] == (20 if kernels == "triton" else 0)
    for theirs, ours in zip(losses[:20], losses[20:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert losses[39] < losses[20] - 0.5, "it learns"


def test_a_classifier(device):
    model, _ = pair(device, n_layer=1)
    theirs = GPTClassifier(model, ("a", "b", "c")).to(device)
    ours = copy.deepcopy(theirs)
    ours.use_kernels("triton")
    x, y = batch(device)
    y = y.clamp(max=2)
    for each in (theirs, ours):
        each(x, y).backward()
    assert_same_gradients(ours, theirs)
    with Calls() as calls:
        found = ours.classify([[1, 2, 3], [4]])
    assert calls.count["softmax_fwd"] == 1 and ours.kernels == "triton"
    assert rms_ratio(found, theirs.classify([[1, 2, 3], [4]])) < BOUND


# ---- decoding

WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "noise": "counter", "seed": 3, "top_k": 0},
    "sampled, all that is fused": {
        "do_sample": True,
        "noise": "counter",
        "seed": 2**63 - 1,
        "num_return_sequences": 2,
        "first_sample": 5,
        "no_repeat_ngram_size": 1,
        "temperature": 0.7,
        "top_k": 5,
    },
    "sampled, more than is fused": {
        "do_sample": True,
        "noise": "counter",
        "seed": 3,
        "top_p": 0.9,
    },
    "by torch's stream": {"do_sample": True, "seed": 3},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 3, "do_sample": True, "noise": "counter", "seed": 4},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "stochastic beams": {"num_beams": 3, "stochastic_beams": True, "seed": 1},
    "contrastive": {"penalty_alpha": 0.5, "top_k": 3},
}
FUSED = ("sampled", "sampled, all that is fused")
# those whose draw is a kernel within a GPU's graph
DRAWN = (*FUSED, "greedy", "sampled, more than is fused")


@pytest.mark.parametrize("way", WAYS)
def test_generate(device, way):
    """The tokens of PyTorch's model, by the kernels of decoding and, where it can be, of the draw.

    Rows of several lengths; of the tokens all but the first come out of the cache.
    """
    model, ours = pair(device, n_layer=1)
    ids, mask = left_padded(2, 5, vocab_size=61)
    options = {"max_new_tokens": 6, "eos_token_id": None} | WAYS[way]
    expected = generate(model, ids, mask, **options)
    with Calls() as calls:
        found = generate(ours, ids, mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    if expected.sequences_scores is not None:
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)
    steps = 7 if way == "contrastive" else 6
    assert calls.count["attention"] == 1, "the prompt, once"
    if device == "cuda":
        # a graph: run once, captured once, and replayed without a call
        assert calls.count["decode_step"] == 2
        assert calls.count["draw"] == (2 if way in DRAWN else 0)
    else:
        assert calls.count["decode_attention"] == steps - 1
        assert calls.count["sample"] == (6 if way in FUSED else 0)


def test_guesses_are_read_side_by_side(device):
    model, ours = pair(device, n_layer=1)
    ids = torch.tensor([[3, 1, 4, 1, 5, 3, 1, 4]])
    options = {"max_new_tokens": 6, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
    with Calls() as calls:
        found = generate(ours, ids, **options)
    assert calls.count["decode_attention"] <= 5
    assert torch.equal(found.sequences, generate(model, ids, **options).sequences)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_long_text_slides(device, way):
    """The context is read anew, by rows that have nothing in common any more."""
    model, ours = pair(device, n_layer=1, block_size=9)
    ids, mask = left_padded(2, 6, vocab_size=61)
    options = {"max_new_tokens": 9, "eos_token_id": None} | WAYS[way]
    with Calls() as calls:
        found = generate(ours, ids, mask, **options)
    assert calls.count["attention"] >= 3
    assert torch.equal(found.sequences, generate(model, ids, mask, **options).sequences)


@pytest.mark.filterwarnings("ignore:a prompt ends with padding")
@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], ids=str)
def test_a_mask_with_holes_is_pytorchs(device, mask):
    model, ours = pair(device, n_layer=1)
    ids, mask = prompts(2, 4), torch.tensor([mask, [1, 1, 1, 1]])
    options = {"max_new_tokens": 3, "num_beams": 2, "eos_token_id": None}
    with Calls() as calls:
        found = generate(ours, ids, mask, **options)
    assert not {"attention", "decode_attention"} & calls.count.keys()
    assert torch.equal(found.sequences, generate(model, ids, mask, **options).sequences)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_nothing_left_to_draw(device, kernels):
    """No token is made up, whoever draws."""
    model = GPT(GPTConfig(2, 20, 1, 1, 16, bos_token_id=0, eos_token_id=None)).to(device)
    model.use_kernels(kernels)
    options = {"do_sample": True, "noise": "counter", "seed": 1, "no_repeat_ngram_size": 1}
    with pytest.raises(ValueError, match="left to draw"):
        generate(model, torch.tensor([[0, 1]]), max_new_tokens=3, **options)
    with pytest.raises(FloatingPointError, match="left to draw"):
        generate(model, torch.tensor([[0]]), max_new_tokens=3, **options)


def test_more_new_tokens_than_the_kernel_takes_at_once(device):
    model, ours = pair(device, n_layer=1, block_size=40)
    x, _ = batch(device, T=38)
    cache = ours.new_cache(2)
    with torch.no_grad(), Calls() as calls:
        parts = [ours.hidden_states(part, cache=cache) for part in x.split([2, 35, 1], dim=1)]
        assert rms_ratio(torch.cat(parts, dim=1), model.hidden_states(x)) < BOUND
    assert calls.count["decode_attention"] == 3 + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("bf16_dots")
def test_half_precision(device, dtype):
    model, ours = pair(device, dtype=dtype, n_layer=1)
    x, _ = batch(device, T=9)
    states = []
    with torch.no_grad():
        for each in (model, ours):
            cache = each.new_cache(2, 9)
            parts = [each.hidden_states(part, cache=cache) for part in x.split([6, 1, 2], dim=1)]
            states.append(torch.cat(parts, dim=1))
    assert states[1].dtype == dtype
    assert rms_ratio(states[1], states[0]) < {torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]


# ---- what is asked for


def test_auto_on_a_cpu_is_torch():
    model = GPT(SHAPE)
    assert model.kernels == "torch"
    model.use_kernels("auto")
    assert model.kernels == "torch" == load_model("demo").kernels
    assert ops.choose_kernels("auto", "mps") == "torch"
    assert ops.describe_kernels("auto", "torch", "cpu") == ""
    assert ops.describe_kernels("torch", "torch", "cpu") == f"kernels: torch {torch.__version__}"


@pytest.mark.gpu
def test_auto_on_a_gpu_is_triton():
    assert load_model("demo", "cuda").kernels == "triton"
    assert load_model("demo", "cuda", kernels="torch").kernels == "torch"
    # heads that Triton's kernels do not take
    model = GPT(GPTConfig(61, 20, 1, 3, 24, eos_token_id=None)).cuda()
    model.use_kernels("auto")
    assert model.kernels == "torch"
    assert ops.describe_kernels("auto", "triton", "cuda").startswith("kernels: triton ")
    model = load_model("demo", "cuda")
    ids = torch.tensor([[1, 2, 3]])
    with Calls() as calls:
        generate(model, ids, max_new_tokens=3, do_sample=True, noise="counter", seed=1)
    # the second token runs the step of four layers, the third captures it
    assert calls.count["decode_step"] == 2 * 4 and calls.count["draw"] == 2


def test_auto_goes_by_the_device_the_package_and_the_heads(monkeypatch):
    assert ops.choose_kernels("auto", "cuda:1") == "triton"
    assert ops.choose_kernels("torch", "cuda") == "torch"
    assert ops.choose_kernels("auto", "cuda", 24, 3) == "torch"
    assert ops.choose_kernels("auto", "cuda", 16384, 128) == "torch"
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert ops.choose_kernels("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match=r"^kernels .* not installed"):
        ops.choose_kernels("triton", "cuda")


def test_what_cannot_be_is_said(tmp_path):
    for kernels in ("triton", "reference"):
        with pytest.raises(ValueError, match=f"for narrow weights, not {kernels}"):
            load_model("demo", "cpu", quantize="int8", kernels=kernels)
    with pytest.raises(
        ValueError, match=r"^kernels must be auto, torch, triton or reference, not 'cuda'"
    ):
        GPT(SHAPE).use_kernels("cuda")
    with pytest.raises(ValueError, match="on mps, not triton"):
        ops.choose_kernels("triton", "mps")
    save_model(GPT(GPTConfig(61, 20, 1, 3, 24, eos_token_id=None)), tmp_path)
    with pytest.raises(ValueError, match="3 heads of 8, not triton, whose heads are of 16, 32"):
        load_model(tmp_path, DEVICE, kernels="triton")


def test_an_error_in_a_kernel_is_an_error(monkeypatch):
    """PyTorch would go on; nobody asks it to."""
    _, ours = pair(DEVICE, n_layer=1)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"), torch.no_grad():
        ours.double()(torch.tensor([[1, 2]], device=DEVICE))


def child(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::RuntimeWarning", *code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_pytorchs_model_imports_no_triton():
    code = (
        "import sys, torch; from nanogpt2 import generate, load_model;"
        "model = load_model('demo', device='cpu');"
        "generate(model, torch.tensor([[1, 2]]), max_new_tokens=2, num_beams=2);"
        "model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward();"
        "assert 'triton' not in sys.modules"
    )
    ran = child(["-c", code])
    assert ran.returncode == 0, ran.stderr


SCRIPTS = [
    ["sample.py", "Hi", "--model", "demo"],
    ["sample.py", "Hi", "--model", "demo", "--classify"],
    ["train.py", "pydocs", "--init", "demo", "--out", "nowhere"],
    ["-m", "nanogpt2.evaluate", "sample.py", "--model", "demo"],
]


@pytest.mark.parametrize("argv", SCRIPTS, ids=" ".join)
def test_triton_without_a_gpu_is_wrong_use(argv):
    if "--classify" in argv:
        argv = ["nanogpt2/assets/demo" if word == "demo" else word for word in argv]
    asked = [*argv, "--kernels", "triton", "--device", "cpu"]
    ran = child(asked, TRITON_INTERPRET="0")
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: --kernels must be auto or torch on cpu, not triton")
    assert len(line) <= 200 and not Path(ROOT / "nowhere").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small byte-level model whose heads the kernels take; a text to train on."""
    monkeypatch.chdir(tmp_path)
    config = GPTConfig(257, 16, 1, 1, 16, bos_token_id=256, eos_token_id=256)
    save_model(GPT(config), tmp_path / "init", byte_tokenizer())
    (tmp_path / "book.txt").write_text("".join(f"{i} sheep jumped. " for i in range(8)))
    monkeypatch.setattr(snapshot, "SAMPLE_TOKENS", 2)
    return "init"


SAID = "kernels: triton "


def test_heads_that_the_kernels_do_not_take_are_wrong_use(capsys, folder, device):
    save_model(GPT(GPTConfig(257, 16, 1, 2, 16)), "small", byte_tokenizer())
    with pytest.raises(SystemExit) as stopped:
        run_sample("small", "Hello", "--kernels", "triton")
    line = "kernels must be auto or torch for 2 heads of 8, not triton"
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.startswith(f"error: --model {line}")
    argv = ["book.txt", "--init", "scratch", "--n_embd", "16", "--n_head", "2"]
    argv += ["--tokenizer", "bytes", "--block_size", "8", "--out", "none"]
    assert run_train(*argv, "--kernels", "triton") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: --init {line}") and len(err) <= 201
    assert not Path("none").exists()


def test_sample_says_what_runs(capsys, folder, device):
    for kernels in ("triton", "torch", "reference"):
        argv = ["Hello", "--max_new_tokens", "4", "--seed", "1", "--noise", "counter"]
        run_sample(folder, *argv, "--top_k", "9", "--do_sample", "--kernels", kernels)
    out, err = capsys.readouterr()
    assert err.count(SAID) == 1 and err.count("kernels: torch ") == 1
    assert err.count("kernels: reference (the formulas in nanogpt2/ops.py)") == 1
    # the same text three times
    assert len(out) % 3 == 0 and out == out[: len(out) // 3] * 3


def test_a_run_resumes_to_the_bit(capsys, folder, device, monkeypatch):
    """Attention's dropout too: its seed is drawn by the generator that a checkpoint holds."""
    argv = ["book.txt", "--init", folder, "--batch_size", "1", "--block_size", "8", "--lr", "0.01"]
    argv += ["--dropout", "0.2", "--kernels", "triton", "--eval_every", "2", "--steps", "4"]
    assert run_train(*argv, "--out", "whole") == 0
    assert capsys.readouterr().err.count(SAID) == 1
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run_train(*argv, "--out", "stopped") == 143
    assert run_train(*argv, "--out", "stopped", "--resume") == 0
    if device == "cpu":
        assert numbers("stopped") == numbers("whole")
    else:
        # a GPU adds up the embeddings' gradients in any order
        assert metrics("stopped")[-1]["loss"] == pytest.approx(metrics("whole")[-1]["loss"], 1e-3)


def test_a_run_resumes_with_others(capsys, folder, device, monkeypatch):
    argv = ["book.txt", "--init", folder, "--batch_size", "1", "--block_size", "8", "--lr", "0.01"]
    argv += ["--eval_every", "2", "--steps", "3"]
    assert run_train(*argv, "--out", "whole", "--kernels", "torch") == 0
    stop_after(monkeypatch, 2)
    assert run_train(*argv, "--out", "other", "--kernels", "torch") == 143
    monkeypatch.setattr(train.terminal, "Signals", lambda: SimpleNamespace(received=None))
    assert run_train("book.txt", "--out", "other", "--resume", "--kernels", "triton") == 0
    assert SAID in capsys.readouterr().err
    for found, expected in zip(metrics("other"), metrics("whole"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_evaluate_says_what_runs(capsys, folder, device):
    argv = ["book.txt", "--model", folder, "--limit", "20", "--json"]
    figures = []
    for kernels in ("triton", "torch", "reference"):
        evaluate.main(parse(evaluate.EvaluateConfig, [*argv, "--kernels", kernels]))
        shown = capsys.readouterr()
        assert f"kernels: {kernels} " in shown.err
        figures.append(json.loads(shown.out)["perplexity"])
    assert figures == pytest.approx([figures[1]] * 3, rel=1e-4)
