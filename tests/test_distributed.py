"""Several processes: torchrun on the CPU, as its users start it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import HUNG, ROOT, TINY, settings
from test_train import SMALL, book, metrics, numbers, run
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from nanogpt2.checkpoints.load import load_classifier, load_model
from nanogpt2.config import TrainConfig, fail
from nanogpt2.model import GPT
from nanogpt2.training.distributed import World
from nanogpt2.training.trainer import Trainer

__all__ = ["book"]  # the fixture

BASE = [*SMALL, "--lr", "0.01"]


def torchrun(*argv, script="train.py", **environment):
    """Two processes, started and not waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    starter = ["torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    return subprocess.Popen(
        [sys.executable, "-m", *starter, f"--master_port={port}", str(ROOT / script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        text=True,
    )


def finished(process):
    """The exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=HUNG)
    except subprocess.TimeoutExpired:
        # it ends the others, too
        process.terminate()
        raise AssertionError(process.communicate()) from None
    return process.returncode, out, err


def assert_same_run(a, b, rel=1e-5):
    """Every loss and gradient norm of two runs, as far as rounding allows."""
    for one, other in zip(metrics(a), metrics(b), strict=True):
        for name in ("loss", "grad_norm", "val_loss", "val_accuracy"):
            assert (name in one) == (name in other)
            if name in one:
                # norms are roots of sums: they round more
                allowed = rel * (10 if name == "grad_norm" else 1)
                assert one[name] == pytest.approx(other[name], rel=allowed), (name, one, other)


@pytest.fixture
def records(tmp_path):
    """Of a chat and of a classification, as uneven as can be; 9 or 13 are held out."""
    chat = [
        {"prompt": f"How many sheep after {i}?", "completion": " " + "baa " * (1 + i % 7 * i % 5)}
        for i in range(90)
    ]
    labelled = [
        {"text": ("good " if i % 3 else "bad ") * (1 + i % 4) + str(i), "label": "yn"[i % 3 == 0]}
        for i in range(130)
    ]
    for name, rows in (("chat", chat), ("classify", labelled)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def data(task):
    return ["book.txt"] if task == "lm" else [f"{task}.jsonl", "--task", task]


def only_by(mark, *cases):
    return [pytest.param(*case, marks=mark) for case in cases]


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("lm", []),
        *only_by(pytest.mark.slow, ("chat", ["--fsdp"])),
        *only_by(
            pytest.mark.marathon,
            ("classify", []),
            ("lm", ["--fsdp"]),
            ("chat", []),
            ("classify", ["--fsdp"]),
            ("chat", ["--fsdp", "--activation_checkpointing"]),
        ),
    ],
)
def test_two_processes_train_as_one_does(book, records, task, flags):
    # a process has 10 sequences in a step, in batches of 4, 4 and 2; 3 or 4 batches validate
    Path("val.txt").write_text("9 sheep jumped over the fence. " * 5)
    held_out = ["--validation", "val.txt"] if task == "lm" else []
    argv = [*data(task), *held_out, *BASE, "--steps", "5", "--grad_accum", "5", "--eval_every", "2"]
    assert run(*argv, "--out", "one") == 0
    code, out, err = finished(torchrun(*argv, *flags, "--out", "two"))
    assert code == 0, err
    assert_same_run("one", "two")

    # one process alone speaks and writes
    said = [line for line in (out + err).splitlines() if line.strip()]
    assert "now try: python sample.py" in out and err.count("step 2: loss") == 1
    assert len({line for line in said if "loss" in line}) == sum("loss" in line for line in said)
    assert "Traceback" not in err and "Warning" not in err
    files = [sorted(str(p.relative_to(d)) for p in Path(d).rglob("*")) for d in ("one", "two")]
    assert files[0] == files[1] and not any("tmp" in name for name in files[1])
    assert [row["step"] for row in metrics("two")] == [1, 2, 3, 4, 5]

    ids = torch.randint(256, (2, 9))
    cls = GPT2ForSequenceClassification if task == "classify" else GPT2LMHeadModel
    theirs, info = cls.from_pretrained("two", output_loading_info=True)
    assert not any(info.values())
    load = load_classifier if task == "classify" else load_model
    with torch.no_grad():
        close = {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(
            load("one").state_dict(), load("two").state_dict(), rtol=1e-2, atol=1e-4
        )
        if task != "classify":
            torch.testing.assert_close(theirs.eval()(ids).logits, load("two")(ids), **close)


# the first process has the starter end both, and waits in that step until its own signal is there
STOPPED = """
import os, runpy, signal, sys, time
from nanogpt2.training import optim

def stopping(step, *rest):
    if step == 25 and os.environ["RANK"] == "0":
        handle, received = signal.getsignal(signal.SIGTERM), []
        signal.signal(signal.SIGTERM, lambda *args: received.append(args) or handle(*args))
        os.kill(os.getppid(), signal.SIGTERM)
        while not received:
            time.sleep(0.001)
    return rate(step, *rest)

rate, optim.learning_rate = optim.learning_rate, stopping
sys.argv[0] = os.environ["SCRIPT"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("flags", "dropout"),
    [
        *only_by(pytest.mark.slow, ([], "0.1")),
        *only_by(pytest.mark.marathon, (["--fsdp"], "0.1"), ([], "0"), (["--fsdp"], "0")),
    ],
)
def test_two_processes_are_stopped_and_go_on_bit_for_bit(book, flags, dropout):
    argv = ["book.txt", *BASE, *flags, "--steps", "50", "--dropout", dropout, "--grad_accum", "2"]
    argv += ["--eval_every", "20"]
    assert finished(torchrun(*argv, "--out", "whole"))[0] == 0
    script = Path("stopped.py").absolute()
    script.write_text(STOPPED)
    environment = {"SCRIPT": str(ROOT / "train.py")}
    code, _, err = finished(torchrun(*argv, "--out", "stopped", script=script, **environment))
    assert code not in (0, None) and err.count("--resume goes on") == 1, err
    assert "train.py" not in err  # in a traceback
    done = len(metrics("stopped"))
    assert done == 25 and Path(f"stopped/checkpoints/step-{done}").exists()

    shutil.copytree("stopped", "alone", symlinks=True)
    code, _, err = finished(torchrun(*argv, "--out", "stopped", "--resume"))
    assert code == 0 and f"resuming after step {done}" in err, err
    assert numbers("stopped") == numbers("whole")

    # one process goes on too; without dropout it computes the same, but for rounding
    if flags:
        argv.remove("--fsdp")
        argv.append("--no_fsdp")
    assert run(*argv, "--out", "alone", "--resume") == 0
    if dropout == "0":
        assert_same_run("alone", "whole", rel=1e-3)
    assert [row["step"] for row in metrics("alone")] == list(range(1, 51))


def test_processes_drop_other_activations(monkeypatch):
    monkeypatch.setattr("nanogpt2.training.trainer.wrap", lambda model: model)
    draws = []
    for rank in range(3):
        torch.manual_seed(5)
        Trainer(settings(seed=5), GPT(TINY), World("cpu", rank, 3))
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 3


def test_wrong_use_is_said_once(book):
    before = sorted(Path().rglob("*"))
    code, out, err = finished(torchrun("book.txt", *BASE, "--steps", "0"))
    assert code != 0 and out == ""
    assert err.count("error: --steps must be") == 1
    assert sorted(Path().rglob("*")) == before


@pytest.mark.marathon
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["book.txt", *BASE, "--batch_size", "3"],
            "--batch_size x --grad_accum must be a ",
        ),
        (["short.txt", *BASE], "DATA 'short.txt' is too short"),
        (["book.txt", *BASE, "--device", "cuda"], "--device 'cuda' is not on this machine"),
    ],
    ids=str,
)
def test_wrong_use_found_later_is_said_once(book, argv, said):
    Path("short.txt").write_text("too short")
    code, out, err = finished(torchrun(*argv))
    assert code != 0 and out == ""
    assert err.count("error: ") == 1 and f"error: {said}" in err and 'train.py", line' not in err
    assert not Path("out").exists()


