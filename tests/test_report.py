"""What a run shows: the picture, TensorBoard, the words at the end."""

import builtins
import json
import math
import os
import shlex

import pytest

from nanogpt2.terminal import sparkline
from nanogpt2.training import report
from nanogpt2.training.report import (
    Snapshot,
    TensorBoard,
    final_report,
    finish,
    plot_losses,
    read_metrics,
    smooth,
)


def rows(steps=40):
    found = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 4 / step, "lr": 1e-3 / step, "tokens_per_second": 9.5}
        found.append(row | ({"val_loss": 5 / step} if step % 10 == 0 else {}))
    return found


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(autouse=True)
def looked_up_again():
    report._matplotlib_figure.cache_clear()


def without(monkeypatch, package):
    real = builtins.__import__

    def fake(name, *rest):
        if name.startswith(package):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_the_picture(metrics, tmp_path):
    png = tmp_path / "loss.png"
    assert plot_losses(metrics, png)
    first = png.read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert plot_losses(metrics, png) and png.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_a_kill_while_the_picture_is_drawn_leaves_nothing_for_good(metrics, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    class Killed(Figure):
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            os._exit(9)

    png = tmp_path / "loss.png"
    monkeypatch.setattr(report, "_matplotlib_figure", lambda: Killed)
    if not (child := os.fork()):
        plot_losses(metrics, png)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.glob(".loss.png*"))) == 1
    # the resumed run is another process
    monkeypatch.undo()
    report._matplotlib_figure.cache_clear()
    assert plot_losses(metrics, png)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_what_the_picture_shows(metrics, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []

    class Kept(Figure):
        def savefig(self, path, **options):
            kept.append(self)
            super().savefig(path, **options)

    monkeypatch.setattr(report, "_matplotlib_figure", lambda: Kept)
    plot_losses(metrics, tmp_path / "loss.png", before=5.5)
    upper, lower = kept[0].axes
    raw, smoothed, points, best = upper.lines
    assert list(raw.get_xdata()) == list(range(1, 41)) and raw.get_alpha() < 1
    assert list(raw.get_ydata()) == [4 / step for step in range(1, 41)]
    assert len(smoothed.get_xdata()) == 40
    assert list(points.get_xdata()) == [0, 10, 20, 30, 40]
    assert points.get_ydata()[0] == 5.5
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([40], [5 / 40])
    assert "best: 0.1250 at step 40" in [t.get_text() for t in upper.get_legend().get_texts()]
    assert list(lower.lines[0].get_ydata()) == [1e-3 / step for step in range(1, 41)]


def test_a_run_without_evaluations_and_one_without_steps(tmp_path):
    path, png = tmp_path / "m", tmp_path / "loss.png"
    path.write_text("")
    assert not plot_losses(path, png) and not png.exists()
    path.write_text('{"step": 1, "loss": 2.5, "lr": 0.1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5, "lr": 0.1}]
    path.write_text('{"step": 1, "loss": 2.5, "lr": 0.1}\n5\n[]\n{"step": 2}\n')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5, "lr": 0.1}]
    assert plot_losses(path, png) and png.exists()


def test_no_half_picture(metrics, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    class Full(Figure):
        def savefig(self, path, **options):
            path.write_bytes(b"half")
            raise OSError("No space left on device")

    monkeypatch.setattr(report, "_matplotlib_figure", lambda: Full)
    with pytest.raises(OSError, match="No space"):
        plot_losses(metrics, tmp_path / "loss.png")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_matplotlib_it_is_said_once(metrics, tmp_path, monkeypatch, capsys):
    without(monkeypatch, "matplotlib")
    for _ in range(3):
        assert not plot_losses(metrics, tmp_path / "loss.png")
    assert capsys.readouterr().err.count("pip install 'nanogpt2[plot]'") == 1


def test_smooth():
    assert smooth([3.0, 1.0], 1) == [3.0, 1.0]
    assert smooth([2.0] * 5, 10) == pytest.approx([2.0] * 5)
    # weights 1/2 and 1
    assert smooth([3.0, 0.0], 2) == pytest.approx([3.0, 1.0])
    assert smooth([], 3) == []


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for row in rows(10):
        board.log(row)
    board.close()
    # a resumed run writes steps 6 to 8 anew
    board = TensorBoard(tmp_path, after_step=5)
    for step in (6, 7, 8):
        board.log({"step": step, "loss": 100.0 + step})
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "lr", "tokens_per_second", "val_loss"}
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert [step for step, _ in losses] == list(range(1, 9))
    assert losses[1][1] == pytest.approx(2.0) and losses[5][1] == 106.0


