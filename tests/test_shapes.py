"""GPT-2 of other shapes than OpenAI's against transformers, by every way that runs a model.

An MLP of another width, erf GELU, scaled or unscaled scores, a head of its own: each alone, then
all at once.
"""

import copy
import json
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from lora_reference import adapted, quietly
from reference import (
    TINY,
    assert_parity,
    backward,
    force_layout,
    hf_model,
    left_padded,
    prompts,
    rewrite,
    run_module,
    run_script,
    settings,
    update,
)
from safetensors.torch import load_file
from test_cuda_decoder import MISSION, WAYS, Traced, Watched, plain, tokens
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)
from transformers.activations import ACT2FN

from nanogpt2 import GPT, GPTClassifier, generate, load_generator, load_model, ops, save_model
from nanogpt2.checkpoints.load import load_classifier
from nanogpt2.config import SCHEMES, GPTConfig
from nanogpt2.cpu import decoder as cpu
from nanogpt2.cpu import native, prepared
from nanogpt2.cpu.inference_model import InferenceGPT, pack
from nanogpt2.cpu.layouts import FLOAT
from nanogpt2.cpu.training import install
from nanogpt2.cuda import decoder as cuda
from nanogpt2.inspect import attention_maps, logit_lens
from nanogpt2.terminal import note_once
from nanogpt2.training.adapter import load_adapter, save_adapter
from nanogpt2.training.distributed import World
from nanogpt2.training.estimate import memory_estimate, model_flops
from nanogpt2.training.lora import merged
from nanogpt2.training.optim import make_optimizers
from nanogpt2.training.trainer import Trainer

# three layers, so that the scores' scales are not powers of 2; heads that Triton's kernels take
BASE = replace(TINY, n_layer=3, n_head=2, n_embd=32)
ALONE = {
    "narrow MLP": {"n_inner": 7},
    "wide MLP": {"n_inner": 141},
    "erf GELU": {"activation_function": "gelu"},
    "scores by layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled scores": {"scale_attn_weights": False},
    "untied head": {"tie_word_embeddings": False},
}
ALL = {
    "n_inner": 45,
    "activation_function": "gelu",
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "tie_word_embeddings": False,
}
SHAPES = ALONE | {"all at once": ALL}
IDS = prompts(3, 9)
NEAR = {"rtol": 1e-4, "atol": 1e-4}
each_shape = pytest.mark.parametrize("shape", SHAPES)
# the interpreter takes half a minute for a shape
SOME = [
    *((shape, kernels) for kernels in ("reference", "torch") for shape in SHAPES),
    ("all at once", "triton"),
    *(pytest.param(shape, "triton", marks=pytest.mark.slow) for shape in ALONE),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By shape: a folder as transformers writes it."""
    found = {}
    for name, options in SHAPES.items():
        found[name] = tmp_path_factory.mktemp("shape")
        hf_model(BASE, **options).save_pretrained(found[name])
    return found


@pytest.fixture
def folder(folders, shape):
    return folders[shape]


@pytest.fixture
def theirs(folder):
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **(NEAR | tolerance))


def their_gradients(theirs):
    """The mean loss of IDS's tokens from the second on, and its gradients by our names."""
    loss = theirs(IDS, labels=IDS).loss
    loss.backward()
    found = {}
    for name, p in theirs.named_parameters():
        conv = name.endswith("weight") and any(n in name for n in ("c_attn", "c_fc", "c_proj"))
        found[name.removeprefix("transformer.")] = p.grad.t() if conv else p.grad
    return loss.detach(), found


def our_gradients(model, loss=None):
    (model(IDS[:, :-1], IDS[:, 1:]) if loss is None else loss).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)


# ---- logits, losses, gradients


@pytest.mark.parametrize(("shape", "kernels"), SOME)
def test_logits_losses_and_gradients_are_transformers(folder, theirs, kernels):
    model = load_model(folder, kernels=kernels)
    assert model.kernels == kernels
    with torch.no_grad():
        close(model(IDS), theirs(IDS).logits)
    loss, gradients = their_gradients(theirs)
    model.train()
    close(model(IDS[:, :-1], IDS[:, 1:]).detach(), loss, atol=1e-5)
    same_gradients(our_gradients(model), gradients)


