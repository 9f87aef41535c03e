"""The beams as a tree: where they split, which were pruned, which ended, with their scores.

This file does not know how beams are chosen: it watches a search go by.
"""

import math
from dataclasses import dataclass, field

from nanogpt2 import terminal
from nanogpt2.generation.beam import OUT, Beams
from nanogpt2.tokenizer import Tokenizer


@dataclass
class _Place:
    token: int
    score: float  # the sum so far, of processed log-probabilities
    last_step: int
    # the best that came of it: (the text's score, or -inf; how far it came; its sum there)
    rank: tuple[float, int, float] = (-math.inf, 0, -math.inf)
    final: float | None = None  # the text that ends here: its length-normalised score
    children: "dict[int, _Place]" = field(default_factory=dict)


class BeamTree:
    """Grows with a search over one prompt."""

    def __init__(self, prompt_length: int) -> None:
        self._start = prompt_length
        self._root = _Place(-1, 0.0, 0)
        self._step = 0

    def record(self, beams: Beams) -> None:
        """Take the state after a step."""
        self._step += 1
        running = beams.running
        for ids, score in zip(running.ids[0].tolist(), running.scores[0].tolist(), strict=True):
            # a text that ended without a place among the finished runs no further
            if score > OUT / 2:
                self._put(ids[self._start :], score).score = score
        ended = zip(
            beams.finished.ids[0].tolist(),
            beams.finished.beams[0].tolist(),
            beams.finished.scores[0].tolist(),
            beams.is_finished[0].tolist(),
            strict=True,
        )
        for ids, rows, score, is_finished in ended:
            if is_finished:
                new = sum(row >= 0 for row in rows)
                place = self._put(ids[self._start : self._start + new], final=score)
                place.final = score

    def _put(self, tokens: list[int], score: float = -math.inf, final: float = -math.inf) -> _Place:
        place = self._root
        for token in tokens:
            place = place.children.setdefault(token, _Place(token, float("nan"), self._step))
            place.last_step = self._step
            place.rank = max(place.rank, (final, self._step, score))
        return place

    def draw(self, tokenizer: Tokenizer) -> str:
        """The tree, best first, runs of tokens without a split on one line."""
        nodes: list[terminal.Node] = []
        # no recursion: a text may be longer than Python's stack is deep
        waiting = [(self._root, nodes)]
        while waiting:
            place, siblings = waiting.pop()
            for child in self._best_first(place):
                label, end = self._line(child, tokenizer)
                siblings.append(terminal.Node(label, []))
                waiting.append((end, siblings[-1].children))
        return terminal.tree(nodes)

    def _best_first(self, place: _Place) -> list[_Place]:
        return sorted(place.children.values(), key=lambda child: child.rank, reverse=True)

    def _line(self, place: _Place, tokenizer: Tokenizer) -> tuple[str, _Place]:
        """What is written without a split from here on, and where that leads to."""
        tokens = [place.token]
        while place.final is None and len(place.children) == 1:
            (place,) = place.children.values()
            tokens.append(place.token)
        label = repr(tokenizer.decode(tokens))
        if place.final is not None:
            label += f"  ended, score {place.final:.3f}"
        elif not place.children:
            fate = "running" if place.last_step == self._step else f"pruned at {place.last_step}"
            label += f"  {fate}, sum {place.score:.3f}"
        return label, place
