"""The beams of a search as a tree: every split, pruned beam, finished text and score.

The tree is built from the search's state after each step. This file does not know how beams are
chosen.
"""

import math
from dataclasses import dataclass, field

from nanogpt2.generation.beam import OUT, Beams


@dataclass
class TreeNode:
    """A token of some beams; the root stands for the prompt."""

    number: int  # in the order of their appearance; the root is 0
    parent: "TreeNode | None"
    token: int
    score: float  # sum of processed log-probabilities up to this token
    last_step: int
    # the best text below: (its final score, or -inf; its last step; its sum at that step)
    rank: tuple[float, int, float] = (-math.inf, 0, -math.inf)
    final: float | None = None  # length-normalised score of the text that ends here
    children: "dict[int, TreeNode]" = field(default_factory=dict)


class SearchTree:
    """The tree of all beams in a search over one prompt."""

    def __init__(self, prompt_length: int) -> None:
        self._start = prompt_length
        self.root = TreeNode(0, None, -1, 0.0, 0)
        self.step = 0
        self.new: list[TreeNode] = []  # of the last step
        self.alive: list[TreeNode] = []  # where the running beams end, best first
        self.finished: list[TreeNode] = []  # where the kept texts end, best first
        self._size = 1

    def record(self, beams: Beams) -> None:
        """Add the beams of the state after a step."""
        self.step += 1
        self.new, self.alive, self.finished = [], [], []
        running = beams.running
        for ids, score in zip(running.ids[0].tolist(), running.scores[0].tolist(), strict=True):
            # skip running entries with a score near OUT: their texts have already ended
            if score > OUT / 2:
                self.alive.append(self._add(ids[self._start :], score))
                self.alive[-1].score = score
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
                self.finished.append(self._add(ids[self._start : self._start + new], final=score))
                self.finished[-1].final = score

    def find(self, tokens: list[int]) -> TreeNode:
        """Return the node of a text's last token."""
        node = self.root
        for token in tokens:
            node = node.children[token]
        return node

    def _add(
        self, tokens: list[int], score: float = -math.inf, final: float = -math.inf
    ) -> TreeNode:
        node = self.root
        for token in tokens:
            if token not in node.children:
                self._size += 1
                child = TreeNode(self._size - 1, node, token, math.nan, self.step)
                node.children[token] = child
                self.new.append(child)
            node = node.children[token]
            node.last_step = self.step
            node.rank = max(node.rank, (final, self.step, score))
        return node
