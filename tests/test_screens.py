"""The screens at 40, 80 and 120 columns, recorded through a pseudo-terminal and compared.

The recordings are in data/screens; digits are 0 there, and what depends on the machine is masked.
To record anew: SCREENS=write pytest tests/test_screens.py.
"""

import fcntl
import os
import re
import shutil
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest

import sample
import train
from nanogpt2 import terminal
from nanogpt2.config import SampleConfig, TrainConfig, parse

SCREENS = Path(__file__).parent / "data/screens"
DEMO = ["The river", "--model", "demo", "--max_new_tokens", "6", "--seed", "1"]
MODES = {
    "sample": [*DEMO],
    "tree": [*DEMO, "--num_beams", "3", "--tree"],
    "explain": [*DEMO[:-4], "--max_new_tokens", "2", "--seed", "1", "--top_p", "0.9", "--explain"],
    "compare": [*DEMO, "--compare", "demo"],
    "inside": [*DEMO[:3], "--attention", "--lens", "--tokens"],
    "head": [*DEMO[:3], "--attention", "2.1"],
    "classify": ["a sheep", "--classify", "--model", "labels"],
    "train": ["book.txt", "--init", "scratch", "--tokenizer", "bytes", "--n_layer", "1"],
}
MODES["train"] += ["--n_head", "1", "--n_embd", "8", "--block_size", "16", "--steps", "4"]
MODES["train"] += ["--lr", "0", "--batch_size", "2", "--device", "cpu"]
LABELS = ["labels.csv", *MODES["train"][1:], "--task", "classify", "--out", "labels"]


# what follows the untrained model's text: the other text, or a table
AFTER_SAMPLE = re.compile(r"after training:|\s+before\b")


class Terminal:
    """A pseudo-terminal in place of the standard streams."""

    def __init__(self, columns):
        self.columns, self.data = columns, b""
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8", buffering=1)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        try:
            while piece := os.read(self.master, 2**16):
                self.data += piece
        except OSError:
            # Linux ends a pseudo-terminal so
            pass

    def screen(self):
        """Close the terminal and return its lines: of each, what was written last."""
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        rows, at = [[]], 0
        for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.", self.data.decode(), flags=re.S):
            if part == "\n":
                rows, at = [*rows, []], 0
            elif part == "\r":
                at = 0
            elif part == "\x1b[K":
                del rows[-1][at:]
            elif not part.startswith("\x1b"):
                rows[-1][at : at + 1] = part
                at += 1
        return ["".join(row).rstrip() for row in rows]


def masked(lines):
    """Hide what depends on the machine: numbers, the bar, the untrained model's text."""
    found, is_sample = [], False
    for line in lines:
        line = re.sub(r"\|[^|]*\| (\d+/\d+) \[.*\]", r"|BAR| \1 [...]", line)
        if is_sample and not AFTER_SAMPLE.match(line):
            # nearly equal chances: rounding decides, even where the lines end
            found += ["SAMPLE"] if found[-1].endswith(" training:") else []
            continue
        # in a table every digit keeps its place
        numbers = r"\d" if "  " in line.strip() else r"\d[\d,.]*"
        found.append(re.sub(numbers, "0", line))
        is_sample = line.endswith(" training:")
    return "\n".join(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("screens")
    (path / "book.txt").write_text("".join(f"{i} sheep crossed the river. " for i in range(40)))
    rows = "".join(f"{i} sheep,many\n{i} boats,few\n" for i in range(9))
    (path / "labels.csv").write_text(f"text,label\n{rows}")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        train.main(parse(TrainConfig, LABELS))
    return path


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("mode", MODES)
def test_a_screen(folder, monkeypatch, mode, columns):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    shutil.rmtree(folder / "out", ignore_errors=True)
    screen = Terminal(columns)
    for name in ("stdout", "stderr", "__stdout__"):
        monkeypatch.setattr(sys, name, screen.stream)
    monkeypatch.setattr(terminal, "_colours", True)
    try:
        if mode == "train":
            train.main(parse(TrainConfig, MODES[mode]))
        else:
            sample.main(parse(SampleConfig, MODES[mode]))
    finally:
        lines = screen.screen()
    bars = [line for line in lines if re.search(r"\d+/\d+ \[", line)]
    # one bar is left, and it fits; tables and trees fit too
    assert len(bars) == (mode == "train") and all(len(bar) <= columns for bar in bars)
    drawn = [line for line in lines if "  " in line.strip() or line.lstrip().startswith("└")]
    assert not [line for line in drawn if len(line) > columns]
    found = masked(lines)
    path = SCREENS / f"{mode}_{columns}.txt"
    if os.environ.get("SCREENS") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