def test_without_tensorboard(tmp_path, monkeypatch):
    without(monkeypatch, "torch.utils.tensorboard")
    with pytest.raises(ValueError, match=r"pip install 'nanogpt2\[tensorboard\]'"):
        TensorBoard(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_the_report_of_a_run():
    before = Snapshot(math.log(40), "The cat cat", [7, 7, 7, 7, 7])
    after = Snapshot(math.log(8), "The cat sat", [1, 2, 3, 1, 2])
    text = final_report(before, after, math.log(6), [3.0, 2.0, 2.08], "my runs/it's")
    assert text.index("before training:\nThe cat cat") < text.index("after training:\nThe cat sat")
    for name, *cells in [
        ("validation loss", *(f"{math.log(n):.4f}" for n in (40, 8, 6))),
        ("perplexity", "40.0000", "8.0000", "6.0000"),
        ("distinct-1 of the sample", "0.2000", "0.6000"),
        ("distinct-2 of the sample", "0.2500", "0.7500"),
        ("repeated 4-grams", "0.5000", "0.0000"),
    ]:
        row = next(line for line in text.splitlines() if line.startswith(name))
        assert row.removeprefix(name).split() == cells
    # from the loss before training over the evaluations
    assert text.splitlines()[-3] == f"validation loss  {sparkline([math.log(40), 3, 2, 2.08], 60)}"
    command = text.splitlines()[-1].removeprefix("now try: ")
    assert shlex.split(command) == ["python", "sample.py", "--model", "my runs/it's"]


def test_the_report_of_a_classifier():
    before = Snapshot(0.7, accuracy=0.5, macro_f1=1 / 3)
    after = Snapshot(0.1, accuracy=0.975, macro_f1=0.9)
    text = final_report(before, after, 0.1, [0.4, 0.1], "out", task="classify")
    shown = [line.split() for line in text.splitlines()]
    assert ["accuracy", "0.5000", "0.9750"] in shown and [
        "macro",
        "F1",
        "0.3333",
        "0.9000",
    ] in shown
    assert "perplexity" not in text and "distinct" not in text and "training:" not in text
    command = shlex.split(text.splitlines()[-1].removeprefix("now try: "))
    assert command == ["python", "sample.py", "some text", "--model", "out", "--classify"]


def test_a_report_of_few_and_huge_figures():
    text = final_report(Snapshot(1e6), Snapshot(20.0), 20.0, [20.0], "out")
    assert "inf" in text and "4.85e+08" in text
    # a single evaluation is no curve
    assert "▁" not in text


def test_the_report_shows_control_characters(tmp_path, capsys):
    """Those of a sample, which an untrained byte model writes, and of the folder's name."""
    folder = tmp_path / "o\x1b[31m"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "val_loss": 2.0}\n')
    samples = [Snapshot(2.0, sample=f"a\n\tb\x1b]0;{i}\x07\x9b") for i in range(2)]
    finish(folder, *samples, 2.0, "lm")
    out, _ = capsys.readouterr()
    assert "a\n\tb\\x1b]0;1\\x07\\x9b" in out and "o\\x1b[31m" in out
    assert not set(out) & set("\x1b\x07\x9b")
