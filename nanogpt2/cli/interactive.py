"""sample.py --interactive: a prompt loop with undo, retry and branches.

This file does not know how tokens are chosen.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from nanogpt2 import terminal
from nanogpt2.atomic import whole_file
from nanogpt2.cli.decode import OutputSink, decode_texts, note_dropped
from nanogpt2.cli.text import shown
from nanogpt2.config import GenerationConfig, refuse_ignored, value_of
from nanogpt2.generation.text import request_for_ids
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

HELP = """Your line is added to the text, and the model continues from there.
  :undo              take back the last exchange
  :retry             say the last words again, with another seed
  :branch            continue in a copy; :branch N returns to branch N
  :set NAME VALUE    change an option, such as :set temperature 0.9
  :text              show the whole text
  :save FILE         write the text to a new file
  :help, :quit       (or Ctrl-D); Ctrl-C stops the text being written, or drops your line"""

WITH_ARGUMENT = ("branch", "set", "save")
# setting an option resets the option that would conflict with it
RESETS: dict[str, dict[str, Any]] = {
    "max_length": {"max_new_tokens": None},
    "max_new_tokens": {"max_length": None},
    "min_length": {"min_new_tokens": None},
    "min_new_tokens": {"min_length": 0},
}


class Interrupts:
    """Ctrl-C raises KeyboardInterrupt inside a `with` block, once; elsewhere it does nothing.

    So a second Ctrl-C cannot end the program while the first one is dealt with.
    """

    def __init__(self) -> None:
        self._wanted = False

    def __enter__(self) -> None:
        self._wanted = True

    def __exit__(self, *error: object) -> None:
        self._wanted = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT."""
        if self._wanted:
            self._wanted = False
            raise KeyboardInterrupt


