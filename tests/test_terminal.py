"""Drawing in the terminal: a screen with a changing tail, tables, trees, colours; streams."""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from reference import ROOT

from nanogpt2 import terminal
from nanogpt2.config.flags import fail


class FakeTerminal:
    """A small terminal that knows \\r, \\n and erasing to the end of the line."""

    def __init__(self, columns):
        self.columns = columns
        self.rows = [""]
        self.column = 0

    def write(self, text):
        for piece in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.|\n", text, re.DOTALL):
            if piece == "\r":
                self.column = 0
            elif piece == "\n":
                self.rows.append("")
                self.column = 0
            elif piece.endswith("K") and piece.startswith("\x1b"):
                self.rows[-1] = self.rows[-1][: self.column]
            elif not piece.startswith("\x1b"):
                self._put(piece)

    def _put(self, char):
        if self.column == self.columns:
            self.rows.append("")
            self.column = 0
        self.rows[-1] = self.rows[-1][: self.column] + char + self.rows[-1][self.column + 1 :]
        self.column += 1

    @property
    def shown(self):
        """The rows on the screen, wrapped ones joined again."""
        text = ""
        for row in self.rows[:-1]:
            text += row if len(row) == self.columns else row + "\n"
        return text + self.rows[-1]


@pytest.fixture
def fake(monkeypatch):
    out = FakeTerminal(20)
    # pytest's standard output is not a terminal
    monkeypatch.setattr(terminal, "write", out.write)
    monkeypatch.setattr(terminal.Screen, "redraws", lambda self: True)
    # replace the module, not shutil's function, because pytest calls that too
    size = SimpleNamespace(get_terminal_size=lambda: os.terminal_size((20, 24)))
    monkeypatch.setattr(terminal, "shutil", size)
    return out


def test_a_tail_is_drawn_and_erased(fake):
    screen = terminal.Screen()
    screen.write("The cat")
    screen.tail(" sat on")
    assert fake.shown == "The cat sat on"
    screen.tail(" ran")
    assert fake.shown == "The cat ran"
    screen.write(" slept")
    screen.tail("")
    assert fake.shown == "The cat slept"


@pytest.mark.parametrize("length", [5, 19, 20, 21, 39, 40, 41, 66])
def test_a_long_line_keeps_its_text_whatever_the_tail(fake, length):
    text = "".join(chr(97 + i % 26) for i in range(length))
    screen = terminal.Screen()
    for i, char in enumerate(text):
        screen.tail("some tail, longer than the line"[i % 7 :])
        screen.write(char)
    screen.tail("x\ny")
    screen.tail("")
    assert fake.shown == text


def test_a_tail_never_takes_a_second_row(fake):
    screen = terminal.Screen()
    screen.write("a\n12345")
    screen.tail("日本語日本語日本語\nnext")
    assert len(fake.rows) == 2
    screen.write("6\n")
    assert fake.shown == "a\n123456\n"


def test_without_a_terminal_no_tail_is_drawn(capsys):
    screen = terminal.Screen()
    screen.write("The cat")
    screen.tail(" sat")
    screen.write(" ran\n")
    assert capsys.readouterr().out == "The cat ran\n"


def test_tables_align_wide_characters():
    drawn = terminal.table([["token", "p"], ["'日'", "1%"], ["'a'", "100%"]])
    assert drawn == "token     p\n'日'     1%\n'a'    100%"


def test_trees():
    leaf = terminal.Node("b", [])
    nodes = [terminal.Node("a", [leaf, terminal.Node("c", [leaf])]), terminal.Node("d", [])]
    assert terminal.tree(nodes) == "├─ a\n│  ├─ b\n│  └─ c\n│     └─ b\n└─ d"


def test_colours_run_from_red_to_green():
    backgrounds = [re.match(r"\x1b\[48;2;(\d+);(\d+)", terminal.paint("x", s)) for s in (0, 0.5, 1)]
    red, green = zip(*[map(int, found.groups()) for found in backgrounds], strict=True)
    assert red[0] > red[2] and green[0] < green[2]
    assert terminal.paint("x", 7.0) == terminal.paint("x", 1.0)


