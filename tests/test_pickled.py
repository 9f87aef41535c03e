"""pytorch_model.bin, ckpt.pt and model.pt: read as what they are, or refused in one line."""

import builtins
import collections
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from reference import ROOT, TINY, hf_model, run_module, run_script
from safetensors.torch import load_file
from saved_files import (
    Karpathy,
    as_linear,
    config_json,
    llmc,
    mutant,
    nanogpt,
    pickle_of,
    repacked,
    saved_bytes,
    their_state,
    with_pickle,
)

from nanogpt2 import GPTConfig, generate, load_model, open_checkpoint, save_model
from nanogpt2.checkpoints import pickled
from nanogpt2.checkpoints.archive import LONGEST_PICKLE
from nanogpt2.checkpoints.folder import digest_ahead
from nanogpt2.checkpoints.load import load_generator, load_tokenizer

IDS = torch.randint(TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
SMALL = GPTConfig(3, 4, 1, 1, 2, bos_token_id=0, eos_token_id=0)
OLD = {"_use_new_zipfile_serialization": False}
CONTAINERS = {"zip": {}, "old": OLD}


def home(path, data, name="pytorch_model.bin", config=TINY, **stated):
    """A folder with a file and config.json."""
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(data)
    (path / "config.json").write_text(config_json(config, **stated))
    return path


def check_logits(source, expected, **options):
    for load in (load_model, load_generator):
        with torch.no_grad():
            torch.testing.assert_close(load(source)(IDS), expected, atol=1e-4, rtol=1e-4)


def refusal(source):
    """The line that says why a model is not loaded."""
    with pytest.raises(ValueError) as raised:
        load_model(source)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 350, line
    return line


# ---- what transformers wrote


def without_prefix(state):
    return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}


def without_head(state):
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


def with_masks(state):
    mask = torch.ones(1, 1, TINY.block_size, TINY.block_size, dtype=torch.uint8).tril()
    masks = {f"transformer.h.{i}.attn.bias": mask for i in range(TINY.n_layer)}
    bias = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(TINY.n_layer)}
    return state | masks | bias


CHANGES = [
    collections.OrderedDict,
    without_prefix,
    without_head,
    with_masks,
    lambda s: without_head(without_prefix(with_masks(s))),
    as_linear,
    lambda s: {f"module.{n}": torch.nn.Parameter(t) for n, t in s.items()},
    lambda s: {"state_dict": s, "epoch": 3},
    lambda s: {"model_state_dict": s, "optimizer": {"state": {0: torch.zeros(9)}}},
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_naming_in_every_container(tmp_path, change, container):
    state, logits = their_state()
    data = saved_bytes(change(state), **CONTAINERS[container])
    if container == "old" and change is CHANGES[-1]:
        # no tensor of the model has the optimizer's storage, so its size is unknown
        assert "no tensor uses its storage" in refusal(home(tmp_path / "m", data))
        return
    check_logits(home(tmp_path / "m", data), logits(IDS))
    # the file alone, its config.json beside it
    check_logits(tmp_path / "m/pytorch_model.bin", logits(IDS))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.05), (torch.bfloat16, 0.5)])
def test_half_precision(tmp_path, container, dtype, tolerance):
    state, logits = their_state()
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    folder = home(tmp_path / "m", saved_bytes(half, **CONTAINERS[container]))
    for load in (load_model, load_generator):
        model = load(folder)
        torch.testing.assert_close(model(IDS), logits(IDS), atol=tolerance, rtol=tolerance)
    narrow = load_model(folder, dtype=str(dtype).removeprefix("torch."))
    for name, tensor in narrow.state_dict().items():
        theirs = half[f"transformer.{name}"]
        assert torch.equal(tensor, theirs.t() if name.endswith(pickled.TRANSPOSED) else theirs)


def test_the_same_tokens_as_transformers(tmp_path):
    theirs = hf_model()
    folder = home(tmp_path / "m", saved_bytes(theirs.state_dict()))
    options = {"max_new_tokens": 20, "do_sample": False}
    for model in (load_model(folder), load_generator(folder)):
        for beams in (1, 3):
            ours = generate(model, IDS, num_beams=beams, eos_token_id=None, **options)
            expected = theirs.generate(IDS, num_beams=beams, eos_token_id=None, **options)
            assert torch.equal(ours.sequences, expected)


@pytest.mark.parametrize("scheme", ["fp16", "int8"])
def test_narrow_weights(tmp_path, scheme):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path / "st")
    folder = home(tmp_path / "m", saved_bytes(theirs.state_dict()))
    models = [load_model(f, quantize=scheme) for f in (folder, tmp_path / "st")]
    assert torch.equal(models[0](IDS), models[1](IDS))


