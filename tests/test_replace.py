"""A model saved over another: at every kill and every loss of power, one of the two, whole."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanogpt2.checkpoints import replace
from nanogpt2.checkpoints.load import load_classifier, load_model, load_tokenizer, open_checkpoint
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig
from nanogpt2.cpu.inference_model import pack
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer


def config(**changes):
    return GPTConfig(**({"vocab_size": 257, "block_size": 7, "n_layer": 1, "n_head": 2,
                         "n_embd": 12, "eos_token_id": 256} | changes))  # fmt: skip


def float_model(**changes):
    return lambda: GPT(config(**changes))


def int8_model():
    return pack(GPT(config(n_head=3)), "int8")


def classifier(*labels):
    return lambda: GPTClassifier(GPT(config()), labels)


def save(make, folder):
    model = make()
    save_model(model, folder, byte_tokenizer() if model.config.vocab_size == 257 else None)


CHANGES = {
    "heads": (float_model(), float_model(n_head=3)),
    "ids that end a text": (float_model(), float_model(eos_token_id=5)),
    "labels swapped": (classifier("a", "b"), classifier("b", "a")),
    "a classifier for a model": (classifier("a", "b"), float_model(n_head=3)),
    "int8 for float": (float_model(), int8_model),
    "float for int8": (int8_model, float_model()),
    "another vocabulary": (float_model(vocab_size=50257), float_model()),
    "the same config": (float_model(), float_model()),
    "pytorch_model.bin": (float_model(), float_model(n_head=3)),
}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def seen(folder):
    """Return all that a reader would compute with."""
    with open_checkpoint(folder) as checkpoint:
        labels, shape = checkpoint.labels, checkpoint.config
        load = load_classifier if labels else load_model
        if shape.vocab_size == 257:
            load_tokenizer(folder)
    model = load(folder)
    state = model.stored() if hasattr(model, "stored") else model.state_dict().items()
    return shape, labels, {name: tensor.tolist() for name, tensor in state if "ln" not in name}


class Disk:
    """Records what reaches the disk, and plays every state that a loss of power could leave."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.steps, self.synced = folder, [], {}
        rename, unlink, sync = Path.replace, Path.unlink, replace.sync

        def recorded_rename(path, target):
            data = path.read_bytes() if path in self.synced else b""
            self.steps.append((target.name, data))
            return rename(path, target)

        def recorded_unlink(path, missing_ok=False):
            if path.suffix != ".tmp":
                self.steps.append((path.name, None))
            return unlink(path, missing_ok)

        def recorded_sync(path):
            sync(path)
            if path == folder:
                self.steps.append(None)
            else:
                self.synced[path] = True

        monkeypatch.setattr(Path, "replace", recorded_rename)
        monkeypatch.setattr(Path, "unlink", recorded_unlink)
        monkeypatch.setattr(replace, "sync", recorded_sync)

    def states(self, before):
        """Yield {name: bytes}: what was synced, and any part of what was not, in any order."""
        groups = [[]]
        for step in self.steps:
            if step is None:
                groups.append([])
            else:
                groups[-1].append(step)
        certain, known = dict(before), []
        for group in groups:
            for count in range(len(group) + 1):
                for some in itertools.combinations(group, count):
                    state = {n: d for n, d in (certain | dict(some)).items() if d is not None}
                    if state not in known:
                        known.append(state)
            certain |= dict(group)
        return known


@pytest.mark.parametrize("name", CHANGES)
def test_a_reader_finds_the_old_model_or_the_new_one(tmp_path, monkeypatch, name):
    old, new = CHANGES[name]
    folder = tmp_path / "model"
    save(old, folder)
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    (folder / "notes.txt").write_text("mine")
    before, first = files_of(folder), seen(folder)
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        disk = Disk(patch, folder)
        save(new, folder)
    after, last = files_of(folder), seen(folder)
    assert first != last
    states = disk.states(before)
    assert states[0] == before and states[-1] == after and after["notes.txt"] == b"mine"
    found = []
    for number, state in enumerate(states):
        target = tmp_path / str(number)
        target.mkdir()
        for file, data in state.items():
            (target / file).write_bytes(data)
        found.append(seen(target))
        assert found[-1] in (first, last), sorted(state)
    assert found[-1] == last


def test_a_new_folder_is_a_model_only_once_it_is_whole(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, tmp_path / "model")
    save(float_model(n_head=3), tmp_path / "model")
    *partial, whole = disk.states({})
    assert "model.safetensors" in whole
    assert all("model.safetensors" not in state for state in partial)


@pytest.mark.parametrize("first, second, left", [
    (float_model(), int8_model, "model.int8.safetensors"),
    (int8_model, float_model(), "model.safetensors"),
])  # fmt: skip
def test_one_set_of_weights_is_left(tmp_path, first, second, left):
    save(first, tmp_path / "model")
    save(second, tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").glob("*.safetensors")] == [left]


def test_the_manifest_of_the_old_files_goes(tmp_path):
    save(float_model(), tmp_path)
    data = (tmp_path / "config.json").read_bytes()
    entry = {"size": len(data), "sha256": replace.digest_of_text(data.decode())}
    (tmp_path / "manifest.json").write_text(json.dumps({"config.json": entry}))
    load_model(tmp_path)
    save(float_model(n_head=3), tmp_path)
    assert load_model(tmp_path).config.n_head == 3


def test_a_failed_save_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch):
    save(float_model(), tmp_path)
    before = files_of(tmp_path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replace.tensor_file, "write", full)
    with pytest.raises(OSError, match="No space"):
        save(float_model(n_head=3), tmp_path)
    assert files_of(tmp_path) == before


def test_an_edit_after_a_save_counts(tmp_path):
    """The metadata stand for the old text alone: a text of the user's is neither."""
    save(float_model(), tmp_path)
    save(float_model(n_head=3), tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | {"n_head": 4}))
    assert load_model(tmp_path).config.n_head == 4


@pytest.mark.parametrize(
    "stated", ["5", "{", '{"config.json": 5}', '{"config.json": [null]}', "[]"]
)
def test_metadata_that_are_malformed(tmp_path, stated):
    save_model(GPT(config()), tmp_path)
    tensors = {"x": torch.zeros(2)}
    metadata = {"nanogpt2.replaces": stated}
    replace.tensor_file.write(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=r"model.safetensors' is no whole safetensors file"):
        load_model(tmp_path)


def test_files_have_ordinary_permissions(tmp_path):
    save(float_model(), tmp_path / "model")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {p.stat().st_mode for p in (tmp_path / "model").iterdir()} == {expected}
