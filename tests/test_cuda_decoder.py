"""The decoding step as one CUDA graph, without a GPU: traced, replayed, watched.

A CUDA graph freezes every Python number of the function it captures, and cannot capture a function
that waits for the GPU. Both are shown on the CPU:

- `Traced` records the step's operations by torch.fx and replays them for the rest of the text. A
  number that ought to change is frozen there as well, and the tokens show it.
- `Watched` raises at an operation that waits for a value or makes a tensor on the host.

Each check is tried on a mistake that it must find.
"""

import contextlib
import copy
import inspect
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from reference import ROOT, left_padded
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanogpt2.config import GenerationConfig, GPTConfig
from nanogpt2.cpu import decoder as cpu
from nanogpt2.cuda import decoder as cuda
from nanogpt2.cuda import graph
from nanogpt2.generation import generate, replay
from nanogpt2.generation.request import Request, prepare
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

SHAPE = GPTConfig(61, 200, n_layer=2, n_head=2, n_embd=32, bos_token_id=60, eos_token_id=60)
COUNTER = {"do_sample": True, "noise": "counter", "seed": 3}
# every option that may be part of the graph
WAYS = {
    "greedy": {},
    "greedy, penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampled": COUNTER | {"top_k": 0},
    "sampled, three texts": COUNTER | {"temperature": 0.7, "top_k": 9, "num_return_sequences": 3},
    "sampled, top_p": COUNTER | {"top_p": 0.8, "no_repeat_ngram_size": 3},
    "sampled, other shapes": COUNTER | {"min_p": 0.05, "typical_p": 0.9, "top_h": 0.9},
    "sampled, penalties": COUNTER
    | {"repetition_penalty": 1.2, "no_repeat_ngram_size": 1, "renormalize_logits": True},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "beams that never stop early": {"num_beams": 2, "early_stopping": "never"},
    # the mission's command
    "sampled beams": COUNTER
    | {
        "num_beams": 5,
        "temperature": 0.7,
        "top_k": 50,
        "no_repeat_ngram_size": 2,
        "num_return_sequences": 2,
    },
}
MISSION = WAYS["sampled beams"]
# options that keep the choice of tokens out of the graph, and how `left_out` names them
OUTSIDE = {
    "noise hf": {"do_sample": True, "seed": 3},
    "logits_processor": {"logits_processor": [lambda ids, scores: scores - ids[:, -1:] % 2]},
    "output_scores": {"output_scores": True},
    "stopping_criteria": {"stopping_criteria": lambda ids, scores: ids[:, -1] == 7},
    "suppress_tokens": {"suppress_tokens": [1, 2]},
    "penalty_alpha": {"penalty_alpha": 0.5, "top_k": 3},
    "num_beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "force_words_ids": {"num_beams": 3, "force_words_ids": [[4]]},
    "stochastic_beams": {"num_beams": 3, "stochastic_beams": True, "seed": 1},
}


def sharp(**shape):
    """A random model, sharp enough that no two scores are nearly equal."""
    model = GPT(GPTConfig(**(SHAPE.__dict__ | shape))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.05))
    return model


class Traced(graph.Graphs):
    """Replays what torch.fx recorded of the first captured step, as CUDA replays its capture."""

    replays = 0

    def __init__(self, device):
        super().__init__(device)
        self._captures = True

    def captured(self, function):
        recorded = make_fx(lambda: function())()
        fresh = True

        def again():
            nonlocal fresh
            # the trace has run the step; a capture does not
            if not fresh:
                recorded()
                Traced.replays += 1
            fresh = False

        return again


class ForbiddenError(Exception):
    """An operation that a CUDA graph cannot hold."""


