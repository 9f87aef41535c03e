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
from typing import Any

from nanogpt2 import terminal
from nanogpt2.cli.decode import OutputSink, decode_texts, note_dropped, request_for
from nanogpt2.config import GenerationConfig, refuse_ignored, value_of
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

HELP = """Your line is added to the text, and the model continues from there.
  :undo              take back the last exchange
  :retry             say the last words again, with another seed
  :branch            continue in a copy; :branch N returns to branch N
  :set NAME VALUE    change an option, such as :set temperature 0.9
  :text              show the whole text
  :save FILE         write the text to a new file
  :help, :quit       (or Ctrl-D); Ctrl-C stops the text being written"""

WITH_ARGUMENT = ("branch", "set", "save")
# setting an option resets the option that would conflict with it
RESETS: dict[str, dict[str, Any]] = {
    "max_length": {"max_new_tokens": None},
    "max_new_tokens": {"max_length": None},
    "min_length": {"min_new_tokens": None},
    "min_new_tokens": {"min_length": 0},
}


class Conversation:
    """The text so far, its history and its branches."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, options: GenerationConfig, template: str
    ) -> None:
        """template: a format string, with {} for the user's words."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.options = options
        self.seed = int.from_bytes(os.urandom(7)) if options.seed is None else options.seed
        # one history for each branch: (text so far, user's words) after each exchange
        self.branches: list[list[tuple[str, str]]] = [[("", "")]]
        self.branch = 0
        self.commands: dict[str, Callable[[str], None]] = {
            "undo": self.undo,
            "retry": self.retry,
            "branch": self.go_to_branch,
            "set": self.set,
            "text": lambda _: terminal.write(f"{self.text}\n"),
            "save": self.save,
            "help": lambda _: terminal.note(HELP),
            "quit": self.quit,
        }

    @property
    def history(self) -> list[tuple[str, str]]:
        """(text so far, user's words) after each exchange of the branch, from an empty start."""
        return self.branches[self.branch]

    @property
    def text(self) -> str:
        """The whole text of this branch."""
        return self.history[-1][0]

    def say(self, words: str) -> None:
        """Add words and let the model continue. Raises ValueError if the context is full."""
        self.history.append((self._continue_text(self.text, words), words))

    def open(self, words: str) -> None:
        """Say the first words. Nobody typed them at the prompt, so print them too."""
        text = self._continue_text("", words, shown=self.template.format(words))
        self.history.append((text, words))

    def _continue_text(self, text: str, words: str, shown: str = "") -> str:
        """Return the text with the words and the model's continuation; stream the continuation.

        shown: printed before the continuation.
        """
        opening = self.template.format(words) if words else ""
        between = "\n" if self.template != "{}" and text and words else ""
        prompt = text + between + opening
        options = replace(self.options, seed=self.seed)
        self.seed = (self.seed + 1) % 2**63
        request = request_for(self.model, self.tokenizer, [prompt], options)
        note_dropped(request, self.model.config.block_size)
        screen = terminal.Screen()
        written: list[str] = []
        sink = OutputSink(screen, shown, on_text=written.append)
        try:
            decode_texts(self.model, self.tokenizer, request, sink)
        except KeyboardInterrupt:
            terminal.note(" (stopped)")
        screen.write("\n")
        return prompt + "".join(written)

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
        self.history[-1] = (self._continue_text(self.history[-2][0], words), words)

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
        partial = path.with_name(f"{path.name}.part")
        try:
            if path.exists():
                raise ValueError(f"{file!r} exists; :save writes a new file")
            # write under another name, then rename: the file is complete or absent
            partial.write_bytes(f"{self.text}\n".encode())
            partial.rename(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ValueError(str(error)) from None
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
    if terminal.styled(sys.stdin):
        # line editing and history; Windows has no readline
        with suppress(ImportError):
            import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # a byte that is not UTF-8 makes only its own line invalid
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if opening:
        conversation.open(opening)
    terminal.note(":help lists the commands")
    while True:
        try:
            conversation.execute(input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
