"""From logits to the next token, beside PyTorch's operations. Writes results/sampling.*

    python -m benchmarks.bench_sampling [--quick | --check]

R rows of 50257 logits in fp32, temperature 0.7, top-k 50, no repeated bigram in a text of 900
tokens, and a draw by exponential noise. Least bytes: 8 R V (logits in, scores out). Only the scores
are compared, because each arm draws with its own noise: ours from a counter, the peers from
PyTorch's generator. The head is the product of the last hidden state with the embedding, and the
first half of the draw: V C s bytes of weights.
"""

import torch
from torch import Tensor

from benchmarks import gpu
from nanogpt2.kernels.sampling import (
    Options,
    Text,
    candidates,
    draw,
    draw_ref,
    head_candidates,
    sample,
    scores_ref,
)

# rows, tokens, length of the text
SHAPES = {
    "full": [(1, 50257, 900), (5, 50257, 900), (64, 50257, 900)],
    "quick": [(5, 50257, 900)],
    "check": [(3, 300, 40)],
}
TEMPERATURE, TOP_K, NGRAM = 0.7, 50, 2
# n_embd of the 124M
C = 768


def eager(logits: Tensor, ids: Tensor) -> Tensor:
    """The processors of generate() and the draw, without a Python loop."""
    repeated = ids[:, :-1] == ids[:, -1:]  # (R, T - 1): earlier places of the last token
    banned = torch.where(repeated, ids[:, 1:], logits.size(1))
    scores = torch.nn.functional.pad(logits, (0, 1)).scatter(1, banned, -torch.inf)[:, :-1]
    scores = scores / TEMPERATURE
    kth = scores.topk(TOP_K).values[:, -1:]
    scores = scores.masked_fill(scores < kth, -torch.inf)
    torch.multinomial(scores.softmax(dim=-1), 1)
    return scores


def cases(R: int, V: int, T: int):
    logits = torch.randn(R, V, device=gpu.DEVICE)
    ids = torch.randint(V, (R, T), device=gpu.DEVICE)
    # repeat the last token, so that the ban has work to do
    ids[:, T // 2] = ids[:, -1]
    samples, step = torch.arange(R, device=gpu.DEVICE), torch.tensor(3, device=gpu.DEVICE)

    def ours(logits: Tensor, ids: Tensor) -> Tensor:
        return sample(logits, 5, samples, step, TEMPERATURE, TOP_K, ids, None, NGRAM)[1]

    options = Options(True, TEMPERATURE, TOP_K, 1.0, 1.0, NGRAM, 5)
    text = Text(ids, None, None, samples, step)

    def reference(logits: Tensor, ids: Tensor) -> Tensor:
        noise = torch.ones_like(logits, dtype=torch.float64)
        return draw_ref(scores_ref(logits, options, text), noise, options)[1]

    def parts(logits: Tensor, ids: Tensor) -> Tensor:
        """As a decoding step does it, with the scores masked for the comparison."""
        scores, best = candidates(logits, options, text)
        draw(scores, best, options, text, mask=True)
        return scores

    functions = {
        "ours": ours,
        "ours, in parts": parts,
        "eager": eager,
        "torch.compile": gpu.compiled(eager),
    }
    work = {"forward": (8 * R * V, 40 * R * V)}
    yield from gpu.passes(f"{R} x {V}", functions, reference, (logits, ids), work)
    if R <= 8:
        yield from head_cases(R, V, options, text)


def head_cases(R: int, V: int, options: Options, text: Text):
    """The head's product and the first half of the draw, beside the product alone."""
    x, weight = gpu.randn(R, C), gpu.randn(V, C) / C**0.5

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return head_candidates(x, weight, options, text)[0]

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return scores_ref(x @ weight.t(), options, text)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return scores_ref(torch.nn.functional.linear(x, weight), options, text)

    functions = {"ours": ours, "eager": eager}
    size = V * C * x.element_size() + 4 * R * V
    work = {"forward": (size, 2 * R * V * C)}
    bounds = {"the product alone": lambda: torch.nn.functional.linear(x, weight)}
    yield from gpu.passes(f"head, {R} x {V}", functions, reference, (x, weight), work, bounds)


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