class Forbid(TorchDispatchMode):
    """Raises at operations whose result or whose size the host must read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*function.tags}
        if function == torch.ops.aten.index.Tensor:
            # of masks alone the size depends on values
            waits = [each for each in args[1] if each is not None and each.dtype == torch.bool]
        if waits:
            raise ForbiddenError(function.name())
        return function(*args, **(kwargs or {}))


class ForbidCopies(TorchFunctionMode):
    """Raises at copies to the host, which are no operation on a CPU, and at copies from it."""

    NAMES = {"cpu", "tolist", "numpy", "item", "tensor", "as_tensor", "new_tensor", "from_numpy"}
    NAMES |= {"__bool__", "__int__", "__float__", "__index__"}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, given = getattr(function, "__name__", ""), (*args, *(kwargs or {}).values())
        if name in self.NAMES or (name == "to" and "cpu" in map(str, given)):
            raise ForbiddenError(name)
        return function(*args, **(kwargs or {}))


class Watched(graph.Graphs):
    """Runs each step eagerly, and lets it do nothing that a capture forbids."""

    runs = 0

    def run(self, key, function):
        with ForbidCopies(), Forbid():
            function()
        Watched.runs += 1


@pytest.fixture
def on_cpu(monkeypatch):
    """The CUDA decoder runs on the CPU, by buckets of 8, 16, 32, ... positions."""
    monkeypatch.setattr(cpu, "can_run", lambda model: False)
    monkeypatch.setattr(cuda, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda, "LEAST_BUCKET", 8)


@pytest.fixture
def traced(on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "Graphs", Traced)
    monkeypatch.setattr(Traced, "replays", 0)


@pytest.fixture
def watched(on_cpu, monkeypatch):
    monkeypatch.setattr(cuda, "Graphs", Watched)
    monkeypatch.setattr(Watched, "runs", 0)


def tokens(model, ids, mask=None, **options):
    return generate(model, ids, mask, **options).sequences


def plain(model, ids, mask=None, **options):
    """The plain path's tokens: without the CUDA decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "DEVICES", ())
        return tokens(model, ids, mask, **options)


# ---- the same tokens


@pytest.mark.parametrize("end", [None, (3, 5, 11)], ids=["endless", "early ends"])
@pytest.mark.parametrize("way", WAYS)
def test_a_replayed_trace_writes_the_plain_paths_tokens(traced, way, end):
    """Over the borders of three buckets, with left padding, with rows that end early."""
    model = sharp()
    ids, mask = left_padded(3, 6, vocab_size=61)
    options = {"max_new_tokens": 40, "eos_token_id": end} | WAYS[way]
    expected = plain(model, ids, mask, **options)
    assert torch.equal(tokens(model, ids, mask, **options), expected)
    # of 39 steps, one before and one for each of at most four captures
    assert Traced.replays >= expected.size(1) - 6 - 1 - 2 * 4


@pytest.mark.parametrize("way", ["greedy", "sampled, penalties", "beams", "sampled beams"])
def test_a_text_longer_than_the_context(traced, way):
    """Each slide is read eagerly; the graphs go on with the same buffers."""
    model = sharp(block_size=21, n_layer=1)
    ids, mask = left_padded(2, 6, vocab_size=61)
    options = {"max_new_tokens": 50, "eos_token_id": None} | WAYS[way]
    expected = plain(model, ids, mask, **options)
    assert torch.equal(tokens(model, ids, mask, **options), expected)
    assert Traced.replays >= 20


def test_a_prompt_longer_than_the_context(traced):
    model = sharp(block_size=12, n_layer=1)
    ids, _ = left_padded(1, 30, vocab_size=61)
    options = {"max_new_tokens": 15, "eos_token_id": None}
    assert torch.equal(tokens(model, ids, **options), plain(model, ids, **options))


@pytest.mark.parametrize("outside", OUTSIDE)
def test_what_the_graph_does_not_hold_runs_after_it(traced, outside):
    model, (ids, mask) = sharp(n_layer=1), left_padded(2, 6, vocab_size=61)
    options = {"max_new_tokens": 20, "eos_token_id": None} | OUTSIDE[outside]
    torch.manual_seed(1)
    expected = plain(model, ids, mask, **options)
    torch.manual_seed(1)
    assert torch.equal(tokens(model, ids, mask, **options), expected)
    assert Traced.replays >= 10