@each_shape
def test_what_a_cpu_installs_and_what_a_compiler_makes_train_the_same(folder, theirs):
    _, gradients = their_gradients(theirs)
    model = load_model(folder).train()
    install(model, add_lookups=True)
    same_gradients(our_gradients(model), gradients)
    model = load_model(folder).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = F.cross_entropy(compiled(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
    same_gradients(our_gradients(model, loss), gradients)


@each_shape
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_as_near_as_transformers(folder, dtype):
    """Beside float32 ours is not much further off than theirs in the same type."""
    with torch.no_grad():
        exact = GPT2LMHeadModel.from_pretrained(folder).eval()(IDS).logits
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()(IDS).logits
        for kernels in ("reference", "torch"):
            ours = load_model(folder, dtype=dtype, kernels=kernels)(IDS)
            assert ours.dtype == getattr(torch, dtype)
            error, limit = ((x.float() - exact).norm() for x in (ours, theirs))
            assert error < 1.5 * limit


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_scores_in_float32_where_they_are_asked_for(tmp_path, dtype):
    """reorder_and_upcast_attn: ours are float32 anyway, so the flag changes nothing."""
    options = {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}
    hf_model(BASE, **options).save_pretrained(tmp_path)
    load = partial(GPT2LMHeadModel.from_pretrained, tmp_path, attn_implementation="eager")
    ours = load_model(tmp_path, dtype=dtype)
    with torch.no_grad():
        exact, theirs = (load(dtype=d).eval()(IDS).logits.float() for d in ("float32", dtype))
        found = ours(IDS).float()
    if dtype == "float32":
        close(found, exact)
    else:
        assert (found - exact).norm() < 1.5 * (theirs - exact).norm()


def test_unscaled_scores_that_float16_does_not_hold(tmp_path):
    """The formulas too compute them in float32: scores of 10^5 end in softmax, not in inf."""
    theirs = hf_model(BASE, scale_attn_weights=False)
    with torch.no_grad():
        for block in theirs.transformer.h:
            block.attn.c_attn.bias[:64] = 150.0
    theirs.save_pretrained(tmp_path)
    for kernels in ("reference", "torch"):
        assert load_model(tmp_path, dtype="float16", kernels=kernels)(IDS).isfinite().all()


# ---- generation

DECODED = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3, "length_penalty": 0.5, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3, "temperature": 0.7},
    "past the context": {"max_new_tokens": 40},
}


