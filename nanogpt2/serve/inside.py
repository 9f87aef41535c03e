"""The model's work of the page's endpoints: what happens while a text is written, and inside.

Each generator yields JSON, encoded in the worker's thread, or None to say that time passed. This
file does not know HTTP.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from nanogpt2 import inspect
from nanogpt2.config import GenerationConfig
from nanogpt2.generation import search, steps
from nanogpt2.generation.beam import best
from nanogpt2.generation.engine import context_start
from nanogpt2.generation.explain import Watch, explanation, kl_divergence, stages
from nanogpt2.generation.request import Request
from nanogpt2.generation.text import Completion, completed, completions
from nanogpt2.generation.tree import SearchTree, TreeNode
from nanogpt2.serve.web import encoded, finite
from nanogpt2.serve.writing import Prompt, Scored, Served, prepared, scores_of
from nanogpt2.tokenizer import Tokenizer

KINDS = ("attention", "lens", "norms", "neighbours", "merges")


def about(served: Served, request: Request) -> dict[str, Any]:
    """Return what a stream says first."""
    length, block_size = request.prompt_length, served.model.config.block_size
    ids = request.ids[0].tolist()
    return {
        "model": served.name,
        "seed": request.config.seed,
        "ids": ids,
        "tokens": [served.tokenizer.decode([i]) for i in ids],
        "dropped": context_start(length, request.max_length, block_size),
        # tokens until the context slides, to a place that depends on the text's greatest length
        "room": block_size + 1 - length,
        "options": changed(request.config),
    }


def changed(config: GenerationConfig) -> dict[str, Any]:
    """Return the options that are not generate()'s defaults."""
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(config) if values[f.name] != f.default}


def generate(
    served: Served, prompt: Prompt, options: GenerationConfig, alternatives: int, most_new: int
) -> Iterator[bytes]:
    """Write one text; explain each token as it is chosen."""
    begin = time.monotonic()
    watch = Watch()
    request = prepared(served, prompt.encode(served.tokenizer), options, most_new)
    request = replace(request, watch=watch)
    ((text,),) = completions(served.tokenizer, request, 1)
    yield encoded({"type": "start"} | about(served, request))
    for position, step in enumerate(steps(served.model, request)):
        token = int(step.tokens[0])
        event = {"type": "token", "position": position, "id": token, "piece": text.add(token)}
        yield encoded(event | _why(served.tokenizer, watch, position, token, alternatives))
    end = {"type": "end", "piece": text.finish(), "ids": text.token_ids, "seed": options.seed}
    yield encoded(end | _ended(text) | {"seconds": time.monotonic() - begin})


def _ended(text: Completion) -> dict[str, Any]:
    return {"text": text.text, "finish_reason": text.finish_reason}


def _why(
    tokenizer: Tokenizer, watch: Watch, position: int, token: int, alternatives: int
) -> dict[str, Any]:
    """Describe a token and its runners-up, stage by stage."""
    rows = watch.row(0)
    why = explanation(position, watch.names, rows, token, tokenizer, alternatives)
    scores = torch.cat(rows)  # (stages, V)
    logp = scores[0].log_softmax(dim=0)
    found = [
        {
            "id": each.token,
            "text": each.text,
            "logprob": finite(float(logp[each.token])),
            "rank": each.rank,
            "scores": [finite(score) for score in scores[:, each.token].tolist()],
            "probabilities": each.probabilities,
        }
        for each in (why.chosen, *why.runners_up)
    ]
    return found[0] | {"entropy": why.entropy, "stages": why.stages, "runners_up": found[1:]}