def test_guesses_are_read_eagerly(on_cpu):
    model, ids = sharp(n_layer=1), torch.tensor([[3, 1, 4, 1, 5, 3, 1, 4]])
    options = {"max_new_tokens": 30, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
    assert torch.equal(tokens(model, ids, **options), plain(model, ids, **options))


@pytest.mark.parametrize("every", [1, 3, 16])
@pytest.mark.parametrize("way", ["sampled", "sampled beams"])
def test_the_hosts_looks_change_nothing(on_cpu, monkeypatch, way, every):
    """What came after the end, up to `every` - 1 tokens, is cut."""
    monkeypatch.setattr(replay, "EVERY", every)
    monkeypatch.setattr(replay.decode, "__defaults__", (every,))
    model, (ids, mask) = sharp(n_layer=1), left_padded(3, 6, vocab_size=61)
    for end in range(0, 60, 7):
        options = {"max_new_tokens": 23, "eos_token_id": end} | WAYS[way]
        found, expected = (each(model, ids, mask, **options) for each in (tokens, plain))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams"])
def test_stop_strings(on_cpu, way):
    """A string ends a row at the host's look; what the row wrote after it is cut."""
    model, tokenizer = sharp(vocab_size=257, n_layer=1), byte_tokenizer()
    options = {"max_new_tokens": 30, "eos_token_id": None, "tokenizer": tokenizer} | WAYS[way]
    ids = torch.tensor([[65, 66, 67], [70, 71, 72]])
    whole = plain(model, ids, **options)[0, 3:].tolist()
    text = tokenizer.decode_bytes(whole[4:6]).decode("latin-1")
    options["stop_strings"] = [text if text.isascii() else chr(b) for b in range(32, 127)][:60]
    found, expected = (each(model, ids, **options) for each in (tokens, plain))
    assert torch.equal(found, expected) and expected.size(1) < 33


def test_max_time(on_cpu, monkeypatch):
    """The clock is read for each token: the text ends where the plain path's does."""
    clock = iter(range(100))
    monkeypatch.setattr("nanogpt2.generation.stopping.time.monotonic", lambda: next(clock))
    model, (ids, _) = sharp(n_layer=1), left_padded(1, 6, vocab_size=61)
    for way in ({}, {"num_beams": 2}):
        options = {"max_new_tokens": 30, "eos_token_id": None, "max_time": 7.5} | way
        lengths = [each(model, ids, **options).size(1) for each in (plain, tokens)]
        assert lengths[0] == lengths[1] == 6 + 8


class Streamer:
    def __init__(self):
        self.seen = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.seen.append(value.clone())

    def end(self):
        self.seen.append(None)


def test_a_streamer_gets_each_token_once(on_cpu):
    model, (ids, mask) = sharp(n_layer=1), left_padded(2, 6, vocab_size=61)
    options = {"max_new_tokens": 40, "eos_token_id": (3, 5, 11)} | WAYS["sampled"]
    streamers = Streamer(), Streamer()
    for each, streamer in zip((tokens, plain), streamers, strict=True):
        each(model, ids, mask, streamer=streamer, **options)
    found, expected = (streamer.seen for streamer in streamers)
    assert len(found) == len(expected) and found[-1] is expected[-1] is None
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))


def damage(model):
    with torch.no_grad():
        # read at position 9 alone
        model.wpe.weight[9] = float("nan")


@pytest.mark.parametrize("way", ["greedy", "sampled", "beams", "sampled beams"])
def test_scores_that_are_not_finite_are_an_error(on_cpu, way):
    model, (ids, _) = sharp(n_layer=1), left_padded(1, 6, vocab_size=61)
    damage(model)
    options = {"eos_token_id": None} | WAYS[way] | {"num_return_sequences": 1}
    found, expected = (each(model, ids, max_new_tokens=4, **options) for each in (tokens, plain))
    assert torch.equal(found, expected)
    for each in (tokens, plain):
        with pytest.raises(FloatingPointError, match="not finite numbers"):
            each(model, ids, max_new_tokens=20, **options)


