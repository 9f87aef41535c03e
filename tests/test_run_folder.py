"""The folder of a run: who may write to it, what it was told, how it went."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from test_checkpoint import save

from nanogpt2.config import TrainConfig
from nanogpt2.training import checkpoint as store
from nanogpt2.training.run_folder import EVENTS, RunFolder
from nanogpt2.training.snapshot import Snapshot


def settings(tmp_path, **options):
    options = {"data": "pydocs", "init": "demo", "out": str(tmp_path / "out")} | options
    return TrainConfig(**({"steps": 10} | options), given=tuple(options))


def begun(tmp_path, **options):
    config = settings(tmp_path, **options)
    folder = RunFolder(tmp_path / "out")
    folder.lock()
    folder.hold_to(config, data="abc")
    folder.start(config, before={"val_loss": 1.0})
    folder.close()
    return folder


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "out")
    assert folder.check(settings(tmp_path)) == settings(tmp_path)
    assert not (tmp_path / "out").exists()
    begun(tmp_path)
    with pytest.raises(ValueError, match=r"already holds run\.json"):
        folder.check(settings(tmp_path))
    folder.check(settings(tmp_path, overwrite=True))


def test_a_model_of_somebody_elses_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"already holds model\.safetensors"):
        RunFolder(tmp_path / "out").check(settings(tmp_path))
    inside = settings(tmp_path, overwrite=True, init=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="--init"):
        RunFolder(tmp_path / "out").check(inside)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()} | {
        str(p.relative_to(path)): p.readlink() for p in path.rglob("*") if p.is_symlink()
    }


def write(path, text="mine"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    """A run of two steps with an adapter, event files and a published model."""
    place = tmp_path_factory.mktemp("finished")
    folder = begun(place, lora_rank=2)
    for step in (1, 2):
        folder.log({"step": step})
        save(folder.checkpoints, step, run=folder.run_id)
        store.settle(folder.path, {"step": step, "is_best": True}, 2)
    for name in ("tensorboard/events.out.tfevents.1" + EVENTS, "adapter/adapter_config.json"):
        write(folder.path / name, "")
    write(folder.path / "loss.png", "")
    folder.end(after={"val_loss": 1.0})
    folder.close()
    return folder.path


@pytest.fixture
def finished(tmp_path, finished_once):
    return Path(shutil.copytree(finished_once, tmp_path / "out", symlinks=True))


OTHERS = (
    "notes.txt",
    "checkpoints/notes.txt",
    "checkpoints/mine/step-3/model.safetensors",
    "checkpoints/step-x/model.safetensors",
    "tensorboard/notes.txt",
    "tensorboard/events.out.tfevents.2.theirs",
    "tensorboard/other/events.out.tfevents.1" + EVENTS,
    "adapter/README.md",
)


@pytest.mark.parametrize("others", [(), OTHERS], ids=["alone", "others"])
def test_overwriting_removes_the_run_and_nothing_else(tmp_path, finished, others):
    for name in others:
        write(finished / name)
    folder = RunFolder(finished)
    config = settings(tmp_path, overwrite=True)
    assert folder.check(config) == config
    folder.start(config, before={"val_loss": 1.0})
    assert files(finished).keys() == {".lock", "run.json", *others}
    if not others:
        assert sorted(p.name for p in finished.iterdir()) == [".lock", "run.json"]


@pytest.mark.parametrize("flag", ["", "overwrite"])
@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "run.json", "metrics.jsonl", "checkpoints/step-3/x"),
        *("checkpoints/best", "loss.png", "adapter/adapter_model.safetensors"),
    ],
)
def test_what_no_run_made_is_refused(tmp_path, name, flag):
    """Also by --overwrite: a folder without run.json holds no run."""
    out = tmp_path / "out"
    write(out / name)
    before = files(tmp_path)
    config = settings(tmp_path, lora_rank=2, **({flag: True} if flag else {}))
    with pytest.raises(ValueError, match=name.split("/")[0]):
        RunFolder(out).check(config)
    with pytest.raises(FileExistsError, match=name.split("/")[0]):
        RunFolder(out).start(config, before={"val_loss": 1.0})
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["adapter", "tensorboard", "checkpoints"])
def test_what_a_run_would_delete_is_looked_for(tmp_path, name):
    write(tmp_path / "out" / name / "notes.txt")
    with pytest.raises(ValueError, match=f"already holds {name}"):
        RunFolder(tmp_path / "out").check(settings(tmp_path))


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "manifest.json", "loss.png"),
        *("adapter/adapter_config.json", "checkpoints/step-9/model.safetensors"),
        *("checkpoints/step-9/state.json", "checkpoints/step-9", "checkpoints/best"),
    ],
)
def test_a_file_of_ones_own_among_a_runs_files_is_refused(tmp_path, finished, name):
    path = finished / name
    if path.is_symlink() or path.exists():
        path.unlink()
    write(path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="move it away"):
        RunFolder(tmp_path / "out").check(settings(tmp_path, overwrite=True))
    with pytest.raises(FileExistsError, match="move it away"):
        RunFolder(tmp_path / "out").start(settings(tmp_path, overwrite=True), before={})
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "more/notes.txt", ".DS_Store"])
def test_a_file_in_a_checkpoint_stays(tmp_path, finished, name):
    path = finished / "checkpoints/step-2" / name
    write(path)
    folder = RunFolder(tmp_path / "out")
    folder.start(settings(tmp_path, overwrite=True), before={"val_loss": 1.0})
    kept = {f for f in files(finished) if f.startswith("checkpoints")}
    assert kept == {f"checkpoints/step-2/{name}"}


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "run.json", "adapter"])
def test_links_are_not_removed(tmp_path, finished, name):
    path = finished / name
    path.rename(tmp_path / "precious")
    path.symlink_to(tmp_path / "precious")
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"{name}.*move it away"):
        RunFolder(tmp_path / "out").check(settings(tmp_path, overwrite=True))
    assert files(tmp_path) == before


def test_checkpoints_on_another_disk(tmp_path, finished):
    (finished / "checkpoints").rename(tmp_path / "disk")
    (finished / "checkpoints").symlink_to(tmp_path / "disk")
    folder = RunFolder(finished)
    config = settings(tmp_path, overwrite=True)
    folder.start(folder.check(config), before={"val_loss": 1.0})
    assert (finished / "checkpoints").is_symlink() and not list((tmp_path / "disk").iterdir())
    (tmp_path / "disk").rmdir()
    for flag in ("overwrite", "resume", "dry_run"):
        with pytest.raises(ValueError, match="disk not mounted"):
            folder.check(settings(tmp_path, **{flag: True}))


def test_a_run_is_known_without_links_and_without_checkpoints(tmp_path, finished):
    """A copied run has no hard links; a finished run's checkpoints may have been deleted."""
    config = settings(tmp_path, overwrite=True)
    assert finished.joinpath("model.safetensors").stat().st_nlink == 1
    RunFolder(finished).check(config)
    shutil.rmtree(finished / "checkpoints")
    RunFolder(finished).check(config)


