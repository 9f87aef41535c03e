"""The first eight minutes on a GPU: correctness, speed and failures. No network is needed.

    python -m benchmarks.first_light --out DIR
    python -m benchmarks.first_light --out DIR --only rooms decode
    python -m benchmarks.first_light --out DIR --device cpu     rehearse, in Triton's interpreter

Runs the parts of `LIMITS` in that order, each in a process of its own and under its own time limit,
and prints the tables to commit. DIR gets one JSON file a part, complete before the next part
starts. A part consists of cases. A case that fails, hangs or kills its process is recorded with
its error, and the next case runs, in a new process if need be. A killed run leaves the files of
all parts that ended, and of the part that was running the cases that ended.

Exits 0 if every case of every part succeeded, else 1. On a CPU the sizes are tiny and the times
mean nothing: the rehearsal shows that the parts run. This file knows processes and files; the
parts' work is in first_light_parts.py and first_light_rooms.py.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# part -> seconds of the whole part, seconds of one of its cases
LIMITS = {
    "machine": (30, 20),
    "warm": (90, 75),
    "correct": (50, 20),
    "rooms": (90, 25),
    "decode": (60, 30),
    "train": (80, 70),
    "profile": (30, 20),
    "sanitizer": (50, 45),
}
# an interpreter needs longer for tiny sizes than a GPU for large ones
SLOWER = {"cuda": 1, "cpu": 20}
# the exit status of a part whose device is lost: its remaining cases need a new process
LOST = 75
LOG_CHARACTERS = 2000
# runs the cases of one part, or of one share of all parts
PROGRAM = "benchmarks.first_light_parts"
CHILDREN: set[subprocess.Popen] = set()
STOPPED = threading.Event()


def path_of(out: Path, part: str) -> Path:
    """The part's file, numbered in the order of the parts."""
    return out / f"{list(LIMITS).index(part) + 1}-{part}.json"


def read(path: Path) -> dict[str, Any]:
    """Return a part's report, as it stands; empty before its process has started."""
    return json.loads(path.read_text()) if path.exists() else {"cases": {}, "running": None}


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Replace the file at once: a kill leaves the old report or the new one."""
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


class Report:
    """A part's file, kept up to date by the process that runs the cases."""

    def __init__(self, path: Path, seconds: int, lost: Callable[[], bool]) -> None:
        """seconds: the limit of a case. lost: whether the device refuses any further work."""
        self.path, self.seconds, self.lost = path, seconds, lost
        self.cases: dict[str, dict] = read(path)["cases"]

    def save(self, running: str | None) -> None:
        write(self.path, {"cases": self.cases, "running": running})

    def run(self, name: str, case: Callable[[], dict]) -> None:
        """Run a case, unless an earlier process has, and save its result or its error."""
        if name in self.cases:
            return
        self.save(running=name)
        # the signal's default action ends the process even where it waits for the GPU
        signal.alarm(self.seconds)
        began = time.perf_counter()
        try:
            found = case()
        except Exception as error:
            # any failure is a result; the next case runs
            said = str(error).strip() or type(error).__name__
            found = {
                "error": f"{type(error).__name__}: {said.splitlines()[0][:300]}",
                "log": traceback.format_exc()[-LOG_CHARACTERS:],
            }
        signal.alarm(0)
        self.cases[name] = found | {"seconds": round(time.perf_counter() - began, 2)}
        self.save(running=None)
        if "error" in found and self.lost():
            os._exit(LOST)


def environment(device: str) -> dict[str, str]:
    """On a CPU hide the GPU and interpret the kernels; on a GPU compile them."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return found


def kill(child: subprocess.Popen) -> None:
    """Kill the process and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def stop(number: int, _: object) -> None:
    """End every process of ours, then this one: the handler of SIGINT and SIGTERM."""
    STOPPED.set()
    for child in list(CHILDREN):
        kill(child)
    sys.exit(128 + number)


@contextlib.contextmanager
def started(command: Sequence[str], device: str, log: Any) -> Iterator[subprocess.Popen]:
    """A process with its children in a group of its own, which ends with the block.

    Not in a session of its own: a kill of our session must reach it.
    """
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(device),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    CHILDREN.add(child)
    try:
        yield child
    finally:
        kill(child)
        child.wait()
        CHILDREN.discard(child)


def attempt(command: Sequence[str], device: str, seconds: float) -> tuple[int | None, str]:
    """Run the command for at most `seconds`: its exit status, None at the limit, and its output."""
    with tempfile.TemporaryFile("w+") as log:
        with started(command, device, log) as child:
            try:
                code = child.wait(max(seconds, 0))
            except subprocess.TimeoutExpired:
                code = None
        log.seek(0)
        return code, log.read()[-LOG_CHARACTERS:]