def test_tokens_before_the_fault_are_streamed(on_cpu):
    model, (ids, _) = sharp(n_layer=1), left_padded(1, 6, vocab_size=61)
    damage(model)
    streamers = Streamer(), Streamer()
    for each, streamer in zip((tokens, plain), streamers, strict=True):
        with pytest.raises(FloatingPointError):
            each(model, ids, max_new_tokens=20, eos_token_id=None, streamer=streamer)
    found, expected = (streamer.seen for streamer in streamers)
    assert len(found) == len(expected) == 1 + 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_left_to_draw(on_cpu):
    model = sharp(vocab_size=2, n_layer=1, bos_token_id=0, eos_token_id=None)
    options = COUNTER | {"no_repeat_ngram_size": 1, "max_new_tokens": 3}
    with pytest.raises(ValueError, match="left to draw"):
        generate(model, torch.tensor([[0, 1]]), **options)
    with pytest.raises(FloatingPointError, match="left to draw"):
        generate(model, torch.tensor([[0]]), **options)


# ---- nothing waits


@pytest.mark.parametrize("way", WAYS)
def test_a_step_neither_waits_nor_makes_a_tensor_on_the_host(watched, way):
    model, (ids, mask) = sharp(n_layer=1), left_padded(3, 6, vocab_size=61)
    options = {"max_new_tokens": 12, "eos_token_id": (3, 5, 11)} | WAYS[way]
    expected = plain(model, ids, mask, **options)
    assert torch.equal(tokens(model, ids, mask, **options), expected)
    assert Watched.runs >= min(11, expected.size(1) - 7)


