"""Kill the store or the trainer, again and again, and look at what is left.

    python tests/kills.py store|signals|errors|train|full NUMBER SEED FOLDER

    store     SIGKILL before or after a C call that can reach the file system, or at a random time
    signals   SIGTERM twice at such a call
    errors    such a call fails, as on a full disk
    train     SIGKILL to a run at random times, which is resumed until it finishes
    full      a run whose files may grow to some size only, or whose folder is read-only

One process imports torch and forks a child for each, so that a start costs milliseconds. Fails at
the first thing that is lost; prints one JSON object that counts what was hit.

A kill cannot show that an fsync is missing, since the kernel outlives it: here none waits for the
disk, and test_checkpoint.py looks at them instead. Run by test_kills.py, which pytest collects.
"""

import ctypes
import errno
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import time
from collections import Counter
from functools import cache, partial
from itertools import count
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from nanogpt2 import terminal  # noqa: E402
from nanogpt2.checkpoints.load import load_model  # noqa: E402
from nanogpt2.config import GPTConfig, TrainConfig, parse  # noqa: E402
from nanogpt2.model import GPT  # noqa: E402
from nanogpt2.tokenizer import byte_tokenizer  # noqa: E402
from nanogpt2.training import checkpoint as store  # noqa: E402
from nanogpt2.training.report import plot_losses  # noqa: E402
from nanogpt2.training.run_folder import RunFolder  # noqa: E402

KEEP = 2
# calls that only look: a kill there is one at the call before
LOOKING = {"fspath", "stat", "lstat", "fstat", "scandir", "listdir", "readlink", "getpid", "read"}
LOOKING |= {"seek", "tell", "fileno", "readable", "writable", "seekable", "isatty", "readinto"}
LOOKING |= {"text_encoding", "_path_normpath", "__enter__"}


# ---- the store: what is committed is a function of the step


