"""GELU in GPT-2's tanh form beside PyTorch's and torch.compile's. Writes results/gelu.*

    python -m benchmarks.bench_gelu [--quick | --check]

M rows of N columns of s bytes: 2 M N s bytes forward (x in, y out), 3 M N s backward (x and dy in,
dx out); 10 and 20 M N operations. Adding the bias of the layer before changes no bytes, except that
the eager form also writes and reads x + b. Liger offers GELU only with a gate.
"""

import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from nanogpt2.kernels.gelu import bias_gelu, gelu, gelu_ref

SHAPES = {
    "full": [(16384, 3072), (65536, 3072)],
    "quick": [(16384, 3072)],
    "check": [(5, 37)],
}


def eager(x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return F.gelu(x if isinstance(bias, float) else x + bias, approximate="tanh")


def cases(M: int, N: int):
    x, bias = gpu.randn(M, N), gpu.randn(N)
    size = M * N * x.element_size()
    work = {"forward": (2 * size, 10 * M * N), "backward": (3 * size, 20 * M * N)}
    for name, ours, inputs in (
        (f"{M} x {N}", gelu, (x,)),
        (f"{M} x {N} + b", bias_gelu, (x, bias)),
    ):
        functions = {"ours": ours, "eager": eager, "torch.compile": gpu.compiled(eager)}
        yield from gpu.passes(name, functions, gelu_ref, inputs, work)


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
