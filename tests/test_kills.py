"""Nothing committed is lost: SIGKILL at named and random points, signals, full disks, two trainers.

What is killed is in kills.py, which runs as a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import kills
import pytest
from reference import ROOT
from test_train import SMALL, metrics, numbers, run

from nanogpt2.training import checkpoint as store


def killed(what, number, folder, seed=0):
    script = str(ROOT / "tests/kills.py")
    ran = subprocess.run(
        [sys.executable, script, what, str(number), str(seed), str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    print(ran.stdout)
    return json.loads(ran.stdout)


def slow(number):
    return pytest.param(number, marks=pytest.mark.slow)


def marathon(number):
    return pytest.param(number, marks=pytest.mark.marathon)


# where a commit must have been killed for its kills to prove anything
CALLS = {"open", "write", "mkdir", "rename", "replace", "unlink", "rmdir", "link"}


@pytest.mark.parametrize("number", [100, slow(300), marathon(10_000)], ids=str)
def test_the_store_loses_nothing(tmp_path, number):
    hit = killed("store", number, tmp_path)
    assert hit["named"] + hit["random"] == number
    assert hit["unfinished folder seen"] > number / 5
    assert hit["committed, not all that follows"] > number / 10
    assert hit["by name"].keys() >= CALLS


@pytest.mark.parametrize("number", [slow(20), marathon(500)], ids=str)
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, number):
    hit = killed("train", number, tmp_path / "runs")
    assert hit["kills"] == number and hit["resumed"] > 0 and hit["with a checkpoint"] > 0


def test_what_the_last_commit_left_undone_is_done_on_resuming(tmp_path, monkeypatch, capsys):
    """Killed between the last checkpoint's commit and all that follows from it."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("seven sheep jumped over the fence " * 100)
    argv = ["book.txt", *SMALL, "--steps", "6", "--save_every", "2"]
    assert run(*argv, "--out", "whole") == 0

    def stop(*arguments):
        raise KeyboardInterrupt

    settle, steps = store.settle, []

    def stop_at_the_last(out, state, keep):
        steps.append(state["step"])
        (stop if state["finished"] else settle)(out, state, keep)

    monkeypatch.setattr(store, "settle", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        run(*argv)
    monkeypatch.setattr(store, "settle", settle)
    assert steps[-1] == 6 and store.latest_checkpoint(Path("out/checkpoints")).name == "step-6"
    assert numbers() != numbers("whole") and not Path("out/loss.png").exists()
    assert run(*argv, "--resume") == 0
    assert numbers() == numbers("whole")
    assert kills.left_behind(Path("out")) == kills.left_behind(Path("whole"))
    capsys.readouterr()
    assert run(*argv, "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().err


# ---- what else may end a save


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_without_harm(tmp_path):
    hit = killed("signals", 60, tmp_path)
    assert hit["status 143"] == 60 and hit["unfinished folder seen"] > 10


@pytest.mark.slow
def test_an_error_at_any_call_leaves_the_last_checkpoint(tmp_path):
    hit = killed("errors", 60, tmp_path)
    assert hit["status 1"] > 50 and hit["unfinished folder seen"] > 10


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_folder(tmp_path):
    """Refused by the kernel: a size that no file may exceed, and permissions."""
    hit = killed("full", 12, tmp_path / "runs")
    assert hit["status 1"] > 4 and hit["committed more"] > 0 and hit["read-only"] in (1, 2)


HOLDER = """
import sys, time
from pathlib import Path
from nanogpt2.training.run_folder import RunFolder
folder = RunFolder(Path("out"))
folder.lock()
print("locked", flush=True)
time.sleep(600)
"""


def test_a_lock_keeps_two_trainers_out_and_dies_with_its_holder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("seven sheep jumped over the fence " * 100)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, env=environment
    )
    with holder:
        try:
            assert holder.stdout.readline() == b"locked\n"
            assert run("book.txt", *SMALL, "--steps", "2") == 2
            assert [path.name for path in Path("out").iterdir()] == [".lock"]
        finally:
            holder.kill()
    assert "error: --out 'out' is in use by another trainer\n" in capsys.readouterr().err
    assert holder.returncode == -9
    assert run("book.txt", *SMALL, "--steps", "2") == 0
    assert metrics()[-1]["step"] == 2
