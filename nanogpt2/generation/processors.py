"""Processors: functions that change the model's scores before a token is chosen.

A processor is a function of (ids, scores): int64 (N, T), all tokens so far, and float32 (N, V),
logits when sampling and log-probabilities with beams. A processor returns new scores and does not
write to its input; -inf bans a token. `processors_for` puts the processors in transformers' order.
No processor loops over rows, tokens or the vocabulary, except for the user's
`prefix_allowed_tokens_fn`.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanogpt2.generation.request import PrefixAllowedTokens, Processor, Request, Watcher

INF = float("inf")
RAW = "raw"  # the stage before the processors
# tokens that top_p examines before it sorts all, and the error allowed in a sum of float32
TOP_P_CANDIDATES = 1024
BLOCK = 64  # scores of which `best` finds the largest at once
ROUNDING = 1e-5


def processors_for(request: Request, rows: int | None = None) -> list[tuple[str, Processor]]:
    """Return the processors that a request asks for, with the names of their options.

    rows: how many rows of a prompt a call gives them, by default all.
    """
    chain = _preferences(request, request.rows if rows is None else rows)
    _check_forced(request)
    chain += [("logits_processor", processor) for processor in request.user_processors]
    if request.config.samples:
        chain += _warpers(request)
    if request.config.renormalize_logits:
        chain.append(("renormalize_logits", renormalise))
    return chain if request.watch is None else _watched(chain, request.watch)


def _watched(chain: list[tuple[str, Processor]], watch: Watcher) -> list[tuple[str, Processor]]:
    """Show the scores to a watcher, raw and after each processor."""

    def shown(name: str, process: Processor) -> Processor:
        def step(ids: Tensor, scores: Tensor) -> Tensor:
            scores = process(ids, scores)
            watch(name, scores)
            return scores

        return step

    return [(RAW, shown(RAW, lambda _, scores: scores)), *((n, shown(n, p)) for n, p in chain)]


def _preferences(request: Request, rows: int) -> list[tuple[str, Processor]]:
    """Make the processors that prefer or ban tokens, with or without sampling."""
    c, eos, T = request.config, request.eos, request.prompt_length
    chain: list[tuple[str, Processor]] = []
    if c.sequence_bias is not None:
        chain.append(("sequence_bias", SequenceBias(_biases(c.sequence_bias), request)))
    if c.repetition_penalty != 1:
        first = request.mask.int().argmax(dim=1).repeat_interleave(rows)  # (N,)
        penalty = partial(penalise_repetition, penalty=c.repetition_penalty, first=first)
        chain.append(("repetition_penalty", penalty))
    if c.no_repeat_ngram_size > 0:
        chain.append(
            ("no_repeat_ngram_size", partial(ban_repeated_ngrams, n=c.no_repeat_ngram_size))
        )
    if c.bad_words_ids is not None:
        words = _lists_of_ids("bad_words_ids", c.bad_words_ids, request.vocab_size)
        ends = [[i] for i in eos.tolist()]
        biases = {tuple(word): -INF for word in words if word not in ends}
        chain.append(("bad_words_ids", SequenceBias(biases, request)))
    if c.min_new_tokens is not None:
        # min_new_tokens overrides min_length
        wait = partial(ban_before, length=T + c.min_new_tokens, tokens=eos)
        chain.append(("min_new_tokens", wait))
    elif c.min_length > 0:
        chain.append(("min_length", partial(ban_before, length=c.min_length, tokens=eos)))
    if request.prefix_allowed_tokens is not None:
        allow = partial(allow_only, fn=request.prefix_allowed_tokens, rows=rows)
        chain.append(("prefix_allowed_tokens_fn", allow))
    if c.forced_bos_token_id is not None:
        bos = _ids("forced_bos_token_id", c.forced_bos_token_id, request)
        chain.append(("forced_bos_token_id", partial(force_at, length=1, tokens=bos)))
    if c.forced_eos_token_id is not None:
        last = _ids("forced_eos_token_id", c.forced_eos_token_id, request)
        force = partial(force_at, length=request.max_length - 1, tokens=last)
        chain.append(("forced_eos_token_id", force))
    if c.exponential_decay_length_penalty is not None and len(eos):
        start, factor = _decay(c.exponential_decay_length_penalty)
        decay = partial(raise_end, start=T + start, factor=factor, eos=eos)
        chain.append(("exponential_decay_length_penalty", decay))
    if c.suppress_tokens is not None:
        tokens = _ids("suppress_tokens", c.suppress_tokens, request)
        chain.append(("suppress_tokens", partial(ban, tokens=tokens)))
    if c.begin_suppress_tokens is not None:
        tokens = _ids("begin_suppress_tokens", c.begin_suppress_tokens, request)
        # the text begins after a forced first token
        begin = T + 1 if T == 1 and c.forced_bos_token_id is not None else T
        chain.append(("begin_suppress_tokens", partial(ban_at, length=begin, tokens=tokens)))
    return chain


def _warpers(request: Request) -> list[tuple[str, Processor]]:
    """Make the processors that shape the distribution to draw from."""
    c = request.config
    # beams need a token beside all end tokens, so that a text can run on; stochastic beams draw
    # whole texts from plain sampling's distribution
    keep = max(1, len(request.eos)) + 1 if c.num_beams > 1 and not c.stochastic_beams else 1
    chain: list[tuple[str, Processor]] = []
    if c.temperature != 1:
        chain.append(("temperature", partial(scale_temperature, temperature=c.temperature)))
    if c.top_h is not None:
        chain.append(("top_h", partial(keep_top_h, h=c.top_h)))
    if c.top_k:
        chain.append(("top_k", partial(keep_top_k, k=max(c.top_k, keep))))
    if c.top_p < 1:
        chain.append(("top_p", partial(keep_top_p, p=c.top_p, keep=keep)))
    if c.min_p is not None:
        chain.append(("min_p", partial(keep_min_p, p=c.min_p, keep=keep)))
    if c.typical_p < 1:
        chain.append(("typical_p", partial(keep_typical, p=c.typical_p, keep=keep)))
    if c.epsilon_cutoff > 0:
        chain.append(("epsilon_cutoff", partial(cut_epsilon, epsilon=c.epsilon_cutoff, keep=keep)))
    if c.eta_cutoff > 0:
        chain.append(("eta_cutoff", partial(cut_eta, epsilon=c.eta_cutoff, keep=keep)))
    return chain


# ---- preferences and bans


class SequenceBias:
    """Adds a bias to the token that would complete a sequence; -inf bans the token."""

    def __init__(self, biases: Mapping[tuple[int, ...], float], request: Request) -> None:
        device = request.ids.device
        self._single = torch.zeros(request.vocab_size, device=device)  # (V,)
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for sequence, bias in biases.items():
            if any(not 0 <= i < request.vocab_size for i in sequence) or not sequence:
                raise ValueError(
                    f"sequence_bias and bad_words_ids must hold ids below {request.vocab_size}, "
                    f"not {list(sequence)}"
                )
            if len(sequence) == 1:
                self._single[sequence[0]] = bias
            else:
                by_length.setdefault(len(sequence) - 1, []).append((sequence, bias))
        # for each length of prefix: prefixes (G, n - 1), last tokens (G,), biases (G,)
        self._groups = [
            (
                torch.tensor([sequence[:-1] for sequence, _ in group], device=device),
                torch.tensor([sequence[-1] for sequence, _ in group], device=device),
                torch.tensor([bias for _, bias in group], dtype=torch.float32, device=device),
            )
            for group in by_length.values()
        ]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Process scores, as every processor does."""
        bias = self._single.expand_as(scores).clone()  # (N, V)
        for prefixes, last, biases in self._groups:
            length = prefixes.size(1)
            if length <= ids.size(1):
                matches = (ids[:, None, -length:] == prefixes).all(dim=2)  # (N, G)
                bias.index_add_(1, last, torch.where(matches, biases, 0.0))
        return scores + bias


