"""The operations of one new token for each of R rows on a GPU, by PyTorch or by Triton's kernels.

The step that graph.py captures and replays is made of these. None waits for the GPU, and none
depends on a Python number that changes within a text. As in nanogpt2/ops.py, each function states
its result, then chooses by `kernels`. This file does not know the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt2 import ops


def decode_scratch(rows: int, n_head: int, device: torch.device, kernels: str) -> Tensor | None:
    """Return what Triton's kernels count their finished programs in, for `scratch` below."""
    if kernels != "triton":
        return None
    from nanogpt2.kernels.decode_linear import ARRIVED

    return torch.zeros(max(ARRIVED, rows * n_head), dtype=torch.int32, device=device)


def decode_embedding(
    tokens: Tensor, lengths: Tensor, start: Tensor, wte: Tensor, wpe: Tensor, kernels: str = "torch"
) -> Tensor:
    """Embed tokens, int64 (R,), at positions lengths - start, both int32 (R,) -> (R, C)."""
    if kernels == "triton":
        from nanogpt2.kernels import decode_linear as kernel

        return kernel.decode_embed(tokens, lengths, wte, wpe, start)
    return F.embedding(tokens, wte) + F.embedding(lengths - start, wpe)


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    bends: str | None = None,
    residual: Tensor | None = None,
    kernels: str = "torch",
    scratch: Tensor | None = None,
) -> Tensor:
    """Compute gelu(layer_norm(x) W^T + b) + residual: (R, K) -> (R, N).

    norm: weight and bias (K,), and eps. bends: GELU's form, as for ops.gelu. Without norm, bends or
    residual (R, N) that part is left out. Triton's kernel takes few rows of some thousand columns;
    PyTorch multiplies larger ones, and computes erf GELU.
    """
    if kernels == "triton":
        from nanogpt2.kernels import decode_linear as kernel

        if len(x) <= kernel.MAX_ROWS and x.size(1) <= kernel.MAX_COLUMNS:
            tanh = bends == "tanh"
            y = kernel.decode_linear(
                x, weight, bias, norm=norm, gelu=tanh, residual=residual, arrived=scratch
            )
            return y if tanh or bends is None else ops.gelu(y, kernels, bends)
    if norm is not None:
        x = ops.layer_norm(x, *norm, kernels)
    y = F.linear(x, weight, bias)
    y = y if bends is None else ops.gelu(y, kernels, bends)
    return y if residual is None else y + residual


def decode_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    start: Tensor,
    ancestors: Tensor | None = None,
    kernels: str = "torch",
    scratch: Tensor | None = None,
) -> Tensor:
    """Write a token's key and value at position `lengths`, and attend from `start` to there.

    qkv: (R, 3C); caches: (R, H, S, D), modified; lengths, start: int32 (R,). ancestors: int32
    (R, S), the cache's row that holds position t of row r, by default row r. -> (R, C).
    """
    R, H, S, D = k_cache.shape
    if kernels == "triton":
        from nanogpt2.kernels import decode_attention as kernel

        cuda = qkv.is_cuda
        processors = (
            torch.cuda.get_device_properties(qkv.device).multi_processor_count if cuda else 1
        )
        return kernel.decode_step(
            qkv,
            k_cache,
            v_cache,
            lengths,
            start=start,
            ancestors=ancestors,
            splits=kernel.step_splits(R, H, S, processors),
            arrived=scratch,
        )
    q, k, v = qkv.view(R, 3, H, 1, D).unbind(1)  # each (R, H, 1, D)
    at = lengths.long()[:, None, None, None].expand_as(k)
    k_cache.scatter_(2, at, k)
    v_cache.scatter_(2, at, v)
    t = torch.arange(S, device=qkv.device)
    mask = (t >= start[:, None]) & (t <= lengths[:, None])  # (R, S)
    if ancestors is not None:
        rows = ancestors.long()
        k_cache, v_cache = (x[rows, :, t].transpose(1, 2) for x in (k_cache, v_cache))
    y = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask[:, None, None])
    return y.reshape(R, H * D)


def decode_draw(
    x: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, Tensor, float],
    options: Mapping[str, Any],
    text: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Tensor:
    """Choose each row's next token from the last block's output (R, C), in three kernels.

    weight: (V, C), the head's, after the layer norm `norm`. options, text: the fields of
    kernels/sampling.py's Options and Text. state: what its `draw` keeps. -> int64 (R,). Triton
    only: generation/replay.py does the same in PyTorch.
    """
    from nanogpt2.kernels import sampling as kernel
    from nanogpt2.kernels.decode_linear import MAX_COLUMNS, MAX_ROWS

    asked, written = kernel.Options(**options), kernel.Text(**text)
    x = ops.layer_norm(x, *norm, "triton")
    if len(x) <= MAX_ROWS and x.size(1) <= MAX_COLUMNS:
        found = kernel.head_candidates(x, weight, asked, written)
    else:
        found = kernel.candidates(F.linear(x, weight), asked, written)
    return kernel.draw(*found, asked, written, **state)
