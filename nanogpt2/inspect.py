"""Inside a GPT, for one text: attention weights, each layer's guess, norms, neighbours, merges.

x_0 = wte[id] + wpe[position] is the residual stream before the blocks, x_l the stream after l
blocks; the model's own logits are ln_f(x_L) W^T, where W is the head: wte, but for untied models.

    attention_maps     softmax(q k^T / sqrt(D)) over a position and those before it, for each head
    logit_lens         softmax(ln_f(x_l) W^T) for each l: the model's answer if it ended there
    residual_norms     |x_l|
    token_neighbours   the tokens whose rows of wte have the largest cosine with a token's row
    merges             the steps of byte-pair encoding

The functions mirror GPT.hidden_states, Block, CausalSelfAttention and MLP `.forward` of model.py,
without dropout. They register no hook, change no mode and write nothing to the model, which may be
any GPT: in training, with LoRA, packed for a CPU, narrowed to fp16 or int8. `tolist()` makes plain
lists of the tensors; the named tuples hold plain values, so json.dumps takes both. This file knows
neither files nor terminals.

Axes: T tokens, L layers, H heads, D = C // H, C = n_embd, V vocabulary.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Sennrich et al. 2016 (merges).
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import regex
import torch
from torch import Tensor
from torch.nn import functional as F

from nanogpt2 import ops
from nanogpt2.model import GPT
from nanogpt2.tokenizer import PATTERN, Tokenizer, printable_bytes

ROWS = 256  # rows of logits computed at once
TABLE_ROWS = 4096  # rows of the token table compared at once


class Guesses(NamedTuple):
    """What each layer would predict: the k likeliest next tokens, the likeliest first."""

    ids: Tensor  # int64 (L + 1, T, k)
    probabilities: Tensor  # float32 (L + 1, T, k)


class Neighbour(NamedTuple):
    """A token and the cosine between its row of wte and that of the token asked for."""

    token: int
    similarity: float


class Merge(NamedTuple):
    """One merge: the part that starts at byte `start` of its piece takes in the part behind it."""

    rank: int  # place in the tokenizer's list of merges, from 0
    start: int
    left: str  # both in the printable alphabet of vocab.bpe, a character a byte
    right: str


class Piece(NamedTuple):
    """A word, number or other run of a text, which no merge crosses."""

    text: str
    letters: str  # its bytes in the printable alphabet
    merges: tuple[Merge, ...]
    tokens: tuple[str, ...]  # the parts that are left, in the printable alphabet
    ids: tuple[int, ...]

    def after(self, count: int) -> list[str]:
        """Return the parts after the first `count` merges: single letters for 0."""
        gone = {merge.start + len(merge.left) for merge in self.merges[:count]}
        cuts = [at for at in range(len(self.letters) + 1) if at not in gone]
        return [self.letters[start:end] for start, end in pairwise(cuts)]


def attention_maps(model: GPT, ids: Sequence[int] | Tensor) -> Tensor:
    """Return the attention weights of every head: float32 (L, H, T, T).

    [l, h, t, s] is the weight that position t gives to position s; each row sums to 1. ids: token
    ids, T of them, 1 to block_size: a list, or a tensor (T,) or (1, T).
    Raises ValueError for other ids, FloatingPointError where the model overflows or is damaged.
    """
    return torch.stack([*attention_by_layer(model, ids)])


@torch.no_grad()
def attention_by_layer(model: GPT, ids: Sequence[int] | Tensor) -> Iterator[Tensor]:
    """Yield each layer's attention weights, float32 (H, T, T): attention_maps in less memory."""
    for _, qkv in _layers(model, _row(model, ids)):
        if qkv is not None:
            q, k, _ = qkv[0].float().transpose(0, 2).unbind(1)  # each (H, T, D)
            scores = q @ k.transpose(1, 2) / math.sqrt(q.size(2))  # (H, T, T)
            later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
            yield scores.masked_fill(later, -torch.inf).softmax(dim=2)


@torch.no_grad()
def logit_lens(model: GPT, ids: Sequence[int] | Tensor, k: int = 5) -> Guesses:
    """Read the residual stream after each layer as if it were the last.

    [0] is the embedding's guess, [l] that after l blocks, [L] the model's own prediction. The k
    likeliest tokens stand for all: the logits would take 4 (L + 1) T V bytes. k = V returns all.
    ids and errors as for attention_maps; raises ValueError for k outside 1 to V.
    """
    _check("k", k, 1, model.config.vocab_size)
    best = []
    for x, _ in _layers(model, _row(model, ids)):
        for rows in model.ln_f(x)[0].split(ROWS):  # (R, C)
            best.append(model.logits(rows).float().softmax(dim=1).topk(k))
    shape = model.config.n_layer + 1, -1, k
    return Guesses(
        torch.cat([found.indices for found in best]).view(shape),
        torch.cat([found.values for found in best]).view(shape),
    )


@torch.no_grad()
def residual_norms(model: GPT, ids: Sequence[int] | Tensor) -> Tensor:
    """Return the Euclidean norm of the residual stream: float32 (L + 1, T).

    [0] is that of the embedding, [l] that after l blocks, before ln_f. ids and errors as for
    attention_maps.
    """
    layers = _layers(model, _row(model, ids))
    return torch.stack([torch.linalg.vector_norm(x[0].float(), dim=1) for x, _ in layers])


