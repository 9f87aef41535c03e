"""What sample.py --attention, --lens and --tokens found about one text, ready to be drawn.

nanogpt2/inspect.py computes. This file gives tokens their names and sums up the heads. It does not
know how the findings are drawn.
"""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from nanogpt2 import inspect
from nanogpt2.cli.text import token_name
from nanogpt2.config import SampleConfig
from nanogpt2.inspect import Guesses, Piece
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

SEVERAL = 3  # tokens shown for one: those that it looks at most, the likeliest guesses
PIECE = 25  # letters of the longest piece that is spelled out after every merge
PICTURE = 64  # last tokens in the small picture of a head


class Head(NamedTuple):
    """One head in short. Means over the text; None where it has no such pair of tokens."""

    name: str  # LAYER.HEAD
    itself: float | None  # all tokens but the first, which can look nowhere else
    before: float | None
    first: float | None
    most: int  # where the last token looks most
    weight: float
    picture: Tensor  # (S, S): the weights between the last S tokens


class Inside(NamedTuple):
    """The findings about one text; None where not asked for."""

    model: str
    text: str
    names: list[str]  # of the tokens
    heads: list[Head] | None
    head: tuple[str, Tensor] | None  # LAYER.HEAD and its weights (T, T)
    lens: tuple[Guesses, dict[int, str]] | None  # with the names of the guessed tokens
    pieces: list[Piece] | None


def look(
    config: SampleConfig, model: GPT | None, tokenizer: Tokenizer, ids: list[int], text: str
) -> Inside:
    """Compute what is asked for. model: given where the attention or the lens is asked for."""
    heads = head = lens = pieces = None
    if model is not None and config.attention == "all":
        layers = enumerate(inspect.attention_by_layer(model, ids))
        heads = [
            in_short(f"{layer}.{n}", weights)
            for layer, maps in layers
            for n, weights in enumerate(maps.cpu())
        ]
    elif model is not None and config.attention is not None:
        layer, number = map(int, config.attention.split("."))
        maps = next(islice(inspect.attention_by_layer(model, ids), layer, None))
        head = f"{layer}.{number}", maps[number].cpu()
    if model is not None and config.lens:
        k = min(SEVERAL, model.config.vocab_size)
        guesses = Guesses(*(tensor.cpu() for tensor in inspect.logit_lens(model, ids, k)))
        lens = guesses, {i: token_name(tokenizer, i) for i in guesses.ids.unique().tolist()}
    if config.tokens:
        pieces = inspect.merges(tokenizer, text, allow_special=not config.literal_prompt)
    names = [token_name(tokenizer, i) for i in ids]
    return Inside(config.model, text, names, heads, head, lens, pieces)


def in_short(name: str, weights: Tensor) -> Head:
    """Sum up a head's weights (T, T)."""
    itself, before, first = (
        float(some.mean()) if len(some) else None
        for some in (weights.diagonal()[1:], weights.diagonal(-1), weights[1:, 0])
    )
    weight, most = weights[-1].max(dim=0)
    # a copy: a view would keep all the weights in memory
    picture = weights[-PICTURE:, -PICTURE:].clone()
    return Head(name, itself, before, first, int(most), float(weight), picture)


def counts(pieces: Sequence[Piece]) -> tuple[int, int]:
    """How many tokens a text has, and how many merges made them."""
    return sum(len(piece.ids) for piece in pieces), sum(len(piece.merges) for piece in pieces)


def layer_names(count: int) -> list[str]:
    """The names of the residual stream's stages."""
    return ["embedding", *(f"layer {layer}" for layer in range(count - 1))]


def spelled(piece: Piece, count: int) -> str:
    """Spell a piece's parts after its first `count` merges; "" for a long piece."""
    return " ".join(piece.after(count)) if len(piece.letters) <= PIECE else ""
