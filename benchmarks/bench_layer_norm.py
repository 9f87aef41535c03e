"""Layer norm beside PyTorch's, torch.compile's and Liger's. Writes results/layer_norm.*

    python -m benchmarks.bench_layer_norm [--quick | --check]

M rows of N columns of s bytes: 2 M N s bytes forward (x in, y out), 3 M N s backward (x and dy in,
dx out; dw and db besides); 8 and 14 M N operations. With the residual addition before the
norm, forward moves 4 M N s (x and residual in, y and sum out), and so does backward (the sum's
gradient in as well). 16384 rows of bf16 are 25 MB and fit in an H100's L2 of 50 MB; 65536 do not.
"""

import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from nanogpt2.kernels.layer_norm import layer_norm, layer_norm_ref, residual_layer_norm

SHAPES = {
    "full": [(16384, 768), (65536, 768), (65536, 1600)],
    "quick": [(16384, 768)],
    "check": [(5, 37)],
}


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, w.shape, w, b, 1e-5)


def eager_residual(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager(total, w, b), total


def residual_ref(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # round the sum as the next layer reads it, although the reference computes in float32
    total = (x + residual).to(gpu.DTYPE).float()
    return layer_norm_ref(total, w, b), total


def cases(M: int, N: int):
    x, residual, w, b = gpu.randn(M, N), gpu.randn(M, N), gpu.randn(N), gpu.randn(N)
    size, liger = M * N * x.element_size(), gpu.liger("transformers.functional", "liger_layer_norm")
    functions = {
        "ours": layer_norm,
        "eager": eager,
        "torch.compile": gpu.compiled(eager),
        "Liger": liger if isinstance(liger, str) else lambda x, w, b: liger(x, w, b, 1e-5),
    }
    work = {"forward": (2 * size, 8 * M * N), "backward": (3 * size, 14 * M * N)}
    yield from gpu.passes(f"{M} x {N}", functions, layer_norm_ref, (x, w, b), work)
    functions = {
        "ours": residual_layer_norm,
        "eager": eager_residual,
        "torch.compile": gpu.compiled(eager_residual),
    }
    work = {"forward": (4 * size, 9 * M * N), "backward": (4 * size, 15 * M * N)}
    name = f"{M} x {N} with residual"
    yield from gpu.passes(name, functions, residual_ref, (x, residual, w, b), work)


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
