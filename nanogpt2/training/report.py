"""Reports on a run: loss.png, TensorBoard, and the text at the end.

This file works from recorded figures and knows neither the model nor the loop. matplotlib and
tensorboard are extras, imported where they are used.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.metrics import distinct_n, perplexity, repetition
from nanogpt2.training.run_folder import EVENTS
from nanogpt2.training.snapshot import Snapshot

SPARKLINE_WIDTH = 60
# report the repetition of 4-grams: they show the loops that GPT-2 falls into
REPEATED = 4


# ---- the curves


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; skip a last line that was cut short, and lines of no step."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and {"step", "loss", "lr"} <= row.keys():
                rows.append(row)
    return rows


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Return the exponential moving average over about `span` values, without start-up bias."""
    decay, total, weight = 1 - 1 / max(1, span), 0.0, 0.0
    found = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        found.append(total / weight)
    return found


def plot_losses(metrics_path: Path, png_path: Path, before: float | None = None) -> bool:
    """Draw the losses and the learning rate of metrics.jsonl, and write the file atomically.

    before: the validation loss before the first step, drawn at step 0. Without matplotlib, draws
    nothing and prints one note per process. Returns True if the file was written. Raises OSError.
    """
    figure_class = _matplotlib_figure()
    rows = read_metrics(metrics_path)
    if figure_class is None or not rows:
        return False
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    evaluated = [(r["step"], r["val_loss"]) for r in rows if r.get("val_loss") is not None]
    figure = figure_class(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
    upper.plot(steps, smooth(losses, len(losses) // 20), color="tab:blue", label="smoothed")
    if evaluated:
        curve = evaluated if before is None else [(0, before), *evaluated]
        upper.plot(*zip(*curve, strict=True), "o-", color="tab:orange", label="validation")
        step, best = min(evaluated, key=lambda point: point[1])
        label = f"best: {best:.4f} at step {step:,}"
        upper.plot([step], [best], "*", color="tab:red", markersize=14, label=label)
    upper.set_ylabel("loss (nats)")
    upper.legend()
    lower.plot(steps, [r["lr"] for r in rows], color="tab:green")
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    with whole_file(png_path, locked=True) as partial:
        # leave out matplotlib's version: the same run gives the same bytes
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
    return True


@cache
def _matplotlib_figure() -> Any:
    """Return matplotlib's Figure class, which needs no screen; None, and a note, without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        terminal.note("no loss.png without matplotlib: pip install 'nanogpt2[plot]' draws it")
        return None
    return Figure


class TensorBoard:
    """Writes a run's figures as event files for `tensorboard --logdir`."""

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        """after_step: a resumed run's step; TensorBoard drops the figures of later steps.

        Raises ValueError if the package tensorboard is missing.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(
                "needs the package tensorboard: pip install 'nanogpt2[tensorboard]'"
            ) from None
        purge = after_step + 1 if after_step else None
        # by their suffix --overwrite knows a run's files from others
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge, filename_suffix=EVENTS)

    def log(self, figures: Mapping[str, Any]) -> None:
        """Write the numbers of the step `figures["step"]`."""
        for name, value in figures.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        """Write everything that is still buffered."""
        self._writer.close()


# ---- the end


def final_report(
    before: Snapshot,
    after: Snapshot,
    best: float,
    val_losses: Sequence[float],
    folder: str | Path,
    task: str = "lm",
) -> str:
    """Compare the model before and after training; say how to try the model in `folder`.

    Both samples have the same prompt and seed. `best` is the lowest validation loss. A sparkline
    shows `val_losses`, in order.
    """
    parts = []
    if before.sample or after.sample:
        parts += [f"before training:\n{before.sample}", f"after training:\n{after.sample}"]
    parts.append(terminal.table(_comparison(before, after, best, task)))
    drawn = terminal.sparkline([before.val_loss, *val_losses], SPARKLINE_WIDTH)
    if len(val_losses) > 1 and drawn:
        parts.append(f"validation loss  {drawn}")
    # chat.py writes dialogues so; a prompt with its completion stands by itself
    is_dialogue = task == "chat" and "\nFriend:" in f"\n{before.sample}"
    text = " 'some text'" if task == "classify" else ""
    flag = " --classify" if task == "classify" else ""
    flag = " --interactive" + " --preset dialogue" * is_dialogue if task == "chat" else flag
    parts.append(f"now try: python sample.py{text} --model {shlex.quote(str(folder))}{flag}")
    return "\n\n".join(parts) + "\n"


def finish(folder: Path, before: Snapshot, after: Snapshot, best: float, task: str) -> None:
    """Draw the losses of the run in `folder`, and print its report."""
    metrics = folder / "metrics.jsonl"
    plot_losses(metrics, folder / "loss.png", before.val_loss)
    val_losses = [row["val_loss"] for row in read_metrics(metrics) if "val_loss" in row]
    report = final_report(before, after, best, val_losses, folder, task)
    terminal.write(terminal.visible(report))


def _comparison(
    before: Snapshot, after: Snapshot, best: float, task: str
) -> list[tuple[str, str, str, str]]:
    """Make the table's rows; leave out a figure that neither snapshot has."""

    def row(name: str, old: float | None, new: float | None, last: str = "") -> None:
        if old is not None or new is not None:
            rows.append((name, _number(old), _number(new), last))

    rows = [("", "before", "after", "best")]
    row("validation loss", before.val_loss, after.val_loss, _number(best))
    if task == "classify":
        row("accuracy", before.accuracy, after.accuracy)
        row("macro F1", before.macro_f1, after.macro_f1)
    else:
        old, new = perplexity(before.val_loss), perplexity(after.val_loss)
        row("perplexity", old, new, _number(perplexity(best)))
    if before.ids or after.ids:
        for n in (1, 2):
            row(f"distinct-{n} of the sample", distinct_n(before.ids, n), distinct_n(after.ids, n))
        repeated = repetition(before.ids, REPEATED), repetition(after.ids, REPEATED)
        row(f"repeated {REPEATED}-grams", *repeated)
    return rows


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e4 or not math.isfinite(value) else f"{value:.3g}"
