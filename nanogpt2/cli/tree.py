"""sample.py --tree: the beams as a tree, with every split, pruned beam, finished text and score."""

from nanogpt2 import terminal
from nanogpt2.generation.tree import SearchTree, TreeNode
from nanogpt2.tokenizer import Tokenizer


class BeamTree(SearchTree):
    """A tree of beams that can be drawn."""

    def draw(self, tokenizer: Tokenizer) -> str:
        """Draw the tree, best beams first. Tokens without a split between them share a line."""
        drawn: list[terminal.Node] = []
        # no recursion: a text may be longer than Python's recursion limit
        waiting = [(self.root, drawn)]
        while waiting:
            node, siblings = waiting.pop()
            for child in self._best_first(node):
                label, end = self._line(child, tokenizer)
                siblings.append(terminal.Node(label, []))
                waiting.append((end, siblings[-1].children))
        return terminal.tree(drawn)

    def _best_first(self, node: TreeNode) -> list[TreeNode]:
        return sorted(node.children.values(), key=lambda child: child.rank, reverse=True)

    def _line(self, node: TreeNode, tokenizer: Tokenizer) -> tuple[str, TreeNode]:
        """Return the line of the tokens from `node` to the next split or end, and the last node."""
        tokens = [node.token]
        while node.final is None and len(node.children) == 1:
            (node,) = node.children.values()
            tokens.append(node.token)
        label = repr(tokenizer.decode(tokens))
        if node.final is not None:
            label += f"  ended, score {node.final:.3f}"
        elif not node.children:
            fate = "running" if node.last_step == self.step else f"pruned at {node.last_step}"
            label += f"  {fate}, sum {node.score:.3f}"
        return label, node