def run_part(
    part: str, path: Path, device: str, limit: tuple[float, int], *words: str
) -> dict[str, Any]:
    """Run all of the part's cases, in as many processes as it takes; return the final report.

    limit: seconds of the whole, and of a case. words: more arguments of first_light_parts.
    """
    whole, each = limit
    command = [sys.executable, "-m", PROGRAM, part, str(path)]
    command += ["--device", device, "--case_seconds", str(each), *words]
    began, log = time.monotonic(), ""
    while True:
        code, output = attempt(command, device, began + whole - time.monotonic())
        log = (log + output)[-LOG_CHARACTERS:]
        report = read(path)
        report |= {"status": "done", "seconds": round(time.monotonic() - began, 1), "log": log}
        hung = report["running"]
        if hung is not None:
            report["cases"][hung] = {"error": why(code, whole, each), "log": output}
            report["running"] = None
        if code is None:
            report["status"] = f"stopped at its limit of {whole} s"
        elif code not in (0, LOST) and hung is None:
            # no case ran, so another process would fail in the same way
            report["status"] = f"failed with exit code {code}"
        write(path, report)
        again = code == LOST or (code not in (0, None) and hung is not None)
        if not again or STOPPED.is_set():
            return report


def why(code: int | None, whole: float, each: int) -> str:
    """Say what ended a process in the middle of a case."""
    if code is None:
        return f"running when the part reached its limit of {whole} s"
    if code == -signal.SIGALRM:
        return f"reached the limit of {each} s a case"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"


def warm(path: Path, device: str, limit: tuple[float, int]) -> dict[str, Any]:
    """Fill the caches of compiled kernels: all the other parts' cases once, a process per core."""
    count = os.cpu_count() or 1 if device == "cuda" else 2
    began = time.monotonic()
    write(path, {"status": "running", "cases": {}, "running": None})

    def share(number: int, folder: str) -> dict[str, Any]:
        own = Path(folder) / f"{number}.json"
        return run_part("share", own, device, limit, "--share", f"{number}/{count}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        reports = list(pool.map(partial(share, folder=folder), range(count)))
    cases = {name: case for report in reports for name, case in report["cases"].items()}
    failed = {name: case["error"] for name, case in cases.items() if "error" in case}
    times = sorted(((case.get("seconds", 0), name) for name, case in cases.items()), reverse=True)
    rows = "".join(f"| {name} | {seconds} |\n" for seconds, name in times[:8])
    found = {
        # an error here comes again, and counts, in the case's own part
        "shares": [report | {"cases": sorted(report["cases"])} for report in reports],
        "failed": failed,
        "seconds_of": {name: seconds for seconds, name in times},
        "table": f"{len(cases)} cases in {count} processes, {len(failed)} failed.\n\n"
        f"| longest, compiling included | s |\n| --- | --- |\n{rows}",
    }
    worst = max((report["status"] for report in reports), key=lambda status: status != "done")
    report = {"cases": {"all": found}, "running": None, "status": worst, "log": ""}
    report["seconds"] = round(time.monotonic() - began, 1)
    write(path, report)
    return report


def errors(report: Mapping[str, Any]) -> dict[str, str]:
    """Case -> its error, and the part's own under an empty name."""
    found = {name: case["error"] for name, case in report["cases"].items() if "error" in case}
    return found | ({} if report["status"] == "done" else {"": report["status"]})


def show(part: str, report: Mapping[str, Any]) -> None:
    """Print the part's tables, then its errors."""
    print(f"\n## {part}: {report['status']}, {report['seconds']} s", flush=True)
    for name, case in report["cases"].items():
        if "table" in case:
            print(f"\n{name}\n\n{case['table']}")
    for name, error in errors(report).items():
        print(f"\nerror: {part} {name}: {error}".replace(" : ", ": "))
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for the JSON files")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {str(args.out)[-80:]!r}: {error.strerror}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    paths = {part: path_of(args.out.resolve(), part) for part in LIMITS if part in args.only}
    for path in paths.values():
        # files of an earlier run would pass for this run's
        path.unlink(missing_ok=True)
    failed = False
    if args.device == "cpu":
        print("A rehearsal at tiny sizes in Triton's interpreter: its times mean nothing.")
    for part, path in paths.items():
        limit = tuple(seconds * SLOWER[args.device] for seconds in LIMITS[part])
        run = warm if part == "warm" else partial(run_part, part)
        report = run(path, args.device, limit)
        show(part, report)
        failed |= bool(errors(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
