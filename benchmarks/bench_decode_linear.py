"""The linear layers of one new token a row, beside PyTorch's. Writes results/decode_linear.*

    python -m benchmarks.bench_decode_linear [--quick | --check]

R rows, the four products of a layer of the 124M, with what goes with each: layer norm and bias,
bias and residual, layer norm, bias and GELU. N K s bytes of weights, s an element, and 2 R N K
operations. torch.compile fuses what surrounds the product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import gpu
from nanogpt2.kernels.decode_linear import ARRIVED, decode_linear, decode_linear_ref

# name -> outputs, inputs, whether a norm comes first, a GELU after, and a residual last
LAYERS = {
    "c_attn": (3, 1, True, False, False),
    "attn.c_proj": (1, 1, False, False, True),
    "c_fc": (4, 1, True, True, False),
    "mlp.c_proj": (1, 4, False, False, True),
}
# rows, n_embd
SHAPES = {
    "full": [(1, 768), (5, 768), (8, 768), (1, 1600)],
    "quick": [(1, 768), (5, 768)],
    "check": [(2, 24), (5, 17)],
}


def cases(R: int, C: int):
    arrived = torch.zeros(ARRIVED, dtype=torch.int32, device=gpu.DEVICE)
    for name, (outputs, inputs, normed, gelu, added) in LAYERS.items():
        N, K = outputs * C, inputs * C
        x, weight, bias = gpu.randn(R, K), gpu.randn(N, K) / K**0.5, gpu.randn(N)
        norm = (gpu.randn(K), gpu.randn(K), 1e-5) if normed else None
        residual = gpu.randn(R, N) if added else None
        options = {"norm": norm, "gelu": gelu, "residual": residual}

        def eager(x: Tensor, weight: Tensor, bias: Tensor, options: dict = options) -> Tensor:
            if options["norm"] is not None:
                w, b, eps = options["norm"]
                x = F.layer_norm(x, w.shape, w, b, eps)
            y = F.linear(x, weight, bias)
            y = F.gelu(y, approximate="tanh") if options["gelu"] else y
            return y if options["residual"] is None else y + options["residual"]

        def ours(x: Tensor, weight: Tensor, bias: Tensor, options: dict = options) -> Tensor:
            return decode_linear(x, weight, bias, arrived=arrived, **options)

        def reference(x: Tensor, weight: Tensor, bias: Tensor, options: dict = options) -> Tensor:
            return decode_linear_ref(x, weight, bias, **options)

        functions = {"ours": ours, "eager": eager, "torch.compile": gpu.compiled(eager)}
        work = {"forward": (N * K * x.element_size(), 2 * R * N * K)}
        yield from gpu.passes(f"{name}, {R} x {C}", functions, reference, (x, weight, bias), work)


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
