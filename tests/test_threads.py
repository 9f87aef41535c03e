"""The threads that a program may use, and the flags that choose them."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from reference import ROOT, run_module, run_script

from nanogpt2 import threads
from nanogpt2.config import SampleConfig, TrainConfig, parse
from nanogpt2.devices import choose_device
from nanogpt2.evaluate import EvaluateConfig
from nanogpt2.tune import TuneConfig


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The choice is the process's."""
    monkeypatch.setattr(threads, "fixed", False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("limit", "count"),
    [
        ("max 100000\n", 6),
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("20000 100000\n", 1),
        ("600000 100000\n", 6),
        ("6400000 100000\n", 6),
        ("0 100000\n", 1),
        ("-100000 100000\n", 1),
        # malformed
        ("", 6),
        ("100000", 6),
        ("100000 0\n", 6),
        ("100000 100000 1\n", 6),
        ("many few\n", 6),
        ("\xff\xfe", 6),
        (None, 6),
    ],
    ids=repr,
)
def test_what_is_allowed(tmp_path, monkeypatch, limit, count):
    file = tmp_path / "cpu.max"
    if limit is not None:
        file.write_bytes(limit.encode("latin-1"))
    monkeypatch.setattr(threads, "CONTAINER_LIMIT", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 4, 5, 8, 9}, raising=False)
    assert threads.allowed() == count


def test_what_is_allowed_without_an_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "CONTAINER_LIMIT", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, allowed in ((5, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert threads.allowed() == allowed


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, str(threads.LOOKS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_waiting_briefly_keeps_what_the_user_has_set(monkeypatch, set_by_user, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # setenv first: it is undone after the test, whatever the function adds
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    threads.wait_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
    assert os.environ.get("OMP_WAIT_POLICY") == set_by_user.get("OMP_WAIT_POLICY")


def test_the_threads_that_are_used(monkeypatch):
    monkeypatch.setattr(threads, "allowed", lambda: 4)
    assert threads.settle(None, 16) == 4 and not threads.fixed
    assert threads.settle(None, 2) == 2 and not threads.fixed
    # what is asked for may be more than what is allowed
    assert threads.settle(9, 2) == 9 and threads.fixed
    assert threads.settle(1, 2) == 1 and threads.fixed
    assert threads.settle(None, 16) == 4 and not threads.fixed


def test_choosing_a_device_sets_them(monkeypatch):
    monkeypatch.setattr(threads, "allowed", lambda: 2)
    choose_device("cpu", 3)
    assert torch.get_num_threads() == 3 and threads.fixed
    choose_device("cpu")
    assert torch.get_num_threads() == 2 and not threads.fixed


SCRIPTS = ("train.py", "sample.py", *(f"nanogpt2/{n}.py" for n in ("evaluate", "quantize", "tune")))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_asks_for_it_before_torch_loads(script):
    """GNU's OpenMP reads its settings when torch loads it."""
    seen = (
        "import os, runpy, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    argv = [sys.executable, "-c", seen, str(ROOT / script), str(ROOT / "README.md")]
    if "quantize" in script or "tune" in script:
        argv[-1:] = ["demo"]
    if "quantize" in script:
        # nothing is written: the process ends where torch is imported
        argv += ["--out", "absent"]
    done = subprocess.run(
        argv, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == f"{threads.LOOKS}\n", done.stderr


def test_no_other_file_is_a_script():
    """Each file that a user runs is held above."""
    run = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanogpt2").glob("*.py")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if any(ast.unparse(call.func) == "terminal.prepare" for call in calls):
            run.add(str(path.relative_to(ROOT)))
    run = {name for name in run if not (ROOT / name).is_symlink()}
    assert {name.removeprefix("nanogpt2/") for name in run} == {
        name.removeprefix("nanogpt2/") for name in SCRIPTS
    }


def test_every_script_that_stops_collecting_garbage_begins_again():
    found = 0
    for path in [*ROOT.glob("*.py"), *(ROOT / "nanogpt2").rglob("*.py")]:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = [ast.unparse(call.func) for call in calls]
        if "terminal.prepare" in names:
            assert "terminal.loaded" in names, path
            found += 1
    assert found >= len(SCRIPTS)
    code = (
        "import gc; from nanogpt2 import terminal; terminal.prepare(); assert not gc.isenabled();"
        "terminal.loaded(); assert gc.isenabled() and gc.get_freeze_count() > 1000"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


FLAGS = {
    "sample": (SampleConfig, ["Hi"]),
    "train": (TrainConfig, [str(ROOT / "README.md")]),
    "evaluate": (EvaluateConfig, [str(ROOT / "README.md")]),
    "tune": (TuneConfig, ["demo"]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_the_flag(name, capsys):
    kind, argv = FLAGS[name]
    assert parse(kind, argv).threads is None
    for given, number in (("1", 1), ("2", 2), ("1024", 1024)):
        assert parse(kind, [*argv, "--threads", given]).threads == number
    for wrong in ("0", "-1", "abc", "1.5", "1025", "99999999999999999999", ""):
        with pytest.raises(SystemExit) as stopped:
            parse(kind, [*argv, f"--threads={wrong}"])
        assert stopped.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and len(err) <= 201
        assert err.startswith("error: --threads") and "1" in err
        assert wrong in err


def test_verbose_says_what_ran_in_one_line(tmp_path):
    """The text is the same; the line names each matrix's layout and the threads."""
    argv = ["sample.py", "Hi", "--model", "demo", "--seed", "1", "--max_new_tokens", "3"]
    plain = run_script(*argv, cwd=tmp_path, HOME=str(tmp_path))
    said = run_script(*argv, "--verbose", "--threads", "1", cwd=tmp_path, HOME=str(tmp_path))
    assert plain.returncode == said.returncode == 0, said.stderr
    assert plain.stdout == said.stdout
    lines = [n for n in said.stderr.decode().splitlines() if n not in plain.stderr.decode()]
    assert len(lines) == 1, said.stderr
    assert lines[0].startswith("layouts: c_attn ") and lines[0].endswith("threads: 1 of 1")
    for part in ("attn_c_proj", "c_fc", "mlp_c_proj", "head"):
        assert f", {part} " in lines[0]


def test_evaluating_with_a_number_of_threads(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the state of the union " * 5)
    argv = [str(text), "--model", "demo", "--device", "cpu", "--json"]
    one, more = (
        run_module("nanogpt2.evaluate", *argv, *extra, cwd=tmp_path)
        for extra in ([], ["--threads", "2"])
    )
    assert one.returncode == more.returncode == 0, more.stderr
    assert b"perplexity" in more.stdout
