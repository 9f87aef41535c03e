"""A run's state on disk: whole or not there at all."""

import os
import random
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import TINY, backward, settings, update
from safetensors import safe_open

from nanogpt2.checkpoints.load import load_model
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training.distributed import World
from nanogpt2.training.run_folder import RunFolder
from nanogpt2.training.trainer import Trainer


def trained(seed=0, steps=2):
    """A trainer with a past."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, vocab_size=257, bos_token_id=256, eos_token_id=256))
    trainer = Trainer(settings(), model, World("cpu"))
    for _ in range(steps):
        backward(trainer, torch.randint(257, (2, 5)), torch.randint(257, (2, 5)), 1.0, last=True)
        update(trainer, lr=1e-2)
    return trainer


def save(folder, step, seed=0):
    trainer = trained(seed)
    made = trainer.exported(), byte_tokenizer(), trainer.tensors()
    return store.save_checkpoint(folder, *made, {"step": step})


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    assert store.latest_checkpoint(tmp_path / "none") is None
    for step in (1, 9, 10):
        save(tmp_path, step)
    (tmp_path / "step-11.tmp").mkdir()
    assert store.latest_checkpoint(tmp_path).name == "step-10"
    (tmp_path / "step-12").mkdir()
    assert store.latest_checkpoint(tmp_path).name == "step-10"


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "training.safetensors", "state.json", "config.json", "manifest.json"],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    assert store.latest_checkpoint(tmp_path).name == "step-1"


def test_ten_thousand_flipped_bits_are_all_found(tmp_path):
    """In any file; the manifest's own bits too."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    rng, seen = random.Random(0), Counter()
    whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
    assert {"manifest.json", "state.json", "model.safetensors"} <= {file.name for file in whole}
    for number in range(10_000):
        file = rng.choice(list(whole))
        place, bit = rng.randrange(len(whole[file])), rng.randrange(8)
        descriptor = os.open(file, os.O_RDWR)
        os.pwrite(descriptor, bytes([whole[file][place] ^ 1 << bit]), place)
        assert not store.is_whole(path), (file.name, place, bit)
        if number % 100 == 0:
            assert store.latest_checkpoint(tmp_path).name == "step-1"
        os.pwrite(descriptor, whole[file][place : place + 1], place)
        os.close(descriptor)
        seen[file.name] += 1
    assert store.is_whole(path) and min(seen.values()) > 900


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        saved = save(tmp_path, step)
        if step == 2:
            store.mark_best(saved)
    (tmp_path / "step-9.tmp").mkdir()
    (tmp_path / "mine").mkdir()
    store.prune(tmp_path / "step-5", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best",
        "mine",
        "step-2",
        "step-4",
        "step-5",
    ]
    store.mark_best(tmp_path / "step-5")
    store.prune(tmp_path / "step-5", keep=2)
    assert sorted(p.name for p in store.checkpoints(tmp_path)) == ["step-4", "step-5"]
    assert load_model(tmp_path / "best").config.vocab_size == 257