def beams(
    served: Served, prompt: Prompt, options: GenerationConfig, most_new: int
) -> Iterator[bytes]:
    """Search with beams; show the tree after each step."""
    begin = time.monotonic()
    request = prepared(served, prompt.encode(served.tokenizer), options, most_new)
    tree = SearchTree(request.prompt_length)
    yield encoded({"type": "start"} | about(served, request))
    before: list[TreeNode] = []
    for state in search(served.model, request):
        tree.record(state)
        yield encoded(_step(served.tokenizer, tree, before))
        before = tree.alive
    group = best(request, state)
    (texts,) = completed(served.tokenizer, request, group)
    found = [
        {"node": tree.find(text.token_ids).number, "ids": text.token_ids, "score": score}
        | _ended(text)
        for text, score in zip(texts, group.scores[0].tolist(), strict=True)
    ]
    seconds = time.monotonic() - begin
    yield encoded({"type": "end", "texts": found, "seed": options.seed, "seconds": seconds})


def _step(tokenizer: Tokenizer, tree: SearchTree, before: list[TreeNode]) -> dict[str, Any]:
    kept = set()
    for node in (*tree.alive, *tree.finished):
        above: TreeNode | None = node
        while above is not None and above.number not in kept:
            kept.add(above.number)
            above = above.parent
    return {
        "type": "step",
        "step": tree.step,
        "nodes": [
            {
                "node": node.number,
                "parent": node.parent.number if node.parent else None,
                "token": node.token,
                "text": tokenizer.decode([node.token]),
                "score": finite(node.score),
            }
            for node in tree.new
        ],
        "alive": [node.number for node in tree.alive],
        "finished": [{"node": node.number, "score": node.final} for node in tree.finished],
        "pruned": [node.number for node in before if node.number not in kept],
    }


def compare(
    sides: Sequence[tuple[Served, GenerationConfig]], prompt: Prompt, most_new: int
) -> Iterator[bytes | None]:
    """Write a text by each side from the same seed, then score both texts by both sides."""
    begin = time.monotonic()
    tokenizer = sides[0][0].tokenizer
    ids = prompt.encode(tokenizer)
    requests = [prepared(served, ids, options, most_new) for served, options in sides]
    start = [about(served, request) for (served, _), request in zip(sides, requests, strict=True)]
    shared = {name: start[0][name] for name in ("seed", "ids", "tokens")}
    each = {
        side: {name: one[name] for name in ("model", "options", "dropped")}
        for side, one in zip("ab", start, strict=True)
    }
    yield encoded({"type": "start"} | shared | each)
    texts = []
    for side, (served, _), request in zip("ab", sides, requests, strict=True):
        ((text,),) = completions(tokenizer, request, 1)
        texts.append(text)
        for position, step in enumerate(steps(served.model, request)):
            token = int(step.tokens[0])
            event = {"side": side, "position": position, "id": token, "piece": text.add(token)}
            yield encoded({"type": "token", "text": tokenizer.decode([token])} | event)
        text.finish()
    found = []
    for side, text in zip("ab", texts, strict=True):
        scored = []
        both = [
            stages(served.model, request, text.token_ids)
            for (served, _), request in zip(sides, requests, strict=True)
        ]
        for token, (_, a), (_, b) in zip(text.token_ids, *both, strict=True):
            scored.append(_under_both(tokenizer, token, a, b))
            yield None
        found.append({"side": side, "ids": text.token_ids, "tokens": scored} | _ended(text))
    end = {"type": "end", "seed": shared["seed"], "texts": found}
    yield encoded(end | {"seconds": time.monotonic() - begin})


def _under_both(
    tokenizer: Tokenizer, token: int, a: list[torch.Tensor], b: list[torch.Tensor]
) -> dict[str, Any]:
    """Return a token's probabilities by two sides; a, b: their stages, each (1, V)."""
    found: dict[str, Any] = {"id": token, "text": tokenizer.decode([token])}
    raw = []
    for side, rows in (("a", a), ("b", b)):
        logp = rows[0][0].log_softmax(dim=0)
        raw.append(logp)
        found[side] = {
            "logprob": finite(float(logp[token])),
            "rank": 1 + int((logp > logp[token]).sum()),
            "processed": finite(float(rows[-1][0].log_softmax(dim=0)[token])),
        }
    return found | {"kl": finite(kl_divergence(raw[1], raw[0]))}


