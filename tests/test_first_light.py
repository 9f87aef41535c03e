"""The first eight minutes on a GPU, without one: the driver with parts that fail in every way, the
checks with kernels that are wrong, and a rehearsal in Triton's interpreter."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from reference import HUNG, ROOT

from benchmarks import first_light, first_light_parts, first_light_rooms, gpu

# a part's process, without torch: each case is one way to end
FAKE = """
import os, signal, sys, time
from pathlib import Path
from benchmarks import first_light

device = {"lost": False}

def note(ended=None):
    found = {"pid": os.getpid()} | ({"table": ended} if ended else {})
    return lambda: found

def fail():
    raise ValueError("a reason\\nand more")

def lose():
    device["lost"] = True
    raise RuntimeError("an illegal access")

def hang():
    time.sleep(HUNG)

PARTS = {
    "machine": {"good": note("| a table |")},
    "correct": {
        "first": note(),
        "fails": fail,
        "after an error": note(),
        "loses the device": lose,
        "after a loss": note(),
        "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "exits": lambda: os._exit(3),
        "hangs": hang,
        "last": note(),
    },
    "rooms": {"done": note(), "too long": hang, "never": note()},
    "train": {"good": note("| trained |")},
    "share": {f"{n}": note() for n in range(5)} | {"fails": fail},
}

part, path, _, name, _, seconds, *words = sys.argv[1:]
assert part != "profile", "no case runs"
report = first_light.Report(Path(path), int(seconds), lambda: device["lost"])
first, count = map(int, words[1].split("/")) if words else (0, 1)
for name, case in list(PARTS[part].items())[first::count]:
    report.run(name, case)
report.save(running=None)
""".replace("HUNG", str(HUNG))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The driver starts fake parts; no limit but those that a test is about."""
    (tmp_path / "fake_parts.py").write_text(FAKE)
    monkeypatch.setattr(first_light, "PROGRAM", "fake_parts")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path / "out"
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not first_light.CHILDREN


def report_of(out, part):
    return json.loads(first_light.path_of(out, part).read_text())


def test_every_way_to_fail_leaves_the_other_cases(fake, monkeypatch, capsys):
    monkeypatch.setitem(first_light.LIMITS, "correct", (HUNG, 1))
    # a case that loads nothing cannot reach the limit of a second unless it hangs
    assert first_light.main(["--out", str(fake), "--device", "cuda", "--only", "correct"]) == 1
    report = report_of(fake, "correct")
    cases = report["cases"]
    assert (report["status"], report["running"]) == ("done", None)
    assert list(cases) == [
        "first", "fails", "after an error", "loses the device", "after a loss", "dies", "exits",
        "hangs", "last",
    ]  # fmt: skip
    assert {name: case["error"] for name, case in cases.items() if "error" in case} == {
        "fails": "ValueError: a reason",
        "loses the device": "RuntimeError: an illegal access",
        "dies": "killed by SIGSEGV",
        "exits": "exited with 3",
        "hangs": "reached the limit of 1 s a case",
    }
    assert "and more" in cases["fails"]["log"]
    # an ordinary error costs no new process, the loss of the device and a death each cost one
    assert cases["first"]["pid"] == cases["after an error"]["pid"] != cases["after a loss"]["pid"]
    assert cases["last"]["pid"] not in (cases["first"]["pid"], cases["after a loss"]["pid"])
    assert "error: correct hangs: reached the limit of 1 s a case" in capsys.readouterr().out


def test_a_part_that_reaches_its_limit_leaves_what_it_has(fake, monkeypatch, capsys):
    """Nor is the next part left out."""
    waited = first_light.subprocess.Popen.wait

    def wait(child, timeout=None):
        # until the case runs that never ends, however slow the machine is
        path = first_light.path_of(fake, "rooms")
        while timeout == 7 and first_light.read(path)["running"] != "too long":
            time.sleep(0.05)
        return waited(child, 0.1 if timeout == 7 else timeout)

    monkeypatch.setattr(first_light.time, "monotonic", lambda: 0)
    monkeypatch.setattr(first_light.subprocess.Popen, "wait", wait)
    monkeypatch.setitem(first_light.LIMITS, "rooms", (7, HUNG))
    monkeypatch.setitem(first_light.LIMITS, "train", (HUNG, HUNG))
    assert first_light.main(["--out", str(fake), "--only", "train", "rooms"]) == 1
    report = report_of(fake, "rooms")
    assert report["status"] == "stopped at its limit of 7 s"
    assert list(report["cases"]) == ["done", "too long"]
    error = report["cases"]["too long"]["error"]
    assert error == "running when the part reached its limit of 7 s"
    assert report_of(fake, "train")["status"] == "done"
    out = capsys.readouterr().out
    assert out.index("## rooms: stopped at its limit of 7 s") < out.index("| trained |")


