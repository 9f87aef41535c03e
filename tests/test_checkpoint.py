"""A run's state on disk: whole or not there at all."""

import errno
import json
import math
import os
import random
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from reference import TINY, backward, settings, update
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as dump
from test_train import SMALL, book, numbers, run

from nanogpt2.checkpoints import folder as folder_files
from nanogpt2.checkpoints.load import load_model, load_tokenizer
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training import removal
from nanogpt2.training.distributed import World
from nanogpt2.training.run_folder import RunFolder
from nanogpt2.training.trainer import Trainer

__all__ = ["book"]  # the fixture


def trained(seed=0, steps=2):
    """A trainer with a past."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, vocab_size=257, bos_token_id=256, eos_token_id=256))
    trainer = Trainer(settings(), model, World("cpu"))
    for _ in range(steps):
        backward(trainer, torch.randint(257, (2, 5)), torch.randint(257, (2, 5)), 1.0, last=True)
        update(trainer, lr=1e-2)
    return trainer


def save(folder, step, seed=0, run=""):
    trainer = trained(seed)
    made = trainer.exported(), byte_tokenizer(), trainer.tensors()
    return store.save_checkpoint(folder, *made, {"step": step}, run)


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
        if str(target).endswith(removal.GONE):
            self._remove(source)
            return
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

    def _remove(self, path):
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
    assert after[-3:] == ["sync out", "prune", "rename step-1"]


# ---- whose a checkpoint is

RUN = ["book.txt", *SMALL, "--steps", "4", "--save_every", "2", "--eval_every", "2", "--keep", "9"]


def stated_run(path):
    return json.loads((path / "manifest.json").read_text())["state.json"].get("run")


def test_every_file_of_a_checkpoint_is_known_to_be_the_runs(tmp_path):
    assert {file.name for file in save(tmp_path, 1).iterdir()} == removal.CHECKPOINT_FILES


def test_overwriting_publishes_the_new_run(book):
    """With checkpoints/ on another disk, which cannot be deleted whole."""
    Path("disk").mkdir()
    Path("out").mkdir()
    Path("out/checkpoints").symlink_to("../disk")
    assert run(*RUN, "--overwrite") == 0
    old = stated_run(Path("out/checkpoints/step-4"))
    Path("out/checkpoints/mine").mkdir()
    Path("out/checkpoints/step-4/notes.txt").write_text("mine")
    assert run(*RUN, "--overwrite", "--seed", "2") == 0
    assert run(*RUN, "--seed", "2", "--out", "fresh") == 0
    assert numbers() == numbers("fresh")
    assert stated_run(Path("out/checkpoints/step-4")) not in (old, None)
    assert RunFolder(Path("out")).run_id == stated_run(Path("out/checkpoints/step-4"))
    assert Path("out/checkpoints").is_symlink()
    # what the run did not make is still there
    assert Path("out/checkpoints/mine").is_dir()
    assert Path("out/checkpoints/step-4.old1/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a checkpoint that stays"])
def test_what_cannot_be_deleted_is_an_error_before_anything_is_written(
    book, capsys, monkeypatch, kind
):
    checkpoints = Path("out/checkpoints")
    if kind == "a checkpoint that stays":
        assert run(*RUN) == 0

        def refuse(path, **options):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "unlink", refuse)
    else:
        Path("out").mkdir()
        checkpoints.write_text("") if kind == "a file" else checkpoints.symlink_to("nowhere")
    Path("out/.lock").touch()
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    capsys.readouterr()
    code = 1 if kind == "a checkpoint that stays" else 2
    assert run(*RUN, "--overwrite", "--seed", "2") == code
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and "out/checkpoints" in said[-1], said
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


def test_another_runs_checkpoint_is_never_taken(book, capsys):
    """Neither where a run is resumed nor where it comes to the same step."""
    assert run(*RUN) == 0
    assert run(*RUN, "--seed", "2", "--out", "other") == 0
    for step in (2, 4):
        shutil.copytree(f"other/checkpoints/step-{step}", f"mixed{step}/checkpoints/step-{step}")
        shutil.copy("out/run.json", f"mixed{step}/run.json")
    shutil.copytree("out/checkpoints/step-2", "mixed4/checkpoints/step-2")
    shutil.copy("out/metrics.jsonl", "mixed4/metrics.jsonl")
    capsys.readouterr()
    assert run(*RUN, "--out", "mixed4", "--resume") == 0
    said = capsys.readouterr().err
    assert "mixed4/checkpoints/step-4 is another run's" in said and "after step 2" in said
    assert numbers("mixed4") == numbers("out")
    # it is kept, under another name
    assert "moved to step-4.old1" in said
    assert store.is_whole(Path("mixed4/checkpoints/step-4.old1"))

    assert run(*RUN, "--out", "mixed2", "--resume") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --resume found only checkpoints damaged or of another run in ")
    assert {path.name for path in Path("mixed2").iterdir()} == {"checkpoints", "run.json"}


def test_a_run_without_an_id_goes_on(book):
    """As the releases before wrote it."""
    assert run(*RUN) == 0
    whole = numbers()
    shutil.rmtree("out/checkpoints/step-4")
    without = json.loads(Path("out/run.json").read_text())
    del without["run"], without["after"]
    Path("out/run.json").write_text(json.dumps(without))
    for manifest in Path("out/checkpoints").glob("step-*/manifest.json"):
        entries = json.loads(manifest.read_text())
        del entries["state.json"]["run"]
        manifest.write_text(json.dumps(entries, indent=1))
    assert run(*RUN, "--resume") == 0
    assert numbers() == whole and stated_run(Path("out/checkpoints/step-4")) is None


# ---- a folder that people and their programs have touched


def touch_by_programs(checkpoints):
    for folder in (checkpoints, *checkpoints.glob("step-*")):
        (folder / ".DS_Store").write_text("Finder")
        (folder / "notes.txt").write_text("mine")
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints/notes-checkpoint.txt").write_text("mine")


def copy_without_links(checkpoints):
    shutil.move(checkpoints, "moved")
    shutil.copytree("moved", checkpoints)
    (checkpoints / "best/notes.txt").write_text("mine")


def point_best_back(checkpoints):
    (checkpoints / "best").unlink()
    (checkpoints / "best").symlink_to("step-2")


def copy_a_step(checkpoints):
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-4 copy")
    shutil.copytree(checkpoints / "step-2", checkpoints / "step-02")
    (checkpoints / "step-1.tmp").write_text("mine")
    (checkpoints / "step-1").write_text("mine")


def link_a_step(checkpoints):
    shutil.move(checkpoints / "step-2", "elsewhere")
    (checkpoints / "step-2").symlink_to(Path("elsewhere").absolute())


def put_a_file_in_the_way(checkpoints):
    for name in ("step-6", "step-5.tmp"):
        (checkpoints / name).write_text("mine")


def put_folders_in_the_way(checkpoints):
    """With the names of the run's files, but without a manifest."""
    for name in ("step-6/model.safetensors", "step-5/state.json"):
        (checkpoints / name).parent.mkdir()
        (checkpoints / name).write_text("mine")


