"""train.py as its users meet it: runs, resumes, kills and refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import HUNG, ROOT, run_script
from transformers import AutoTokenizer, GPT2LMHeadModel

import train
from nanogpt2.checkpoints.load import load_model, load_tokenizer
from nanogpt2.config import TrainConfig, parse
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer
from nanogpt2.training import prepare
from nanogpt2.training.checkpoint import latest_checkpoint
from nanogpt2.training.run_folder import RunFolder

SMALL = ["--init", "scratch", "--tokenizer", "bytes", "--n_layer", "2", "--n_head", "2"]
SMALL += ["--n_embd", "16", "--block_size", "16", "--batch_size", "4"]


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i} sheep jumped over the fence. " for i in range(200)))
    return "book.txt"


def run(*argv):
    """The script in this process; its exit code."""
    try:
        config = parse(TrainConfig, argv)
        with train.usage_error("--out"):
            config = RunFolder(Path(config.out)).check(config)
        train.main(config)
    except SystemExit as stopped:
        return stopped.code
    return 0


def metrics(out="out"):
    lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(out="out"):
    """What a run computed, to the bit: hex floats and the weights' bytes."""
    kept = ("step", "loss", "lr", "grad_norm", "val_loss")
    rows = [[float(row[k]).hex() for k in kept if k in row] for row in metrics(out)]
    return rows, (Path(out) / "model.safetensors").read_bytes()


def test_from_a_book_to_a_model(capsys, book):
    assert run(book, *SMALL, "--steps", "40", "--prompt", "7 sheep") == 0
    shown = capsys.readouterr().out
    before, after = (
        shown.index("before training:\n7 sheep"),
        shown.index("after training:\n7 sheep"),
    )
    assert before < after and "python sample.py --model out" in shown

    rows = metrics()
    assert [row["step"] for row in rows] == list(range(1, 41))
    for row in rows:
        assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= row.keys()
    evaluated = [row["step"] for row in rows if "val_loss" in row]
    assert evaluated == list(range(4, 41, 4))
    assert rows[-1]["val_loss"] < rows[0]["loss"] - 1

    theirs, info = GPT2LMHeadModel.from_pretrained("out", output_loading_info=True)
    assert not any(info.values())
    ours, ids = load_model("out"), torch.randint(257, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained("out")("7 sheep")["input_ids"] == list(b"7 sheep")
    assert load_tokenizer("out") is byte_tokenizer()
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)[1]
    assert str(Path("out/checkpoints/best").readlink()) == f"step-{best}"


def test_two_runs_with_one_seed_are_equal_and_settings_do_not_matter(book):
    argv = [book, *SMALL, "--steps", "12", "--dropout", "0.1", "--grad_accum", "2"]
    assert run(*argv, "--out", "a") == 0
    assert run(*argv, "--out", "b") == 0
    assert numbers("a") == numbers("b")
    assert run(*argv, "--out", "c", "--eval_every", "5", "--save_every", "1", "--keep", "1") == 0
    rows = [row[:4] for row in numbers("c")[0]]
    assert rows == [row[:4] for row in numbers("a")[0]] and numbers("c")[1] == numbers("a")[1]
    assert run(*argv, "--out", "d", "--seed", "5") == 0
    assert numbers("d")[1] != numbers("a")[1]


STOPPED = """
import os, runpy, sys
from nanogpt2.training import optim

def stopping(step, *rest):
    if step == int(at):
        os.kill(os.getpid(), int(number))
    return rate(step, *rest)

script, number, at, *argv = sys.argv[1:]
rate, optim.learning_rate = optim.learning_rate, stopping
sys.argv = [script, *argv]
runpy.run_path(script, run_name="__main__")
"""


