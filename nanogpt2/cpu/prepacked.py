"""x W^T for few rows on a CPU: the weight in a fast layout, or narrowed to 16 or 8 bits.

    float32   the same numbers
    fp16      2 bytes a weight
    int8      1 byte: W = s q, with one s for each output, |q| <= 127

int8 narrows its input x to 8 bits too, or to 7 where oneDNN cannot use VNNI instructions. Each row
x has its own range, so a text does not depend on its neighbours. With d, the range over 255 (127),
x is about low + d u for integers u from 0 to 255 (127). The product takes u - m, with m in the
middle, and

    x W^T = d (u - m) W^T + (low + m d) (the sum of W over its inputs)

layouts.py computes the products of float32 and int8, plan.py changes their layout. This file does
not know what the matrices mean.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nanogpt2.cpu import malloc, native
from nanogpt2.cpu.layouts import (
    AS_STORED,
    BYTES,
    FLOAT,
    FULL,
    HALVES,
    REST,
    ByteLayout,
    Layout,
    OneDNN,
    OneDNNBytes,
)

SCALE = "_scale"  # int8's scales, appended to the matrix's name: float32 (N,)
CHUNK = 256  # rows of a matrix narrowed at once
LEAST = 1e-30  # the smallest scale: a divisor
Release = Callable[[Tensor], None]


class PrepackedLinear(nn.Module, ABC):
    """x W^T + b for a weight (N, K) that can change its layout: (..., K) -> (..., N).

    layout: the layout's name, None before the first use. usual: the one it takes by itself.
    layouts: all that it can take. shape: (N, K).
    """

    layout: str | None
    usual: str
    layouts: tuple[str, ...]
    shape: tuple[int, int]
    middle = 0  # m, of int8
    most: int  # rows that blocks.c multiplies faster than PyTorch, in the layout `rows`

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b; of few rows by blocks.c where it is compiled."""
        rows, N = x.numel() // max(1, x.size(-1)), self.shape[0]
        if self.layout == "rows" and native.can_run(rows, N, self.most):
            matrix, (weight, *_) = self.matrix()
            y = native.linear(x.reshape(rows, -1), matrix, N, weight.dtype, self.middle)
            return y.view(*x.shape[:-1], N)
        return self._product(x)

    @abstractmethod
    def _product(self, x: Tensor) -> Tensor:
        """Return x W^T + b, by PyTorch's operations."""

    def gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        """Return GELU(x W^T + b). approximate: tanh or none, as for F.gelu."""
        return F.gelu(self(x), approximate=approximate)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x W^T + b + residual; residual: (..., N)."""
        return self(x).add_(residual)

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Return the weight's tensors, by the suffixes of their names."""

    @abstractmethod
    def lay_out(self, name: str) -> None:
        """Change the layout. The results stay the same, but for the order of float32's sums."""

    @abstractmethod
    def matrix(self) -> tuple[native.Matrix, list[Tensor]]:
        """Return the weight laid out in `rows` for blocks.c, and the tensors that it points to."""


def _matrix(*tensors: Tensor | None) -> tuple[native.Matrix, list[Tensor]]:
    """Point to a weight, its bias, scale and sums."""
    places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return native.Matrix(*places), [tensor for tensor in tensors if tensor is not None]


def _compiled(names: Iterable[str]) -> tuple[str, ...]:
    """Return the layouts worth trying: `rows` where blocks.c is compiled."""
    return tuple(name for name in names if name != "rows" or native.library() is not None)