@each_shape
@pytest.mark.parametrize("way", [*DECODED])
@pytest.mark.parametrize("by", ["CPUDecoder", "model.py", "load_generator", "tiles"])
def test_the_tokens_are_transformers(folder, theirs, monkeypatch, by, way):
    monkeypatch.setattr(prepared, "table_for", prepared.table_for)
    if by == "tiles":
        force_layout("tiles_64")
    if by == "model.py":
        monkeypatch.setattr(cpu, "can_run", lambda model: False)
    model = load_model(folder) if by in ("CPUDecoder", "model.py") else load_generator(folder)
    ids, mask = left_padded(3, 6)
    options = {"max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0} | DECODED[way]
    if way == "past the context":
        # transformers ends there: what follows is held to our own plain path
        assert model.config.block_size < 6 + 40
        options["max_new_tokens"] = 31
    found = assert_parity((model, theirs), ids, mask, seed=5, **options)
    assert found.sequences.size(1) == 6 + options["max_new_tokens"]


@each_shape
@pytest.mark.parametrize("layout", FLOAT)
def test_every_layout_computes_it(folder, theirs, monkeypatch, layout):
    monkeypatch.setattr(prepared, "table_for", prepared.table_for)
    force_layout(layout)
    model = load_generator(folder)
    assert_parity((model, theirs), IDS[:1], max_new_tokens=12, eos_token_id=None)
    if layout != "rows":
        assert {p.layout for p in prepared.prepared_for(model).products()} == {layout}


@pytest.fixture
def on_cpu(monkeypatch):
    """As test_cuda_decoder.py runs the step of a GPU without one."""
    monkeypatch.setattr(cpu, "can_run", lambda model: False)
    monkeypatch.setattr(cuda, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda, "LEAST_BUCKET", 8)


@each_shape
@pytest.mark.parametrize("kind", [Traced, Watched])
def test_the_step_of_a_gpu_writes_the_same_tokens(folder, on_cpu, monkeypatch, kind):
    monkeypatch.setattr(cuda, "Graphs", kind)
    counted = "replays" if kind is Traced else "runs"
    monkeypatch.setattr(kind, counted, 0)
    model, (ids, mask) = load_model(folder), left_padded(2, 4)
    for way in ({}, WAYS["sampled"], MISSION):
        options = {"max_new_tokens": 25, "eos_token_id": None} | way
        expected = plain(model, ids, mask, **options)
        assert torch.equal(tokens(model, ids, mask, **options), expected)
    assert getattr(kind, counted) > 20


@pytest.mark.parametrize(("shape", "kernels"), [e for e in SOME if "triton" in str(e)])
def test_the_step_of_a_gpu_by_tritons_kernels(folder, on_cpu, kernels):
    model, ids = load_model(folder, kernels=kernels), IDS[:1, :3]
    found = tokens(model, ids, max_new_tokens=4, eos_token_id=None)
    expected = plain(load_model(folder), ids, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(found, expected)


def test_the_blocks_in_c_compute_every_shape_but_erf_gelu(folders, monkeypatch):
    monkeypatch.setattr(prepared, "PAYS_AFTER", 1)
    native.compile_library()
    for shape, folder in folders.items():
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
        for model in (load_model(folder), load_generator(folder)):
            assert_parity((model, theirs), IDS[:1], max_new_tokens=15, eos_token_id=None)
            has_blocks = prepared.prepared_for(model).blocks is not None
            assert has_blocks == (model.config.activation_function == "gelu_new"), shape


# ---- narrow weights, copies, files


def same_parts(found, expected):
    found, expected = dict(found), dict(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@each_shape
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_model_for_generating_keeps_its_shape(folder, theirs, tmp_path, scheme):
    model = load_generator(folder, quantize=scheme)
    assert isinstance(model, InferenceGPT)
    with torch.no_grad():
        expected = theirs(IDS).logits
    error = (model(IDS) - expected).norm() / expected.norm()
    assert error < {None: 1e-5, "fp16": 2e-3, "int8": 0.1}[scheme]
    close(model(IDS, IDS), F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()))
    # one row alone, and among others
    single = generate(model, IDS[:1], max_new_tokens=9, eos_token_id=None).sequences
    assert torch.equal(
        generate(model, IDS, max_new_tokens=9, eos_token_id=None).sequences[:1], single
    )
    # read from the file, packed in memory, copied, pickled, saved and read again: the same
    packed = pack(load_model(folder), scheme)
    same_parts(packed.stored(), model.stored())
    save_model(model, tmp_path)
    again = load_generator(tmp_path, quantize=scheme)
    options = {"max_new_tokens": 9, "eos_token_id": None}
    texts = generate(model, IDS, **options).sequences
    for twin in (packed, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), again):
        same_parts(twin.stored(), model.stored())
        assert twin.config == model.config
        assert torch.equal(twin(IDS), model(IDS))
        assert torch.equal(generate(twin, IDS, **options).sequences, texts)


@each_shape
@pytest.mark.parametrize("way", ["ours", "half", "compiled", "fp16"])
def test_what_is_saved_is_the_same_model_to_transformers(folder, theirs, tmp_path, way):
    model = load_model(folder, quantize="fp16" if way == "fp16" else None)
    if way == "half":
        model, theirs = model.half(), theirs.half()
    compiled = torch.compile(model, backend="eager") if way == "compiled" else model
    save_model(compiled, tmp_path)
    again, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    expected = theirs.state_dict()
    for name, tensor in again.state_dict().items():
        if way == "fp16":
            close(tensor.float(), expected[name], rtol=1e-3)
        else:
            assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    with torch.no_grad():
        if way in ("ours", "compiled"):
            close(again.eval()(IDS).logits, model(IDS))
    for name in (*ALL, "reorder_and_upcast_attn"):
        assert getattr(again.config, name) == getattr(theirs.config, name), name
    assert load_model(tmp_path, quantize="int8").config == model.config


def test_openais_shape_is_stated_as_ever(tmp_path):
    save_model(GPT(TINY), tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert not stated.keys() & ALL.keys() - {"activation_function"}
    assert stated["activation_function"] == "gelu_new"
    assert load_model(tmp_path).config == TINY


@pytest.mark.parametrize("shards", [False, True])
def test_an_untied_head_in_other_files(folders, tmp_path, shards):
    """Without a prefix; in shards, the head in another file than the embedding."""
    theirs = GPT2LMHeadModel.from_pretrained(folders["untied head"]).eval()
    if shards:
        theirs.save_pretrained(tmp_path / "model", max_shard_size="9KB")
        assert len([*(tmp_path / "model").glob("model-*.safetensors")]) > 2
    else:
        rewrite(
            folders["untied head"],
            tmp_path / "model",
            lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()},
        )
    for load in (load_model, load_generator, partial(load_model, dtype="bfloat16")):
        model = load(tmp_path / "model")
        assert not torch.equal(model.wte(torch.arange(61)), theirs.lm_head.weight)
        with torch.no_grad():
            wide = model(IDS).dtype == torch.float32
            close(model(IDS).float(), theirs(IDS).logits, **({} if wide else {"atol": 1.0}))


# ---- training


@each_shape
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_trains_every_parameter_as_a_plain_loop_does(folder, optimizer):
    x, y = IDS[:, :-1], IDS[:, 1:]
    model, plain_model = load_model(folder), load_model(folder).train()
    trainer = Trainer(settings(optimizer=optimizer), model, World("cpu"))
    optimizers = make_optimizers(plain_model, optimizer, 1e-2, trainer.config.weight_decay)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        loss, plain_loss = backward(trainer, x, y), plain_model(x, y)
        close(loss, plain_loss.detach(), rtol=1e-3)
        update(trainer, 1e-2)
        plain_loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    held = [p for each in optimizers for g in each.param_groups for p in g["params"]]
    assert len(held) == len({*map(id, held)}) == len(before)
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


@each_shape
def test_lora_and_pefts_adapters(folder, tmp_path):
    from peft import PeftModel

    ours = adapted(load_model(folder))
    save_adapter(ours, tmp_path, str(folder))
    theirs = GPT2LMHeadModel.from_pretrained(folder)
    theirs = quietly(PeftModel.from_pretrained, theirs, tmp_path).eval()
    again = load_model(folder)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        expected = theirs(IDS).logits
        for model in (ours, again, merged(ours), pack(merged(ours))):
            close(model(IDS), expected)
    found = generate(ours.eval(), IDS, max_new_tokens=9, eos_token_id=None).sequences
    # without a mask, theirs would take token 0 for padding
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    again = theirs.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=9, **options)
    assert torch.equal(found, again)