def test_another_runs_checkpoint_is_not_removed(tmp_path, finished):
    """Moved here by a person, say to compare them."""
    save(finished / "checkpoints", 7, run="another")
    before = files(tmp_path)
    with pytest.raises(ValueError, match="step-7' is not known to be a run's"):
        RunFolder(finished).check(settings(tmp_path, overwrite=True))
    assert files(tmp_path) == before


def test_a_best_that_is_a_copy_is_the_runs(tmp_path, finished):
    """As a run without symlinks writes it, and as cp -rL copies it."""
    best, step = finished / "checkpoints/best", finished / "checkpoints/step-2"
    best.unlink()
    best.mkdir()
    store.publish(step, best)
    RunFolder(finished).check(settings(tmp_path, overwrite=True))
    shutil.rmtree(best)
    shutil.copytree(step, best)
    RunFolder(finished).check(settings(tmp_path, overwrite=True))


def test_a_folder_called_as_a_part_of_a_run(tmp_path, finished):
    for name in ("adapter", "checkpoints", "tensorboard"):
        path = Path(shutil.copytree(finished, tmp_path / name, symlinks=True))
        config = settings(tmp_path, overwrite=True, out=str(path))
        RunFolder(path).check(config)
        (path / "model.safetensors").unlink()
        write(path / "model.safetensors")
        with pytest.raises(ValueError, match="move it away"):
            RunFolder(path).check(config)


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png", "model.safetensors"])
def test_a_file_to_be_written_that_is_no_file(tmp_path, kind, name):
    """A pipe would be waited for, a folder would fail the first save, hours later."""
    begun(tmp_path)
    kind(tmp_path / "out" / name)
    with pytest.raises(ValueError, match=f"{name}' must be a plain file"):
        RunFolder(tmp_path / "out").check(settings(tmp_path, resume=True))


def test_a_link_in_place_of_a_temporary_file_is_not_written_through(tmp_path):
    begun(tmp_path)
    write(tmp_path / "precious")
    (tmp_path / "out/.run.json.tmp").symlink_to(tmp_path / "precious")
    RunFolder(tmp_path / "out").end(after={"val_loss": 1.0})
    assert (tmp_path / "precious").read_text() == "mine"
    assert RunFolder(tmp_path / "out").record()["after"]


def test_what_came_after_the_check_is_not_removed(tmp_path):
    folder = RunFolder(tmp_path / "out")
    config = folder.check(settings(tmp_path))
    write(tmp_path / "out/model.safetensors")
    with pytest.raises(FileExistsError, match=r"already holds model\.safetensors"):
        folder.start(config, before={"val_loss": 1.0})
    assert (tmp_path / "out/model.safetensors").read_text() == "mine"


