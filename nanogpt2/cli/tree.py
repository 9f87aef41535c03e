"""sample.py --tree: the beams as a tree, with every split, pruned beam, finished text and score.

The tree is built from the search's state after each step. This file does not know how beams are
chosen.
"""

import math
from dataclasses import dataclass, field

from nanogpt2 import terminal
from nanogpt2.generation.beam import OUT, Beams
from nanogpt2.tokenizer import Tokenizer


@dataclass
class _TreeNode:
    token: int
    score: float  # sum of processed log-probabilities up to this token
    last_step: int
    # the best text below: (its final score, or -inf; its last step; its sum at that step)
    rank: tuple[float, int, float] = (-math.inf, 0, -math.inf)
    final: float | None = None  # length-normalised score of the text that ends here
    children: "dict[int, _TreeNode]" = field(default_factory=dict)


class BeamTree:
    """The tree of all beams in a search over one prompt."""

    def __init__(self, prompt_length: int) -> None:
        self._start = prompt_length
        self._root = _TreeNode(-1, 0.0, 0)
        self._step = 0

    def record(self, beams: Beams) -> None:
        """Add the beams of the state after a step."""
        self._step += 1
        running = beams.running
        for ids, score in zip(running.ids[0].tolist(), running.scores[0].tolist(), strict=True):
            # skip running entries with a score near OUT: their texts have already ended
            if score > OUT / 2:
                self._add(ids[self._start :], score).score = score
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
                node = self._add(ids[self._start : self._start + new], final=score)
                node.final = score

    def _add(
        self, tokens: list[int], score: float = -math.inf, final: float = -math.inf
    ) -> _TreeNode:
        node = self._root
        for token in tokens:
            node = node.children.setdefault(token, _TreeNode(token, float("nan"), self._step))
            node.last_step = self._step
            node.rank = max(node.rank, (final, self._step, score))
        return node

    def draw(self, tokenizer: Tokenizer) -> str:
        """Draw the tree, best beams first. Tokens without a split between them share a line."""
        drawn: list[terminal.Node] = []
        # no recursion: a text may be longer than Python's recursion limit
        waiting = [(self._root, drawn)]
        while waiting:
            node, siblings = waiting.pop()
            for child in self._best_first(node):
                label, end = self._line(child, tokenizer)
                siblings.append(terminal.Node(label, []))
                waiting.append((end, siblings[-1].children))
        return terminal.tree(drawn)

    def _best_first(self, node: _TreeNode) -> list[_TreeNode]:
        return sorted(node.children.values(), key=lambda child: child.rank, reverse=True)

    def _line(self, node: _TreeNode, tokenizer: Tokenizer) -> tuple[str, _TreeNode]:
        """Return the line of the tokens from `node` to the next split or end, and the last node."""
        tokens = [node.token]
        while node.final is None and len(node.children) == 1:
            (node,) = node.children.values()
            tokens.append(node.token)
        label = repr(tokenizer.decode(tokens))
        if node.final is not None:
            label += f"  ended, score {node.final:.3f}"
        elif not node.children:
            fate = "running" if node.last_step == self._step else f"pruned at {node.last_step}"
            label += f"  {fate}, sum {node.score:.3f}"
        return label, node