class OnDevice(TorchDispatchMode):
    """Raises at an operation whose result is on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                raise ForbiddenError(f"{function.name()} on {each.device}")
        return out


@torch.no_grad()
def step_without_values(**options):
    """Run one step on tensors of another device that hold no values: what reads them cannot run."""
    with torch.device("meta"):
        model, ids = GPT(SHAPE), torch.zeros(3, 6, dtype=torch.int64)
    config = GenerationConfig(**options)
    rows = max(config.num_beams, config.num_return_sequences)
    request = Request(config, ids, ids == 0, ids[0, :2], 1, 20, SHAPE.vocab_size, rows)
    texts = (replay.Search if config.num_beams > 1 else replay.Rows)(request)
    texts._decoder = cuda.CUDADecoder(model, 3, rows, 20)
    with OnDevice():
        texts._choose_from(texts._decoder.step(16))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_stays_on_its_device(way):
    step_without_values(**WAYS[way])


# ---- each check finds its mistake


def test_a_frozen_length_is_found(traced, monkeypatch):
    """The eager step is right, and so are its tokens; a replay repeats the captured length."""
    step = cuda.CUDADecoder.step

    def frozen(self, bucket):
        self.lengths.fill_(self._length)
        return step(self, bucket)

    model, (ids, mask) = sharp(n_layer=1), left_padded(2, 6, vocab_size=61)
    options = {"max_new_tokens": 30, "eos_token_id": None}
    expected = plain(model, ids, mask, **options)
    monkeypatch.setattr(cuda.CUDADecoder, "step", frozen)
    assert not torch.equal(tokens(model, ids, mask, **options), expected)
    monkeypatch.setattr(cuda, "Graphs", graph.Graphs)
    assert torch.equal(tokens(model, ids, mask, **options), expected)


WAITS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "tensor": lambda x: x + torch.tensor(1.0),
    "new_tensor": lambda x: x + x.new_tensor(1.0),
}
ELSEWHERE = {
    "item": (lambda x: x.sum().item(), "meta tensors"),
    "cpu": (lambda x: x.cpu(), "meta tensor"),
    "arange": (lambda x: x + torch.arange(61), "arange.* on cpu"),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_step_that_leaves_its_device_is_found(monkeypatch, kind):
    scores, (leave, message) = cuda.CUDADecoder.scores, ELSEWHERE[kind]

    def leaving(self, x):
        leave(scores(self, x))
        return scores(self, x)

    monkeypatch.setattr(cuda.CUDADecoder, "scores", leaving)
    with pytest.raises((ForbiddenError, RuntimeError, NotImplementedError), match=message):
        step_without_values()


@pytest.mark.parametrize("kind", WAITS)
def test_a_hidden_wait_is_found(watched, monkeypatch, kind):
    scores = cuda.CUDADecoder.scores

    def waiting(self, x):
        WAITS[kind](x)
        return scores(self, x)

    monkeypatch.setattr(cuda.CUDADecoder, "scores", waiting)
    model, (ids, mask) = sharp(n_layer=1), left_padded(2, 6, vocab_size=61)
    with pytest.raises(ForbiddenError):
        generate(model, ids, mask, max_new_tokens=5, eos_token_id=None)


# ---- a graph that cannot be


class Broken(graph.Graphs):
    def __init__(self, device):
        super().__init__(device)
        self._captures = True

    def captured(self, function):
        raise RuntimeError("CUDA error: operation not permitted\nCompile with TORCH_USE_CUDA_DSA")


def test_without_a_graph_decoding_goes_on_and_says_so_once(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(cuda, "Graphs", Broken)
    monkeypatch.setattr(graph, "_warned", False)
    model, (ids, mask) = sharp(n_layer=1), left_padded(2, 6, vocab_size=61)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in ("greedy", "sampled beams"):
            options = {"max_new_tokens": 30, "eos_token_id": None} | WAYS[way]
            expected = plain(model, ids, mask, **options)
            assert torch.equal(tokens(model, ids, mask, **options), expected)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "warning: no CUDA graph, so decoding is slower: CUDA error: operation not permitted"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_asks_torch_for_what_it_has(monkeypatch, fails):
    """By a stand-in for torch.cuda: the arguments exist, and a failure leaves no stream behind."""
    calls, signature = [], inspect.signature(torch.cuda.graph.__init__)

    @contextlib.contextmanager
    def capture(*args, **kwargs):
        bound = signature.bind(None, *args, **kwargs).arguments
        assert (bound["pool"], bound["stream"]) == ("pool", "stream")
        calls.append(bound["capture_error_mode"])
        yield

    def step():
        calls.append("step")
        if fails and calls.count("step") == 2:
            raise RuntimeError("out of memory")

    stand_ins = {
        "device": lambda device: contextlib.nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda: "stream",
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: calls.append("replay")),
        "current_stream": lambda: "before",
        "set_stream": calls.append,
        "graph": capture,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphs = graph.Graphs(torch.device("cuda"))
    for _ in range(3):
        graphs.run("key", step)
    captured = ["step", "thread_local", "step", "before"]
    assert calls == captured + (["step", "step"] if fails else ["replay", "replay"])


# ---- what is said


def test_the_note_names_what_is_outside_the_graph(on_cpu):
    model = sharp(n_layer=1)

    def note(**options):
        user = tuple(options.pop("logits_processor", ()))
        criteria = options.pop("stopping_criteria", None)
        config, device = GenerationConfig(**options), torch.device("cpu")
        ids = torch.tensor([[1, 2, 3]])
        request = prepare(
            model.config,
            device,
            config,
            ids,
            user_processors=user,
            stopping_criteria=(criteria,) if criteria else (),
        )
        return replay.describe(model, request)

    whole = "decoding: one CUDA graph a token; the host looks every"
    assert note() == note(**MISSION) == f"{whole} 16 tokens"
    assert note(max_time=3.0) == f"{whole} 1 token"
    for name, options in OUTSIDE.items():
        assert note(**options).startswith("decoding: the model is a CUDA graph; outside it: ")
        assert name in note(**options)
    model.use_kernels("reference")
    assert note() == ""


# ---- by Triton's kernels, interpreted without a GPU

# head, ban, penalty and draw by kernels; top_p; what they do not know; beams
BY_TRITON = ["greedy, penalties", "sampled, top_p", "sampled, other shapes", "sampled beams"]


@pytest.mark.interpreted
@pytest.mark.parametrize("way", BY_TRITON)
def test_tritons_kernels_write_the_plain_paths_tokens(watched, way):
    """Also when the step is watched: nothing waits."""
    model = sharp(n_layer=1, n_head=1, n_embd=16)
    ours = copy.deepcopy(model)
    ours.use_kernels("triton")
    ids, mask = left_padded(1 if "beams" in way else 2, 6, vocab_size=61)
    options = {"max_new_tokens": 4, "eos_token_id": (3, 5, 11)} | WAYS[way]
    assert torch.equal(tokens(ours, ids, mask, **options), plain(model, ids, mask, **options))
    assert Watched.runs >= 2


@pytest.mark.interpreted
def test_scores_of_tritons_kernels_that_are_not_finite_are_an_error(on_cpu):
    model, (ids, _) = sharp(n_layer=1, n_head=1, n_embd=16), left_padded(1, 8, vocab_size=61)
    damage(model)
    model.use_kernels("triton")
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="not finite numbers"):
        generate(model, ids, max_new_tokens=4, eos_token_id=None)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("way", WAYS)
def test_a_gpus_graph_writes_the_plain_paths_tokens(monkeypatch, capsys, way, kernels):
    monkeypatch.setattr(cuda, "LEAST_BUCKET", 16)
    monkeypatch.setattr(graph, "_warned", False)
    model, (ids, mask) = sharp(), left_padded(2, 6, vocab_size=61)
    options = {"max_new_tokens": 40, "eos_token_id": (3, 5, 11)} | WAYS[way]
    expected = plain(model, ids, mask, **options)
    ours = model.cuda()
    ours.use_kernels(kernels)
    assert torch.equal(tokens(ours, ids, mask, **options), expected)
    # no capture has failed
    assert capsys.readouterr().err == ""


# ---- launches, recorded without a GPU


def step_launches(*arguments):
    """The table of tests/step_launches.py, from a process that does not interpret its kernels."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, "-W", "error", str(ROOT / "tests/step_launches.py"), *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def launched():
    return step_launches()


