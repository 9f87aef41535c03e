"""Attention in training beside SDPA's flash, cuDNN and eager forms. Writes results/attention.*

    python -m benchmarks.bench_attention [--quick | --check]

From c_attn's packed (B, T, 3C) to c_proj's (B, T, C), causal. The peers get the same tensor and
read it as views. Operations: 4 B H T^2 D / 2 forward, 2.5 times as many backward; the masked half
does not count. Least bytes: forward 4 B T C s (q, k, v and o once), backward 8 B T C s (those, do
and the gradients). The eager form builds T x T matrices and runs only up to 1024 tokens. cuDNN and
ours sum dq by atomics. "ours, deterministic" gives the same bits in every run, for 7 products
instead of 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu
from nanogpt2.kernels.attention import attention_qkv

# B, H, T, D
SHAPES = {
    "full": [(16, 12, 1024, 64), (4, 12, 4096, 64), (2, 12, 8192, 64), (1, 12, 16384, 64)],
    "quick": [(4, 12, 1024, 64), (1, 12, 4096, 64)],
    "check": [(2, 3, 37, 16)],
}
LONGEST_EAGER = 1024


def split(qkv: Tensor, H: int) -> list[Tensor]:
    """(B, T, 3C) -> q, k, v as (B, H, T, D)."""
    return [x.unflatten(2, (H, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2)]


def joined(o: Tensor) -> Tensor:
    """(B, H, T, D) -> (B, T, C)."""
    return o.transpose(1, 2).flatten(2)


def cases(B: int, H: int, T: int, D: int):
    qkv = gpu.randn(B, T, 3 * H * D)
    size, flops = B * T * H * D * qkv.element_size(), 2 * B * H * T**2 * D

    def sdpa(qkv: Tensor) -> Tensor:
        return joined(F.scaled_dot_product_attention(*split(qkv, H), is_causal=True))

    def by(backend: SDPBackend):
        def function(qkv: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(qkv)

        return gpu.on_gpu(function)

    def eager(qkv: Tensor) -> Tensor:
        q, k, v = split(qkv, H)
        unseen = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(unseen, -torch.inf)
        return joined(scores.softmax(dim=-1) @ v)

    functions = {
        "ours": lambda qkv: attention_qkv(qkv, H),
        "ours, deterministic": lambda qkv: attention_qkv(qkv, H, deterministic=True),
        "SDPA flash": by(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "eager": eager if T <= LONGEST_EAGER else "T x T matrices too large",
        "torch.compile": gpu.compiled(eager) if T <= LONGEST_EAGER else "T x T matrices too large",
    }
    work = {
        "forward": (4 * size, flops),
        "backward": (8 * size, 2.5 * flops),
        "forward and backward": (12 * size, 3.5 * flops),
    }
    yield from gpu.passes(f"B{B} H{H} T{T} D{D}", functions, sdpa, (qkv,), work)


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
