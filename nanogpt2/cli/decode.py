"""Decode the texts of a prompt and stream the first one.

Of several rows, the first is streamed and the others follow when finished. Of beams, the tokens
that all beams share are final, so they are printed at once. On a terminal the rest of the best beam
is drawn behind them, and redrawn whenever it changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from nanogpt2 import terminal
from nanogpt2.cli.text import Completion, shown
from nanogpt2.cli.tree import BeamTree
from nanogpt2.config import GenerationConfig
from nanogpt2.generation import search, steps
from nanogpt2.generation.beam import Beams, best
from nanogpt2.generation.engine import check_memory, context_start
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.replay import EVERY
from nanogpt2.generation.request import Request, check_least, prepare
from nanogpt2.generation.search.diverse import avoided
from nanogpt2.generation.stopping import stop_bytes
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


def request_for(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str],
    options: GenerationConfig,
    literal: bool = False,
    seeds: Sequence[int] | None = None,
) -> Request:
    """Make a request for prompts of equal length in tokens.

    The prompts need equal lengths because padding would count as prompt. literal: <|endoftext|> is
    characters, not the token. seeds: one for each prompt; by default all draw from options.seed.
    Raises ValueError for invalid options or a prompt that leaves no room for new tokens.
    """
    rows = [tokenizer.encode(prompt, allow_special=not literal) for prompt in prompts]
    request = request_for_ids(model, tokenizer, rows, options)
    return request if seeds is None else replace(request, seeds=tuple(seeds))


def request_for_ids(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[list[int]], options: GenerationConfig
) -> Request:
    """Make a request for prompts given as equally many token ids each; errors as request_for."""
    bos = model.config.bos_token_id
    if bos is None and not all(prompts):
        raise ValueError("PROMPT must not be empty: the model has no bos_token_id to start from")
    ids = torch.tensor([row or [bos] for row in prompts], dtype=torch.int64)
    mask = torch.ones_like(ids)
    request = prepare(model.config, model.wte.weight.device, options, ids, mask, tokenizer)
    # check all options now, before any output
    check_memory(model, request)
    check_least(request)
    processors_for(request)
    if options.stop_strings is not None:
        stop_bytes(options.stop_strings)
    return request


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


def _completions(
    tokenizer: Tokenizer, request: Request, count: int, sink: OutputSink
) -> list[list[Completion]]:
    """Return `count` empty texts for each prompt."""
    ends, stops = request.eos.tolist(), request.config.stop_strings or ()
    return [
        [Completion(tokenizer, ids, ends, stops, sink.continues) for _ in range(count)]
        for ids in request.ids.tolist()
    ]


def _rows(model: GPT, tokenizer: Tokenizer, request: Request, sink: OutputSink) -> list[list[Text]]:
    texts = _completions(tokenizer, request, request.rows, sink)
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
    shown, agreed = _completions(tokenizer, request, 1, sink)[0][0], 0
    sink.completion = shown
    # the tree draws each step
    every = EVERY if sink.tree is None else 1
    for beams in search(model, request, every):
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
    texts = _completions(tokenizer, request, group.ids.size(1), sink)
    for row, ids, rows in zip(texts, group.ids, group.beams, strict=True):
        for text, tokens, beam in zip(row, ids, rows, strict=True):
            new = tokens[request.prompt_length :][beam >= 0]
            for token in new.tolist():
                text.add(token)
            text.finish(cut=not sink.continues)
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
