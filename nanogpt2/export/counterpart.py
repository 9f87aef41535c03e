"""Run the other program in a process of its own: its memory, messages and crashes stay there.

A script with_*.py gets three paths: the exported folder, a JSON job, and the .npz file to write.
This file does not know what the scripts run.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt2.export.prompts import Continuation

TOLERANCE = 1e-4  # of logits up to 1, relative to the largest above


class CheckError(Exception):
    """What was written does not compute what the model computes."""


def is_installed(package: str) -> bool:
    """Return True if a package can be imported."""
    return find_spec(package) is not None


def answers(script: str, folder: Path, job: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays that a script writes about a folder. Raises CheckError where it fails."""
    with tempfile.TemporaryDirectory() as name:
        asked, answered = Path(name) / "job.json", Path(name) / "answer.npz"
        asked.write_text(json.dumps(job))
        program = Path(__file__).parent / f"{script}.py"
        done = subprocess.run(
            # -P: a script's folder must not hide packages
            [sys.executable, "-P", str(program), str(folder), str(asked), str(answered)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ
            | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
            | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        if done.returncode or not answered.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            last = said[-1] if said else f"exit code {done.returncode}"
            raise CheckError(f"{script.removeprefix('with_')} failed: {last}")
        with np.load(answered) as arrays:
            return dict(arrays)


def largest_difference(ours: np.ndarray, theirs: np.ndarray, by: str) -> float:
    """Return the largest difference of logits. Raises CheckError where it is above TOLERANCE."""
    if ours.shape != theirs.shape:
        raise CheckError(f"{by} gave logits {theirs.shape}, not {ours.shape}")
    difference = float(np.abs(ours - theirs).max())
    # float32 itself is coarser for logits far above 1
    allowed = TOLERANCE * max(1.0, float(np.abs(ours).max()))
    if not difference <= allowed:
        raise CheckError(f"logits by {by} differ by {difference:.2g}; {allowed:.2g} is allowed")
    return difference


def agreement(
    ours: Sequence[Continuation], theirs: Sequence[Sequence[int]], by: str, allowed: float
) -> dict[str, Any]:
    """Count the prompts with equal greedy tokens.

    Raises CheckError where they first differ at a token that the model prefers by more than
    `allowed` times the largest logit: rounding decides between tokens that are nearly equal.
    """
    margins = [mine.margin(tokens) for mine, tokens in zip(ours, theirs, strict=True)]
    equal = sum(
        mine.tokens == list(tokens)[: len(mine.tokens)]
        for mine, tokens in zip(ours, theirs, strict=True)
    )
    allowed *= max(1.0, *(mine.size for mine in ours))
    if not max(margins) <= allowed:
        raise CheckError(
            f"greedy tokens by {by} differ where the model prefers its own by {max(margins):.2g}; "
            f"{allowed:.2g} is allowed"
        )
    return {"prompts": len(ours), "prompts_equal": equal, "largest_margin": max(margins)}