def penalise_repetition(ids: Tensor, scores: Tensor, penalty: float, first: Tensor) -> Tensor:
    """Lower the score of each distinct token from position `first` (N,) on, once.

    A positive score is divided by the penalty, a negative one multiplied.
    """
    seen = torch.arange(ids.size(1), device=ids.device) >= first[:, None]  # (N, T)
    # replace padding by the row's last token, which the penalty covers anyway
    ids = ids.where(seen, ids[:, -1:])
    score = scores.gather(1, ids)  # (N, T)
    return scores.scatter(1, ids, torch.where(score < 0, score * penalty, score / penalty))


def ban_repeated_ngrams(ids: Tensor, scores: Tensor, n: int) -> Tensor:
    """Ban each token that would complete an n-gram of the row, padding included."""
    if ids.size(1) < n:
        return scores
    ngrams = ids.unfold(1, n, 1)  # (N, T - n + 1, n)
    prefix = ids[:, None, ids.size(1) - (n - 1) :]  # (N, 1, n - 1)
    row, start = (ngrams[:, :, :-1] == prefix).all(dim=2).nonzero(as_tuple=True)
    if len(row) == 0:
        return scores
    return scores.index_put((row, ngrams[row, start, -1]), scores.new_tensor(-INF))


def ban(ids: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """Ban these tokens."""
    return scores.index_fill(1, tokens, -INF)


def ban_before(ids: Tensor, scores: Tensor, length: int, tokens: Tensor) -> Tensor:
    """Ban these tokens in rows shorter than `length`."""
    return ban(ids, scores, tokens) if ids.size(1) < length else scores


def ban_at(ids: Tensor, scores: Tensor, length: int, tokens: Tensor) -> Tensor:
    """Ban these tokens in rows of this length."""
    return ban(ids, scores, tokens) if ids.size(1) == length else scores


def force_at(ids: Tensor, scores: Tensor, length: int, tokens: Tensor) -> Tensor:
    """Allow only these tokens, with equal scores, in rows of this length."""
    if ids.size(1) != length:
        return scores
    return torch.full_like(scores, -INF).index_fill(1, tokens, 0.0)


def allow_only(ids: Tensor, scores: Tensor, fn: PrefixAllowedTokens, rows: int) -> Tensor:
    """Allow the tokens that `fn(prompt's number, row)` returns; each prompt has `rows` rows.

    If no row of a prompt has a token left, all its allowed tokens score 0.
    """
    mask = torch.full_like(scores, -INF)
    for row, tokens in enumerate(ids):
        allowed = fn(row // rows, tokens)
        if len(allowed) == 0:
            raise ValueError(f"prefix_allowed_tokens_fn must allow a token in row {row}, not 0")
        mask[row, allowed] = 0.0
    result = scores + mask
    none = result.amax(dim=1).isneginf().view(-1, rows).all(dim=1)  # (N / rows,)
    return torch.where(none.repeat_interleave(rows)[:, None], mask, result)


def raise_end(ids: Tensor, scores: Tensor, start: int, factor: float, eos: Tensor) -> Tensor:
    """Past `start` tokens, raise the end's score by |score| (factor^(tokens past start) - 1)."""
    if ids.size(1) <= start:
        return scores
    ends, past = scores[:, eos], ids.size(1) - start  # (N, E)
    # from 1e30 on the end is certain, and float32 would overflow soon
    gain = ends.abs() * (factor**past - 1 if past * math.log(factor) < 69 else 1e30)
    gain = gain.where(ends.isfinite(), 0.0)
    return scores + torch.zeros_like(scores).index_copy(1, eos, gain)


def renormalise(ids: Tensor, scores: Tensor) -> Tensor:
    """Turn the scores into log-probabilities."""
    return scores.log_softmax(dim=1)


# ---- the shape of the distribution


def scale_temperature(ids: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Divide all scores by the temperature."""
    return scores / temperature


def keep_top_h(ids: Tensor, scores: Tensor, h: float) -> Tensor:
    """Keep the likeliest of the 100 best tokens, up to `h` of the entropy of the 100."""
    best = scores.topk(min(100, scores.size(1)), dim=1)
    p, entropy = _distribution(best.values)  # (N, 100), (N, 1)
    kept = (-p * p.log()).cumsum(dim=1) <= entropy * h
    kept[:, 0] = True
    none = torch.zeros_like(scores, dtype=torch.bool)
    return scores.masked_fill(~none.scatter(1, best.indices, kept), -INF)


def keep_top_k(ids: Tensor, scores: Tensor, k: int) -> Tensor:
    """Ban tokens that score below the k-th best; ties with the k-th stay."""
    kth = best(scores, min(k, scores.size(1)))[0][:, -1:]  # (N, 1)
    return torch.where(scores < kth, -INF, scores)


def likeliest(scores: Tensor) -> Tensor:
    """Return scores.argmax(dim=1): float32 (N, V) -> int64 (N,). NumPy is ten times as fast."""
    if scores.device.type != "cpu":
        return scores.argmax(dim=1)
    return torch.from_numpy(scores.detach().numpy().argmax(axis=1))


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores of each row and their places, each (..., k), as topk does.

    Equal scores may come in another order. On a CPU topk looks for few among many four times as
    long: the k largest lie in those blocks whose own largest are the k largest.
    """
    V = scores.size(-1)
    even = V // BLOCK * BLOCK
    if scores.device.type != "cpu" or even < 4 * k * BLOCK:
        return scores.topk(k)
    blocks = scores[..., :even].unflatten(-1, (-1, BLOCK)).amax(dim=-1).topk(k).indices
    places = (blocks[..., None] * BLOCK + torch.arange(BLOCK)).flatten(-2)
    rest = torch.arange(even, V).expand(*scores.shape[:-1], -1)
    places = torch.cat([places, rest], dim=-1)
    values, found = scores.gather(-1, places).topk(k)
    return values, places.gather(-1, found)


def keep_top_p(ids: Tensor, scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Ban the least likely tokens, up to a total of 1 - p; the `keep` best stay."""
    banned_at_once = _outside_top_p(scores, p, keep)
    if banned_at_once is not None:
        return scores.masked_fill(banned_at_once, -INF)
    ascending, order = scores.sort(dim=1)
    banned = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - p  # (N, V), in order of score
    banned[:, -keep:] = False
    return scores.masked_fill(banned.scatter(1, order, banned), -INF)


def _outside_top_p(scores: Tensor, p: float, keep: int) -> Tensor | None:
    """Return what keep_top_p bans, bool (N, V), without a sort of the whole vocabulary.

    None where the best tokens do not hold enough probability. None as well where rounding or the
    order of equal tokens decides: only the same sums in the same order give the same answer.
    """
    if scores.size(1) <= TOP_P_CANDIDATES or scores.device.type != "cpu":
        return None
    best = scores.softmax(dim=1).topk(TOP_P_CANDIDATES, dim=1)  # descending
    masses = best.values.double()
    rest = 1 - masses.sum(dim=1, keepdim=True)
    # the probability of each token and all less likely ones
    tails = rest + masses.flip(1).cumsum(dim=1).flip(1)
    near = (tails - (1 - p)).abs() < ROUNDING
    last = (tails > 1 - p).sum(dim=1, keepdim=True).clamp(min=keep)  # kept, (N, 1)
    if near.any() or (rest > 1 - p - ROUNDING).any() or (last >= TOP_P_CANDIDATES).any():
        return None
    if (best.values.gather(1, last) == best.values.gather(1, last - 1)).any():
        return None
    banned = torch.arange(TOP_P_CANDIDATES, device=scores.device) >= last  # (N, 1024)
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, best.indices, banned)


def keep_min_p(ids: Tensor, scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Ban tokens below `p` times the greatest probability; the `keep` best stay."""
    probabilities = scores.softmax(dim=1)
    banned = probabilities < p * probabilities.amax(dim=1, keepdim=True)
    best = probabilities.topk(min(keep, scores.size(1)), dim=1).indices
    return scores.masked_fill(banned.scatter(1, best, False), -INF)


def keep_typical(ids: Tensor, scores: Tensor, p: float, keep: int = 1) -> Tensor:
    """Keep the tokens whose -log p is nearest to the entropy, until their total reaches `p`."""
    logp = scores.log_softmax(dim=1)
    entropy = -(logp * logp.exp()).nansum(dim=1, keepdim=True)
    distance, order = (-logp - entropy).abs().sort(dim=1)
    mass = scores.gather(1, order).softmax(dim=1).cumsum(dim=1)
    last = (mass < p).sum(dim=1, keepdim=True).clamp(max=scores.size(1) - 1)
    banned = distance > distance.gather(1, last)
    banned[:, :keep] = False
    return scores.masked_fill(banned.scatter(1, order, banned), -INF)


def cut_epsilon(ids: Tensor, scores: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Ban tokens less probable than epsilon; the `keep` best stay."""
    return _cut_below(scores, scores.softmax(dim=1), epsilon, keep)


def cut_eta(ids: Tensor, scores: Tensor, epsilon: float, keep: int = 1) -> Tensor:
    """Ban tokens less probable than min(epsilon, sqrt(epsilon) exp(-entropy))."""
    _, entropy = _distribution(scores)  # (N, 1)
    most = scores.new_tensor(epsilon)
    eta = torch.minimum(most, most.sqrt() * (-entropy).exp())  # (N, 1)
    return _cut_below(scores, scores.softmax(dim=1), eta, keep)


def _distribution(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(N, V) -> probabilities (N, V) and entropy (N, 1), in nats.

    Computes in the order of torch.distributions.Categorical: one bit can decide at a threshold.
    """
    logp = scores - scores.logsumexp(dim=1, keepdim=True)
    p = logp.softmax(dim=1)
    # a banned token adds 0 to the entropy: 0 log 0 = 0
    terms = logp.clamp(min=torch.finfo(logp.dtype).min) * p
    return p, -terms.sum(dim=1, keepdim=True)


def _cut_below(scores: Tensor, p: Tensor, least: Tensor | float, keep: int) -> Tensor:
    kth = scores.topk(min(keep, scores.size(1)), dim=1).values[:, -1:]
    return scores.masked_fill((p < least) & (scores < kth), -INF)


# ---- checks of the options' values


def _ids(name: str, value: Any, request: Request) -> Tensor:
    """One id or several -> int64 (n,). Raises ValueError for an id outside the vocabulary."""
    ids, V = _listed(value), request.vocab_size
    if not isinstance(ids, list | tuple) or not all(type(i) is int and 0 <= i < V for i in ids):
        raise ValueError(f"{name} must be ids from 0 to {V - 1}, not {value!r}")
    return torch.tensor(list(ids), dtype=torch.int64, device=request.ids.device)


def _listed(value: Any) -> Any:
    """None -> [], an id -> [id], several ids unchanged."""
    return [] if value is None else [value] if isinstance(value, int) else value


def _lists_of_ids(name: str, value: Any, vocab_size: int) -> list[list[int]]:
    ok = isinstance(value, list | tuple) and all(
        isinstance(ids, list | tuple)
        and ids
        and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        for ids in value
    )
    if not ok or not value:
        raise ValueError(f"{name} must be a list of lists of ids below {vocab_size}, not {value!r}")
    return [list(ids) for ids in value]


def _biases(value: Any) -> dict[tuple[int, ...], float]:
    """{(ids): bias} or [[ids, bias], ...] -> {(ids): bias}."""
    try:
        pairs = value.items() if isinstance(value, dict) else [(ids, bias) for ids, bias in value]
        biases = {tuple(ids): bias for ids, bias in pairs}
    except (TypeError, ValueError):
        biases = {}
    # biases become float32; -inf bans
    if not biases or not all(
        type(bias) in (int, float)
        and (abs(bias) < 3e38 or bias == -INF)
        and all(type(i) is int for i in ids)
        for ids, bias in biases.items()
    ):
        raise ValueError(f"sequence_bias must be a list of [token ids, bias], not {value!r}")
    return biases


def _check_forced(request: Request) -> None:
    """Raise ValueError where an option forces a token that suppress_tokens bans."""
    c = request.config
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(c, name)
        forced = {*_listed(value)}
        if forced and forced <= {*_listed(c.suppress_tokens)}:
            raise ValueError(f"{name} must not be among suppress_tokens, as {value!r} is")


def _decay(value: Any) -> tuple[int, float]:
    try:
        start, factor = value
        if type(start) is int and start >= 0 and type(factor) in (int, float) and 0 < factor < 1e3:
            return start, factor
    except (TypeError, ValueError):
        pass
    raise ValueError(f"exponential_decay_length_penalty must be [START, FACTOR], not {value!r}")