def test_a_part_that_runs_no_case_is_not_tried_again(fake, monkeypatch, capsys):
    monkeypatch.setitem(first_light.LIMITS, "profile", (HUNG, HUNG))
    assert first_light.main(["--out", str(fake), "--only", "profile"]) == 1
    report = report_of(fake, "profile")
    assert report["status"] == "failed with exit code 1" and report["cases"] == {}
    assert "AssertionError: no case runs" in report["log"]
    assert "error: profile: failed with exit code 1" in capsys.readouterr().out


def test_success_is_zero_and_an_old_file_is_not_taken_for_a_new_one(fake, monkeypatch, capsys):
    monkeypatch.setitem(first_light.LIMITS, "machine", (HUNG, HUNG))
    fake.mkdir()
    path = first_light.path_of(fake, "machine")
    first_light.write(path, {"cases": {"good": {"error": "old"}}, "running": None})
    assert first_light.main(["--out", str(fake), "--only", "machine"]) == 0
    assert report_of(fake, "machine")["cases"]["good"]["table"] == "| a table |"
    assert "| a table |" in capsys.readouterr().out
    assert [file.name for file in fake.iterdir()] == ["1-machine.json"]


def test_the_warm_up_shares_the_cases_among_processes(fake, monkeypatch, capsys):
    """Its errors do not count: they come again in the parts."""
    monkeypatch.setitem(first_light.LIMITS, "warm", (HUNG, HUNG))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert first_light.main(["--out", str(fake), "--only", "warm"]) == 0
    found = report_of(fake, "warm")["cases"]["all"]
    cases = [share["cases"] for share in found["shares"]]
    assert cases == [["0", "4"], ["1", "fails"], ["2"], ["3"]]
    assert found["failed"] == {"fails": "ValueError: a reason"}
    assert "6 cases in 4 processes, 1 failed." in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_the_parts_that_ended(fake, number):
    code = f"""
        from benchmarks import first_light
        first_light.PROGRAM = "fake_parts"
        first_light.LIMITS = {{name: ({HUNG}, {HUNG}) for name in first_light.LIMITS}}
        first_light.main(["--out", {str(fake)!r}, "--only", "machine", "rooms", "train"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as driver:
        rooms = first_light.path_of(fake, "rooms")
        while first_light.read(rooms)["running"] != "too long":
            assert driver.poll() is None
            time.sleep(0.05)
        driver.send_signal(number)
        code = driver.wait()
    pid = report_of(fake, "rooms")["cases"]["done"]["pid"]
    if number == signal.SIGTERM:
        assert code == 143
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    else:
        os.killpg(pid, signal.SIGKILL)
    assert report_of(fake, "machine")["status"] == "done"
    assert not first_light.path_of(fake, "train").exists()


def test_the_limits_are_eight_minutes():
    assert sum(whole for whole, _ in first_light.LIMITS.values()) == 8 * 60
    assert all(0 < case < whole for whole, case in first_light.LIMITS.values())


def test_wrong_use(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert first_light.main(["--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --out ") and err.count("\n") == 1 and len(err) <= 200


def test_a_cpu_hides_the_gpu_and_a_gpu_compiles(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" not in first_light.environment("cuda")
    on_cpu = first_light.environment("cpu")
    assert (on_cpu["TRITON_INTERPRET"], on_cpu["CUDA_VISIBLE_DEVICES"]) == ("1", "")


# ---- the checks, in this process


def room(name):
    return first_light_rooms.module_of(name)


@pytest.fixture
def quiet():
    """The interpreter computes with numpy, which would warn of what a GPU computes in silence."""
    with np.errstate(all="ignore"):
        yield


def scaled(function, factor):
    return lambda *args, **kwargs: function(*args, **kwargs) * factor


@pytest.mark.interpreted
def test_a_wrong_room_is_an_error(quiet, monkeypatch):
    case = partial(first_light_rooms.correct_case, "gelu", (5, 37), torch.float32)
    assert all(error < 1e-6 for error in case()["errors"].values())
    bench = first_light_rooms.bench_of("gelu")
    monkeypatch.setattr(bench, "bias_gelu", scaled(bench.bias_gelu, 1.001))
    with pytest.raises(AssertionError, match="5 x 37 \\+ b, forward: ours is wrong"):
        case()


@pytest.mark.interpreted
def test_a_wrong_model_is_an_error(quiet, monkeypatch):
    found = first_light_parts.model_case("triton", autocast=False)
    assert "error" not in found and len(found["ratios"]) == 2 + 16
    monkeypatch.setattr(room("gelu"), "bias_gelu", scaled(room("gelu").bias_gelu, 1.001))
    found = first_light_parts.model_case("triton", autocast=False)
    assert "results are wrong: logits" in found["error"]


@pytest.mark.interpreted
def test_other_tokens_are_an_error(quiet, monkeypatch):
    case = partial(first_light_parts.tokens_case, "Triton, eager", "greedy")
    assert case() == {"tokens": 4, "equal": 4, "decoders": ["ModelDecoder"]}
    attention = room("decode_attention")
    monkeypatch.setattr(attention, "decode_attention", scaled(attention.decode_attention, -3))
    found = case()
    assert found["error"] == f"token {found['equal']} of 4 differs from PyTorch's"
    # the prompt is read by another kernel
    assert 1 <= found["equal"] < 4


@pytest.mark.interpreted
def test_a_sweep_leaves_out_what_is_wrong_or_fails(quiet):
    gelu = room("gelu")
    config, kernel = gelu._config, gelu._gelu_fwd_kernel

    class Wrong:
        def __getitem__(self, grid):
            return lambda rows, bias, y, *_, **__: y.fill_(7)

    def fails(_):
        raise RuntimeError("out of resource: shared memory")

    sweep = first_light_rooms.SWEEPS["gelu, forward"]()
    others = {
        "wrong": partial(mock.patch.object, gelu, "_gelu_fwd_kernel", Wrong()),
        "fails": partial(mock.patch.object, gelu, "_config", fails),
    }
    sweep = replace(sweep, choices=sweep.choices | others)
    found = first_light_rooms.sweep_case(lambda: sweep)
    assert found["left_out"].keys() == others.keys()
    assert found["left_out"]["wrong"].startswith("5 x 37, forward: ours is wrong: RMS ratio ")
    assert found["left_out"]["fails"] == "out of resource: shared memory"
    assert set(found["clocks"]) == {"as it is", "num_warps 4", "num_warps 8"}
    assert found["present"] == "as it is" and found["fastest"] in found["clocks"]
    assert (gelu._config, gelu._gelu_fwd_kernel) == (config, kernel)


@pytest.mark.interpreted
def test_a_sweep_makes_its_choices(monkeypatch):
    """And takes them back."""
    attention, sampling = room("attention"), room("sampling")
    before = dict(attention.FORWARD), (sampling.BLOCK_V, sampling.NUM_WARPS)
    key = gpu.DTYPE.itemsize, first_light_rooms.shapes_of("attention")[0][3]
    choices = first_light_rooms.entry(attention, "FORWARD", key, [(16, 16, 1, 1), before[0][key]])
    assert list(choices) == [str(before[0][key]), "(16, 16, 1, 1)"]
    with choices["(16, 16, 1, 1)"]():
        assert attention.FORWARD[key] == (16, 16, 1, 1)
    choices = first_light_rooms.constants(sampling, ("BLOCK_V", "NUM_WARPS"), [(64, 1)])
    with choices["(64, 1)"]():
        assert (sampling.BLOCK_V, sampling.NUM_WARPS) == (64, 1)
    choices = first_light_rooms.config(room("softmax"), [{"num_warps": 3}])
    present = room("softmax")._config(37)
    with choices["num_warps 3"]():
        assert room("softmax")._config(37) == present | {"num_warps": 3}
    assert before == (attention.FORWARD, (sampling.BLOCK_V, sampling.NUM_WARPS))
    assert room("softmax")._config(37) == present


@pytest.mark.interpreted
def test_unlike_losses_are_an_error(tmp_path, monkeypatch):
    report = first_light.Report(tmp_path / "train.json", HUNG, lambda: False)
    monkeypatch.setattr(first_light_parts, "LIVE", {"ours": lambda: 3.0})
    arms = {"ours": [3.0, 3.0, 3.0], "nanoGPT's recipe": [3.0, 3.0, 3.0]}
    report.cases = {arm: {"losses": losses, "memory": 1} for arm, losses in arms.items()}
    first_light_parts.LIVE["nanoGPT's recipe"] = lambda: 3.0
    found = first_light_parts.ten_steps(report)
    assert "error" not in found and len(found["losses"]["ours"]) == 13
    first_light_parts.LIVE["nanoGPT's recipe"] = lambda: 3.1
    assert "number 3 is 3.1, not 3.0" in first_light_parts.ten_steps(report)["error"]
    # an arm that could not start is left out
    report.cases["ours"] = {"error": "no"}
    assert list(first_light_parts.ten_steps(report)["losses"]) == ["nanoGPT's recipe"]


TOOL = """#!{python}
import os, pathlib, sys
check, path = sys.argv[2], pathlib.Path(sys.argv[sys.argv.index("tiny") + 1])
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
wrong = '{{"error": "wrong"}}' if check == "synccheck" else "{{}}"
path.write_text('{{"cases": {{"gelu": %s}}, "running": null}}' % wrong)
print("========= ERROR SUMMARY: %d errors" % (check == "racecheck"))
sys.exit(9 if check == "racecheck" else 0)
"""


def test_what_a_sanitizer_says(tmp_path):
    """A check that finds something, and one under which a result is wrong."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(python=sys.executable))
    tool.chmod(0o755)
    found = first_light_parts.all_sanitized(str(tool))
    assert found["error"] == (
        "racecheck: exit code 9: ========= ERROR SUMMARY: 1 errors; "
        "synccheck: exit code 0: ========= ERROR SUMMARY: 0 errors gelu"
    )
    assert "| memcheck | ========= ERROR SUMMARY: 0 errors |" in found["table"]