def test_the_lock_goes_with_a_run_that_never_started(tmp_path):
    folder = RunFolder(tmp_path / "new/deep/out")
    folder.lock()
    assert (tmp_path / "new/deep/out/.lock").exists()
    folder.close()
    assert not list(tmp_path.iterdir())
    # what was there before stays as it is
    write(tmp_path / "out/.lock")
    folder = RunFolder(tmp_path / "out")
    folder.lock()
    folder.close()
    assert files(tmp_path) == {"out/.lock": b"mine"}
    long = RunFolder(tmp_path / "new" / ("x" * 300))
    with pytest.raises(OSError, match="name too long"):
        long.lock()
    long.close()
    assert not (tmp_path / "new").exists()


def test_a_lock_whose_file_was_deleted_is_no_lock(tmp_path, monkeypatch):
    """Its last holder deletes it between the opening and the locking here."""
    folder = RunFolder(tmp_path / "out")
    flock = fcntl.flock

    def late(file, how):
        (tmp_path / "out/.lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="in use"):
        folder.lock()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file(tmp_path, kind):
    lock = tmp_path / "out/.lock"
    lock.parent.mkdir()
    {"link": lambda p: p.symlink_to("../x"), "pipe": os.mkfifo, "folder": os.mkdir}[kind](lock)
    with pytest.raises(ValueError, match="plain file"):
        RunFolder(tmp_path / "out").check(settings(tmp_path))
    assert not (tmp_path / "x").exists()


def log(folder, *rows):
    for row in rows:
        folder.log(row)
    folder.close()


@pytest.mark.parametrize("said", ["run.json", "metrics.jsonl", "model.safetensors", "vocab.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "unfinished"])
def test_lost_checkpoints_are_no_new_run(tmp_path, said, how):
    folder = begun(tmp_path, save_every=2)
    rows = [{"step": step, "loss": 1.0} for step in (1, 2)]
    log(folder, *rows)
    if how != "gone":
        (folder.checkpoints / ("step-2.tmp" if how == "unfinished" else ".")).mkdir(parents=True)
    # two steps prove nothing: a kill may come before the second one's save
    folder.check_unsaved()
    if said == "run.json":
        folder.end(after={"val_loss": 1.0})
    elif said == "metrics.jsonl":
        log(folder, {"step": 3, "loss": 1.0})
    else:
        write(tmp_path / "out" / said)
    with pytest.raises(ValueError, match=f"no checkpoint, but {said} .*disk"):
        folder.check_unsaved()


def test_an_evaluation_proves_a_checkpoint(tmp_path):
    folder = begun(tmp_path, save_every=100)
    log(folder, {"step": 1, "val_loss": float("nan")}, {"step": 2, "val_loss": 2.0})
    folder.check_unsaved()
    log(folder, {"step": 3})
    with pytest.raises(ValueError, match="metrics"):
        folder.check_unsaved()
    for odd in ("5", "[]", '{"step": "x"}', '{"val_loss": "x"}', "{"):
        (tmp_path / "out/metrics.jsonl").write_text(f"{odd}\n" * 3)
        folder.check_unsaved()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "out").check(settings(tmp_path))


def test_resuming_takes_what_the_run_was_told(tmp_path):
    begun(tmp_path, lr=0.5, steps=7)
    folder = RunFolder(tmp_path / "out")
    config = folder.check(settings(tmp_path, resume=True, save_every=3, lr=0.5))
    assert (config.lr, config.steps, config.save_every, config.resume) == (0.5, 7, 3, True)
    with pytest.raises(ValueError, match=r"--lr 0\.5.*cannot change to 0\.25"):
        folder.check(settings(tmp_path, resume=True, lr=0.25))
    with pytest.raises(ValueError, match="no run to --resume"):
        RunFolder(tmp_path / "other").check(settings(tmp_path, resume=True))
    folder.hold_to(config, data="abc")
    with pytest.raises(ValueError, match="another data"):
        folder.hold_to(config, data="def")


def test_files_that_moved_are_held_to_their_digests(tmp_path):
    out = tmp_path / "out"
    begun(tmp_path, validation="old/val.txt", init="old/base")
    record = json.loads((out / "run.json").read_text())
    record["digests"] = {"data": "abc", "init": "def"}
    (out / "run.json").write_text(json.dumps(record))
    folder = RunFolder(out)
    moved = {"data": "new.txt", "validation": "new/val.txt", "init": "new/base"}
    config = folder.check(settings(tmp_path, resume=True, **moved))
    assert (config.data, config.validation, config.init) == tuple(moved.values())
    folder.hold_to(config, data="abc", init="def")
    folder.hold_to(config, data="abc")
    for digests in ({"data": "other"}, {"data": "abc", "init": "other"}):
        with pytest.raises(ValueError, match="another"):
            folder.hold_to(config, **digests)
    # an older run recorded no init: the same name is taken, another one is not
    (out / "run.json").write_text(json.dumps(record | {"digests": {"data": "abc"}}))
    folder.hold_to(folder.check(settings(tmp_path, resume=True, init="old/base")), init="def")
    with pytest.raises(ValueError, match="another init"):
        folder.hold_to(config, data="abc", init="def")
    # another way to hold out, or to begin, is no move
    for name, value in (("init", "scratch"), ("validation", None)):
        with pytest.raises(ValueError, match=f"--{name} .*cannot change"):
            folder.check(settings(tmp_path, resume=True, **{name: value}))


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        *(("config", "seed", 5), ("config", "lr", 0.25), ("config", "schedule", "constant")),
        *(("config", "steps", 5), ("digests", "data", "def"), ("digests", "init", "def")),
    ],
)
def test_an_edited_record_does_not_resume(tmp_path, where, name, value):
    out = tmp_path / "out"
    begun(tmp_path, lr=0.5, steps=7)
    folder = RunFolder(out)
    config = folder.check(settings(tmp_path, resume=True, keep=5, save_every=3))
    folder.hold_to(config, data="abc", init="demo's")
    (out / "run.json").write_text(json.dumps(folder.record() | {"digests": folder._digests}))
    stated = json.loads(json.dumps(folder.settings(config)))
    folder.hold_to_checkpoint(config, stated)
    # of an older version, and of a later one
    folder.hold_to_checkpoint(config, {})
    folder.hold_to_checkpoint(config, {"config": {"warmth": 3}})
    record = folder.record()
    record[where][name] = value
    (out / "run.json").write_text(json.dumps(record))
    config = folder.check(settings(tmp_path, resume=True))
    with pytest.raises(ValueError, match=f"run.json' was edited: {name} is {value!r}"):
        folder.hold_to_checkpoint(config, stated)