class FloatLinear(PrepackedLinear):
    """float32, at first as the weight is stored."""

    most = native.MOST_ROWS
    usual = "onednn"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        release: Release | None = None,
        lays_out: bool = True,
        keeps: bool = False,
    ) -> None:
        """weight: in either memory order.

        release: called with the stored weight once it is not read any more. lays_out: False where
        a layout would be a second copy in memory. keeps: the caller owns the weight and may change
        it; then a layout is a second copy, to be made again after a change.
        """
        super().__init__()
        weight = weight.detach()
        self._stored = weight if keeps else None
        self._bias, self._release = None if bias is None else bias.detach(), release
        self._layout: Layout = OneDNN(weight)
        self.layout = self.usual
        self.shape = (weight.size(0), weight.size(1))
        in_place = (*AS_STORED, "rows") if weight.is_contiguous() else AS_STORED
        self.layouts = _compiled(FLOAT if lays_out else in_place)

    @override
    def _product(self, x: Tensor) -> Tensor:
        return self._layout.product(x, self._bias)

    @override
    def gelu(self, x: Tensor, approximate: str = "tanh") -> Tensor:
        return self._layout.gelu(x, self._bias, approximate)

    @override
    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._layout.plus(x, self._bias, residual)

    @override
    def stored(self) -> dict[str, Tensor]:
        return {"": self._weight()}

    @override
    def lay_out(self, name: str) -> None:
        if name == self.layout:
            return
        weight, was_stored = self._weight(), self.layout in AS_STORED
        self._layout, self.layout = FLOAT[name](weight), name
        # rows that lie one after the other already are not copied
        shared = name == "rows" and self._layout.dense().data_ptr() == weight.data_ptr()
        if name not in AS_STORED and not shared:
            malloc.return_free()
            if was_stored and self._release is not None:
                self._release(weight)

    @override
    def matrix(self) -> tuple[native.Matrix, list[Tensor]]:
        return _matrix(self._layout.dense(), self._bias)

    def _weight(self) -> Tensor:
        return self._layout.dense() if self._stored is None else self._stored


class HalfLinear(PrepackedLinear):
    """A weight of 16 bits; the sums are float32."""

    most = 32

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (N, K), of any floating type."""
        super().__init__()
        self.shape = _, K = (weight.size(0), weight.size(1))
        # a head is much the largest matrix, so that padding would cost it the most
        pads = bias is None and K > FULL and K % FULL == REST
        self.usual = "fbgemm_fp16_head" if pads else "fbgemm_fp16"
        self.layouts = _compiled((self.usual, "rows"))
        self._bias = None if bias is None else bias.detach()
        self._layout: Layout = HALVES[self.usual](weight)
        self.layout = self.usual

    @override
    def _product(self, x: Tensor) -> Tensor:
        return self._layout.product(x, self._bias)

    @override
    def stored(self) -> dict[str, Tensor]:
        return {"": self._layout.dense()}

    @override
    def lay_out(self, name: str) -> None:
        if name != self.layout:
            self._layout, self.layout = HALVES[name](self._layout.dense()), name
            malloc.return_free()

    @override
    def matrix(self) -> tuple[native.Matrix, list[Tensor]]:
        return _matrix(self._layout.dense(), self._bias)


class Int8Linear(PrepackedLinear):
    """q of 8 bits with a scale s for each output; the formulas are at the top of the file."""

    middle = 128
    most = 64
    usual = "onednn_u8s8"

    def __init__(
        self, q: Tensor, scale: Tensor, bias: Tensor | None, release: Release | None = None
    ) -> None:
        """q: int8 (N, K), laid out on first use. scale: float32 (N,). release: see FloatLinear."""
        super().__init__()
        # in chunks: sum() widens each number to 8 bytes
        sums = torch.cat([rows.sum(dim=1) for rows in q.split(CHUNK)])
        self._scale, self._sums = scale, sums * scale  # each (N,)
        self._bias = torch.zeros_like(scale) if bias is None else bias.detach()
        self._q: Tensor | None = q
        self._layout: ByteLayout | None = None
        self._release = release
        self.layout = None
        self.shape = (q.size(0), q.size(1))
        exact = {self.usual, "tiles_64", "tiles_96", "rows"}
        self.layouts = tuple(name for name in _compiled(BYTES) if name in exact)

    @override
    def _product(self, x: Tensor) -> Tensor:
        if self._layout is None:
            self.lay_out(self.usual)
        assert self._layout is not None
        u, d, low = self._narrowed(x)
        y = self._layout.product(u, self.middle)
        return torch.addcmul(self._bias, low.add(d, alpha=self.middle), self._sums).addcmul_(d, y)

    @override
    def stored(self) -> dict[str, Tensor]:
        return {"": self._weight(), SCALE: self._scale}

    @override
    def lay_out(self, name: str) -> None:
        if name == self.layout:
            return
        q, first = self._weight(), self._layout is None
        self._layout, self.layout, self._q = BYTES[name](q, self._scale), name, None
        if first and self._release is not None:
            self._release(q)
        del q
        malloc.return_free()

    @override
    def matrix(self) -> tuple[native.Matrix, list[Tensor]]:
        return _matrix(self._weight(), self._bias, self._scale, self._sums)

    def _weight(self) -> Tensor:
        # read once: another thread's text may lay it out now
        if (q := self._q) is not None:
            return q
        assert self._layout is not None
        return self._layout.dense()

    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, uint8 (..., K), with d and low, each (..., 1)."""
        # each row: u, then d and low in the last 8 bytes
        rows = torch.ops.quantized.embedding_bag_byte_prepack(x)
        # a copy even of one row, whose d may start at any byte
        d = rows[..., -8:-4].clone(memory_format=torch.contiguous_format).view(torch.float32)
        # recompute the minimum separately: the fused op drops NaN
        return rows[..., :-8], d, x.amin(dim=-1, keepdim=True)