@torch.no_grad()
def token_neighbours(model: GPT, token: int, k: int = 10) -> list[Neighbour]:
    """Return the k other tokens nearest to a token by the cosine of their embeddings, best first.

    Raises ValueError for a token outside 0 to V - 1 and for k outside 1 to V - 1.
    """
    V, device = model.config.vocab_size, model.wpe.weight.device
    _check("token", token, 0, V - 1)
    _check("k", k, 1, V - 1)
    # look rows up, in parts: a narrowed table has no float32 matrix
    parts = torch.arange(V, device=device).split(TABLE_ROWS)
    own = F.normalize(model.wte(torch.tensor([token], device=device)).float())[0]  # (C,)
    cosines = torch.cat([F.normalize(model.wte(part).float()) @ own for part in parts])  # (V,)
    cosines[token] = -torch.inf
    best = cosines.topk(k)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Neighbour(*pair) for pair in pairs]


def merges(tokenizer: Tokenizer, text: str, allow_special: bool = False) -> list[Piece]:
    """Encode a text step by step: its pieces, each with its merges in order.

    The ids of all pieces are those of `tokenizer.encode(text, allow_special)`. Within a piece the
    pair of the lowest rank is merged first, of equal pairs the left one. An added token is a piece
    of its own; special ones, as <|endoftext|>, with `allow_special` only. In a vocabulary without
    GPT-2's steps each token is one, without merges.
    """
    if not tokenizer.shows_merges:
        names = ((i, tokenizer.decode([i])) for i in tokenizer.encode(text, allow_special))
        return [Piece(name, name, (), (name,), (i,)) for i, name in names]
    letters, ranks = printable_bytes(), _ranks(tokenizer.merges)
    found = []
    for part in tokenizer.split(text, allow_special):
        if isinstance(part, int):
            token = tokenizer.decode([part])
            found.append(Piece(token, token, (), (token,), (part,)))
            continue
        for word in regex.findall(PATTERN, part):
            spelled = "".join(letters[byte] for byte in word.encode("utf-8"))
            steps, tokens = _merge(spelled, ranks)
            ids = tuple(tokenizer.vocabulary[token] for token in tokens)
            found.append(Piece(word, spelled, steps, tokens, ids))
    return found


def _merge(
    letters: str, ranks: dict[tuple[str, str], int]
) -> tuple[tuple[Merge, ...], tuple[str, ...]]:
    """Merge a piece's letters until no pair has a rank; return the merges and the parts left.

    A queue of possible merges keeps the time near the piece's length, however long.
    """
    parts = dict(enumerate(letters))  # start -> the part there
    before = {start: start - 1 for start in parts}  # start -> the start of the part before
    queue: list[Merge] = []

    def offer(start: int) -> None:
        left = parts[start]
        right = parts.get(start + len(left), "")
        if (left, right) in ranks:
            heapq.heappush(queue, Merge(ranks[left, right], start, left, right))

    for start in parts:
        offer(start)
    done = []
    while queue:
        merge = heapq.heappop(queue)
        middle, end = (merge.start + len(side) for side in (merge.left, merge.left + merge.right))
        if (parts.get(merge.start), parts.get(middle)) != (merge.left, merge.right):
            continue  # another merge took one of the two
        done.append(merge)
        parts[merge.start] += parts.pop(middle)
        if end in parts:
            before[end] = merge.start
        offer(merge.start)
        if merge.start > 0:
            offer(before[merge.start])
    return tuple(done), tuple(parts.values())


@cache
def _ranks(lines: str) -> dict[tuple[str, str], int]:
    """The text of vocab.bpe -> the rank of each pair."""
    pairs = (line.split(" ") for line in lines.splitlines()[1:])
    return {(left, right): rank for rank, (left, right) in enumerate(pairs)}


def _layers(model: GPT, idx: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield each block's input (1, T, C) and its qkv (1, T, 3, H, D); then the output and None."""
    T, H, C = idx.size(1), model.config.n_head, model.config.n_embd
    x = model.wte(idx) + model.wpe(torch.arange(T, device=idx.device))  # (1, T, C)
    block: Any
    for block in model.h:
        attn, mlp = block.attn, block.mlp
        qkv = attn.c_attn(block.ln_1(x)).view(1, T, 3, H, C // H)
        if attn.scale != 1:
            qkv[:, :, 0] *= attn.scale
        yield _finite(x), qkv
        y = ops.self_attention(qkv, kernels=attn.kernels).flatten(2)  # (1, T, C)
        x = x + attn.c_proj(y)
        x = x + mlp.c_proj(ops.linear_gelu(block.ln_2(x), mlp.c_fc, mlp.kernels, mlp.approximate))
    yield _finite(x), None


def _finite(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise FloatingPointError(
            "the model's numbers are not finite: are its weights damaged, or its dtype too narrow?"
        )
    return x


def _row(model: GPT, ids: Sequence[int] | Tensor) -> Tensor:
    """Check one text's ids: (T,) or (1, T) -> int64 (1, T), on the model's device."""
    c, row = model.config, torch.as_tensor(ids)
    if row.dim() == 2 and len(row) == 1:
        row = row[0]
    if row.dim() != 1 or not 1 <= len(row) <= c.block_size:
        raise ValueError(
            f"ids must be 1 to {c.block_size} tokens of one text, (T,) or (1, T), "
            f"not {tuple(row.shape)}"
        )
    if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
        raise ValueError(f"ids must be whole numbers, not {row.dtype}")
    for end in (int(row.min()), int(row.max())):
        _check("ids", end, 0, c.vocab_size - 1)
    return row[None].to(model.wpe.weight.device, torch.int64)


def _check(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be {low} to {high}, not {value}")
