"""sample.py --explain and --color: what generation/explain.py finds, as a table or a colour."""

import torch

from nanogpt2 import terminal
from nanogpt2.generation.explain import Explanation


def draw(explanation: Explanation) -> str:
    """Draw a table of probabilities: the chosen token (>) and its runners-up, stage by stage."""
    heads = [name.replace("_", " ") for name in explanation.stages]
    rows = [["", "rank", *heads]]
    for candidate in (explanation.chosen, *explanation.runners_up):
        mark = ">" if candidate is explanation.chosen else " "
        cells = ["-" if p == 0 else f"{p:.2%}" for p in candidate.probabilities]
        rows.append([f"{mark} {candidate.text!r}", str(candidate.rank), *cells])
    title = f"token {explanation.position + 1}, entropy {explanation.entropy:.2f} nats"
    return f"{title}\n{terminal.table(rows)}"


def shade(explanation: Explanation, by: str, vocab_size: int) -> float:
    """Return the chosen token's colour, from 0 (red) to 1 (green).

    by: "prob" (raw probability), "entropy" (of the raw distribution) or "rank".
    """
    chosen = explanation.chosen
    if by == "prob":
        return chosen.probabilities[0] ** 0.5
    if by == "entropy":
        return 1 - explanation.entropy / torch.tensor(float(vocab_size)).log().item()
    return 1 / (1 + torch.tensor(float(chosen.rank)).log2().item())