def score(served: Served, prompt: Prompt, alternatives: int) -> Iterator[bytes | None]:
    """Score the tokens of a text."""
    ids = _ids_within(served, prompt, "text")
    scored = [Scored(ids[0])]
    for some in scores_of(served.model, ids, alternatives):
        scored += some
        yield None
    tokens = [_scored(served.tokenizer, each, alternatives) for each in scored]
    values = [each.logprob for each in scored if each.logprob is not None]
    mean = sum(values) / len(values) if values else None
    yield encoded(
        {
            "ids": ids,
            "tokens": tokens,
            "logprob": finite(sum(values)),
            # the perplexity of one token is that of nothing
            "perplexity": None if mean is None else finite(float(torch.tensor(-mean).exp())),
        }
    )


def _scored(tokenizer: Tokenizer, scored: Scored, alternatives: int) -> dict[str, Any]:
    others = [
        {"id": i, "text": tokenizer.decode([i]), "logprob": finite(value), "rank": rank}
        for rank, (i, value) in enumerate(scored.likeliest or [], start=1)
        if i != scored.token
    ]
    return {
        "id": scored.token,
        "text": tokenizer.decode([scored.token]),
        "logprob": None if scored.logprob is None else finite(scored.logprob),
        "rank": scored.rank,
        "entropy": scored.entropy,
        "runners_up": others[:alternatives],
    }


def _ids_within(served: Served, prompt: Prompt, name: str) -> list[int]:
    """Encode a text of 1 to block_size tokens. Raises ValueError for another one."""
    ids, most = prompt.encode(served.tokenizer), served.model.config.block_size
    if not 1 <= len(ids) <= most:
        raise ValueError(f"{name} must have 1 to {most} tokens, not {len(ids):,}")
    return ids


def look(
    served: Served, prompt: Prompt, kinds: Sequence[str], layer: int, head: int, k: int, token: int
) -> Iterator[bytes | None]:
    """Look inside the model at a text. token: for its neighbours."""
    tokenizer, model = served.tokenizer, served.model
    ids = _ids_within(served, prompt, "text")
    found: dict[str, Any] = {"ids": ids, "tokens": [tokenizer.decode([i]) for i in ids]}

    def named(i: int) -> dict[str, Any]:
        return {"id": i, "text": tokenizer.decode([i])}

    if "attention" in kinds:
        for number, weights in enumerate(inspect.attention_by_layer(model, ids)):
            yield None
            if number == layer:
                rows = enumerate(weights[head].tolist(), start=1)
                seen = [[round(weight, 5) for weight in row[:count]] for count, row in rows]
                found["attention"] = {"layer": layer, "head": head, "weights": seen}
                break
    if "lens" in kinds:
        guesses = inspect.logit_lens(model, ids, k)
        pairs = zip(guesses.ids.tolist(), guesses.probabilities.tolist(), strict=True)
        found["lens"] = [
            [
                [named(i) | {"probability": p} for i, p in zip(*at, strict=True)]
                for at in zip(*pair, strict=True)
            ]
            for pair in pairs
        ]
        yield None
    if "norms" in kinds:
        found["norms"] = inspect.residual_norms(model, ids).tolist()
        yield None
    if "neighbours" in kinds:
        near = inspect.token_neighbours(model, token, k)
        nearest = [named(each.token) | {"similarity": each.similarity} for each in near]
        found["neighbours"] = named(token) | {"nearest": nearest}
        yield None
    if "merges" in kinds:
        pieces = inspect.merges(tokenizer, prompt.shown(tokenizer), not prompt.literal)
        found["merges"] = [{"word": piece.text, "steps": _steps(piece)} for piece in pieces]
    yield encoded(found)


def _steps(piece: inspect.Piece) -> list[list[str]]:
    """Return the parts of a word before the first merge and after each one."""
    if not piece.merges:
        return [[*piece.tokens]]
    return [piece.after(count) for count in range(len(piece.merges) + 1)]