def sharded(folder, state, parts=3, **options):
    folder.mkdir(exist_ok=True)
    names, weight_map = [*state], {}
    for i in range(parts):
        file = f"pytorch_model-{i + 1:05}-of-{parts:05}.bin"
        part = {name: state[name] for name in names[i::parts]}
        (folder / file).write_bytes(saved_bytes(part, **options))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(config_json())


def test_shards_of_projections_out_in(tmp_path):
    """One shard's c_attn tells for all: a square c_proj beside none looks alike both ways."""
    state, logits = their_state()
    turned = {
        name: t.t().contiguous() if name.endswith(pickled.TRANSPOSED) else t
        for name, t in state.items()
    }
    apart = [name for name in turned if name.endswith("attn.c_proj.weight")]
    # the shards take every third name, so the projections meet in the first
    names = [name for name in turned if name not in apart]
    order = [x for i, name in enumerate(apart) for x in (name, *names[2 * i : 2 * i + 2])]
    order += names[2 * len(apart) :]
    assert apart == order[: 3 * len(apart) : 3]
    sharded(tmp_path, {name: turned[name] for name in order})
    check_logits(tmp_path, logits(IDS))


@pytest.mark.parametrize("container", CONTAINERS)
def test_shards(tmp_path, container):
    state, logits = their_state()
    sharded(tmp_path, state, **CONTAINERS[container])
    check_logits(tmp_path, logits(IDS))
    shard = tmp_path / "pytorch_model-00002-of-00003.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    assert shard.name in refusal(tmp_path)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load_model(tmp_path)
    shard.write_bytes(whole)
    index = tmp_path / "pytorch_model.bin.index.json"
    for text in ("{}", '{"weight_map": {"a": "../x.bin"}}', "["):
        index.write_text(text)
        assert "index" in refusal(tmp_path)


def test_safetensors_wins(tmp_path):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"no model")
    torch.testing.assert_close(load_model(tmp_path)(IDS), theirs(IDS).logits)
    (tmp_path / "model.safetensors").unlink()
    assert "pytorch_model.bin" in refusal(tmp_path)


def test_a_classifier(tmp_path):
    state = without_prefix(without_head(their_state()[0]))
    state["score.weight"] = torch.randn(2, TINY.n_embd)
    labels = {"id2label": {"0": "bad", "1": "good"}}
    folder = home(tmp_path / "m", saved_bytes(state), **labels)
    with open_checkpoint(folder) as checkpoint:
        model = checkpoint.classifier()
    assert model.labels == ("bad", "good") and torch.equal(
        model.score.weight, state["score.weight"]
    )


def test_the_model_can_be_saved(tmp_path):
    state, logits = their_state()
    model = load_model(home(tmp_path / "m", saved_bytes(state)))
    save_model(model, tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    check_logits(tmp_path / "out", logits(IDS))


# ---- nanoGPT and minGPT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("optimizer", [True, False])
def test_nanogpts_checkpoint(tmp_path, bias, optimizer):
    saved, model = nanogpt(bias=bias, optimizer=optimizer)
    (tmp_path / "ckpt.pt").write_bytes(saved_bytes(saved))
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        check_logits(source, model(IDS))
    config = load_model(tmp_path).config
    assert (config.n_head, config.activation_function) == (TINY.n_head, "gelu")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours, ids = generate(load_generator(tmp_path), IDS, **options).sequences, IDS
    for _ in range(12):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(ours, ids)
    save_model(load_model(tmp_path), tmp_path / "out")
    check_logits(tmp_path / "out", model(IDS))


def test_a_config_beside_nanogpts_checkpoint(tmp_path):
    saved, _ = nanogpt()
    folder = home(tmp_path / "m", saved_bytes(saved), "ckpt.pt")
    tanh = Karpathy({n.removeprefix("_orig_mod."): t for n, t in saved["model"].items()}, 3, False)
    check_logits(folder, tanh(IDS))
    (folder / "config.json").write_text(config_json(TINY, n_head=4))
    assert "config.json': n_head is 4, but 3 by ckpt.pt" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 5}, "ckpt.pt': n_embd must be a multiple of n_head"),
        ({"n_head": "3"}, "model_args lack n_head"),
        ({"n_layer": True}, "model_args lack n_layer"),
        ({"n_layer": 10**9}, "n_layer must be 1 to 1,000"),
        ({"n_layer": 3}, "ckpt.pt': n_layer is 3, but 2 by the tensors of ckpt.pt"),
        ({"vocab_size": 62}, "vocab_size is 62, but 61"),
        ({"rope": True}, "model_args have 'rope', unknown to nanoGPT"),
        ({3: 4}, "model_args have 3, unknown to nanoGPT"),
        (None, "model_args lack n_layer"),
    ],
    ids=str,
)
def test_model_args_that_cannot_be(tmp_path, change, message):
    saved, _ = nanogpt(optimizer=False)
    saved["model_args"] = [3] if change is None else saved["model_args"] | change
    (tmp_path / "ckpt.pt").write_bytes(saved_bytes(saved))
    assert message in refusal(tmp_path)