class Int7Linear(Int8Linear):
    """Int8Linear with inputs of 7 bits, for fbgemm, which is exact with them without VNNI."""

    middle = 64
    usual = "fbgemm_7bit"

    @override
    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, d, low = super()._narrowed(x)
        # two steps merge into one, whose middle lies half a step above the lower one
        return u >> 1, 2 * d, low + d / 2


@cache
def onednn_sums_exactly() -> bool:
    """Return True where oneDNN's 8-bit product is exact: without VNNI it saturates at 16 bits.

    Test a product, not the processor's features: ONEDNN_MAX_CPU_ISA can switch VNNI off.
    """
    u = torch.full((1, 64), 255, dtype=torch.uint8)
    layout = OneDNNBytes(torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16))
    found = layout.product(u, Int8Linear.middle)
    return bool((found == (255 - Int8Linear.middle) * 127 * 64).all())


def prepacked_linear_for(
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    scheme: str | None,
    release: Release | None = None,
    lays_out: bool = True,
) -> PrepackedLinear:
    """Make the linear layer of a scheme; None is float32.

    scale: given with an int8 weight. release, lays_out: see FloatLinear.
    """
    if scheme is None:
        return FloatLinear(widened(weight, release), bias, release, lays_out)
    if scheme == "int8":
        kind = Int8Linear if onednn_sums_exactly() else Int7Linear
        if scale is not None:
            return kind(weight, scale, bias, release)
        narrow = kind(*to_int8(weight), bias)
        if release is not None:
            # now, while the rest of the model lies in its file: later both would be in memory
            narrow.lay_out(kind.usual)
        product: PrepackedLinear = narrow
    else:
        product = HalfLinear(weight, bias)
    if release is not None:
        release(weight)
    return product


def widened(weight: Tensor, release: Release | None) -> Tensor:
    """Convert to float32, and release the original; return a float32 weight unchanged."""
    wide = weight.float()
    if wide is not weight and release is not None:
        release(weight)
    return wide


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (N, K) -> q, int8 (N, K), and the scales s, float32 (N,)."""
    scale = scales(weight)
    q = torch.empty(weight.shape, dtype=torch.int8)
    # in chunks: the embedding alone is a third of the model
    for part, rows, s in zip(*(t.split(CHUNK) for t in (q, weight, scale)), strict=True):
        part.copy_((rows / s[:, None]).round_())
    return q, scale


def scales(weight: Tensor) -> Tensor:
    """Return int8's scales s of a weight (N, K), float32 (N,)."""
    largest = torch.linalg.vector_norm(weight.float(), float("inf"), dim=1)  # (N,)
    return (largest / 127).clamp_(min=LEAST)


def runs_prepacked(kernels: str, device: str, dtype: torch.dtype) -> bool:
    """Return True where few rows are multiplied fastest by prepacked layers."""
    return kernels == "torch" and device == "cpu" and dtype == torch.float32 and can_multiply()


def can_multiply() -> bool:
    """Return True for a PyTorch with these products, which its stable interface lacks."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
