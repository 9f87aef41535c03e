"""Folders that are damaged, absurd or hostile: one line that names the file, nothing else."""

import json
import os
import random
import shutil

import pytest
import torch
from reference import TINY
from transformers import AutoTokenizer

from nanogpt2.checkpoints import load as loading
from nanogpt2.checkpoints.folder import find_files
from nanogpt2.checkpoints.load import load_model, load_tokenizer, new_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.config import GPTConfig, check_model
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer
from nanogpt2.training import checkpoint

BYTES = GPTConfig(257, 8, 2, 1, 4, bos_token_id=256, eos_token_id=256)


@pytest.fixture
def folder(tmp_path):
    save_model(GPT(BYTES), tmp_path / "model", byte_tokenizer())
    return tmp_path / "model"


def refused(folder, *words, load=load_model):
    """The folder is refused by ValueError or OSError, in one line that has these words."""
    with pytest.raises((ValueError, OSError)) as raised:
        load(folder)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 400, line
    for word in words:
        assert word in line, line


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- config.json against the tensors


@pytest.mark.parametrize(
    "name", ["vocab_size", "n_positions", "n_layer", "n_head", "n_embd", "layer_norm_epsilon"]
)
@pytest.mark.parametrize(
    "value",
    [10**400, 10**18, 2**31, 10**7, 0, -1, 1.5, "4", None, True, [4], {"a": 4}, [[]], "x" * 10**6],
    ids=lambda value: repr(value)[:12],
)
def test_absurd_sizes_are_refused_before_anything_is_made(folder, name, value):
    if name == "layer_norm_epsilon" and value in (10**7, 1.5):
        value = float("nan")
    edit(folder / "config.json", **{name: value})
    refused(folder, "config.json", name, repr(value)[:20])
    refused(folder, "config.json", name, load=load_tokenizer)


@pytest.mark.parametrize(
    ("name", "value"), [("vocab_size", 256), ("n_positions", 9), ("n_layer", 1), ("n_embd", 5)]
)
def test_a_size_that_the_tensors_do_not_have(folder, name, value):
    before = json.loads((folder / "config.json").read_text())[name]
    edit(folder / "config.json", **{name: value})
    refused(folder, f"config.json': {name} is {value}, but {before} by", "model.safetensors")


@pytest.mark.parametrize("name", ["model_type", "n_inner", "activation_function"])
def test_values_that_are_shown_are_cut(folder, name):
    edit(folder / "config.json", **{name: ["x" * 10**6]})
    refused(folder, "config.json", name)


def test_what_a_configuration_can_judge_alone():
    for wrong in ({"n_layer": 10**7}, {"n_embd": 10**9}, {"n_head": 0}, {"n_embd": 2**31 - 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GPTConfig(**{"n_head": 1} | wrong)
    for config in (TINY, BYTES):
        assert config.n_parameters == sum(p.numel() for p in GPT(config).parameters())


def test_a_model_that_does_not_fit_says_how_large_it_is(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"98,\d{3},\d{3},\d{3} parameters take 39\d"):
        monkeypatch.setattr(loading, "memory_of", lambda device: 10**11)
        new_model(GPTConfig(n_layer=2, n_head=1, n_embd=63_000))
    monkeypatch.setattr(loading, "memory_of", lambda device: BYTES.n_parameters * 4 - 1)
    refused(folder, f"{BYTES.n_parameters:,} parameters")
    # when the machine has it, but others use it
    monkeypatch.undo()
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\nTwo"),
        torch.OutOfMemoryError("CUDA out of memory.\nTry"),
    ):

        def fail(config, error=error):
            raise error

        monkeypatch.setattr(loading, "GPT", fail)
        refused(folder, f"{BYTES.n_parameters:,} parameters")
        with pytest.raises(ValueError, match="parameters"):
            new_model(BYTES)


# ---- JSON that is none, or not what it should be


NO_OBJECTS = ["true", "[]", "5", '"text"', "null", "", "{", "[" * 10**5, '{"a":' * 10**5, "\xff"]


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:6])
def test_a_json_file_that_is_no_object(folder, text):
    save_model(GPT(BYTES), folder / "2", byte_tokenizer())
    names = ["config.json", "generation_config.json", "manifest.json"]
    tokenizers = ["vocab.json", "tokenizer.json", "tokenizer_config.json"]
    for name in names + tokenizers:
        shutil.copytree(folder / "2", folder / "copy")
        (folder / "copy" / name).write_bytes(text.encode("latin-1"))
        refused(folder / "copy", name, load=load_model if name in names else load_tokenizer)
        shutil.rmtree(folder / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(folder, "model.safetensors.index.json")


def test_no_damage_to_a_config_is_a_traceback(folder):
    """Bytes changed anywhere in the JSON files: a model, or one line."""
    rng = random.Random(0)
    for name, load in {
        "config.json": load_model,
        "generation_config.json": load_model,
        "vocab.json": load_tokenizer,
        "tokenizer_config.json": load_tokenizer,
    }.items():
        whole = (folder / name).read_bytes()
        for _ in range(200):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.choice(b'{}[]",:.-019eE\x00\xff\\ntf')
            (folder / name).write_bytes(data)
            try:
                load(folder)
            except ValueError as error:
                assert "\n" not in str(error) and name in str(error)
        (folder / name).write_bytes(whole)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A model folder with the files that transformers' own tokenizer writes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_model(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=4)), folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": "BPE"},
        {"model": {}},
        {"model": {"vocab": [["a", 1.0]]}},
        {"model": {"vocab": {}}},
        {"model": {"vocab": {"a": [1]}}},
        {"added_tokens": 5},
        {"added_tokens": [5]},
        {"added_tokens": {"<|user|>": 3}},
        {"added_tokens": [{"id": "3", "content": "<|user|>"}]},
        {"added_tokens": [{"id": 3, "content": ["<|user|>"]}]},
        # a new meaning for an id of the vocabulary, and another id for the end
        {"added_tokens": [{"id": 15496, "content": "<|user|>"}]},
        {"added_tokens": [{"id": 5, "content": "<|endoftext|>"}]},
    ],
    ids=lambda changes: json.dumps(changes)[:40],
)
def test_odd_tokenizer_files(with_tokenizer, tmp_path, changes):
    shutil.copytree(with_tokenizer, tmp_path, dirs_exist_ok=True)
    # beyond the vocabulary the model has no embedding: the token is never met
    edit(tmp_path / "tokenizer.json", added_tokens=[{"id": 50257, "content": "<|pad|>"}])
    assert load_tokenizer(tmp_path) is gpt2_tokenizer()
    edit(tmp_path / "tokenizer.json", **changes)
    refused(tmp_path, "tokenizer.json", load=load_tokenizer)