def put_a_file_for_best(checkpoints):
    (checkpoints / "best").unlink()
    (checkpoints / "best").write_text("mine")


def put_a_folder_for_best(checkpoints):
    (checkpoints / "best").unlink()
    (checkpoints / "best").mkdir()
    (checkpoints / "best/model.safetensors").write_text("mine")


def copy_under_other_steps(checkpoints):
    shutil.copytree(checkpoints / "step-4", checkpoints / "step-40")
    (checkpoints / "step-5").symlink_to("step-2")


def lose_the_links(checkpoints):
    (checkpoints / "best").unlink()


def make_read_only(checkpoints):
    for path in checkpoints.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o444)


TOUCHES = [touch_by_programs, copy_without_links, point_best_back, copy_a_step, link_a_step]
TOUCHES += [put_a_file_in_the_way, put_folders_in_the_way, copy_under_other_steps, lose_the_links]
TOUCHES += [put_a_file_for_best, put_a_folder_for_best, make_read_only]


def put_there(folder):
    """How many files with their content people and their programs have put there."""
    found = (path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return Counter(data for data in found if data in (b"mine", b"Finder"))


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.__name__)
def test_a_touched_folder_still_resumes_and_settles(tmp_path, monkeypatch, touch):
    """Resumed, then saved until everything is pruned; what a person put there stays."""
    out = tmp_path / "out"
    made = trained().exported(), byte_tokenizer(), trained().tensors()
    for step in (1, 2, 3, 4):
        state = {"step": step, "is_best": step == 3, "best_step": min(step, 3)}
        store.commit(out, *made, state, keep=3, run="a run")
    monkeypatch.chdir(tmp_path)
    touch(out / "checkpoints")
    put = put_there(out / "checkpoints")
    latest = store.latest_checkpoint(out / "checkpoints", "a run")
    assert latest.name == "step-4"
    store.settle(out, state, keep=3)
    # the best is kept, whatever the link says
    for step in (5, 6):
        state = {"step": step, "is_best": False, "best_step": 3}
        store.commit(out, *made, state, keep=1, run="a run")
    assert store.is_whole(out / "checkpoints/step-3")
    assert load_model(out / "checkpoints/best")
    state = {"step": 7, "is_best": True, "best_step": 7}
    store.commit(out, *made, state, keep=1, run="a run")
    assert store.is_whole(store.latest_checkpoint(out / "checkpoints", "a run"))
    assert load_model(out / "checkpoints/best") and load_model(out)
    assert put_there(out / "checkpoints") == put
    assert not any("notes" in path.name or path.name.startswith(".") for path in out.iterdir())