def test_damaged_checkpoints_after_the_saved_one_do_not_count(tmp_path):
    """The run went on from before them; what it saves is not to make way for them."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-3/state.json").write_text("")
    store.prune(tmp_path / "step-2", keep=1)
    assert [p.name for p in store.checkpoints(tmp_path)] == ["step-2", "step-3"]
    assert store.latest_checkpoint(tmp_path).name == "step-2"


def test_publishing_leaves_an_open_model_as_it_was(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    first, second = save(checkpoints, 1, seed=1), save(checkpoints, 2, seed=2)
    store.publish(first, tmp_path)
    assert (
        not (tmp_path / "state.json").exists() and not (tmp_path / "training.safetensors").exists()
    )
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        before = file.get_tensor("transformer.wte.weight").clone()
        store.publish(second, tmp_path)
        assert torch.equal(file.get_tensor("transformer.wte.weight"), before)
    assert not torch.equal(load_model(tmp_path).wte.weight, before)
    assert store.is_whole(first) and store.is_whole(second)


# ---- what a power failure would leave, which no kill can show


class Disk:
    """What is sure to be on the disk: files and folders as they were at their last fsync.

    Looks at each call that renames or removes within `root`; where one comes too early, it fails.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.files, self.folders = root, {}, {}
        self.log = []  # (what was done, the file's or folder's name)
        for name in ("fsync", "rename", "replace", "link"):
            self._watch(monkeypatch, os, name, getattr(self, f"_{name}"))
        self._watch(monkeypatch, shutil, "rmtree", self._rmtree)

    def _watch(self, monkeypatch, module, name, look):
        real = getattr(module, name)

        def act(*arguments, **options):
            look(*arguments)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, act)

    def _fsync(self, descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.log.append(("fsync", path.name))
        if path.is_dir():
            self.folders[path.stat().st_ino] = self.entries(path)
        else:
            self.files[path.stat().st_ino] = path.read_bytes()

    @staticmethod
    def entries(folder):
        return {p.name: p.lstat().st_ino for p in folder.iterdir() if p.suffix != ".tmp"}

    def holds(self, path):
        """True where a power failure would leave all of a file, or of a folder, as it is."""
        if path.is_dir():
            return self.holds_names(path) and all(map(self.holds, path.iterdir()))
        return self.files.get(path.stat().st_ino) == path.read_bytes()

    def holds_names(self, folder):
        """True where none of a folder's entries would be missing; one removed may come back."""
        held = self.folders.get(folder.stat().st_ino, {})
        return self.entries(folder).items() <= held.items()

    def _rename(self, source, target):
        source = Path(source)
        # within an unfinished folder nothing counts yet
        if not source.is_symlink() and source.parent.suffix != ".tmp":
            assert self.holds(source), f"{source.name} renamed before it is on the disk"
        if source.is_dir():
            # the commit: what the run had told of itself is there before
            for name in ("run.json", "metrics.jsonl"):
                assert self.holds(self.root / name), f"{name} is not on the disk yet"
                names = self.folders.get(self.root.stat().st_ino, ())
                assert name in names, f"{name} is in no folder on the disk"
        self.log.append(("rename", Path(target).name))

    _replace = _rename

    def _link(self, source, target):
        assert self.holds(Path(source))

    def _rmtree(self, path, *rest):
        if path.name.endswith(".tmp") or not path.exists():
            return
        newest = store.checkpoints(path.parent)[-1]
        self.log.append(("remove", path.name))
        assert path != newest and self.holds(newest)
        for folder in (path.parent, self.root):
            assert self.holds_names(folder), f"{folder.name} is to be synced before removing"
        assert self.holds(self.root / "model.safetensors")


def test_what_must_be_on_the_disk_before_what(tmp_path, monkeypatch):
    disk = Disk(tmp_path / "out", monkeypatch)
    trainer = trained()
    with closing(RunFolder(tmp_path / "out")) as folder:
        folder.lock()
        folder.start(settings(), before={"val_loss": 1.0})
        assert disk.holds(tmp_path / "out/run.json") and disk.holds_names(tmp_path)
        for step in range(1, 6):
            folder.log({"step": step})
            folder.sync_metrics()
            state = {"step": step, "is_best": step % 2 == 1}
            made = trainer.exported(), byte_tokenizer(), trainer.tensors(), state
            store.commit(tmp_path / "out", *made, keep=2)
            for path in (tmp_path / "out", tmp_path / "out/checkpoints"):
                assert disk.holds_names(path)
        folder.cut_metrics(4)
        assert disk.holds(tmp_path / "out/metrics.jsonl")
        folder.end(after={"val_loss": 1.0})
        assert disk.holds(tmp_path / "out/run.json") and disk.holds_names(tmp_path / "out")
    removed = [name for what, name in disk.log if what == "remove"]
    assert removed == ["step-1", "step-2", "step-3"]


def test_the_order_of_a_commit(tmp_path, monkeypatch):
    folder = tmp_path / "out/checkpoints"
    trainer = trained()
    made = trainer.exported(), byte_tokenizer(), trainer.tensors()
    store.commit(tmp_path / "out", *made, {"step": 1, "is_best": True}, keep=1)
    order, publish, prune = [], store.publish, store.prune

    def write_text(path, text, encoding=None):
        order.append(f"write {path.name}")
        return real_write(path, text, encoding=encoding)

    real_write = Path.write_text
    monkeypatch.setattr(Path, "write_text", write_text)
    real_sync, real_rename = store.sync, Path.rename
    monkeypatch.setattr(store, "sync", lambda p: (order.append(f"sync {p.name}"), real_sync(p)))
    monkeypatch.setattr(
        Path, "rename", lambda p, to: (order.append(f"rename {p.name}"), real_rename(p, to))[1]
    )
    monkeypatch.setattr(store, "publish", lambda *a: (order.append("publish"), publish(*a)))
    monkeypatch.setattr(store, "prune", lambda *a: (order.append("prune"), prune(*a)))
    store.commit(tmp_path / "out", *made, {"step": 2, "is_best": True}, keep=1)
    names = sorted(path.name for path in (folder / "step-2").iterdir())
    manifest = order.index("write manifest.json")
    assert order.index("write state.json") < manifest
    after = order[manifest + 1 :]
    assert sorted(after[: len(names)]) == [f"sync {name}" for name in names]
    assert after[len(names) : len(names) + 5] == [
        "sync step-2.tmp",
        "rename step-2.tmp",
        "sync checkpoints",
        "sync checkpoints",
        "publish",
    ]
    assert after[-2:] == ["sync out", "prune"]


def test_every_file_has_ordinary_permissions_and_the_tensors_metadata(tmp_path):
    path = save(tmp_path, step=1)
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in path.iterdir()} == {expected}
    with safe_open(path / store.TENSORS, "pt") as file:
        assert file.metadata()["format"] == "pt"
