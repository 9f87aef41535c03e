"""The folder of a run: who may write to it, what it was told, how it went."""

import json

import pytest
from test_checkpoint import save

from nanogpt2.config import TrainConfig
from nanogpt2.training.run_folder import RunFolder


def settings(tmp_path, **options):
    options = {"data": "pydocs", "init": "demo", "out": str(tmp_path / "out")} | options
    return TrainConfig(**options, given=tuple(options))


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


def test_overwriting_removes_the_run_and_nothing_else(tmp_path):
    folder = begun(tmp_path)
    folder.log({"step": 1})
    folder.close()
    save(folder.checkpoints, 1)
    (tmp_path / "out/notes.txt").write_text("mine")
    folder = RunFolder(tmp_path / "out")
    folder.start(settings(tmp_path, overwrite=True), before={"val_loss": 1.0})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock",
        "notes.txt",
        "run.json",
    ]


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
    whole = json.loads((tmp_path / "out/run.json").read_text())
    unknown = whole | {"config": whole["config"] | {"warmth": 3}}
    for damaged in ("{", "[]", "null", "{}", '{"config": []}', json.dumps(unknown), "[" * 100_000):
        (tmp_path / "out/run.json").write_text(damaged)
        with pytest.raises(ValueError, match="damaged"):
            folder.check(settings(tmp_path, resume=True))


def test_metrics_are_cut_to_the_step(tmp_path):
    folder = begun(tmp_path)
    for step in range(1, 6):
        folder.log({"step": step})
    folder.close()
    path = tmp_path / "out/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')
    RunFolder(tmp_path / "out").cut_metrics(3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


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