def test_a_protected_checkpoint_stays(tmp_path, monkeypatch):
    """A folder without write permission; root has it always, so the call fails by itself here."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    unlink = Path.unlink

    def refuse(path, **options):
        if "step-1" in str(path.parent):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    store.prune(tmp_path / "step-3", keep=1)
    assert [path.name for path in store.checkpoints(tmp_path)] == ["step-1", "step-3"]
    assert store.is_whole(tmp_path / "step-1")


def test_a_reader_of_the_best_never_finds_it_damaged(tmp_path):
    """While another thread saves, moves the link and deletes the old target."""
    made = trained().exported(), byte_tokenizer(), trained().tensors()
    stop, best = Event(), tmp_path / "checkpoints/best"

    def commit(step):
        store.commit(tmp_path, *made, {"step": step, "is_best": True}, keep=1)

    def save_on():
        step = 1
        while not stop.is_set():
            commit(step := step + 1)

    commit(1)
    writer = Thread(target=save_on)
    writer.start()
    try:
        for _ in range(40):
            assert load_model(best).config.vocab_size == 257
            assert load_tokenizer(best).vocab_size == 257
    finally:
        stop.set()
        writer.join()


def test_a_reader_whose_target_is_deleted_opens_the_new_one(tmp_path, monkeypatch):
    """At the worst moments: after it has resolved the link, and between two of its files."""
    made = trained().exported(), byte_tokenizer(), trained().tensors()
    step = 1

    def commit():
        nonlocal step
        store.commit(tmp_path, *made, {"step": step, "is_best": True}, keep=1)
        step += 1

    for name in ("read_manifest", "_read_json", "_weights_in"):
        commit()
        real, left = getattr(folder_files, name), [commit]

        def act(*arguments, real=real, left=left):
            found = real(*arguments)
            for act_now in [left.pop()] if left else []:
                act_now()
            return found

        with monkeypatch.context() as patched:
            patched.setattr(folder_files, name, act)
            assert load_model(tmp_path / "checkpoints/best")
        assert not left


# ---- a state whose manifest holds and whose fields do not

STATE = {"step": 4, "best": 1.5, "best_step": 3, "stale": 1, "finished": False, "is_best": False}
STATE |= {"micro_batch": 4, "figures": {"loss": 1.5, "grad_norm": None, "val_loss": math.nan}}
WRONG = {
    "step": ["4", 4.0, 3, True, None, -4],
    "best": [math.nan, "1.5", None, True, 10**400],
    "best_step": [5, -1, "3", None],
    "stale": [-1, "0", 0.5, None],
    "finished": [True, "no", 0, None],
    "is_best": [0, "false", None],
    "micro_batch": ["4", 0, 5, 4.0, None],
    "figures": [None, [], {"loss": "low"}, {"val_loss": [1]}, {"val_loss": True}],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_field_of_the_state_is_named(name):
    path, config = Path("checkpoints/step-4"), settings(steps=10, batch_size=4)
    store.check_state(path, STATE, config)
    store.check_state(path, STATE | {"best": math.inf}, config)
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"state.json': {name} must be "):
            store.check_state(path, STATE | {name: value}, config)
    without = {key: value for key, value in STATE.items() if key != name}
    if name == "best_step":
        # earlier releases did not state it
        store.check_state(path, without, config)
    else:
        with pytest.raises(ValueError, match=f"{name} must be .*, not absent"):
            store.check_state(path, without, config)


def test_a_run_ends_at_its_last_step_or_by_patience():
    path = Path("checkpoints/step-10")
    state = STATE | {"step": 10, "finished": True}
    store.check_state(path, state, settings(steps=10))
    with pytest.raises(ValueError, match="finished must be True"):
        store.check_state(path, state | {"finished": False}, settings(steps=10))
    with pytest.raises(ValueError, match="step must be 10 and <= 9"):
        store.check_state(path, state, settings(steps=9))
    stopped = STATE | {"finished": True}
    store.check_state(Path("step-4"), stopped, settings(steps=20, patience=1))


def changed(path, name, data):
    """Replace a checkpoint's file, and have the manifest state it."""
    (path / name).write_bytes(data)
    entries = json.loads((path / "manifest.json").read_text())
    entries[name] |= store._digest(path / name)
    (path / "manifest.json").write_text(store._manifest_text(entries))
    assert store.is_whole(path)