@each_shape
def test_classifiers_have_no_head_for_tokens(folder, tmp_path, shape):
    theirs = GPT2ForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    model = load_classifier(tmp_path / "theirs")
    assert {n.split(".")[0] for n in model.state_dict()} == {"transformer", "score"}
    ids = IDS[:, :7].clamp(min=1)
    with torch.no_grad():
        close(model(ids)[:, -1], theirs(ids).logits)
    # a new one, made of the language model
    made = GPTClassifier(load_model(folder), ("a", "b", "c")).eval()
    made.score.load_state_dict(model.score.state_dict())
    assert made.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(made(ids), model(ids))
    made(ids, ids % 3).backward()
    assert all(p.grad is not None for p in made.parameters())
    save_model(made, tmp_path / "made")
    again, info = GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "made", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        close(again.eval()(ids).logits, theirs(ids).logits)


@pytest.fixture
def of_bytes(tmp_path):
    """A byte-level model of another shape, and a text to train it on."""
    shape = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=16, **ALL)
    shape = replace(shape, bos_token_id=256, eos_token_id=256)
    torch.manual_seed(0)
    save_model(GPT(shape), tmp_path / "base")
    text = "".join(f"{i} sheep jumped over the fence. " for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    return tmp_path, shape


def test_runs_stop_resume_and_are_read_by_transformers(of_bytes):
    home, shape = of_bytes
    argv = ["book.txt", "--init", "base", "--batch_size", "2", "--schedule", "constant"]
    argv += ["--seed", "3", "--warmup", "0", "--lr", "0.01", "--eval_every", "2"]
    for out, *flags in (["whole", "--steps", "6"], ["parts", "--steps", "3"]):
        done = run_script("train.py", *argv, "--out", out, *flags, cwd=home)
        assert done.returncode == 0, done.stderr
    done = run_script("train.py", *argv, "--out", "parts", "--steps", "6", "--resume", cwd=home)
    assert done.returncode == 0, done.stderr
    whole, parts = (load_file(home / out / "model.safetensors") for out in ("whole", "parts"))
    assert "lm_head.weight" in whole and whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    ours, theirs = load_model(home / "whole"), GPT2LMHeadModel.from_pretrained(home / "whole")
    assert ours.config == shape
    ids = torch.randint(257, (2, 16))
    with torch.no_grad():
        close(ours(ids), theirs.eval()(ids).logits)


def test_the_commands_take_them(of_bytes):
    home, _ = of_bytes
    argv = ["nanogpt2.quantize", "base", "--text", "book.txt", "--limit", "300", "--out", "narrow"]
    done = run_module(*argv, "--json", cwd=home)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert json.loads(done.stdout)["top1_agreement"] > 0.8
    sample = ["sample.py", "7 sheep", "--max_new_tokens", "12", "--seed", "1"]
    for flags in (["base"], ["narrow"], ["base", "--kernels", "reference"], ["base", "--explain"]):
        done = run_script(*sample, "--model", *flags, cwd=home)
        assert done.returncode == 0 and done.stdout, done.stderr


# ---- the inside, and sizes


@each_shape
def test_the_inside_is_transformers(folder):
    theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(IDS[:1], output_attentions=True)
    for model in (load_model(folder), load_generator(folder)):
        close(attention_maps(model, IDS[0]), torch.cat(expected.attentions))
        lens = logit_lens(model, IDS[0], k=61)
        last = expected.logits[0].softmax(1).gather(1, lens.ids[-1])
        close(lens.probabilities[-1], last)


@each_shape
def test_parameters_memory_and_arithmetic_are_counted(folder, shape):
    config = load_model(folder).config
    model = GPT(config)
    assert config.n_parameters == sum(p.numel() for p in model.parameters())
    usual = replace(config, **{name: getattr(GPTConfig, name) for name in ALL})
    more = config.n_parameters - usual.n_parameters
    tokens_, C = 2 * 8, config.n_embd
    # an embedding that is only looked up is never multiplied
    unused = 0 if config.tie_word_embeddings else 61 * C
    flops = model_flops(config, tokens_, 8) - model_flops(usual, tokens_, 8)
    assert flops == 6 * tokens_ * (more - unused)
    # weights and moments; 8 bytes of activations for each number between the two matrices
    estimates = [memory_estimate(c, 512, 8, device="cuda") for c in (config, usual)]
    width = config.mlp_width - usual.mlp_width
    assert estimates[0] - estimates[1] == 12 * more + 512 * 8 * 3 * 8 * width
    # the initial weights, at their own scale
    if shape == "untied head":
        assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)


