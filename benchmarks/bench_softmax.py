"""Softmax of rows beside PyTorch's, torch.compile's and Liger's. Writes results/softmax.*

    python -m benchmarks.bench_softmax [--quick | --check]

M rows of N columns of s bytes: 2 M N s bytes forward (x in, y out), 3 M N s backward (y and dy in,
dx out); 5 and 4 M N operations. A causal row reads only the columns it sees, on average half of x.
1024 columns are a block of attention's scores. 768 is GPT-2's width, not a power of two, and 50257
its vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from nanogpt2.kernels.softmax import softmax, softmax_ref

SHAPES = {
    "full": [(65536, 768, False), (65536, 1024, False), (196608, 1024, True), (8192, 50257, False)],
    "quick": [(8192, 768, False), (1024, 50257, False)],
    "check": [(3, 37, False), (10, 5, True), (2, 20000, False)],
}


def cases(M: int, N: int, causal: bool):
    x = gpu.randn(*((M // N, N) if causal else (M,)), N)
    s, part = x.element_size(), 0.5 if causal else 1

    def eager(x: Tensor) -> Tensor:
        if causal:
            unseen = torch.ones(N, N, dtype=torch.bool, device=x.device).triu(1)
            x = x.masked_fill(unseen, -torch.inf)
        return F.softmax(x, dim=-1)

    functions = {
        "ours": lambda x: softmax(x, causal),
        "eager": eager,
        "torch.compile": gpu.compiled(eager),
    }
    if not causal:
        functions["Liger"] = gpu.liger("ops.softmax", "LigerSoftmaxFunction")
        if not isinstance(functions["Liger"], str):
            functions["Liger"] = functions["Liger"].apply
    work = {
        "forward": ((1 + part) * M * N * s, 5 * M * N),
        "backward": ((1 + 2 * part) * M * N * s, 4 * M * N),
    }
    name = f"{M} x {N}{' causal' if causal else ''}"
    yield from gpu.passes(name, functions, lambda x: softmax_ref(x, causal), (x,), work)


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