@pytest.mark.parametrize("stated", [{}, {"<|endoftext|>": 256}, {"a": 97, "<|endoftext|>": 256}])
def test_a_vocabulary_that_lacks_tokens(folder, stated):
    (folder / "vocab.json").write_text(json.dumps(stated))
    refused(folder, "vocab.json", load=load_tokenizer)


# ---- what is no file


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json"])
@pytest.mark.parametrize("make", ["mkfifo", "mkdir", "loop", "/dev/zero"])
def test_a_file_that_is_none(folder, name, make):
    """A pipe would be waited for, a device read, without end."""
    path = folder / name
    path.unlink()
    if make.startswith("mk"):
        getattr(os, make)(path)
    else:
        path.symlink_to(name if make == "loop" else make)
    if make != "loop":
        refused(folder, name, load=load_tokenizer if name == "vocab.json" else load_model)
        return
    # it leads nowhere: as if it were not there
    if name == "model.safetensors":
        refused(folder, "holds no model.safetensors")
        refused(path, "is not a file")
    elif name == "config.json":
        refused(folder, "no config.json")


def test_a_file_too_large_for_what_it_is(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**40)
    refused(folder, "config.json", "bytes at most")


@pytest.mark.parametrize("shard", ["../model/x", "/etc/passwd", "..", ".", "", 5, None, "no\0name"])
def test_an_index_that_leads_elsewhere(folder, shard):
    (folder / "model.safetensors").rename(folder / "x")
    index = {"weight_map": {"wte.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder)


@pytest.mark.parametrize("name", ["", ".", "/", "\0", "a" * 300, "\udcff", "/dev/null", " "])
def test_a_name_that_is_no_model(name):
    refused(name)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_wrong_use(name):
    with pytest.raises(ValueError, match="or a known model"):
        check_model(name)


# ---- what a run leaves is held to its manifest


@pytest.fixture
def run(tmp_path):
    model = GPT(BYTES)
    made = (model, byte_tokenizer(), {}, {"step": 1, "is_best": True})
    checkpoint.commit(tmp_path / "run", *made, keep=1)
    return tmp_path / "run"


@pytest.mark.parametrize("home", [".", "checkpoints/step-1", "checkpoints/best"])
def test_no_bit_of_a_runs_model_changes_unseen(run, tmp_path, home):
    shutil.copytree(run / home, tmp_path / "copy")
    load_model(tmp_path / "copy")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        path = tmp_path / "copy" / name
        whole = path.read_bytes()
        step = 5 if len(whole) < 1000 else 397
        for bit in range(0, len(whole) * 8, step):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            refused(tmp_path / "copy", name)
        path.unlink()
        refused(tmp_path / "copy", name)
        path.write_bytes(whole)


def test_what_is_meant_can_be_said(run):
    edit(run / "generation_config.json", eos_token_id=5)
    refused(run, "generation_config.json", "delete manifest.json")
    (run / "manifest.json").unlink()
    assert load_model(run).config.eos_token_id == 5
    # an edit in place does not reach the checkpoint
    assert checkpoint.is_whole(run / "checkpoints/step-1")
    # weights of another program, that state no digest of their own
    checkpoint.publish(run / "checkpoints/step-1", run)
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").write_bytes(data.replace(b"nanogpt2.sha256", b"nanogpt2.sha257"))
    refused(run, "model.safetensors", "delete manifest.json")
    (run / "manifest.json").unlink()
    load_model(run)


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"config.json": 5},
        {"config.json": {}},
        {"../config.json": {"size": 1, "sha256": ""}},
        {"model.safetensors": {"size": 1, "sha256": None}},
    ],
    ids=str,
)
def test_a_manifest_that_is_none(run, manifest):
    path = run / "checkpoints/step-1"
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused(path, "manifest.json")
    assert not checkpoint.is_whole(path)


def test_the_demo_model_is_as_it_was_made():
    source = find_files("demo")
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert source.manifest.keys() == names
    load_model("demo")