def test_every_process_has_the_same_cases_in_the_same_order():
    """Else shares would leave cases out."""
    code = "from benchmarks import first_light_parts as p; print(list(p.once()))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    """Every part, at tiny sizes, in Triton's interpreter: nothing fails, nothing is left out."""
    command = [sys.executable, "-m", "benchmarks.first_light", "--device", "cpu", "--out"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [f"{n + 1}-{part}.json" for n, part in enumerate(first_light.LIMITS)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    reports = {part: report_of(tmp_path, part) for part in first_light.LIMITS}
    assert {report["status"] for report in reports.values()} == {"done"}
    warm = reports["warm"]["cases"]["all"]
    assert not warm["failed"]
    # what is timed was compiled before
    for sweep in first_light_rooms.SWEEPS:
        assert any(name.startswith(f"rooms: {sweep}, ") for name in warm["seconds_of"]), sweep
    rooms = reports["rooms"]["cases"]
    for room in first_light_rooms.ROOMS:
        assert any(name.startswith(f"{room} ") for name in rooms)
    for name, case in rooms.items():
        assert case["table"].startswith("| "), name
        assert not name.startswith("sweep") or not case["left_out"], name
    tokens = [case for case in reports["decode"]["cases"].values() if "equal" in case]
    assert tokens and all(case["equal"] == case["tokens"] for case in tokens)
    assert len(reports["train"]["cases"]["ten steps"]["losses"]["ours"]) == 13
    assert all(case["kernels"] for case in reports["profile"]["cases"].values())
    why = reports["sanitizer"]["cases"]["left out"]["left_out"]
    assert why in ("compute-sanitizer is not installed", "no CUDA device")
    assert "its times mean nothing" in done.stdout.splitlines()[0]