def test_a_malformed_record_is_one_line(tmp_path):
    begun(tmp_path, lr=0.5, steps=7)
    folder, path = RunFolder(tmp_path / "out"), tmp_path / "out/run.json"
    whole = json.loads(path.read_text())

    def changed(**config):
        return json.dumps(whole | {"config": whole["config"] | config})

    bad = ["{", "[]", "null", "{}", '{"config": []}', "[" * 100_000, "9" * 5000]
    bad += [json.dumps(whole | {key: []}) for key in ("config", "digests", "before")]
    bad += [changed(warmth=3), changed(given=["lr"]), changed(lr="x"), changed(steps=[])]
    bad += [json.dumps(whole | {"steps": value}) for value in (None, 5, "x")]
    bad += [
        changed(steps=None),
        changed(steps="x"),
        changed(lr=float("inf")),
        changed(seed=True),
        changed(dropout=2),
    ]
    for damaged in bad:
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"run\.json'( is damaged|: )"):
            folder.check(settings(tmp_path, resume=True))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="damaged"):
        folder.check(settings(tmp_path, resume=True))


@pytest.mark.parametrize(
    "figures",
    [
        *({"loss": 1.0}, {}, {"val_loss": None}, {"val_loss": "x"}, {"val_loss": 1.0, "ids": 5}),
        *({"val_loss": 1.0, name: wrong} for name, wrong in (("ids", ["x"]), ("sample", 5))),
        {"val_loss": 1.0, "accuracy": "x"},
        {"val_loss": 10**400},
    ],
)
def test_malformed_figures_of_the_record(figures):
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        Snapshot.from_record(figures)


def test_metrics_are_cut_to_the_step(tmp_path):
    folder = begun(tmp_path)
    for step in range(1, 6):
        folder.log({"step": step})
    folder.close()
    path = tmp_path / "out/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    RunFolder(tmp_path / "out").cut_metrics(3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_lines_that_a_person_put_into_the_metrics(tmp_path, capsys):
    folder, path = begun(tmp_path), tmp_path / "out/metrics.jsonl"
    path.write_text('note\n{"step": 1}\n\n[5]\n{"step": 2}\n{"step": 3}\n')
    folder.cut_metrics(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert not capsys.readouterr().err
    folder.cut_metrics(4)
    assert "has 2 lines of 4 steps" in capsys.readouterr().err


def test_two_trainers_do_not_share_a_folder(tmp_path):
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    first.lock()
    with pytest.raises(ValueError, match="in use"):
        second.lock()
    first.close()
    second.lock()
    second.close()


def test_a_gradient_that_overflowed_is_null_in_the_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "grad_norm": float("inf")})
    folder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "grad_norm": None}