def above_66(table):
    """The ways of choosing whose step takes more launches: the layers' five each, and six more."""
    return {name for name, found in table.items() if sum(found["launches"].values()) > 66}


def test_a_token_of_the_124m_takes_66_launches(launched):
    for name, found in launched.items():
        counts = found["launches"]
        assert counts["_decode_linear_kernel"] == 4 * 12, name
        assert counts["_decode_step_kernel"] == 12, name
    assert not above_66(launched), launched


@pytest.mark.parametrize("mistake", ["copy once", "add residuals apart"])
def test_a_launch_too_many_is_found(mistake):
    assert above_66(step_launches("--mistake", mistake)) == {"greedy"}


def compiled_later(table):
    """The variants that are met after the first step of the first text."""
    found = []
    for name, row in table.items():
        first, second = row["variants"]
        # a prompt of 7 tokens
        found += [(name, length, kernel) for length, kernel in first if length > 7]
        found += [(name, length, kernel) for length, kernel in second]
    return found


def test_no_kernel_is_compiled_after_a_first_step(launched):
    """Over the borders of three buckets; for a second text of another length and start."""
    assert not compiled_later(launched)
    for name, found in launched.items():
        kernels = [kernel for _, kernel in found["variants"][0]]
        assert kernels.count("_decode_step_kernel") == 3 and len(kernels) >= 9, name


@pytest.mark.parametrize("mistake", ["changing splits", "compile late"])
def test_a_kernel_that_is_compiled_later_is_found(mistake):
    assert compiled_later(step_launches("--mistake", mistake))