class Conversation:
    """The text so far, its history and its branches."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        options: GenerationConfig,
        template: str,
        literal: bool = False,
    ) -> None:
        """template: a format string, with {} for the user's words.

        literal: read <|endoftext|> as characters.
        """
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.options, self.literal = options, literal
        self.interrupts = Interrupts()
        self.seed = int.from_bytes(os.urandom(7)) if options.seed is None else options.seed
        # one history for each branch: (ids so far, user's words) after each exchange. Ids, because
        # a text may end within a character
        self.branches: list[list[tuple[list[int], str]]] = [[([], "")]]
        self.branch = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "undo": self.undo,
            "retry": self.retry,
            "branch": self.go_to_branch,
            "set": self.set,
            "text": lambda _: terminal.write(f"{shown(self.text)}\n"),
            "save": self.save,
            "help": lambda _: terminal.note(HELP),
            "quit": self.quit,
        }

    @property
    def history(self) -> list[tuple[list[int], str]]:
        """(ids so far, user's words) after each exchange of the branch, from an empty start."""
        return self.branches[self.branch]

    @property
    def text(self) -> str:
        """The whole text of this branch."""
        return self.tokenizer.decode(self.history[-1][0])

    def say(self, words: str) -> None:
        """Add words and let the model continue. Raises ValueError if the context is full."""
        self.history.append((self._continue(self.history[-1][0], words), words))

    def open(self, words: str) -> None:
        """Say the first words. Nobody typed them at the prompt, so print them too."""
        ids = self._continue([], words, opening=self.template.format(words))
        self.history.append((ids, words))

    def _continue(self, ids: list[int], words: str, opening: str = "") -> list[int]:
        """Return ids with the words' and the model's continuation; stream the continuation.

        opening: printed before the continuation.
        """
        between = "\n" if self.template != "{}" and ids and words else ""
        added = between + self.template.format(words) if words else ""
        prompt = ids + self.tokenizer.encode(added, allow_special=not self.literal)
        options = replace(self.options, seed=self.seed)
        self.seed = (self.seed + 1) % 2**63
        request = request_for_ids(self.model, self.tokenizer, [prompt], options)
        note_dropped(request, self.model.config.block_size)
        screen = terminal.Screen()
        sink = OutputSink(screen, opening, continues=True)
        try:
            with self.interrupts:
                decode_texts(self.model, self.tokenizer, request, sink)
        except KeyboardInterrupt:
            if sink.completion is not None:
                sink.write(sink.completion.finish(cut=False))
            terminal.note(" (stopped)")
        screen.write("\n")
        return prompt + ([] if sink.completion is None else sink.completion.kept_ids())

    def undo(self, _: str = "") -> None:
        """Take back the last exchange."""
        if len(self.history) == 1:
            raise ValueError("nothing to take back")
        self.history.pop()
        terminal.note(f"...{self.text[-60:]}" if self.text else "(at the beginning)")

    def retry(self, _: str) -> None:
        """Say the last words again, with the next seed."""
        if len(self.history) == 1:
            raise ValueError("nothing to try again")
        words = self.history[-1][1]
        # keep the old exchange until the new one is finished
        self.history[-1] = (self._continue(self.history[-2][0], words), words)

    def go_to_branch(self, number: str) -> None:
        """Copy this branch and continue in the copy, or switch to branch `number`."""
        if not number:
            self.branches.append(list(self.history))
            self.branch = len(self.branches) - 1
        elif number.isdecimal() and 1 <= int(number) <= len(self.branches):
            self.branch = int(number) - 1
        else:
            raise ValueError(f":branch takes a number from 1 to {len(self.branches)}")
        terminal.note(f"on branch {self.branch + 1} of {len(self.branches)}")

    def set(self, argument: str) -> None:
        """Change a decoding option."""
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if name == "num_return_sequences":
            raise ValueError("num_return_sequences must be 1 here; :retry writes another text")
        given = {name: value_of(GenerationConfig, name, value.strip())}
        refuse_ignored(given, vars(self.options) | given)
        if name in RESETS:
            given |= RESETS[name]
        self.options = replace(self.options, **given)
        if name == "seed":
            self.seed = self.options.seed or 0

    def save(self, file: str) -> None:
        """Write the text to a new file. Raises ValueError if the file exists."""
        if not file:
            raise ValueError(":save needs a file's name")
        path = Path(file).expanduser()
        try:
            # a link to nothing does not exist either
            if path.exists() or path.is_symlink():
                raise ValueError(f"{file!r} exists; :save writes a new file")
            with whole_file(path) as partial:
                partial.write_bytes(f"{self.text}\n".encode())
        except OSError as error:
            raise ValueError(f"cannot save to {file!r}: {error.strerror}") from None
        terminal.note(f"saved to {file}")

    def quit(self, _: str) -> None:
        """End the loop, like the end of the input."""
        raise EOFError

    def execute(self, line: str) -> None:
        """Run a command, or continue the text with the line. Errors become one line on stderr."""
        try:
            _check_text(line)
            if not line.startswith(":"):
                self.say(line)
                return
            name, _, argument = line[1:].partition(" ")
            argument = argument.strip()
            if name not in self.commands:
                raise ValueError(f"no command :{name}; :help lists them")
            if argument and name not in WITH_ARGUMENT:
                raise ValueError(f":{name} takes no argument, not {argument!r}")
            self.commands[name](argument)
        except (ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
            terminal.note(f"error: {error}")


def _check_text(line: str) -> None:
    """Raise ValueError for a line that is not UTF-8."""
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise ValueError(f"a line must be UTF-8; cannot decode the byte 0x{byte:02x}") from None


def run_interactive(conversation: Conversation, opening: str) -> None:
    """Run the loop until the input ends or :quit. `opening`, unless empty, is said first."""
    typed = sys.stdin.isatty()
    if terminal.styled(sys.stdin):
        # line editing and history; a pasted text, its line ends included, is one line
        # Windows has no readline
        with suppress(ImportError):
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # a byte that is not UTF-8 makes only its own line invalid
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    signal.signal(signal.SIGINT, conversation.interrupts.receive)
    if opening:
        conversation.open(opening)
    terminal.note(":help lists the commands")
    while True:
        try:
            with conversation.interrupts:
                line = input("> " if typed else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not typed:
                sys.exit(128 + signal.SIGINT)
            terminal.note("\n(the text is kept; :quit or Ctrl-D ends)")
            continue
        try:
            conversation.execute(line)
        except EOFError:
            return