def test_a_model_of_characters_has_no_tokenizer(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(saved_bytes(nanogpt()[0]))
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ValueError, match="vocabulary of 61"):
        load_tokenizer(tmp_path)


def mingpt(seed=0):
    state = as_linear(their_state(seed=seed)[0])
    state["lm_head.weight"] = state["lm_head.weight"].flip(0).contiguous()
    mask = torch.ones(1, 1, TINY.block_size, TINY.block_size).tril()
    state |= {f"transformer.h.{i}.attn.bias": mask for i in range(TINY.n_layer)}
    return state, Karpathy(state, TINY.n_head, exact=False)


def test_mingpts_state_dict(tmp_path):
    state, model = mingpt()
    path = tmp_path / "model.pt"
    path.write_bytes(saved_bytes(state))
    assert "no config.json beside it, to state n_head" in refusal(path)
    (tmp_path / "config.json").write_text(config_json(tie_word_embeddings=False))
    check_logits(path, model(IDS))
    # what minGPT's own projects write beside it
    for stated in ({"n_head": 3, "n_layer": None}, {"model_type": "gpt-nano", "n_head": None}):
        text = json.dumps({"system": {"seed": 3}, "data": {}, "model": stated, "trainer": {}})
        (tmp_path / "config.json").write_text(text)
        check_logits(tmp_path, model(IDS))


def test_a_known_size_needs_no_config(tmp_path):
    state = {"wte.weight": torch.zeros(1).expand(50257, 768)}
    (tmp_path / "model.pt").write_bytes(saved_bytes(state))
    assert "repeats its numbers" in refusal(tmp_path)


# ---- tensors of other kinds


def replaced(make, name="transformer.h.0.ln_1.weight"):
    return lambda state: state | {name: make(state[name])}


def in_one_storage(state):
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    parts = flat.split([tensor.numel() for tensor in state.values()])
    return {n: p.view(t.shape) for (n, t), p in zip(state.items(), parts, strict=True)}