@cache
def blank() -> GPT:
    shape = GPTConfig(
        vocab_size=257, block_size=7, n_layer=1, n_head=2, n_embd=6,
        bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return GPT(shape)


def state_of(step):
    return {"step": step, "is_best": step % 2 == 0}


def made(step):
    with torch.no_grad():
        for parameter in blank().parameters():
            parameter.fill_(step)
    return blank(), byte_tokenizer(), {"slot": torch.full((500,), float(step))}, state_of(step)


def commit(out, step):
    store.commit(out, *made(step), keep=KEEP)


def files(folder):
    """Every file in a folder, but for its subfolders."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def kept(step):
    """The steps that are there once `step` is committed and what follows is done."""
    best = step - step % 2
    return {s for s in {*range(step - KEEP + 1, step + 1), best} if s > 0}


class Expected(dict):
    """step -> the bytes of its checkpoint, as an undisturbed save writes them."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, step):
        self.clear() if len(self) > 100 else None
        path = store.save_checkpoint(self.folder / str(step), *made(step))
        self[step] = files(path)
        store.shutil.rmtree(self.folder / str(step))
        return self[step]


def check(out, done, expected):
    """`done` was committed and nothing of it is lost; return the step to go on from."""
    folder = out / "checkpoints"
    newest = store.latest_checkpoint(folder)
    step = int(newest.name.removeprefix("step-"))
    assert step in (done, done + 1), f"step {done} was committed; the newest is {newest}"
    best = (folder / "best").resolve().name
    assert best in {f"step-{s - s % 2}" for s in (done, step)}, best
    for s in kept(step) | {int(best.removeprefix("step-"))}:
        assert files(folder / f"step-{s}") == expected[s], f"step-{s} is not as it was committed"
    # the model to use is one of the two, whole
    published = load_model(out).wte.weight[0, 0].item()
    assert published in (done, step), published
    return step


def check_settled(out, step, expected):
    """All that follows from `step`'s commit is done, and nothing else lies about."""
    folder = out / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {"best", *(f"step-{s}" for s in kept(step))}
    assert (folder / "best").readlink() == Path(f"step-{step - step % 2}")
    assert (out / store.WEIGHTS).read_bytes() == expected[step][store.WEIGHTS]
    assert not list(out.rglob("*.tmp")) + list(out.rglob(".*.tmp"))
    for s in kept(step):
        assert files(folder / f"step-{s}") == expected[s]


def reaches_files(call):
    """True for a C function that can change what is on the disk."""
    if call.__name__ in LOOKING:
        return False
    owner = getattr(call, "__module__", None) or ""
    of_file = isinstance(getattr(call, "__self__", None), io.IOBase)
    return of_file or owner.split(".")[0] in (
        "posix",
        "io",
        "_io",
        "safetensors",
        "safetensors_rust",
    )


def at_each_call(act):
    """Have `act(name)` called before and after each C call that reaches the file system."""

    def profile(frame, event, call):
        if event in ("c_call", "c_return") and reaches_files(call):
            act(f"{event[2:]} {call.__name__}")

    sys.setprofile(profile)


def points(out, step):
    """The names of all points of committing `step`."""
    found = []
    at_each_call(found.append)
    try:
        commit(out, step)
    finally:
        sys.setprofile(None)
    return found


def fork(work):
    """Run `work(pipe)` in a child that never returns; its process id and the pipe's other end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        work(writing)
        os._exit(0)
    except SystemExit as stopped:
        os._exit(stopped.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(70)


def die(name):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(name):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)


def break_down(name):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


def wait(child, pipe):
    """How a child ended, and the lines that it wrote."""
    # a kill may cut a character in two
    with open(pipe, encoding="utf-8", errors="replace") as lines:  # noqa: PTH123
        said = lines.read().split("\n")[:-1]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def commit_until(out, first, point, act):
    """What a child does: commit, say so, and go on; it acts at `point` of the first."""

    def work(pipe):
        passed = count()

        def pass_by(name):
            if next(passed) == point:
                os.write(pipe, f"at {name}\n".encode())
                act(name)

        os.write(pipe, b"ready\n")
        terminal.Signals()
        if point is not None:
            at_each_call(pass_by)
        for step in count(first):
            try:
                commit(out, step)
            except OSError:
                os._exit(1)
            os.write(pipe, f"{step}\n".encode())
            if act is break_down:
                # an error that did no harm
                os._exit(0)

    return work


def kill_store(kills, seed, folder, act=die):
    """At named points, SIGKILL at random times too; return what was hit."""
    rng, out, expected = random.Random(seed), folder / "out", Expected(folder / "expected")
    hit, by_name = Counter(), Counter()
    for step in (1, 2, 3):
        commit(out, step)
    started = time.perf_counter()
    names, done = points(out, 4), 4
    duration = time.perf_counter() - started
    # every point in turn, in any order, but one of each kind of call first; each third kill comes
    # at a random time
    order, kinds = rng.sample(range(len(names)), len(names)), set()
    order.sort(key=lambda i: (kind := names[i].split()[-1]) in kinds or kinds.add(kind) or False)
    for number in range(kills):
        # the commit to be killed marks a new best one and removes an old one
        while done % 2 == 0:
            done += 1
            commit(out, done)
        named_before = number if act is not die else number - number // 3
        at_random = act is die and number % 3 == 2
        point = None if at_random else order[named_before % len(order)]
        child, pipe = fork(commit_until(out, done + 1, point, act))
        if point is None:
            time.sleep(rng.uniform(0, 4 * duration))
            os.kill(child, signal.SIGKILL)
        status, said = wait(child, pipe)
        assert status in STATUSES[act], (status, said)
        committed = [int(line) for line in said if line.isdigit()]
        if point is not None:
            assert said[1].startswith("at "), said
            assert bool(committed) == (status == 0), (status, said)
            by_name[said[1].split()[-1]] += 1
        done = max([done, *committed])
        hit["named" if point is not None else "random"] += 1
        hit["unfinished folder seen"] += (out / f"checkpoints/step-{done + 1}.tmp").exists()
        step = check(out, done, expected)
        hit["committed, not all that follows"] += step > done
        # what a resumed run does
        _, state = store.read_checkpoint(store.latest_checkpoint(out / "checkpoints"))
        assert state == state_of(step)
        store.settle(out, state, KEEP)
        check_settled(out, step, expected)
        done = step + 1
        commit(out, done)
        check_settled(out, done, expected)
        hit[f"status {status}"] += 1
    return {"points": len(names), **hit, "by name": dict(by_name)}


# an error may do no harm: a file is copied where it cannot be linked
STATUSES = {die: {-signal.SIGKILL}, leave: {128 + signal.SIGTERM}, break_down: {0, 1}}


# ---- the trainer, end to end

ARGV = ["book.txt", "--init", "scratch", "--tokenizer", "bytes", "--n_layer", "1", "--n_head", "2"]
ARGV += ["--n_embd", "6", "--block_size", "8", "--batch_size", "4", "--dropout", "0.1"]
ARGV += ["--steps", "30", "--save_every", "3", "--eval_every", "5", "--prompt", "7 sheep"]
VARIANTS = ([], ["--ema", "0.9"], ["--optimizer", "muon", "--grad_accum", "2"])


def run_trainer(*argv):
    """What a child does: train or resume; its words go to the pipe."""

    def work(pipe):
        os.dup2(pipe, 1), os.dup2(pipe, 2)
        terminal.prepare()
        config = parse(TrainConfig, [*ARGV, *argv])
        train.main(RunFolder(Path(config.out)).check(config))

    return work


def make_ready(folder):
    """Go to a new folder with a book, and import what a child would import each time."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    Path("book.txt").write_text("".join(f"{i} sheep jumped the fence. " for i in range(60)))
    Path("metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "lr": 0.1}\n')
    plot_losses(Path("metrics.jsonl"), Path("loss.png"))


def left_behind(out):
    """All that a finished run leaves, to the bit, but for what depends on the clock."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("tokens_per_second", "mfu", "memory")
    figures = [{k: float(v).hex() for k, v in row.items() if k not in clocks} for row in rows]
    record = RunFolder(out).record()
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*"))
    best = str((out / "checkpoints/best").readlink())
    return (
        figures,
        (out / store.WEIGHTS).read_bytes(),
        record["before"],
        record["after"],
        names,
        best,
    )


def wait_for_line(child, path, number):
    """Until a file has so many lines, or the child has ended."""
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.001)


def kill_trainer(kills, seed, folder):
    """Runs killed and resumed until they finish; return how many it took."""
    rng, hit = random.Random(seed), Counter()
    make_ready(folder)
    whole, durations = [], []
    for number, variant in enumerate(VARIANTS):
        started = time.perf_counter()
        status, said = wait(*fork(run_trainer("--out", f"whole{number}", *variant)))
        assert status == 0, said
        durations.append(time.perf_counter() - started)
        whole.append(left_behind(Path(f"whole{number}")))
    while hit["kills"] < kills:
        number = hit["runs"] % len(VARIANTS)
        out = Path(f"killed{hit['runs']}")
        hit["runs"] += 1
        while True:
            resume = ["--resume"] if (out / "run.json").exists() else []
            argv = ["--out", str(out), *VARIANTS[number], *resume]
            child, pipe = fork(run_trainer(*argv))
            # seven kills a run, so that every variant has its share of twenty
            if hit["kills"] < min(kills, 7 * hit["runs"]):
                # by the clock alone, a busy machine's runs would all die before their first step
                if rng.random() < 0.75:
                    wait_for_line(child, out / "metrics.jsonl", rng.randint(1, 30))
                time.sleep(rng.uniform(0, durations[number] / 5))
                os.kill(child, signal.SIGKILL)
            status, said = wait(child, pipe)
            if status == 0:
                break
            assert status == -signal.SIGKILL, said
            hit["kills"] += 1
            hit["resumed"] += bool(resume)
            hit["unfinished folder seen"] += bool(list(out.glob("checkpoints/*.tmp")))
            newest = store.latest_checkpoint(out / "checkpoints")
            hit["with a checkpoint"] += newest is not None
            if newest:
                assert load_model(newest)
        for found, undisturbed in zip(left_behind(out), whole[number], strict=True):
            assert found == undisturbed, (out, found, undisturbed)
        store.shutil.rmtree(out)
    return dict(hit)


def fill_up(number, seed, folder):
    """A stopped run goes on where its files may not grow, then in a read-only folder.

    One line says so, and what was committed stays.
    """
    rng, hit = random.Random(seed), Counter()
    make_ready(folder)
    status, said = wait(*fork(run_trainer("--out", "whole")))
    assert status == 0, said
    largest = max(path.stat().st_size for path in Path("whole").rglob("*") if path.is_file())

    def stop_early(pipe):
        train.learning_rate = lambda step, *rest: os._exit(0) if step == 14 else rate(step, *rest)
        run_trainer("--out", "stopped")(pipe)

    rate = train.learning_rate
    status, said = wait(*fork(stop_early))
    assert status == 0 and store.latest_checkpoint(Path("stopped/checkpoints")), said
    for attempt in range(number):
        out = Path(f"full{attempt}")
        store.shutil.copytree("stopped", out, symlinks=True)
        # sizes of all magnitudes: each file meets its limit
        share = rng.random()
        limit = round(largest**share if attempt % 2 else largest * share)

        def limited(pipe, out=out, limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            run_trainer("--out", str(out), "--resume")(pipe)

        committed = {p.name: files(p) for p in store.checkpoints(out / "checkpoints")}
        status, said = wait(*fork(limited))
        hit[f"status {status}"] += 1
        assert status in (0, 1, 2), (limit, status, said)
        if status:
            assert_one_line(said)
            newest = store.latest_checkpoint(out / "checkpoints")
            hit["committed more"] += newest.name not in committed
            if newest.name in committed:
                assert files(newest) == committed[newest.name]
            assert load_model(newest) and load_model(out)
            status, said = wait(*fork(run_trainer("--out", str(out), "--resume")))
            assert status == 0, said
        assert left_behind(out) == left_behind(Path("whole")), limit
    hit["read-only"] = read_only(Path("stopped"))
    return dict(hit)


def assert_one_line(said):
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and said[-1] == errors[0] and len(errors[0]) <= 200, said
    assert not any("Traceback" in line for line in said), said


def read_only(out):
    """The folder may not be written to."""
    everything = [out, *out.rglob("*")]
    for path in everything:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = {p: p.read_bytes() for p in everything if p.is_file()}

    def without_powers(pipe):
        # root writes wherever it likes, unless it gives up its capabilities: none of the three sets
        libc, version = ctypes.CDLL(None), 0x20080522
        assert libc.capset(struct.pack("II", version, 0), bytes(24)) == 0
        run_trainer("--out", str(out), "--resume")(pipe)

    status, said = wait(*fork(without_powers))
    assert status in (1, 2), (status, said)
    assert_one_line(said)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    for path in everything:
        if not path.is_symlink():
            path.chmod(0o755)
    return status


ACTS = {
    "store": kill_store,
    "signals": partial(kill_store, act=leave),
    "errors": partial(kill_store, act=break_down),
    "train": kill_trainer,
    "full": fill_up,
}


def main():
    what, kills, seed, folder = sys.argv[1:]
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None
    started = time.perf_counter()
    found = ACTS[what](int(kills), int(seed), Path(folder))
    print(json.dumps(found | {"seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