def stopped_at(step, number, *argv, cwd):
    """train.py, which gets a signal as it begins a step: at the same place on any machine."""
    script = str(ROOT / "train.py")
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", STOPPED, script, str(int(number)), str(step), *argv],
        cwd=cwd,
        capture_output=True,
        timeout=HUNG,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(book, tmp_path, number, code):
    argv = [book, *SMALL, "--steps", "60", "--dropout", "0.1", "--save_every", "10"]
    assert run(*argv, "--out", "whole") == 0
    ran = stopped_at(25, number, *argv, "--out", "stopped", cwd=tmp_path)
    assert ran.returncode == code, ran.stderr
    assert b"Traceback" not in ran.stderr
    # the step goes on to its end and is saved, unless the process is killed
    done = 24 if number == signal.SIGKILL else 25
    assert len((tmp_path / "stopped/metrics.jsonl").read_text().splitlines()) == done
    saved = int(latest_checkpoint(tmp_path / "stopped/checkpoints").name.removeprefix("step-"))
    assert 20 <= saved < 25 if number == signal.SIGKILL else saved == 25
    resumed = run_script("train.py", *argv, "--out", "stopped", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {saved}".encode() in resumed.stderr
    assert numbers("stopped") == numbers("whole")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_saves_unless_nohup_ignores_it(book, monkeypatch, ignored):
    rate = train.learning_rate

    def hang_up(step, *rest):
        if step == 3:
            # the kernel sends one, the shell another one
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        return rate(step, *rest)

    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        monkeypatch.setattr(train, "learning_rate", hang_up)
        assert run(book, *SMALL, "--steps", "6", "--save_every", "6") == (0 if ignored else 129)
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == ignored
    finally:
        signal.signal(signal.SIGHUP, before)
    assert latest_checkpoint(Path("out/checkpoints")).name == ("step-6" if ignored else "step-3")


def test_a_signal_after_the_last_step_stops_nothing(book, monkeypatch, capsys):
    def finish(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "finish", finish)
    assert run(book, *SMALL, "--steps", "2") == 0
    err = capsys.readouterr().err
    assert "finishing the current step; a second signal stops at once" in err
    assert RunFolder(Path("out")).record()["after"]


def test_the_preview_is_of_the_next_steps_batch(book, monkeypatch):
    """Not of the file's first examples: also where a run is resumed."""
    rows = [{"prompt": f"{i} sheep", "completion": " baa" * (i % 5 + 1)} for i in range(40)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["chat.jsonl", "--task", "chat", *SMALL, "--block_size", "48", "--steps", "5"]
    argv += ["--grad_accum", "2", "--save_every", "1"]
    shown, trained = [], []
    preview, forward = prepare.preview, GPT.forward

    def recording_preview(x, y, *rest):
        shown.append((x, y))
        return preview(x, y, *rest)

    def recording_forward(self, idx, targets=None):
        if self.training:
            trained.append((idx, targets))
        return forward(self, idx, targets)

    monkeypatch.setattr(prepare, "preview", recording_preview)
    monkeypatch.setattr(GPT, "forward", recording_forward)
    assert run(*argv) == 0
    shutil.rmtree("out/checkpoints/step-5")
    assert run(*argv, "--resume") == 0
    assert len(shown) == 2 and len(trained) == (5 + 1) * 2
    for ours, theirs in zip(shown, (trained[0], trained[5 * 2]), strict=True):
        for mine, whole in zip(ours, theirs, strict=True):
            assert len(mine) == 2 and torch.equal(mine, whole[:2, : mine.size(1)])


def test_resuming_a_finished_run_changes_nothing(capsys, book):
    argv = [book, *SMALL, "--steps", "6"]
    assert run(*argv) == 0
    before = {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert run(*argv, "--resume") == 0
    assert "finished" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == before


def test_resuming_before_the_first_checkpoint_starts_over(capsys, book, monkeypatch):
    argv = [book, *SMALL, "--steps", "6", "--eval_every", "3"]
    assert run(*argv, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", lambda *a: sys.exit(-9))
        assert run(*argv) == -9
    assert len(metrics()) == 3 and not Path("out/checkpoints").exists()
    capsys.readouterr()
    assert run(*argv, "--resume") == 0
    assert "starting over" in capsys.readouterr().err
    assert numbers() == numbers("whole")


@pytest.mark.parametrize("how", ["gone", "link"])
def test_lost_checkpoints_are_an_error(capsys, book, how):
    """An unmounted disk: nothing is deleted, nothing is trained from scratch."""
    argv = [book, *SMALL, "--steps", "2"]
    assert run(*argv) == 0
    shutil.rmtree("out/checkpoints")
    if how == "link":
        Path("out/checkpoints").symlink_to("unmounted")
    before = contents("out")
    capsys.readouterr()
    assert run(*argv, "--resume") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --") and "mounted" in err and err.count("\n") == 1
    assert contents("out") == before


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def waiting(monkeypatch, meanwhile):
    """Have something happen while a run waits for its data."""
    read = prepare.read_data

    def slowly(*arguments):
        monkeypatch.setattr(prepare, "read_data", read)
        meanwhile()
        return read(*arguments)

    monkeypatch.setattr(prepare, "read_data", slowly)


@pytest.mark.parametrize("flag", ["--overwrite", "--resume", None])
def test_a_run_that_waits_for_its_data_holds_its_folder(capsys, book, monkeypatch, flag):
    argv = [book, *SMALL, "--steps", "4", "--save_every", "2"]
    if flag:
        assert run(*argv) == 0
        shutil.rmtree("out/checkpoints/step-4")
        argv.append(flag)
    codes = []
    waiting(monkeypatch, lambda: codes.append(run(*argv)))
    assert run(*argv) == 0
    assert codes == [2] and "in use by another trainer" in capsys.readouterr().err
    assert len(metrics()) == 4


def test_a_run_that_finished_before_the_lock_is_kept(capsys, book, monkeypatch):
    """Between the first check, without torch, and the lock."""
    argv = [book, *SMALL, "--steps", "2"]
    config = RunFolder(Path("out")).check(parse(TrainConfig, argv))
    assert run(*argv) == 0
    before = contents("out")
    with pytest.raises(SystemExit) as stopped:
        train.main(config)
    assert stopped.value.code == 2 and "already holds run.json" in capsys.readouterr().err
    assert contents("out") == before


def test_a_refused_run_leaves_no_lock_behind(capsys, book, monkeypatch):
    seen = []
    waiting(monkeypatch, lambda: seen.extend(Path().rglob(".lock")))
    argv = ["short.txt", *SMALL, "--steps", "2", "--out", "new/out"]
    Path("short.txt").write_text("short")
    assert run(*argv) == 2
    assert seen == [Path("new/out/.lock")] and not Path("new").exists()
    assert run(book, *argv[1:], "--dry_run") == 0
    assert len(seen) == 1 and not Path("new").exists()
    # nor does the copy of a finished run that needs nothing
    assert run(book, *argv[1:]) == 0
    Path("new/out/.lock").unlink()
    before = contents("new")
    assert run(book, *argv[1:], "--resume") == 0
    assert contents("new") == before


def test_a_finished_run_on_a_read_only_disk(capsys, book, monkeypatch):
    argv = [book, *SMALL, "--steps", "2"]
    assert run(*argv) == 0

    def refuse(folder):
        raise PermissionError(13, "Permission denied", ".lock")

    monkeypatch.setattr(RunFolder, "lock", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(*argv, "--resume") == 0
    assert "finished" in capsys.readouterr().err
    assert run(*argv, "--out", "other") == 2


def test_overwriting_takes_everything_of_the_old_run(book):
    assert run(book, *SMALL, "--steps", "1", "--out", "base") == 0
    argv = [book, "--init", "base", "--batch_size", "4", "--steps", "2"]
    assert run(*argv, "--lora_rank", "2", "--tensorboard") == 0
    Path("out/tensorboard/notes.txt").write_text("mine")
    assert list(Path("out/tensorboard").glob("events*")) and any(Path("out/adapter").iterdir())
    assert run(*argv, "--overwrite") == 0
    assert [p.name for p in Path("out/tensorboard").iterdir()] == ["notes.txt"]
    assert not Path("out/adapter").exists()
    assert run(*argv, "--out", "new") == 0
    assert numbers() == numbers("new")


def test_an_edited_run_does_not_resume(capsys, book):
    argv = [book, *SMALL, "--steps", "4", "--save_every", "2"]
    assert run(*argv) == 0
    shutil.rmtree("out/checkpoints/step-4")
    path = Path("out/run.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {"seed": 5}}))
    before = contents("out")
    capsys.readouterr()
    assert run(book, "--resume") == 2
    line = "error: --resume 'out/run.json' was edited: seed is 5, in the checkpoint 1337\n"
    assert capsys.readouterr().err == line and contents("out") == before
    # other figures of the model before training would end in a traceback, after all steps
    path.write_text(json.dumps(record | {"before": {"loss": 1}}))
    assert run(book, "--resume") == 2
    assert "run.json is damaged" in capsys.readouterr().err


def test_a_moved_run_resumes_on_its_moved_files(capsys, book):
    Path("old").mkdir()
    shutil.copy(book, "old/val.txt")
    assert run(book, *SMALL, "--steps", "1", "--out", "old/base") == 0
    argv = ["--init", "old/base", "--lora_rank", "2", "--validation", "old/val.txt", "--steps", "4"]
    argv += ["--batch_size", "4", "--save_every", "2", "--dropout", "0.1"]
    assert run(book, *argv, "--out", "whole") == 0
    assert run(book, *argv) == 0
    shutil.rmtree("out/checkpoints/step-4")
    shutil.copytree("out", "moved", symlinks=True)
    Path("old").rename("new")
    Path(book).rename("new/book.txt")
    argv = ["new/book.txt", "--out", "moved", "--resume", "--validation", "new/val.txt"]
    capsys.readouterr()
    assert run(*argv, "--init", "demo") == 2
    assert "another init than 'demo'" in capsys.readouterr().err
    assert run(*argv[:-2], "--init", "new/base") == 2
    assert "error: --validation 'old/val.txt'" in capsys.readouterr().err
    assert run(*argv, "--init", "new/base") == 0
    assert numbers("moved") == numbers("whole")


def test_a_damaged_checkpoint_is_passed_over(book):
    argv = [book, *SMALL, "--steps", "20", "--save_every", "5"]
    assert run(*argv, "--out", "whole") == 0
    assert run(*argv) == 0
    newest = Path("out/checkpoints/step-20/training.safetensors")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert run(*argv, "--resume") == 0
    assert numbers() == numbers("whole")


def test_damaged_checkpoints_are_not_thrown_away(capsys, book):
    argv = [book, *SMALL, "--steps", "6", "--save_every", "3"]
    assert run(*argv) == 0
    for state in Path("out/checkpoints").glob("step-*/state.json"):
        state.write_text("")
    before = sorted(Path("out").rglob("*"))
    assert run(*argv, "--resume") == 2
    assert (
        "found only damaged checkpoints in 'out/checkpoints'; none was deleted"
        in capsys.readouterr().err
    )
    assert sorted(Path("out").rglob("*")) == before


def test_metrics_are_on_the_disk_before_the_checkpoint(book, monkeypatch):
    order, commit, sync = [], train.store.commit, RunFolder.sync_metrics
    monkeypatch.setattr(RunFolder, "sync_metrics", lambda f: (order.append("sync"), sync(f)))
    monkeypatch.setattr(train.store, "commit", lambda *a: (order.append("commit"), commit(*a)))
    assert run(book, *SMALL, "--steps", "4", "--save_every", "2") == 0
    assert order[:2] == ["sync", "commit"] and len(order) % 2 == 0
    assert order == ["sync", "commit"] * (len(order) // 2)


def test_accumulation_equals_the_big_batch(book):
    argv = [book, *SMALL, "--steps", "3", "--lr", "0.01", "--batch_size"]
    assert run(*argv, "8", "--out", "big") == 0
    assert run(*argv, "2", "--grad_accum", "4", "--out", "small") == 0
    for a, b in zip(metrics("big"), metrics("small"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_update(capsys, book, monkeypatch, what):
    forward, calls = GPT.forward, []

    def break_down(self, idx, targets=None):
        loss = forward(self, idx, targets)
        if self.training:
            calls.append(1)
            if len(calls) == 8 and what == "loss":
                return loss * float("nan")
            if len(calls) == 8:
                loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    argv = [book, *SMALL, "--steps", "20", "--save_every", "7"]
    monkeypatch.setattr(GPT, "forward", break_down)
    assert run(*argv) == 1
    err = capsys.readouterr().err
    assert "error: step 8 (sequences 28 to 31): " in err and "before the update" in err
    assert len(metrics()) == 7
    monkeypatch.setattr(GPT, "forward", forward)
    assert run(*argv, "--resume") == 0
    assert run(*argv, "--out", "whole") == 0
    assert numbers() == numbers("whole")


def test_bfloat16(book):
    assert run(book, *SMALL, "--steps", "40", "--dtype", "bfloat16") == 0
    rows = metrics()
    assert rows[-1]["val_loss"] < rows[0]["loss"] - 1
    assert {p.dtype for p in load_model("out").parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["missing.txt"], "DATA"),
        (["empty.txt"], "DATA"),
        (["short.txt"], "DATA"),
        (["latin1.txt"], "offset 3"),
        (["nothing"], "DATA"),
        (["book.txt", "--init", "nothing"], "--init"),
        (["book.txt", "--init", "book.txt"], "--init"),
        (["book.txt", "--block_size", "300", "--init", "demo"], "--block_size"),
        (["book.txt", "--block_size", "9000"], "--block_size"),
        (["book.txt", "--out", "book.txt"], "--out"),
        (["book.txt", "--out", "theirs"], "--overwrite"),
        (["book.txt", "--out", "theirs", "--resume"], "--out"),
        (["book.txt", "--resume"], "--out"),
        (["book.txt", "--device", "cuda:9"], "--device"),
        (["book.txt", "--out", "locked/away"], "--out"),
        (["book.txt", "--epochs", "1", "--warmup", "5000"], "--warmup"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_use_writes_nothing(capsys, book, tmp_path, argv, named):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1") * 100)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/model.safetensors").write_bytes(b"precious")
    (tmp_path / "locked").write_text("a file where a folder is needed")
    before = sorted(tmp_path.rglob("*"))
    scratch = [] if "--init" in argv else SMALL
    sizes = ["--block_size", "9000"] if "9000" in argv else []
    assert run(*argv, *scratch, *sizes) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 201
    assert named in err
    assert sorted(tmp_path.rglob("*")) == before


def test_two_trainers_in_one_folder(capsys, book):
    folder = RunFolder(Path("out"))
    folder.lock()
    assert run(book, *SMALL, "--steps", "2") == 2
    assert "in use" in capsys.readouterr().err
    folder.close()


def test_a_full_disk_keeps_the_last_checkpoint(capsys, book, monkeypatch):
    argv = [book, *SMALL, "--steps", "20", "--save_every", "5"]
    save, calls = train.store.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(train.store, "save_file", full)
    assert run(*argv) == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and "No space left" in err
    assert train.store.latest_checkpoint(Path("out/checkpoints")) is not None
    assert load_model("out")
    assert run(*argv, "--resume") == 0 and metrics()[-1]["step"] == 20


@pytest.mark.slow
def test_fine_tuning_the_demo_model_on_pydocs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["pydocs", "--init", "demo", "--steps", "12", "--batch_size", "2", "--eval_every", "12"]
    assert run(*argv) == 0
    rows = metrics()
    before = json.loads(Path("out/run.json").read_text())["before"]["val_loss"]
    assert rows[-1]["val_loss"] < before - 0.1
    theirs = GPT2LMHeadModel.from_pretrained("out").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained("out")("The yield statement")["input_ids"]])
    with torch.no_grad():
        ours = load_model("out")(ids)
        torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=1e-4)


TINY_MODEL = ["--init", "scratch", "--tokenizer", "bytes", "--n_layer", "1", "--n_head", "1"]
TINY_MODEL += ["--n_embd", "8", "--steps", "2", "--batch_size", "2"]


def test_texts_shorter_than_any_block(book):
    rows = "spam,buy\nham,noon\nspam,sale\nham,lunch\n"
    Path("mails.csv").write_text("label,text\n" + rows)
    assert run("mails.csv", "--task", "classify", *TINY_MODEL) == 0


def test_the_shortest_text(book, capsys):
    Path("short.txt").write_text("x" * 89)
    assert run("short.txt", *TINY_MODEL) == 0
    Path("held_out.txt").write_text("x" * 5)
    argv = ["short.txt", "--validation", "held_out.txt", *TINY_MODEL, "--out", "other"]
    assert run(*argv) == 2
    error = "error: --block_size must be <= 5, all that 'held_out.txt' can fill, not 89\n"
    assert capsys.readouterr().err.endswith(error) and not Path("other").exists()


# ---- going on, and looking first


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_more_steps_go_on(book, capsys, schedule):
    """A constant rate ends as an undisturbed run of all the steps does, to the bit."""
    argv = [book, *SMALL, "--schedule", schedule, "--warmup", "2", "--eval_every", "3"]
    assert run(*argv, "--steps", "12", "--out", "whole") == 0
    assert run(*argv, "--steps", "6") == 0
    assert run("--resume", "--steps", "12") == 0
    assert [row["step"] for row in metrics()] == list(range(1, 13))
    assert RunFolder(Path("out")).record()["config"]["steps"] == 12
    if schedule == "constant":
        assert numbers() == numbers("whole")
    capsys.readouterr()
    assert run("--resume") == 0
    assert "nothing to resume" in capsys.readouterr().err


def test_more_steps_after_a_kill_before_their_first_checkpoint(book):
    argv = [book, *SMALL, "--schedule", "constant", "--warmup", "2", "--eval_every", "3"]
    assert run(*argv, "--steps", "12", "--out", "whole") == 0
    assert run(*argv, "--steps", "6") == 0
    folder = RunFolder(Path("out"))
    config = parse(TrainConfig, ["--resume", "--steps", "12"])
    folder.extend(folder.check(config))
    # the run goes on without the flag
    assert run("--resume") == 0
    assert numbers() == numbers("whole")


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_that_has_fallen_is_not_extended(book, capsys, schedule):
    argv = [book, *SMALL, "--schedule", schedule, "--steps", "3"]
    assert run(*argv) == 0
    before = Path("out/run.json").read_bytes()
    capsys.readouterr()
    assert run("--resume", "--steps", "6") == 2
    line = capsys.readouterr().err
    assert line.startswith("error: --out 'out' holds a run with --schedule " + schedule)
    assert "--init out --out MORE" in line and len(line) <= 201
    assert run("--resume", "--steps", "2") == 2
    assert Path("out/run.json").read_bytes() == before


def test_resuming_needs_no_data(book, capsys):
    argv = [book, *SMALL, "--steps", "8", "--keep", "9"]
    assert run(*argv, "--out", "whole") == 0
    assert run(*argv) == 0
    record = json.loads(Path("out/run.json").read_text())
    del record["after"]
    Path("out/run.json").write_text(json.dumps(record))
    for path in Path("out/checkpoints").glob("step-[78]"):
        shutil.rmtree(path)
    assert run("--resume") == 0
    assert numbers() == numbers("whole")
    capsys.readouterr()
    assert run() == 2
    assert capsys.readouterr().err.startswith("error: DATA is missing: a file, a folder")
    Path("book.txt").rename("moved.txt")
    assert run("moved.txt", "--resume") == 0


def test_a_finished_run_says_how_to_go_on(book, capsys):
    assert run(book, *SMALL, "--steps", "2") == 0
    capsys.readouterr()
    assert run(book, "--resume") == 0
    assert "--init out --out MORE" in capsys.readouterr().err


def test_a_dry_run_beside_a_finished_one(book, capsys):
    assert run(book, *SMALL, "--steps", "2") == 0
    held = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    capsys.readouterr()
    argv = [book, *SMALL, "--steps", "20", "--lr", "0.002", "--warmup", "3", "--dry_run"]
    assert run(*argv) == 0
    out = capsys.readouterr().out
    for part in (
        *("learning rate 0.002 after 3 steps of warm-up, then cosine", "seed 1337"),
        *("float32 on cpu with", "threads", "evaluated every 2 steps on", "saved every 2"),
    ):
        assert part in out, part
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == held


def test_edited_steps_are_no_extension(book, capsys):
    argv = [book, *SMALL, "--steps", "4", "--save_every", "2", "--keep", "9"]
    assert run(*argv) == 0
    record = json.loads(Path("out/run.json").read_text())
    record["config"]["steps"] = 8
    Path("out/run.json").write_text(json.dumps(record))
    assert run("--resume") == 2
    assert "run.json' was edited: steps is 8, in the checkpoint 4" in capsys.readouterr().err


# ---- new tokens


@pytest.fixture
def chatty(book):
    Path("chat.txt").write_text("<user>a sheep?<bot>over the fence\n" * 60)
    rows = [{"prompt": f"<user>{i}", "completion": " baa<bot>" * (i % 3 + 1)} for i in range(40)]
    labels = [{"text": f"{i}<user>sheep", "label": ["odd", "even"][i % 2 == 0]} for i in range(40)]
    for name, records in (("chat", rows), ("labels", labels)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    assert run("book.txt", *SMALL, "--steps", "1", "--out", "base") == 0


ADDED = ["--init", "base", "--add_tokens", "<user>,<bot>", "--steps", "6", "--eval_every", "2"]
ADDED += ["--block_size", "16", "--batch_size", "4", "--schedule", "constant"]


@pytest.mark.parametrize(
    "task", [["chat.txt"], ["chat.jsonl", "--task", "chat"], ["labels.jsonl", "--task", "classify"]]
)
def test_added_tokens_are_learnt_and_saved(chatty, task):
    assert run(*task, *ADDED, "--lr", "0.05") == 0
    tokenizer = load_tokenizer("out")
    assert tokenizer.vocab_size == 259
    theirs = AutoTokenizer.from_pretrained("out")
    text = "<user>hi <bot>there<|endoftext|><user"
    ids = tokenizer.encode(text, allow_special=True)
    assert theirs(text)["input_ids"] == ids and {257, 258} <= {*ids}
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids) == text
    if "classify" in task:
        return
    model, other = load_model("out"), GPT2LMHeadModel.from_pretrained("out").eval()
    torch.testing.assert_close(
        model(torch.tensor([ids])), other(torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4
    )
    mean = load_model("base").wte.weight.mean(0)
    new = model.wte.weight[257:]
    assert (new - mean).abs().amax(1).min() > 1e-3, "the rows were not trained"


def test_added_tokens_start_as_the_mean(chatty):
    config = parse(TrainConfig, ["chat.txt", *ADDED])
    model, tokenizer = prepare.make_model(config, None, "cpu")
    old = load_model("base").wte.weight
    assert torch.equal(model.wte.weight[:257], old) and tokenizer.vocab_size == 259
    torch.testing.assert_close(model.wte.weight[257:], old.mean(0).expand(2, -1))
    assert model.config.vocab_size == 259 == model.wte.num_embeddings


def test_a_resumed_run_keeps_its_added_tokens(chatty, monkeypatch):
    assert run("chat.txt", *ADDED, "--out", "whole") == 0
    assert run("chat.txt", *ADDED[:5], "4", *ADDED[6:]) == 0
    assert run("--resume", "--steps", "6") == 0
    assert numbers("out") == numbers("whole")
    # a further run has the tokens already
    assert run("chat.txt", "--init", "out", "--out", "more", "--steps", "1") == 0
    assert load_tokenizer("more") == load_tokenizer("out")


def test_another_tokenizers_cache_is_not_read(chatty, capsys):
    base = ["chat.txt", "--init", "base", "--steps", "1", "--block_size", "16"]
    for flags in ([], ["--add_tokens", "<user>"], ["--add_tokens", "<bot>"]):
        out = f"o{len(list(Path().iterdir()))}"
        assert run(*base, "--batch_size", "4", *flags, "--out", out) == 0
    counts = re.findall(r"record, ([\d,]+) tokens", capsys.readouterr().err)[-3:]
    assert len({*counts}) == 3, counts


BAD_TOKENS = [
    ("", "at least one token"),
    (",", "commas between"),
    ("<a>,", "commas between"),
    ("<a>, <b>", "no spaces around"),
    ("<a>,<b>,<a>", "'<a>' twice"),
    (",".join(f"<{i}>" for i in range(1001)), "at most 1000 tokens, not 1001"),
    ("a", "'a' is a token already"),
    ("<|endoftext|>", "'<|endoftext|>' is a token already"),
    ("<\u00fc>", "cannot be a token"),
]


@pytest.mark.parametrize(("tokens", "line"), BAD_TOKENS, ids=lambda value: value[:20])
def test_bad_added_tokens(chatty, capsys, tokens, line):
    assert run("chat.txt", "--init", "base", "--add_tokens", tokens) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --add_tokens ") and line in said
    assert said.count("\n") == 1 and len(said) <= 201
    assert not Path("out").exists()


def test_added_tokens_and_lora(chatty, capsys):
    flags = ["--init", "base", "--lora_rank", "2", "--add_tokens", "<a>"]
    assert run("chat.txt", *flags) == 2
    assert "add_tokens must be left out with --lora_rank" in capsys.readouterr().err
    # added before, they stay
    assert run("chat.txt", *ADDED) == 0
    flags = ["--init", "out", "--lora_rank", "2", "--out", "lora", "--steps", "1"]
    assert run("chat.txt", *flags) == 0
    assert load_tokenizer("lora") == load_tokenizer("out")


def test_a_vocabulary_without_an_end_is_refused(chatty, capsys):
    Path("base/manifest.json").unlink()
    for name in ("tokenizer.json", "vocab.json"):
        path = Path("base") / name
        path.write_text(path.read_text().replace("<|endoftext|>", "<|other|>"))
    settings = {"bos_token": None, "eos_token": None, "unk_token": None, "pad_token": None}
    Path("base/tokenizer_config.json").write_text(json.dumps(settings))
    stated = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps(stated | {"eos_token_id": None}))
    flags = ["--init", "base", "--steps", "1", "--block_size", "16"]
    assert run("chat.txt", *flags) == 2
    assert "--init the tokenizer has no eos_token" in capsys.readouterr().err
    assert run("labels.jsonl", "--task", "classify", *flags) == 0
