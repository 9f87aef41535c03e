"""A prompt loop: write together with the model, take back, try again, branch off.

This file does not know how tokens are chosen.
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanogpt2 import terminal
from nanogpt2.cli.decode import OutputSink, decode_texts, note_dropped, request_for
from nanogpt2.config import GenerationConfig, refuse_ignored, value_of
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

HELP = """What you type is added to the text, and the model goes on from there.
  :undo              take back the last exchange
  :retry             the same again, with other chance
  :branch            go on in a copy; :branch N goes back to branch N
  :set NAME VALUE    change an option, such as :set temperature 0.9
  :text              show the whole text
  :save FILE         write the text to a new file
  :help, :quit       (or Ctrl-D); Ctrl-C stops a text while it is written"""

WITH_ARGUMENT = ("branch", "set", "save")
# an option that is set puts out of force what would win over it, or lose to it
RIVALS: dict[str, dict[str, Any]] = {
    "max_length": {"max_new_tokens": None},
    "max_new_tokens": {"max_length": None},
    "min_length": {"min_new_tokens": None},
    "min_new_tokens": {"min_length": 0},
}


class Conversation:
    """The text so far, how it came about, and its branches."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, options: GenerationConfig, template: str
    ) -> None:
        """template: what stands around each thing said, with {} for it."""
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.options = options
        self.seed = int.from_bytes(os.urandom(7)) if options.seed is None else options.seed
        # the text after each exchange, and what was said; one such history a branch
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
        """(text, what was said last) after each exchange of the branch; the first is empty."""
        return self.branches[self.branch]

    @property
    def text(self) -> str:
        """All that was written on this branch."""
        return self.history[-1][0]

    def say(self, words: str) -> None:
        """Add words and let the model go on. Raises ValueError where there is no room."""
        self.history.append((self._go_on(self.text, words), words))

    def open(self, words: str) -> None:
        """Say the first words, which nobody has typed: they are shown as well."""
        text = self._go_on("", words, shown=self.template.format(words))
        self.history.append((text, words))

    def _go_on(self, text: str, words: str, shown: str = "") -> str:
        """Return the text with the words and what the model makes of them; show that as it comes.

        `shown` stands before it on the screen.
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
        show = OutputSink(screen, shown, heard=written.append)
        try:
            decode_texts(self.model, self.tokenizer, request, show)
        except KeyboardInterrupt:
            terminal.note(" (stopped)")
        screen.write("\n")
        return prompt + "".join(written)

    def undo(self, _: str = "") -> None:
        """Take back the last exchange."""
        if len(self.history) == 1:
            raise ValueError("there is nothing to take back")
        self.history.pop()
        terminal.note(f"...{self.text[-60:]}" if self.text else "(at the beginning)")

    def retry(self, _: str) -> None:
        """Say the last thing again, with other chance."""
        if len(self.history) == 1:
            raise ValueError("there is nothing to try again")
        words = self.history[-1][1]
        # the old one stays until there is another
        self.history[-1] = (self._go_on(self.history[-2][0], words), words)

    def go_to_branch(self, number: str) -> None:
        """Copy this branch and go on in the copy, or go to branch `number`."""
        if not number:
            self.branches.append(list(self.history))
            self.branch = len(self.branches) - 1
        elif number.isdecimal() and 1 <= int(number) <= len(self.branches):
            self.branch = int(number) - 1
        else:
            raise ValueError(f":branch takes a number from 1 to {len(self.branches)}")
        terminal.note(f"on branch {self.branch + 1} of {len(self.branches)}")

    def set(self, argument: str) -> None:
        """Change an option of the decoding."""
        name, _, value = argument.partition(" ")
        name = name.replace("-", "_")
        if name == "num_return_sequences":
            raise ValueError("num_return_sequences must be 1 here; :retry writes another text")
        given = {name: value_of(GenerationConfig, name, value.strip())}
        refuse_ignored(given, vars(self.options) | given)
        if name in RIVALS:
            given |= RIVALS[name]
        self.options = replace(self.options, **given)
        if name == "seed":
            self.seed = self.options.seed or 0

    def save(self, file: str) -> None:
        """Write the text to a file that does not exist yet."""
        if not file:
            raise ValueError(":save needs a file's name")
        path = Path(file).expanduser()
        aside = path.with_name(f"{path.name}.part")
        try:
            if path.exists():
                raise ValueError(f"{file!r} exists; :save writes a new file")
            # whole or not at all
            aside.write_bytes(f"{self.text}\n".encode())
            aside.rename(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise ValueError(str(error)) from None
        terminal.note(f"saved to {file}")

    def quit(self, _: str) -> None:
        """End the loop, as the end of input does."""
        raise EOFError

    def obey(self, line: str) -> None:
        """Carry out a command, or go on with the text; what is wrong is one line."""
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
                raise ValueError(f":{name} stands alone, without {argument!r}")
            self.commands[name](argument)
        except (ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
            terminal.note(f"error: {error}")


def _check_text(line: str) -> None:
    """Raise ValueError for a line that holds bytes which are no text."""
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) & 0xFF
        raise ValueError(f"a line must be UTF-8, which the byte 0x{byte:02x} is not") from None


def run_interactive(conversation: Conversation, opening: str) -> None:
    """Talk until the end of input or :quit. `opening` is said first."""
    if sys.stdin.isatty():
        # line editing and history
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        # a byte that is no text spoils its own line only
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if opening:
        conversation.open(opening)
    terminal.note(":help lists the commands")
    while True:
        try:
            conversation.obey(input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
