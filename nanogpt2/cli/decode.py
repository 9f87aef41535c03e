"""Decode the texts of a prompt and stream the first one.

Of several rows, the first is streamed and the others follow when finished. Of beams, the tokens
that all beams share are final, so they are printed at once. On a terminal the rest of the best beam
is drawn behind them, and redrawn whenever it changes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanogpt2 import terminal
from nanogpt2.cli.text import shown
from nanogpt2.cli.tree import BeamTree
from nanogpt2.generation import search, steps
from nanogpt2.generation.beam import Beams, best
from nanogpt2.generation.engine import context_start
from nanogpt2.generation.request import Request
from nanogpt2.generation.search.diverse import avoided
from nanogpt2.generation.text import Completion, completed, completions
from nanogpt2.memory import is_out_of_memory
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A finished continuation; `score` is the score of its beam.

    avoided: diverse beam search only: the tokens that earlier groups chose, at each step.
    """

    completion: Completion
    score: float | None = None
    avoided: tuple[list[int], ...] = ()


def note_dropped(request: Request, block_size: int) -> None:
    """Note how many tokens of a long prompt are dropped."""
    length = request.prompt_length
    dropped = context_start(length, request.max_length, block_size)
    if dropped:
        terminal.note(
            f"note: the prompt has {length} tokens and the context {block_size}: "
            f"the first {dropped} are dropped"
        )


def note_outgrown(request: Request, block_size: int, texts: list["Text"]) -> None:
    """Note from which new token on the oldest tokens were dropped, if a text was that long."""
    length, longest = request.prompt_length, max(len(t.completion.token_ids) for t in texts)
    if length <= block_size < length + longest:
        terminal.note(
            f"note: the text outgrew the context of {block_size} tokens: from new token "
            f"{block_size - length + 2} on, the oldest ones are dropped"
        )


class OutputSink:
    """Where a text goes while it is decoded: a screen, a callback, the beams' tree, or nowhere."""

    def __init__(
        self,
        screen: terminal.Screen | None = None,
        opening: str = "",
        on_text: Callable[[str], object] | None = None,
        tree: BeamTree | None = None,
        continues: bool = False,
    ) -> None:
        """Make a sink.

        opening: printed before the text, but only with its first token, so that errors come first.
        on_text: called with each piece of text that is final. continues: the text may begin or end
        within a character, as a part of a longer text.
        """
        self.screen, self.opening, self.on_text, self.tree = screen, opening, on_text, tree
        self.continues = continues
        # the text so far; an interrupted one can be read here
        self.completion: Completion | None = None

    def write(self, piece: str) -> None:
        """Pass on a piece of text that is final."""
        if self.screen is not None:
            self.screen.write(shown(self.opening + piece))
            self.opening = ""
        if self.on_text is not None:
            self.on_text(piece)

    def tail(self, text: str) -> None:
        """Draw text that may still change behind the final text."""
        if self.screen is not None:
            self.write("")
            self.screen.tail(text)

    @property
    def wants_text(self) -> bool:
        """True if the text is wanted before it is finished."""
        return self.screen is not None or self.on_text is not None


def decode_texts(
    model: GPT, tokenizer: Tokenizer, request: Request, sink: OutputSink | None = None
) -> list[list[Text]]:
    """Return the texts of each prompt; stream the first text of the first prompt to `sink`.

    Raises MemoryError with a message for the user, FloatingPointError if the model's scores are not
    finite.
    """
    decode = _beams if request.config.num_beams > 1 else _rows
    try:
        return decode(model, tokenizer, request, sink or OutputSink())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            "out of memory: lower --num_beams, --num_return_sequences, --batch_size or the texts' "
            "length"
        ) from None


def _rows(model: GPT, tokenizer: Tokenizer, request: Request, sink: OutputSink) -> list[list[Text]]:
    texts = completions(tokenizer, request, request.rows, sink.continues)
    flat = [text for row in texts for text in row]
    sink.completion = flat[0]
    for step in steps(model, request):
        tokens = zip(flat, step.tokens.tolist(), step.running.tolist(), strict=True)
        pieces = [text.add(token) if running else "" for text, token, running in tokens]
        sink.write(pieces[0])
    sink.write(flat[0].finish(cut=not sink.continues))
    for text in flat[1:]:
        text.finish()
    return [[Text(text) for text in row] for row in texts]


def _beams(
    model: GPT, tokenizer: Tokenizer, request: Request, sink: OutputSink
) -> list[list[Text]]:
    shown, agreed = completions(tokenizer, request, 1, sink.continues)[0][0], 0
    sink.completion = shown
    for beams in search(model, request):
        if sink.tree is not None:
            sink.tree.record(beams)
        if sink.wants_text:
            ids = beams.running.ids[0, 0, request.prompt_length :].tolist()
            certain = _agreed(beams, request)
            for token in ids[agreed:certain]:
                sink.write(shown.add(token))
            agreed = max(agreed, certain)
            sink.tail(tokenizer.decode(ids[agreed:]))
    group = best(request, beams)
    texts = completed(tokenizer, request, group, sink.continues)
    sink.completion = texts[0][0]
    # the text shown so far is the beginning of the best text
    sink.write(texts[0][0].text[len(shown.text) :])
    return [
        [
            Text(text, score, avoided(request, beams, beam))
            for text, score, beam in zip(row, scores.tolist(), rows, strict=True)
        ]
        for row, scores, rows in zip(texts, group.scores, group.beams, strict=True)
    ]


def _agreed(beams: Beams, request: Request) -> int:
    """Return how many new tokens all texts of the first prompt share, running and finished."""
    ended = beams.is_finished[0]
    ids = torch.cat([beams.running.ids[0], beams.finished.ids[0][ended]])  # (texts, T)
    new = ids[:, request.prompt_length :]
    same = int((new == new[:1]).all(dim=0).int().cumprod(0).sum())
    lengths = (beams.finished.beams[0][ended] >= 0).sum(dim=1)
    return min([same, *lengths.tolist()])