# ---- what is refused, and what is left out


@pytest.mark.parametrize("name", ACT2FN)
def test_activations_are_taken_by_what_they_compute(tmp_path, name):
    x = torch.linspace(-12, 12, 2001)
    forms = {a: F.gelu(x, approximate=a) for a in ("tanh", "none")}
    try:
        found = ACT2FN[name](x)
        same = [a for a, y in forms.items() if torch.allclose(found, y, atol=1e-5, rtol=1e-5)]
    except TypeError:
        same = []  # it has parameters of its own
    hf_model(BASE).save_pretrained(tmp_path)
    edit(tmp_path, activation_function=name)
    if same:
        assert load_model(tmp_path).h[0].mlp.approximate == same[0]
    else:
        message = f"activation_function must be one of gelu_new, gelu, not '{name}'"
        refused(tmp_path, message, "config.json")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, *parts, load=load_model):
    with pytest.raises(ValueError) as raised:
        load(folder)
    line = str(raised.value)
    assert "\n" not in line and len(line.replace(str(folder), "model")) < 190, line
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_inner": 0}, "n_inner must be a whole number >= 1 or none, not 0"),
        ({"n_inner": -3}, "n_inner must be"),
        ({"n_inner": "big"}, "n_inner must be a whole number >= 1 or none, not 'big'"),
        ({"n_inner": 128.0}, "n_inner must be"),
        ({"n_inner": True}, "n_inner must be"),
        ({"n_inner": 2**31 - 1, "n_layer": 999}, "n_inner 2147483647 makes"),
        ({"n_inner": 77}, "n_inner is 77, but 128 by the tensors of model.safetensors"),
        ({"activation_function": None}, "activation_function must be one of gelu_new, gelu"),
        ({"activation_function": ["gelu"]}, "activation_function must be one of gelu_new, gelu"),
        ({"activation_function": {}}, "activation_function must be one of gelu_new, gelu"),
        ({"scale_attn_weights": "no"}, "scale_attn_weights must be true or false, not 'no'"),
        ({"scale_attn_weights": None}, "scale_attn_weights must be true or false"),
        ({"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx must be true or"),
        ({"tie_word_embeddings": "x" * 10**6}, "tie_word_embeddings must be true or false"),
        ({"tie_word_embeddings": False}, "tensor lm_head.weight is missing"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, not True"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head, not 32 / 5"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be a finite number > 0, not 0"),
        ({"model_type": "gpt_neo"}, "model_type must be 'gpt2', not 'gpt_neo': GPT-Neo"),
        ({"model_type": "gptj"}, "not 'gptj': GPT-J, with rotary positions"),
        ({"model_type": "gpt_bigcode"}, "not 'gpt_bigcode': GPTBigCode"),
        ({"model_type": "imagegpt"}, "not 'imagegpt': Image GPT"),
        ({"model_type": "openai-gpt"}, "not 'openai-gpt': the first GPT"),
        ({"model_type": "llama"}, "model_type must be 'gpt2', not 'llama'"),
        ({"model_type": ["gpt2"]}, "model_type must be 'gpt2', not ['gpt2']"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("load", [load_model, load_generator])
def test_another_architecture_is_named(tmp_path, changes, said, load):
    hf_model(BASE).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    refused(tmp_path, said, load=load)


def test_two_ids_that_begin_a_text_are_refused_by_file(tmp_path):
    hf_model(BASE).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    edit(tmp_path, bos_token_id=[1, 2])
    refused(tmp_path, "config.json': bos_token_id must be a whole number >= 0 or none, not (1, 2)")


@pytest.mark.parametrize("stated", [None, 4 * 32])
def test_the_usual_width_may_be_stated(tmp_path, stated):
    hf_model(BASE).save_pretrained(tmp_path)
    edit(tmp_path, n_inner=stated)
    assert load_model(tmp_path).config.mlp_width == 128


@pytest.mark.parametrize("load", [load_model, load_generator])
def test_heads_of_their_own_must_be_stated(folders, tmp_path, load):
    rewrite(folders["untied head"], tmp_path / "model", dict)
    edit(tmp_path / "model", tie_word_embeddings=True)
    refused(tmp_path / "model", "lm_head.weight must equal wte.weight, unless config", load=load)


@pytest.mark.parametrize(
    "kind", [GPT2ForTokenClassification, GPT2ForQuestionAnswering], ids=lambda kind: kind.__name__
)
def test_other_heads_are_named(tmp_path, kind):
    config = GPT2Config(vocab_size=61, n_positions=37, n_layer=1, n_head=2, n_embd=16)
    kind(config).save_pretrained(tmp_path)
    refused(tmp_path, f"is the head of {kind.__name__}, which is not supported")
    refused(tmp_path, kind.__name__, load=load_classifier)


@pytest.fixture
def second_head(tmp_path):
    theirs = hf_model(BASE)
    config = GPT2Config(**(theirs.config.to_dict() | {"num_labels": 1}))
    model = GPT2DoubleHeadsModel(config)
    model.transformer.load_state_dict(theirs.transformer.state_dict())
    model.save_pretrained(tmp_path)
    assert any("multiple_choice_head" in n for n in load_file(tmp_path / "model.safetensors"))
    note_once.cache_clear()
    return tmp_path, theirs


def test_a_second_head_is_left_out_and_said(second_head, capsys):
    folder, theirs = second_head
    for load in (load_model, load_generator):
        with torch.no_grad():
            close(load(folder)(IDS), theirs(IDS).logits)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{str(folder)!r}: its second head, multiple_choice_head.*, is left out"]


def test_a_second_head_too_large_is_refused_before_it_is_read(second_head, tmp_path_factory):
    folder, _ = second_head
    other = tmp_path_factory.mktemp("other") / "model"
    rewrite(folder, other, lambda t: t | {"multiple_choice_head.x": torch.zeros(33, 32)})
    refused(other, "multiple_choice_head.x' must have 1,024 numbers at most, not 1,056")


def test_erf_gelu_has_no_kernel(monkeypatch):
    """Under "triton" it is PyTorch's; tanh GELU is the kernel's."""
    monkeypatch.setattr("nanogpt2.kernels.gelu.gelu", lambda x: torch.zeros_like(x))
    x = torch.randn(3, 5)
    exact = F.gelu(x)
    assert torch.equal(ops.gelu(x, "triton", "none"), exact)
    assert not ops.gelu(x, "triton").any()
    close(ops.gelu(x, "reference", "none"), exact, atol=1e-6, rtol=1e-6)