# ---- standard streams

SCRIPT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from nanogpt2 import terminal
from nanogpt2.config.flags import fail
terminal.prepare()
opened = Path("opened").open("w")
terminal.note("a note")
if "loop" in sys.argv:
    terminal.Signals()
with opened:
    print(repr(sys.stdin.read()), file=opened)
    try:
        for _ in range(3):
            terminal.write("text\\n" * 20_000)
    except OSError as error:
        fail(str(error), code=1)
"""


def redirected(tmp_path, redirections, *argv):
    """Run the script in a shell; return its status, stdout and stderr."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, *argv]
    quoted = " ".join(f"'{word}'" for word in command)
    ran = subprocess.run(
        ["bash", "-c", f"{quoted} {redirections}; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    # a closed stream's text must not go into the file that the script opened
    assert (tmp_path / "opened").read_text() in ("''\n", "")
    return ran.returncode, ran.stdout, ran.stderr


TEXT = "text\n" * 60_000


@pytest.mark.parametrize(
    ("redirections", "expected"),
    [
        ("</dev/null", (0, TEXT, "a note\n")),
        ("<&-", (0, TEXT, "a note\n")),
        ("<&- >&-", (0, "", "a note\n")),
        ("<&- 2>&-", (0, TEXT, "")),
        ("<&- >&- 2>&-", (0, "", "")),
        ("<&- 2>/dev/full", (0, TEXT, "")),
        (
            "<&- >/dev/full",
            (1, "", "a note\nerror: [Errno 28] No space left on device: 'standard output'\n"),
        ),
        ("<&- >/dev/full 2>/dev/full", (1, "", "")),
    ],
)
def test_closed_and_full_streams(tmp_path, redirections, expected):
    assert redirected(tmp_path, redirections) == expected


def test_a_broken_pipe_ends_a_script_silently_but_not_training(tmp_path):
    assert redirected(tmp_path, "<&- | head -n 1") == (141, "text\n", "a note\n")
    line = "error: [Errno 32] Broken pipe: 'standard output'\n"
    assert redirected(tmp_path, "<&- | head -n 1", "loop") == (1, "text\n", "a note\n" + line)


@pytest.mark.parametrize(
    ("redirections", "status"), [("<&- >&- 2>&-", 0), ("2>/dev/full | true", 1)]
)
def test_training_outlives_its_streams(tmp_path, redirections, status):
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 30)
    flags = "--init scratch --tokenizer bytes --n_layer 1 --n_head 1 --n_embd 4 --block_size 8"
    command = f"{sys.executable} -W error {ROOT}/train.py book.txt {flags} --steps 3 {redirections}"
    ran = subprocess.run(
        ["bash", "-c", command + "; exit ${PIPESTATUS[0]}"], cwd=tmp_path, capture_output=True
    )
    assert ran.returncode == status and ran.stderr == b""
    assert (tmp_path / "out/checkpoints/step-3/manifest.json").exists()


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        ("", (3, b"x\n", b"")),
        (">/dev/full", (1, b"", b"error: [Errno 28] No space left on device\n")),
        (">&-", (1, b"", b"error: standard output is closed\n")),
    ],
)
def test_output_that_cannot_be_written_is_an_error(redirection, expected):
    """Also if the text was only buffered."""
    code = "from nanogpt2 import terminal\nwith terminal.checked_output(): print('x'); exit(3)"
    command = f'{sys.executable} -W error -c "{code}" {redirection}'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    ran = subprocess.run(["bash", "-c", command], capture_output=True, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == expected


def test_sparkline():
    assert terminal.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    # each block is the mean of a slice: of 0 and 2, of 7
    assert terminal.sparkline([0, 2, 7], 2) == "▁█"
    assert terminal.sparkline([5.0, 5.0], 9) == "▁▁"
    assert terminal.sparkline([1, float("nan"), float("inf"), 2], 4) == "▁  █"
    assert terminal.sparkline([], 4) == terminal.sparkline([float("nan")], 4) == ""
    assert len(terminal.sparkline(range(1000), 60)) == 60


@pytest.fixture(params=[40, 80, 120])
def columns(monkeypatch, request):
    monkeypatch.setattr(terminal, "screen_columns", lambda: request.param)
    return request.param


def test_a_wide_table_goes_on_below(columns, capsys):
    heads = [f"column {i}" for i in range(9)]
    rows = [["token", *heads], *([f"{name!r}", *(f"{i}.25" for i in range(9))] for name in "abc")]
    drawn = terminal.table(rows)
    assert max(map(len, drawn.splitlines())) <= columns
    blocks = [block.splitlines() for block in drawn.split("\n\n")]
    assert all(
        [line.split()[0] for line in block] == ["token", "'a'", "'b'", "'c'"] for block in blocks
    )
    assert [w for block in blocks for w in block[2].split()[1:]] == [f"{i}.25" for i in range(9)]
    assert len(blocks) == {40: 3, 80: 2, 120: 1}[columns] and not capsys.readouterr().err


def test_a_table_says_the_columns_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "screen_columns", lambda: 20)
    drawn = terminal.table([["x" * 15, "y" * 9, "z"], ["a", "b", "c"]])
    assert "the table needs 26 columns, the terminal has 20" in capsys.readouterr().err
    assert drawn.split() == ["x" * 15, "y" * 9, "a", "b", "x" * 15, "z", "a", "c"]


