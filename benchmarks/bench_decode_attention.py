"""Attention of one new token over the cache, beside SDPA's. Writes results/decode_attention.*

    python -m benchmarks.bench_decode_attention [--quick | --check]

R rows, 12 heads of 64, L tokens in a cache of 1024: 4 R H L D bytes in bf16 (each key and value
once) and 4 R H L D operations. With five beams the peers first copy their parents' cache rows, as a
reordered cache does (8 R H L D bytes more). Ours follows the table of ancestors. "ours, step" also
writes the new key and value into the cache, and joins its shares in the same launch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu
from nanogpt2.kernels.decode_attention import (
    decode_attention,
    decode_attention_ref,
    decode_step,
    step_splits,
)

# rows, tokens so far, cache length, heads, D, whether the rows are beams
SHAPES = {
    "full": [
        (R, L, 1024, 12, 64, False) for R in (1, 5, 64) for L in (64, 256, 1024)
    ] + [(5, 900, 1024, 12, 64, True)],
    "quick": [(1, 1024, 1024, 12, 64, False), (5, 900, 1024, 12, 64, True)],
    "check": [(2, 37, 50, 3, 16, False), (3, 20, 50, 3, 16, True)],
}  # fmt: skip


def cases(R: int, L: int, S: int, H: int, D: int, beams: bool):
    q, k, v = gpu.randn(R, H, 1, D), gpu.randn(R, H, S, D), gpu.randn(R, H, S, D)
    lengths = torch.full((R,), L, device=gpu.DEVICE)
    # every beam continues the beam before it
    parents = torch.arange(R, device=gpu.DEVICE).roll(1)
    ancestors = parents[:, None].expand(R, S).contiguous() if beams else None

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, :L], v[:, :, :L]
        if beams:
            k, v = k[parents], v[parents]
        return F.scaled_dot_product_attention(q, k, v)

    def by(backend: SDPBackend):
        def function(*inputs: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(*inputs)

        return gpu.on_gpu(function)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, :L], v[:, :, :L]
        if beams:
            k, v = k[parents], v[parents]
        return (q @ k.transpose(-1, -2) * D**-0.5).softmax(dim=-1) @ v

    # decode_step writes the last token, so it gets caches of its own
    rows = parents if beams else torch.arange(R, device=gpu.DEVICE)
    qkv = torch.stack([q[:, :, 0], k[rows, :, L - 1], v[rows, :, L - 1]], dim=1).flatten(1)
    caches, before = (k.clone(), v.clone()), lengths - 1
    chip = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    splits = step_splits(R, H, S, chip.multi_processor_count if chip else 1)
    arrived = torch.zeros(R * H, dtype=torch.int32, device=gpu.DEVICE)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"ancestors": ancestors, "splits": splits, "arrived": arrived}
        return decode_step(qkv, *caches, before, **options).view(q.shape)

    functions = {
        "ours": lambda q, k, v: decode_attention(
            q, k, v, lengths, ancestors=ancestors, trusted=True
        ),
        "ours, step": step,
        "SDPA flash": by(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": by(SDPBackend.CUDNN_ATTENTION),
        "eager": eager,
        "torch.compile": gpu.compiled(eager),
    }
    size = 2 * R * H * L * D * q.element_size()
    name = f"{R} {'beams' if beams else 'rows'}, {L} tokens"
    yield from gpu.passes(
        name,
        functions,
        lambda q, k, v: decode_attention_ref(q, k, v, lengths, ancestors=ancestors),
        (q, k, v),
        {"forward": (size, 4 * R * H * L * D)},
    )


if __name__ == "__main__":
    gpu.main(__file__, __doc__, SHAPES, cases)
