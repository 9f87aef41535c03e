"""A model for generating only, read from files that are mapped into memory."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from reference import (
    ROOT,
    TINY,
    force_layout,
    hf_model,
    official_tensors,
    prompts,
    write_official_file,
)
from safetensors.torch import load_file, save_file

from nanogpt2 import GPT, generate, load_generator, load_model, save_model
from nanogpt2.config import SCHEMES, GPTConfig
from nanogpt2.cpu import prepared
from nanogpt2.cpu.inference_model import InferenceGPT, pack
from nanogpt2.cpu.layouts import AS_STORED
from nanogpt2.cpu.prepacked import onednn_sums_exactly
from nanogpt2.cpu.prepared import prepared_for

LONG = {"max_new_tokens": 20, "eos_token_id": None}
VNNI = onednn_sums_exactly()
CHANGES = {
    "as it is": dict,
    "float16": lambda tensors: {name: t.half() for name, t in tensors.items()},
    "bfloat16": lambda tensors: {name: t.bfloat16() for name, t in tensors.items()},
    "head": lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
    "head of another type": lambda tensors: (
        {name: t.half() for name, t in tensors.items()}
        | {"lm_head.weight": tensors["transformer.wte.weight"].half().float()}
    ),
}


@pytest.fixture(autouse=True)
def laid_out_at_once(monkeypatch):
    """A layout of both float32 and int8."""
    monkeypatch.setattr(prepared, "table_for", prepared.table_for)
    force_layout("tiles_64")


@pytest.fixture
def folder(tmp_path):
    hf_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def same_parts(found, expected):
    found, expected = dict(found.stored()), dict(expected.stored())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_what_load_model_reads(folder, change, scheme):
    rewrite(folder, CHANGES[change])
    found, expected = load_generator(folder, quantize=scheme), pack(load_model(folder), scheme)
    assert isinstance(found, InferenceGPT)
    same_parts(found, expected)
    ids = prompts(2, 7)
    # rows that are narrowed when they are read, rows that are narrow
    assert torch.equal(found.wte(ids), expected.wte(ids))
    torch.testing.assert_close(found(ids), expected(ids))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("residue", range(8))
def test_data_at_any_alignment(tmp_path, residue, scheme):
    path = tmp_path / "model.safetensors"
    write_official_file(path, official_tensors(TINY), header_length=4000 + residue)
    hf_model().config.save_pretrained(tmp_path)
    found, expected = load_generator(path, quantize=scheme), pack(load_model(path), scheme)
    same_parts(found, expected)
    ids = prompts(1, 5)
    texts = [generate(m, ids, num_beams=3, **LONG).sequences for m in (found, expected)]
    assert torch.equal(*texts)


def test_the_head_is_laid_out_where_its_rows_are_in_a_file(folder):
    for model, laid_out in ((load_generator(folder), True), (pack(load_model(folder)), False)):
        generate(model, prompts(1, 5), **LONG)
        assert (model.head.layout not in AS_STORED) == laid_out
        assert all(
            p.layout == "tiles_64" for p in prepared_for(model).products() if p.shape[0] != 61
        )
        same_parts(model, pack(load_model(folder)))


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_file_may_be_replaced_or_deleted(folder, scheme):
    model, ids = load_generator(folder, quantize=scheme), prompts(1, 5)
    expected = generate(pack(load_model(folder), scheme), ids, **LONG).sequences
    save_model(model, folder)
    assert torch.equal(generate(model, ids, **LONG).sequences, expected)
    for file in folder.iterdir():
        file.unlink()
    assert torch.equal(generate(model, ids, **LONG).sequences, expected)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_damage_is_found(folder, scheme):
    save_model(load_model(folder), folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is not the one stated"):
        load_generator(folder, quantize=scheme)


def test_a_head_of_its_own_is_refused(folder):
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": torch.ones(61, 24)})
    with pytest.raises(ValueError, match="must equal"):
        load_generator(folder)


MEMORY = """
import re, sys, torch
sys.path.insert(0, "tests")
from reference import force_layout
from nanogpt2 import generate, load_generator
from nanogpt2.cpu.malloc import large_blocks_apart
status = lambda: open("/proc/self/status").read()
anonymous = lambda: 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status())[1])
force_layout(sys.argv[3])
start = anonymous()
with large_blocks_apart():  # as sample.py does
    model = load_generator(sys.argv[1], quantize=sys.argv[2] or None)
print(anonymous() - start)
generate(model, torch.tensor([[0]]), max_new_tokens=20, eos_token_id=None)
print(anonymous() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "layout", "size", "loaded", "used"),
    # fbgemm fills the inputs of its fp16 matrices up to 512s
    [
        ("", "onednn_1", 4, (-0.1, 0.1), (0.9, 1.1)),
        ("", "tiles_96", 4, (-0.1, 0.1), (0.9, 1.1)),
        ("fp16", "none", 2, (0.9, 1.25), (0.9, 1.35)),
        ("int8", "onednn_u8s8", 1, (0.9, 1.1), (0.9, 1.25 if VNNI else 1.65)),
        ("int8", "tiles_96", 1, (0.9, 1.1), (0.9, 1.25)),
    ],
)
def test_memory(tmp_path, scheme, layout, size, loaded, used):
    """Nothing is copied on loading; what is laid out or narrowed is there once."""
    config = GPTConfig(vocab_size=9000, n_layer=8, n_embd=768)
    save_model(GPT(config), tmp_path)
    argv = [sys.executable, "-c", MEMORY, str(tmp_path), scheme, layout]
    out = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for taken, (low, high) in zip(out.split(), (loaded, used), strict=True):
        assert low <= int(taken) / (config.n_parameters * size) < high


@pytest.mark.slow
def test_memory_at_its_most(tmp_path):
    """124M parameters in int8, while they are narrowed and while five beams are decoded."""
    model = GPT(GPTConfig())
    save_model(model, tmp_path)
    argv = ["-m", "benchmarks.generate_alone", "ours, int8", str(tmp_path), "cpu", "20", "2"]
    out = subprocess.run([sys.executable, *argv], check=True, capture_output=True, cwd=ROOT).stdout
    most = json.loads(out)["memory"] / model.config.n_parameters
    # malloc's holes differ from run to run
    assert 1 < most < (1.29 if VNNI else 1.9)


# ---- copies, pickles, conversions


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_and_a_pickle_compute_the_same(folder, scheme, again):
    model, ids = load_generator(folder, quantize=scheme), prompts(1, 5)
    expected = generate(model, ids, **LONG).sequences
    for file in folder.iterdir():
        file.unlink()
    twin = again(model)
    same_parts(twin, model)
    assert not twin.training and twin.scheme == model.scheme
    assert torch.equal(generate(twin, ids, **LONG).sequences, expected)


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.double(),
        lambda model: model.to(torch.float16),
        lambda model: model.to("meta"),
        lambda model: model.to(torch.empty(0, dtype=torch.float64)),
    ],
)
def test_another_type_or_device_is_refused(folder, scheme, convert):
    model, ids = load_generator(folder, quantize=scheme), prompts(1, 5)
    expected = model(ids)
    with pytest.raises(ValueError, match=r"^a model for generating stays in float32.* dtype and"):
        convert(model)
    assert torch.equal(model(ids), expected)
    assert torch.equal(model.float().cpu().to("cpu", torch.float32)(ids), expected)