@pytest.mark.marathon
def test_a_finished_run_is_said_once(book):
    argv = ["book.txt", *BASE, "--steps", "2"]
    assert run(*argv) == 0
    code, _, err = finished(torchrun(*argv, "--resume"))
    assert code == 0 and err.count("is finished: nothing to resume") == 1


def test_an_error_in_one_process_ends_both(book):
    script = Path("broken.py")
    script.write_text(
        "import os, sys, runpy, torch\n"
        "from nanogpt2.model import GPT\n"
        "forward, calls = GPT.forward, []\n"
        "def broken(self, idx, targets=None):\n"
        "    calls.append(self.training)\n"
        "    if os.environ['RANK'] == '1' and sum(calls) == 3:\n"
        "        raise torch.OutOfMemoryError('all is taken')\n"
        "    return forward(self, idx, targets)\n"
        "GPT.forward = broken\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = ["book.txt", *BASE, "--steps", "2000", "--eval_every", "1000", "--save_every", "1"]
    code, _, err = finished(torchrun(*argv, script=script.absolute()))
    assert code != 0
    assert err.count("error: out of memory with 4 x 16 tokens at a time: try") == 1
    assert 1 <= len(metrics()) < 10
    assert load_model("out")


def test_the_first_of_several_processes_speaks_for_all(capsys, monkeypatch):
    slept = []
    monkeypatch.setattr("nanogpt2.config.flags.time.sleep", slept.append)
    monkeypatch.setattr("nanogpt2.config.flags.signal.signal", lambda *args: slept.append(args))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            fail("--steps is wrong")
        assert bool(slept) == (rank == "1")
    # where it has nothing to say, the others have
    assert capsys.readouterr().err == "error: --steps is wrong\n" * 2


def test_fsdp_without_torchrun_is_wrong_use(book, capsys, monkeypatch):
    assert run("book.txt", *BASE, "--fsdp") == 2
    assert "--fsdp must come with torchrun" in capsys.readouterr().err
    assert not Path("out").exists()
    with pytest.raises(ValueError, match="torchrun"):
        TrainConfig(data="book.txt", fsdp=True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    for flag in ("--lora_rank=4", "--ema=0.5", "--optimizer=muon", "--dtype=float16"):
        assert run("book.txt", *[f for f in BASE if "scratch" not in f], "--fsdp", flag) == 2


@pytest.mark.marathon
def test_leaving_never_waits_for_ever(tmp_path):
    """DDP as the last to hold the group of processes hung about one time in ten."""
    code = (
        "import sys, torch, torch.distributed as dist\n"
        "from nanogpt2.training.distributed import World\n"
        "def run(i):\n"
        "    dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}/{i}', rank=0,"
        " world_size=1)\n"
        "    world = World('cpu', 0, 2)\n"
        "    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))\n"
        "    model(torch.ones(2, 4)).sum().backward()\n"
        "    for _ in range(3):\n"
        "        world.sum(1.0, 2.0)\n"
        "    world.leave()\n"
        "for i in range(1000):\n"
        "    run(i)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, timeout=HUNG, env=environment)


# prints the number of the group's threads that may need the interpreter's lock, here and at the end
ENDING = """
import atexit, sys
from pathlib import Path

def count():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("pt_gloo_runloop\\n")

# runs after those that are registered later
atexit.register(lambda: sys.stdout.write(f"at the end {count()}\\n"))

import torch
from nanogpt2.training import distributed

def main():
    world = distributed.join("cpu")
    model = distributed.wrap(torch.nn.Linear(4, 4)) if "ddp" in sys.argv else None
    if model is not None:
        model(torch.ones(2, 4)).sum().backward()
    world.sum(1.0, 2.0)
    while count() < 2:
        pass
    world.leave()
    if "exits" in sys.argv:
        sys.exit(3)

main()
"""


@pytest.mark.parametrize("argv", [[], ["ddp"], ["ddp", "exits"]])
def test_a_process_that_ends_has_ended_its_groups_threads(tmp_path, argv):
    """One that still wanted the interpreter's lock aborted the process: 6 of 30."""
    script = tmp_path / "ending.py"
    script.write_text(ENDING)
    code, out, err = finished(torchrun(*argv, script=script))
    assert (code == 0) == ("exits" not in argv), err
    assert out == "at the end 0\n" * 2, (out, err)


# ---- a process that stops

# process 1 acts as it begins step 5
STOPPING = """
import os, runpy, signal, sys
from nanogpt2.training import optim

def stopping(step, *rest):
    if step == 5 and os.environ["RANK"] == "1":
        kill()
    return rate(step, *rest)

def kill():
    parent = os.environ["WHAT"] == "torchrun"
    number = signal.SIGSTOP if os.environ["WHAT"] == "hangs" else signal.SIGKILL
    os.kill(os.getppid() if parent else os.getpid(), number)

rate, optim.learning_rate = optim.learning_rate, stopping
sys.argv[0] = os.environ["SCRIPT"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# starts both processes as torchrun does, and waits for the first
STARTER = """
import os, subprocess, sys
started = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {"RANK": r, "LOCAL_RANK": r})
    for r in ("0", "1")
]
code = started[0].wait()
started[1].kill()
started[1].wait()
sys.exit(code)
"""


def started(what, *argv):
    """Two processes without torchrun, which would wait 30 seconds for a stopped one."""
    Path("stopping.py").write_text(STOPPING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    elastic = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    elastic |= {"MASTER_PORT": port, "WHAT": what, "SCRIPT": str(ROOT / "train.py")}
    return subprocess.Popen(
        [sys.executable, "-c", STARTER, "stopping.py", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | elastic,
        text=True,
    )


STOP = ["book.txt", *BASE, "--steps", "100000", "--eval_every", "50000", "--timeout", "8"]


@pytest.mark.parametrize(
    ("what", "flags"),
    only_by(pytest.mark.slow, ("hangs", []), ("dies", []), ("hangs", ["--fsdp"])),
)
def test_a_process_that_stops_ends_the_run_with_its_last_step_saved(book, capsys, what, flags):
    code, out, err = finished(started(what, *STOP, *flags))
    assert code == 1 and out == "", err
    errors = [line for line in err.splitlines() if "error" in line]
    wait = "did not answer within 8 s (--timeout)"
    assert errors == [f"error: another process ended, or {wait}: --resume goes on"], err
    assert "Traceback" not in err
    assert Path("out/checkpoints/step-4").exists() == (not flags)
    if not flags:
        assert [row["step"] for row in metrics()] == [1, 2, 3, 4]
        state = json.loads(Path("out/checkpoints/step-4/state.json").read_text())
        assert state["step"] == 4 and load_model("out")


@pytest.mark.slow
def test_processes_end_with_a_torchrun_that_was_killed(book):
    """It can tell them nothing. They save as after SIGTERM; their end closes the pipes."""
    code, _, err = finished(started("torchrun", *STOP))
    assert code == -9 and err.count("--resume goes on") == 1, err
    assert "Traceback" not in err
    (saved,) = Path("out/checkpoints").glob("step-*")
    assert int(saved.name[5:]) >= 5 and load_model("out")