def test_a_trees_labels_keep_their_scores(columns):
    deep = terminal.Node("'" + "once upon a time " * 9 + "'  ended, score -1.234", [])
    drawn = terminal.tree([terminal.Node("'so'", [deep]), terminal.Node("'by'", [])])
    assert max(map(len, drawn.splitlines())) <= columns
    assert drawn.splitlines()[1].endswith("score -1.234") and "…" in drawn
    assert terminal.shorten("短い文" * 30, 41).count("…") == 1


def test_the_bars_fields_drop_from_the_right():
    fields = ["loss 3.1234", "1,234 tokens/s", "mfu 41%", "3.2 GB"]
    for columns, kept in ((60, 4), (40, 3), (30, 2), (27, 2), (26, 1), (11, 1), (10, 0), (-5, 0)):
        assert terminal.fitting(fields, columns) == ", ".join(fields[:kept]), columns


# ---- what a terminal must not be sent


def test_control_characters_are_shown(capsys):
    foreign = "a\x1b[31m\r\x07\x9b\u202e\udcff\tb\n日本 👩‍👩‍👧\xa0"
    shown = "a\\x1b[31m\\r\\x07\\x9b\\u202e\\udcff\tb\n日本 👩‍👩‍👧\xa0"
    assert terminal.visible(foreign) == shown
    terminal.note(foreign)
    with pytest.raises(SystemExit):
        fail(f"--x is not {foreign}")
    err = capsys.readouterr().err
    assert err.startswith(shown) and "\x1b" not in err and err.count("\n") == 3
    assert terminal.table([["a\x1b[2J\nb", "1"]]) == "a\\x1b[2J\\nb  1"


@pytest.mark.parametrize(
    ("environment", "is_terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_escape_sequences_go_to_terminals_that_take_them(
    monkeypatch, environment, is_terminal, expected
):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: is_terminal)
    assert terminal.Screen().redraws() == terminal.styled(sys.stderr) == expected
    monkeypatch.setattr(terminal, "_colours", terminal.styled(sys.stdout))
    assert ("\x1b" in terminal.paint("x", 0.5)) == expected
    with terminal.Progress(3, 0, "step") as bar:
        assert bar._bar.disable != expected


def test_signals_that_windows_lacks(monkeypatch):
    for name in ("SIGPIPE", "SIGHUP"):
        monkeypatch.delattr(signal, name)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    terminal.Signals()
