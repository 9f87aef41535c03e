"""What the tests of both attention rooms share: dropout's mask, an interpreter for bfloat16."""

import numpy as np
import pytest
import torch
from kernel_reference import DEVICE
from triton.runtime import interpreter


def philox(key, counter):
    """Philox-4x32-10 (Salmon et al., 2011): uint32 (2,) and (..., 4) -> (..., 4)."""
    k0, k1 = (int(k) for k in key)
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    low = np.uint64(2**32 - 1)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), b & low
        c2, c3 = (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def kept(B, H, T, dropout, seed):
    """The entries of the softmax that dropout leaves: bool (B, H, T, T)."""
    head, query, fours = np.meshgrid(
        np.arange(B * H), np.arange(T), np.arange(-(-T // 4)), indexing="ij"
    )
    counter = np.stack([query, fours, head, np.zeros_like(head)], axis=-1)
    bits = philox((seed % 2**32, seed // 2**32), counter).reshape(B, H, T, -1)[..., :T]
    keep = (bits >> 1) < round((1 - dropout) * 2**31)
    return torch.from_numpy(keep).to(DEVICE)


@pytest.fixture
def bf16_dots(monkeypatch):
    """Triton's interpreter holds bfloat16 as uint16 and would multiply the integers: widen them."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return original(self, *(_widened(self, x) for x in (a, b)), *rest)

    def _widened(builder, x):
        if x.dtype.scalar is not interpreter.tl.bfloat16:
            return x
        return interpreter.TensorHandle(
            (x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32
        )

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
