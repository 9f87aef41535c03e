"""One prompt and its texts: streamed as they are made, rows and beams alike.

Of several rows the first is streamed and the others follow. Of beams, what all of them agree on is
final and is printed; the best one's tail is drawn behind it on a terminal, redrawn as it changes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanogpt2 import terminal
from nanogpt2.cli.text import Completion
from nanogpt2.cli.tree import BeamTree
from nanogpt2.config import GenerationConfig
from nanogpt2.generation import search, steps
from nanogpt2.generation.beam import Beams, best
from nanogpt2.generation.engine import check_memory, context_start
from nanogpt2.generation.processors import processors_for
from nanogpt2.generation.request import Request, check_least, prepare
from nanogpt2.generation.search.diverse import avoided
from nanogpt2.generation.stopping import stop_bytes
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Text:
    """A continuation, finished; `score` is the beam's.

    avoided: of diverse beams, the tokens that the groups before it chose, at each step.
    """

    completion: Completion
    score: float | None = None
    avoided: tuple[list[int], ...] = ()


def request_for(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], options: GenerationConfig
) -> Request:
    """Make a request for prompts of one length in tokens: padding would count as prompt.

    Raises ValueError for what cannot be.
    """
    bos = model.config.bos_token_id
    rows = [tokenizer.encode(prompt) or ([] if bos is None else [bos]) for prompt in prompts]
    ids = torch.tensor(rows, dtype=torch.int64)
    mask = torch.ones_like(ids)
    request = prepare(model.config, model.wte.weight.device, options, ids, mask, tokenizer)
    # what is wrong with an option is said before anything is shown
    check_memory(model, request)
    check_least(request)
    processors_for(request)
    if options.stop_strings is not None:
        stop_bytes(options.stop_strings)
    return request


def note_dropped(request: Request, block_size: int) -> None:
    """Say how much of a long prompt the model does not see."""
    length = request.prompt_length
    dropped = context_start(length, request.max_length, block_size)
    if dropped:
        terminal.note(
            f"note: the prompt has {length} tokens and the context {block_size}: "
            f"the first {dropped} are dropped"
        )


def note_outgrown(request: Request, block_size: int, texts: list["Text"]) -> None:
    """Say where the oldest tokens left the model's sight, if a text was that long."""
    length, longest = request.prompt_length, max(len(t.completion.token_ids) for t in texts)
    if length <= block_size < length + longest:
        terminal.note(
            f"note: the text outgrew the context of {block_size} tokens: from new token "
            f"{block_size - length + 2} on, the oldest ones are dropped"
        )


class OutputSink:
    """Who follows a text while it is made: a screen, a listener, the beams' tree; or nobody."""

    def __init__(
        self,
        screen: terminal.Screen | None = None,
        opening: str = "",
        heard: Callable[[str], object] | None = None,
        tree: BeamTree | None = None,
    ) -> None:
        """opening: stands before the text; shown with its first token, errors come first."""
        self.screen, self.opening, self.heard, self.tree = screen, opening, heard, tree

    def write(self, piece: str) -> None:
        """Pass on text that is certain."""
        if self.screen is not None:
            self.screen.write(self.opening + piece)
            self.opening = ""
        if self.heard is not None:
            self.heard(piece)

    def tail(self, text: str) -> None:
        """Pass on text that may still change."""
        if self.screen is not None:
            self.write("")
            self.screen.tail(text)

    @property
    def follows(self) -> bool:
        """True where somebody wants the text before it is finished."""
        return self.screen is not None or self.heard is not None


def decode_texts(
    model: GPT, tokenizer: Tokenizer, request: Request, show: OutputSink | None = None
) -> list[list[Text]]:
    """Return the texts of a request's prompts; show the first text of the first while it is made.

    Raises MemoryError with a line for the person, FloatingPointError for a broken model.
    """
    decode = _beams if request.config.num_beams > 1 else _rows
    try:
        return decode(model, tokenizer, request, show or OutputSink())
    except (MemoryError, RuntimeError) as error:
        # on a CPU torch has no class of its own for this
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        raise MemoryError(
            "out of memory: lower --num_beams, --num_return_sequences, --batch_size or the texts' "
            "length"
        ) from None


def _completions(tokenizer: Tokenizer, request: Request, count: int) -> list[list[Completion]]:
    """`count` empty texts for each prompt."""
    ends, stops = request.eos.tolist(), request.config.stop_strings or ()
    return [
        [Completion(tokenizer, ids, ends, stops) for _ in range(count)]
        for ids in request.ids.tolist()
    ]


def _rows(model: GPT, tokenizer: Tokenizer, request: Request, show: OutputSink) -> list[list[Text]]:
    texts = _completions(tokenizer, request, request.rows)
    flat = [text for row in texts for text in row]
    for step in steps(model, request):
        tokens = zip(flat, step.tokens.tolist(), step.running.tolist(), strict=True)
        pieces = [text.add(token) if running else "" for text, token, running in tokens]
        show.write(pieces[0])
    show.write(flat[0].finish())
    for text in flat[1:]:
        text.finish()
    return [[Text(text) for text in row] for row in texts]


def _beams(
    model: GPT, tokenizer: Tokenizer, request: Request, show: OutputSink
) -> list[list[Text]]:
    shown, agreed = _completions(tokenizer, request, 1)[0][0], 0
    for beams in search(model, request):
        if show.tree is not None:
            show.tree.record(beams)
        if show.follows:
            ids = beams.running.ids[0, 0, request.prompt_length :].tolist()
            certain = _agreed(beams, request)
            for token in ids[agreed:certain]:
                show.write(shown.add(token))
            agreed = max(agreed, certain)
            show.tail(tokenizer.decode(ids[agreed:]))
    group = best(request, beams)
    texts = _completions(tokenizer, request, group.ids.size(1))
    for row, ids, rows in zip(texts, group.ids, group.beams, strict=True):
        for text, tokens, beam in zip(row, ids, rows, strict=True):
            new = tokens[request.prompt_length :][beam >= 0]
            for token in new.tolist():
                text.add(token)
            text.finish()
    # what was shown is the beginning of the best text
    show.write(texts[0][0].text[len(shown.text) :])
    return [
        [
            Text(text, score, avoided(request, beams, beam))
            for text, score, beam in zip(row, scores.tolist(), rows, strict=True)
        ]
        for row, scores, rows in zip(texts, group.scores, group.beams, strict=True)
    ]


def _agreed(beams: Beams, request: Request) -> int:
    """How many new tokens all texts of the first prompt begin with, running and finished ones."""
    ended = beams.is_finished[0]
    ids = torch.cat([beams.running.ids[0], beams.finished.ids[0][ended]])  # (texts, T)
    new = ids[:, request.prompt_length :]
    same = int((new == new[:1]).all(dim=0).int().cumprod(0).sum())
    lengths = (beams.finished.beams[0][ended] >= 0).sum(dim=1)
    return min([same, *lengths.tolist()])