def test_a_malformed_checkpoint_is_one_line(book, capsys):
    assert run(*RUN, "--steps", "6") == 0
    path = Path("out/checkpoints/step-4")
    shutil.rmtree("out/checkpoints/step-6")
    state, tensors = (path / "state.json").read_bytes(), load_file(path / "training.safetensors")
    spoiled = tensors | {"optimizer.wte.weight.exp_avg": torch.zeros(3)}
    files = [("state.json", data) for data in (b"{", b"[]", b"\xff", b"[" * 100_000)]
    files += [("training.safetensors", data) for data in (b"", b"\x08" + bytes(15))]
    for name, data in files:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}' is no "):
            store.read_checkpoint(path)
        (path / name).write_bytes(whole)
    files = [files[0], ("state.json", state.replace(b'"step": 4', b'"step": "4"'))]
    files += [("training.safetensors", dump(spoiled))]
    before = Path("out/metrics.jsonl").read_bytes()
    for name, data in files:
        whole = (path / name).read_bytes()
        changed(path, name, data)
        capsys.readouterr()
        assert run(*RUN, "--steps", "6", "--resume") == 2, data[:20]
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --resume ") and name in line and len(line) <= 200, line
        changed(path, name, whole)
    assert Path("out/metrics.jsonl").read_bytes() == before
    assert run(*RUN, "--steps", "6", "--resume") == 0


def test_every_file_has_ordinary_permissions_and_the_tensors_metadata(tmp_path):
    path = save(tmp_path, step=1)
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert {file.stat().st_mode for file in path.iterdir()} == {expected}
    with safe_open(path / store.TENSORS, "pt") as file:
        assert file.metadata()["format"] == "pt"