GOOD = {
    "a transposed matrix": replaced(
        lambda t: t.t().contiguous().t(), "transformer.h.0.mlp.c_fc.weight"
    ),
    "transposed embeddings": replaced(lambda t: t.t().contiguous().t(), "transformer.wpe.weight"),
    "a transposed table": lambda s: without_head(
        replaced(lambda t: t.t().contiguous().t(), "transformer.wte.weight")(s)
    ),
    "overlapping parts": lambda s: (
        s
        | {
            f"transformer.ln_f.{end}": s["transformer.wpe.weight"].flatten()[start : start + 24]
            for end, start in (("weight", 0), ("bias", 12))
        }
    ),
    "every second number": replaced(lambda t: torch.stack([t, t], dim=1).flatten()[::2]),
    "part of a storage": replaced(lambda t: torch.cat([t, t, t])[24:48]),
    "one storage": in_one_storage,
    "a parameter": replaced(torch.nn.Parameter),
    "float16 among float32": replaced(torch.Tensor.half, "transformer.h.1.mlp.c_fc.weight"),
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("container", CONTAINERS)
def test_tensors_stored_in_other_ways(tmp_path, kind, container):
    state = GOOD[kind](their_state()[0])
    expected = {n: t.detach().float() for n, t in state.items() if n != "lm_head.weight"}
    folder = home(tmp_path / "m", saved_bytes(state, **CONTAINERS[container]))
    # so that the bytes are digested too, each once
    write_manifest(folder)
    for load in (load_model, load_generator):
        model = load(folder)
        found = dict(model.stored()) if hasattr(model, "stored") else model.state_dict()
        for name, tensor in expected.items():
            ours = found[name.removeprefix("transformer.")]
            ours = ours.t() if name.endswith(pickled.TRANSPOSED) else ours
            assert torch.equal(ours.float(), tensor), name
        assert model(IDS).isfinite().all()
    assert all(p.is_contiguous() for p in load_model(folder).parameters())


class Own(torch.Tensor):
    pass


BAD = {
    "a view of one number": (replaced(lambda t: t[:1].expand(24)), "repeats its numbers"),
    "huge": (
        replaced(lambda t: torch.zeros(1).expand(10**9, 24), "transformer.wte.weight"),
        "wte.weight' repeats its numbers",
    ),
    "integers": (replaced(torch.Tensor.int), "must be F32, F16, BF16, not I32"),
    "doubles": (replaced(torch.Tensor.double), "must be F32, F16, BF16, not F64"),
    "complex numbers": (replaced(lambda t: t + 0j), "not torch.complex64"),
    "conjugated": (replaced(lambda t: (t + 1j).conj()), "no plain tensor"),
    "negated lazily": (replaced(lambda t: (t + 1j).conj().imag), "no plain tensor"),
    "sparse": (replaced(torch.Tensor.to_sparse), "'torch._utils._rebuild_sparse_tensor'"),
    "compressed": (
        replaced(torch.Tensor.to_sparse_csr, "transformer.wpe.weight"),
        "'torch._utils._rebuild_sparse_tensor'",
    ),
    "quantized": (
        replaced(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        "'torch._utils._rebuild_qtensor'",
    ),
    "on no device": (
        replaced(lambda t: t.to("meta")),
        "'torch._utils._rebuild_meta_tensor_no_storage'",
    ),
    "of 8 bits": (
        replaced(lambda t: t.to(torch.float8_e4m3fn)),
        "'torch._utils._rebuild_tensor_v3'",
    ),
    "of a class": (replaced(lambda t: t.as_subclass(Own)), "'torch._tensor._rebuild_from_type_v2'"),
    "a number": (replaced(lambda t: 3.0), "ln_1.weight' is no tensor"),
    "a list": (replaced(lambda t: t.tolist()), "ln_1.weight' is no tensor"),
    "another shape": (replaced(lambda t: t[:-1].clone()), "must be (24,), not (23,)"),
    "no numbers": (replaced(lambda t: t[:0].clone()), "must be (24,), not (0,)"),
    "twice": (lambda s: s | {"ln_f.bias": torch.zeros(24)}, "is there twice"),
    "twice, wrapped": (
        lambda s: s | {"module.transformer.ln_f.bias": torch.zeros(24)},
        "is there twice",
    ),
    "missing": (
        lambda s: {n: t for n, t in s.items() if "ln_f" not in n},
        "ln_f.weight is missing",
    ),
    "a name too many": (lambda s: s | {"adapter": torch.zeros(1)}, "adapter' is no part of GPT-2"),
    "no name": (lambda s: s | {7: torch.zeros(1)}, "7 is no tensor"),
    "a list of tensors": (lambda s: [*s.values()], "holds a list"),
    "a tensor": (lambda s: s["lm_head.weight"], "holds a Tensor"),
    "nothing": (lambda s: None, "holds a NoneType"),
    "an empty dictionary": (lambda s: {}, "wte.weight is missing"),
    "an optimizer": (
        lambda s: {"state": {}, "param_groups": [{"lr": 1.0}]},
        "is no tensor",
    ),
    "an untied head": (
        lambda s: s | {"lm_head.weight": s["lm_head.weight"] + 1},
        "must equal wte.weight",
    ),
    "a whole model": (lambda s: torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear'"),
    "a path": (lambda s: s | {"config": ROOT}, "pathlib"),
    "a set": (lambda s: s | {"names": {1, 2}}, "'__builtin__.set'"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_plain_tensor_is_named(tmp_path, kind, container):
    change, message = BAD[kind]
    data = saved_bytes(change(their_state()[0]), **CONTAINERS[container])
    line = refusal(home(tmp_path / "m", data))
    assert message in line and "pytorch_model.bin" in line, line


# ---- pickles that would run code


class Canary:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def canaries(path):
    touch = f"open({str(path)!r}, 'w')"
    yield Canary(os.system, f"touch {path}")
    yield Canary(eval, touch)
    yield Canary(exec, touch)
    yield Canary(builtins.open, str(path), "w")
    yield Canary(subprocess.check_call, ["touch", str(path)])


PLACES = {
    "whole": lambda state, canary: canary,
    "value": lambda state, canary: state | {"lm_head.weight": canary},
    "in model": lambda state, canary: {"model": state | {"x": canary}},
    "beside model": lambda state, canary: {"model": state, "optimizer": [1, {"a": (canary,)}]},
    "first": lambda state, canary: {"x": canary} | state,
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", PLACES)
def test_no_code_is_run(tmp_path, place, protocol):
    state, touched = {"transformer.wte.weight": torch.ones(61, 24)}, tmp_path / "touched"
    for canary in canaries(touched):
        value = PLACES[place](state, canary)
        files = [
            saved_bytes(value, pickle_protocol=protocol),
            saved_bytes(value, pickle_protocol=protocol, **OLD),
        ]
        files += [
            pickle.dumps(value, protocol=protocol),
            with_pickle(files[0], pickle.dumps(canary, protocol=protocol)),
            repacked(files[0], lambda r: r | {"constants.pkl": b"N.", "code/a.py": b"1"}),
        ]
        for data in files:
            line = refusal(home(tmp_path / "m", data))
            assert "pytorch_model.bin" in line and not touched.exists()


def test_the_global_is_named(tmp_path):
    for protocol in range(5 + 1):
        for options in CONTAINERS.values():
            value = {"a": Canary(os.system, f"touch {tmp_path}/touched")}
            data = saved_bytes(value, pickle_protocol=protocol, **options)
            if options and protocol != 2:
                # the magic number of an old file is pickled too: no other protocol is known
                assert "neither" in refusal(home(tmp_path / "m", data))
            else:
                assert "wants 'posix.system'" in refusal(home(tmp_path / "m", data))
    assert not (tmp_path / "touched").exists()


def test_a_pickle_in_a_shard(tmp_path):
    sharded(tmp_path, their_state()[0])
    shard = tmp_path / "pytorch_model-00003-of-00003.bin"
    shard.write_bytes(saved_bytes({"a": Canary(os.system, f"touch {tmp_path}/touched")}))
    line = refusal(tmp_path)
    assert shard.name in line and "posix.system" in line
    assert not (tmp_path / "touched").exists()


def test_what_torch_load_allows_is_not_enough(tmp_path):
    """They allocate, or run a constructor, and make no plain tensor."""
    for call in (
        Canary(bytearray, 10**12),
        Canary(torch.UntypedStorage, 10**12),
        Canary(torch._utils._rebuild_device_tensor_from_numpy, [1], torch.float32, "cpu", False),
    ):
        data = with_pickle(saved_bytes({"a": torch.ones(3)}), pickle.dumps(call, protocol=2))
        line = refusal(home(tmp_path / "m", data))
        assert "wants" in line and call.call[0].__name__ in line


# ---- pickles that do not end


def pickled_as(tmp_path, body):
    data = with_pickle(saved_bytes({"a": torch.ones(3)}), b"\x80\x02" + body + b".")
    return refusal(home(tmp_path / "m", data))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # hashed as a key, it would overflow the stack, and it would never end
        (b"}" + b"K\x01" + b"\x85" * 10**6 + b"K\x01s", "nested too deep"),
        (b"}" + b"K\x01" + b"q\x00h\x00\x86" * 70 + b"K\x01s", "nested too deep"),
        (b"]" * 5 + b"0" * 3, "POP"),
        (b"R", "a value too many"),
        (b"(R", "a value too many"),
        (b"t", "a value too many"),
        (b"h\x07", "a value too many"),
        (b"}(K\x01u", "torch.load"),
        (b"}K\x01K\x02b", "torch.load"),
        (b"", "a value too many"),
        (b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb", "wte.weight is missing"),
        (b"ccollections\nOrderedDict\n", "holds a type"),
        (b"ctorch\nSize\n((J\xff\xff\xff\xffttR", "holds a Size"),
        (b"ctorch\nFloatStorage\n)R", "torch.load"),
        (b"ctorch\nFloatStorage\n)\x81", "torch.load"),
        (b"ctorch.nn.parameter\nParameter\n)\x81", "holds a Parameter"),
        (b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ",
         "holds a TypedStorage"),
        (b"cos\nsystem\n", "'os.system'"),
        (b"c__builtin__\neval\n", "'__builtin__.eval'"),
        (b"\x8c\x02os\x8c\x06system\x93", "'os.system'"),
        (b"ios\nsystem\n", "'os.system'"),
        (b"ctorch._utils\n_rebuild_tensor_v2 x\n", "_rebuild_tensor_v2 x"),
        (b"c\xff\n\xff\n", "broken"),
        (b"\xff", "broken"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_pickle_by_hand(tmp_path, body, message):
    assert message in pickled_as(tmp_path, body)


def rebuilt(numel=3, offset=b"K\x00", size=b"K\x03\x85", stride=b"K\x01\x85", key=b"0"):
    """The pickle of {"a": one tensor}; numel, sizes and strides as they are given."""
    number = b"\x8a\x09" + numel.to_bytes(9, "little", signed=True)
    return (
        b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key + b"X\x03\x00\x00\x00cpu"
        + number + b"tQ" + offset + size + stride + b"\x89ccollections\nOrderedDict\n)RtRs"
    )  # fmt: skip


HUGE = b"\x8a\x09" + (2**62).to_bytes(9, "little")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "wte.weight is missing"),
        ({"numel": 2**40}, "no storage of its size"),
        ({"numel": 2**62}, "torch.load"),
        # the record itself holds all three numbers
        ({"numel": -3}, "wte.weight is missing"),
        ({"numel": 2}, "wte.weight is missing"),
        ({"key": b"7"}, "torch.load"),
        ({"key": b"../a"}, "torch.load"),
        ({"offset": b"K\x01"}, "no storage of its size"),
        ({"offset": HUGE}, "reaches past its storage"),
        ({"offset": b"J\xff\xff\xff\xff"}, "torch.load"),
        ({"size": b"K\x04\x85"}, "no storage of its size"),
        ({"size": HUGE + b"\x85"}, "reaches past its storage"),
        ({"size": b"J\xff\xff\xff\xff\x85"}, "torch.load"),
        ({"size": HUGE + b"\x85", "stride": b"K\x00\x85"}, "repeats its numbers"),
        ({"stride": b"K\x02\x85"}, "no storage of its size"),
        # PyTorch takes it for the plain stride
        ({"stride": b"J\xff\xff\xff\xff\x85"}, "wte.weight is missing"),
        ({"stride": b"K\x01K\x01\x86"}, "torch.load"),
        ({"size": b"]" + b"K\x01a" * 9, "stride": b"]" + b"K\x01a" * 9}, "repeats its numbers"),
        ({"size": b"K\x00\x85"}, "wte.weight is missing"),
    ],
    ids=str,
)
def test_a_tensor_by_hand(tmp_path, parts, message):
    assert message in pickled_as(tmp_path, rebuilt(**parts))


# ---- zip files


def zipped(records, **options):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in records:
            info = zipfile.ZipInfo(name)
            for option, value in options.items():
                setattr(info, option, value)
            archive.writestr(info, content)
    return out.getvalue()


WHOLE = saved_bytes({"a": torch.ones(3)})
PICKLE = pickle_of(WHOLE)
DATA, OTHER = ("x/data/0", bytes(12)), ("x/data/1", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (zipped([("x/data.pkl", PICKLE), DATA]), "wte.weight is missing"),
        (b"junk" + WHOLE, "neither"),
        (WHOLE + b"junk" * 2, "wte.weight is missing"),
        (WHOLE + bytes(2**17), "zip directory"),
        (WHOLE[:-1], "zip directory"),
        (WHOLE[:40], "zip directory"),
        (b"PK\x03\x04", "zip directory"),
        (repacked(WHOLE, compression=zipfile.ZIP_DEFLATED), "compressed: unpack"),
        (repacked(WHOLE, compression=zipfile.ZIP_LZMA), "compressed: unpack"),
        (repacked(WHOLE, lambda r: r | {"byteorder": b"big"}), "byteorder must be little"),
        (repacked(WHOLE, lambda r: r | {"byteorder": b"x" * 99}), "above 16"),
        (repacked(WHOLE, lambda r: {n: c for n, c in r.items() if n != "data.pkl"}), "no data.pkl"),
        (repacked(WHOLE, lambda r: {n: c for n, c in r.items() if n != "data/0"}), "torch.load"),
        (repacked(WHOLE, lambda r: r | {"data/0": bytes(11)}), "no storage of its size"),
        (repacked(WHOLE, lambda r: r | {"data/0": bytes(13)}), "no storage of its size"),
        (repacked(WHOLE, lambda r: r | {"constants.pkl": b"N."}), "TorchScript"),
        (repacked(WHOLE, lambda r: r | {"code/x.py": b""}), "TorchScript"),
        (repacked(WHOLE, lambda r: r | {"../../x": b""}), "no record"),
        (repacked(WHOLE, lambda r: r | {"data/../../x": b""}), "no record"),
        (repacked(WHOLE, lambda r: r | {"x.py": b""}), "no record"),
        (zipped([("x/data.pkl", PICKLE), ("y/data/0", bytes(12))]), "no record 'y/data/0'"),
        (zipped([("data.pkl", PICKLE), ("data/0", bytes(12))]), "no record"),
        (zipped([("/data.pkl", PICKLE), ("/data/0", bytes(12))]), "wte.weight is missing"),
        (zipped([("x/data.pkl", PICKLE), DATA], external_attr=0o120777 << 16), "a link"),
        (zipped([("x/data.pkl", PICKLE), DATA, OTHER]).replace(b"a/1", b"a/0"), "no record"),
        (repacked(WHOLE, lambda r: r | {"data.pkl": bytes(LONGEST_PICKLE + 1)}), "above"),
        (zipped([]), "neither"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_zip_file_by_hand(tmp_path, data, message):
    assert message in refusal(home(tmp_path / "m", data))


def test_records_that_overlap(tmp_path):
    """Both of one place, by the directory."""
    data = bytearray(zipped([("x/data.pkl", PICKLE), DATA, ("x/data/1", bytes(12))]))
    start = data.index(b"PK\x01\x02")
    entries = [i for i in range(start, len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[entries[2] + 42 : entries[2] + 46] = data[entries[1] + 42 : entries[1] + 46]
    assert "overlaps" in refusal(home(tmp_path / "m", bytes(data)))
    data[entries[2] + 42 : entries[2] + 46] = (len(data) - 9).to_bytes(4, "little")
    assert "header of" in refusal(home(tmp_path / "m", bytes(data)))


def test_an_old_file_is_no_archive_of_tar(tmp_path):
    """PyTorch before 0.1.10 wrote tar files, which its loader would unpack."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    assert "neither" in refusal(home(tmp_path / "m", out.getvalue()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-1], "cut short"),
        (lambda d: d + b"x", "goes on for 1 bytes"),
        (lambda d: d[:100], "broken"),
        (lambda d: d.replace(b"M\xe9\x03", b"M\xe9\x04"), "version is unknown"),
        (lambda d: d[: -20] + (4).to_bytes(8, "little") + d[-12:], "cut short"),
        (lambda d: d[: -20] + (2**63).to_bytes(8, "little") + d[-12:], "cut short"),
        (lambda d: d[: -20] + (2).to_bytes(8, "little") + d[-12:], "goes on"),
    ],
)  # fmt: skip
def test_an_old_file_by_hand(tmp_path, change, message):
    data = saved_bytes({"a": torch.ones(3)}, **OLD)
    assert message in refusal(home(tmp_path / "m", change(data)))


def test_a_sparse_file_is_refused_at_once(tmp_path):
    folder = home(tmp_path / "m", b"")
    with (folder / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2**40)
    assert "zip directory" in refusal(folder)


# ---- what a hash states


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_manifest_counts(tmp_path, container):
    state, logits = their_state()
    data = saved_bytes(state, **CONTAINERS[container])
    folder = home(tmp_path / "m", data)
    write_manifest(folder)
    check_logits(folder, logits(IDS))
    digest_ahead(folder)
    check_logits(folder, logits(IDS))
    for place in (len(data) // 2, len(data) // 3, 20):
        changed = bytearray(data)
        changed[place] ^= 1
        (folder / "pytorch_model.bin").write_bytes(changed)
        for load in (load_model, load_generator):
            with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
                load(folder)
    (folder / "pytorch_model.bin").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["pytorch_model.bin"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "states no SHA-256" in refusal(folder)


def write_manifest(folder):
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    stated = {name: {"size": 1, "sha256": digest} for name, digest in digests.items()}
    (folder / "manifest.json").write_text(json.dumps(stated))


# ---- mutants


def mutant_homes(tmp_path):
    """A file to damage, the folder to load it from, whether its hash is known, and its ends."""
    files = {
        "zip": saved_bytes(their_state(SMALL)[0]),
        "old": saved_bytes(their_state(SMALL)[0], **OLD),
        "nanogpt": saved_bytes(nanogpt(SMALL, bias=False)[0]),
        "llmc": llmc(SMALL, padded=5)[0],
        "shard": b"",
    }
    for kind, data in files.items():
        for is_known in (False, True):
            folder = tmp_path / f"{kind}-{is_known}"
            name = {"nanogpt": "ckpt.pt", "llmc": "gpt2.bin"}.get(kind, "pytorch_model.bin")
            if kind == "shard":
                sharded(folder, their_state(SMALL)[0], parts=2)
                name = "pytorch_model-00002-of-00002.bin"
            else:
                home(folder, data, name, config=SMALL)
            (folder / "config.json").write_text(config_json(SMALL))
            if is_known:
                write_manifest(folder)
            yield folder, folder / name, is_known, 32 if kind == "llmc" else 3000


def check_mutants(tmp_path, count):
    """Each loads as what it is, or says why not in one line; what has a hash is never altered."""
    counts = {"loaded": 0, "refused": 0}
    homes = [*mutant_homes(tmp_path)]
    for number, (folder, path, is_known, ends) in enumerate(homes):
        source = path if path.name == "gpt2.bin" else folder
        whole, expected = path.read_bytes(), load_model(source).state_dict()
        rng = random.Random(number)
        for _ in range(count // len(homes)):
            data = mutant(whole, rng, ends)
            path.write_bytes(data)
            try:
                state = load_model(source).state_dict()
            except ValueError as error:
                # a missing tensor is reported for the first shard
                assert path.name.split("-")[0] in str(error) and "\n" not in str(error), error
                counts["refused"] += 1
                continue
            counts["loaded"] += 1
            assert not is_known or data == whole
            for name, tensor in expected.items():
                assert state[name].shape == tensor.shape
                assert not is_known or torch.equal(state[name], tensor), name
    return counts


def test_a_mutated_file_loads_or_says_why(tmp_path):
    counts = check_mutants(tmp_path, 500)
    assert min(counts.values()) > 10, counts


@pytest.mark.slow
def test_five_thousand_mutated_files(tmp_path):
    check_mutants(tmp_path, 5000)


@pytest.mark.marathon
def test_a_hundred_thousand_mutated_files(tmp_path):
    counts = check_mutants(tmp_path, 100_000)
    print(counts)
    assert sum(counts.values()) >= 100_000


# ---- before PyTorch 2.12


# torch's own import of its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pytorch_that_reads_onto_the_meta_device(tmp_path, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(torch.serialization, "_is_meta_location", lambda location: False)
    monkeypatch.setattr(pickled, "_without_bytes", FakeTensorMode)
    state, logits = their_state()
    for options in CONTAINERS.values():
        check_logits(home(tmp_path / "m", saved_bytes(state, **options)), logits(IDS))
    for parts in ({"numel": 2**40}, {"size": HUGE + b"\x85"}, {"key": b"7"}):
        pickled_as(tmp_path, rebuilt(**parts))
    for kind in ("huge", "conjugated", "no numbers"):
        data = saved_bytes(BAD[kind][0](state))
        assert BAD[kind][1] in refusal(home(tmp_path / "m", data))


# ---- memory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "old", "nanogpt", "llmc"])
def test_no_conversion_takes_twice_the_model(tmp_path, kind):
    config = GPTConfig(20000, 64, 6, 8, 1024)
    size = config.n_parameters * 4
    saved = {
        "zip": lambda: saved_bytes(their_state(config)[0]),
        "old": lambda: saved_bytes(their_state(config)[0], **OLD),
        "nanogpt": lambda: saved_bytes(nanogpt(config)[0]),
        "llmc": lambda: llmc(config, padded=20032)[0],
    }[kind]()
    name = {"nanogpt": "ckpt.pt", "llmc": "model.bin"}.get(kind, "pytorch_model.bin")
    source = home(tmp_path / "m", saved, name, config) / name
    del saved
    code = (
        "import re, sys, torch; from nanogpt2 import load_model, save_model\n"
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) * 1024\n"
        "start = peak(); model = load_model(sys.argv[1]); loaded = peak() - start\n"
        "save_model(model, sys.argv[2]); print(loaded, peak() - start)"
    )
    argv = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    loaded, converted = (int(figure) / size for figure in out.split())
    print(kind, loaded, converted)
    assert 0.9 < loaded < 1.6, loaded
    assert 0.9 < converted < 1.8, converted


# ---- the commands


BYTES = GPTConfig(257, 16, 1, 2, 8, bos_token_id=256, eos_token_id=256)


@pytest.mark.slow
def test_every_command_takes_them(tmp_path):
    home(tmp_path / "bin", saved_bytes(their_state(BYTES)[0]), config=BYTES)
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano/ckpt.pt").write_bytes(saved_bytes(nanogpt(BYTES)[0]))
    (tmp_path / "gpt2.bin").write_bytes(llmc(BYTES, padded=384)[0])
    (tmp_path / "book.txt").write_text("All is well. " * 200)
    for model in ("bin", "nano", "nano/ckpt.pt", "gpt2.bin"):
        run = run_script("sample.py", "Hi", "--model", model, "--max_new_tokens", "4", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        name = model.replace("/", "-")
        flags = ["--steps", "2", "--batch_size", "2", "--block_size", "8", "--device", "cpu"]
        flags += ["--init", model, "--out", f"out-{name}"]
        run = run_script("train.py", "book.txt", *flags, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert (tmp_path / f"out-{name}/model.safetensors").exists()
        load_model(tmp_path / f"out-{name}")
        run = run_module("nanogpt2.quantize", model, "--out", f"int8-{name}", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
