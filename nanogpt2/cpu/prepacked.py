"""x W^T for few rows on a CPU: the weight prepacked, or narrowed to 16 or 8 bits.

    float32   the same numbers, prepacked into oneDNN's blocks after some use
    fp16      2 bytes a weight
    int8      1 byte: W = s q, with one s for each output, |q| <= 127

int8 narrows its input x to 8 bits too, or to 7 where oneDNN cannot use VNNI instructions. Each row
x has its own range, so a text does not depend on its neighbours. With d, the range over 255 (127),
x is about low + d u for integers u from 0 to 255 (127). The product takes u - m, with m in the
middle, and

    x W^T = d (u - m) W^T + (low + m d) (the sum of W over its inputs)

PyTorch's own operations compute it, by oneDNN and fbgemm; they are outside its stable interface.
This file does not know what the matrices mean.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nanogpt2.cpu import malloc

SCALE = "_scale"  # int8's scales, appended to the matrix's name: float32 (N,)
# oneDNN prepacks for this number of rows; 1 to 16 are about as fast
FEW_ROWS = 8
CHUNK = 256  # rows of a matrix narrowed at once
ZERO = torch.zeros(1, dtype=torch.int64)  # int8's zero point, for all outputs
FULL, REST = 512, 256  # inputs of one of fbgemm's fp16 blocks, and of a half-empty one
MOST = torch.finfo(torch.float16).max
LEAST = 1e-30  # the smallest scale: a divisor
Release = Callable[[Tensor], None]


class PrepackedLinear(nn.Module, ABC):
    """x W^T + b for a weight (N, K): (..., K) -> (..., N), and two fused forms."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""

    def gelu(self, x: Tensor) -> Tensor:
        """Return GELU(x W^T + b), in the tanh form."""
        return F.gelu(self(x), approximate="tanh")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x W^T + b + residual; residual: (..., N)."""
        return self(x).add_(residual)

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Return the weight's tensors, by the suffixes of their names."""


class FloatLinear(PrepackedLinear):
    """float32 by oneDNN. After `prepacks_after` rows, prepack the weight for good."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        prepacks_after: int = 0,
        release: Release | None = None,
    ) -> None:
        """weight: in either memory order. prepacks_after: 0 is never.

        release: called with the old weight after prepacking.
        """
        super().__init__()
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._left, self._release = prepacks_after, release

    @override
    def forward(self, x: Tensor) -> Tensor:
        weight = self._weight_for(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self._bias, "none", [], "")

    @override
    def gelu(self, x: Tensor) -> Tensor:
        weight = self._weight_for(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self._bias, "gelu", [], "tanh")

    @override
    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        weight = self._weight_for(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, self._bias, "add")

    @override
    def stored(self) -> dict[str, Tensor]:
        return {"": self._weight.to_dense() if self._weight.is_mkldnn else self._weight}

    def _weight_for(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if self._left > 0 and rows <= FEW_ROWS:
            self._left -= rows
            if self._left <= 0:
                stored = self._weight
                self._weight = torch.ops.mkldnn._reorder_linear_weight(stored, FEW_ROWS)
                malloc.return_free()
                if self._release is not None:
                    self._release(stored)
        return self._weight


class HalfLinear(PrepackedLinear):
    """A weight of 16 bits, by fbgemm; the sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: of any floating type; fbgemm rounds it."""
        super().__init__()
        wide = weight.float().contiguous()
        # clamp a copy: fbgemm clamps in place, and `wide` may be a file's or the model's weight
        low, high = torch.aminmax(wide)
        if max(-low, high) > MOST:
            wide = wide.clamp(-MOST, MOST)
        self._packed = torch.ops.quantized.linear_prepack_fp16(wide, bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)

    @override
    def stored(self) -> dict[str, Tensor]:
        return {"": torch.ops.quantized.linear_unpack_fp16(self._packed)[0].half()}


class HalfHead(PrepackedLinear):
    """HalfLinear for a large weight whose last 256 inputs fbgemm would pad to 512.

    A second matrix holds these inputs: output n of the first half beside output n of the second.
    Multiplied by [x 0] it gives the first half of the outputs, by [0 x] the second.
    """

    def __init__(self, weight: Tensor) -> None:
        """weight: (N, K), of any floating type."""
        super().__init__()
        self._N = len(weight)
        first, last = weight.split([weight.size(1) - REST, REST], dim=1)
        # for an odd number of outputs, add an output of zeros
        last = F.pad(last, (0, 0, 0, self._N % 2))
        self._first = HalfLinear(first, None)
        self._last = HalfLinear(torch.cat(last.chunk(2), dim=1), None)

    @override
    def forward(self, x: Tensor) -> Tensor:
        first, last = x.split([x.size(-1) - REST, REST], dim=-1)
        pair = torch.stack([F.pad(last, (0, REST)), F.pad(last, (REST, 0))], dim=-2)
        more = self._last(pair).flatten(-2)  # (..., N), or one more
        return self._first(first.contiguous()).add_(more[..., : self._N])

    @override
    def stored(self) -> dict[str, Tensor]:
        first, last = self._first.stored()[""], self._last.stored()[""]
        last = torch.cat(last.chunk(2, dim=1))[: self._N]
        return {"": torch.cat([first, last], dim=1)}


class Int8Linear(PrepackedLinear):
    """q of 8 bits with a scale s for each output, by oneDNN; formulas at the top of the file."""

    middle = 128  # m

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """q: int8 (N, K); scale: float32 (N,)."""
        super().__init__()
        # in chunks: sum() widens each number to 8 bytes
        sums = torch.cat([rows.sum(dim=1) for rows in q.split(CHUNK)])
        self._scale, self._sums = scale, sums * scale  # each (N,)
        self._bias = torch.zeros_like(scale) if bias is None else bias.detach()
        self._packed = self._pack(q)

    @override
    def forward(self, x: Tensor) -> Tensor:
        u, d, low = self._narrowed(x)
        y = self._times(u)
        return torch.addcmul(self._bias, low.add(d, alpha=self.middle), self._sums).addcmul_(d, y)

    @override
    def stored(self) -> dict[str, Tensor]:
        return {"": self._unpacked(), SCALE: self._scale}

    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, uint8 (..., K), with d and low, each (..., 1)."""
        # each row: u, then d and low in the last 8 bytes
        rows = torch.ops.quantized.embedding_bag_byte_prepack(x)
        d = rows[..., -8:-4].contiguous().view(torch.float32)
        # recompute the minimum separately: the fused op drops NaN
        return rows[..., :-8], d, x.amin(dim=-1, keepdim=True)

    def _pack(self, q: Tensor) -> Any:
        # qlinear_prepack ignores strides
        return torch.ops.onednn.qlinear_prepack(q.contiguous(), None)

    def _times(self, u: Tensor) -> Tensor:
        """Return (u - m) W^T."""
        return _qlinear(u, self.middle, self._packed, self._scale)

    def _unpacked(self) -> Tensor:
        return self._packed.to_dense().t()


class Int7Linear(Int8Linear):
    """Int8Linear with inputs of 7 bits, by fbgemm: exact, and faster where oneDNN lacks VNNI."""

    middle = 64

    @override
    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, d, low = super()._narrowed(x)
        # two steps merge into one, whose middle lies half a step above the lower one
        return u >> 1, 2 * d, low + d / 2

    @override
    def _pack(self, q: Tensor) -> Any:
        with warnings.catch_warnings():
            # quantized tensors are deprecated, but linear_prepack requires one
            warnings.simplefilter("ignore")
            zero = torch.zeros(len(q), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(q, self._scale.double(), zero, 0)
            return torch.ops.quantized.linear_prepack(weight, None)

    @override
    def _times(self, u: Tensor) -> Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            u.float().sub_(self.middle), 1.0, self.middle, self._packed
        )

    @override
    def _unpacked(self) -> Tensor:
        return torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()


def _qlinear(u: Tensor, middle: int, packed: Tensor, scale: Tensor) -> Tensor:
    """Return (u - middle) (scale q)^T: uint8 (..., K), int8 (N, K) -> float32 (..., N)."""
    # no bias, an output scale of 1, no fused operation
    rest: tuple[Any, ...] = None, 1.0, 0, torch.float32, "none", [], ""
    return torch.ops.onednn.qlinear_pointwise(u, 1.0, middle, packed, scale, ZERO, *rest)


@cache
def onednn_sums_exactly() -> bool:
    """Return True where oneDNN's 8-bit product is exact: without VNNI it saturates at 16 bits.

    Test a product, not the processor's features: ONEDNN_MAX_CPU_ISA can switch VNNI off.
    """
    u = torch.full((1, 64), 255, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    found = _qlinear(u, Int8Linear.middle, packed, torch.ones(16))
    return bool((found == (255 - Int8Linear.middle) * 127 * 64).all())


def prepacked_linear_for(
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    scheme: str | None,
    prepacks_after: int,
    release: Release | None,
) -> PrepackedLinear:
    """Make the linear layer of a scheme; None is float32.

    scale: given with an int8 weight. prepacks_after, release: see FloatLinear.
    """
    if scheme is None:
        return FloatLinear(widened(weight, release), bias, prepacks_after, release)
    product: PrepackedLinear
    K = weight.size(1)
    if scheme == "fp16" and bias is None and K > FULL and K % FULL == REST:
        product = HalfHead(weight)
    elif scheme == "fp16":
        product = HalfLinear(weight, bias)
    else:
        kind = Int8Linear if onednn_sums_exactly() else Int7Linear
        product = kind(*(to_int8(weight) if scale is None else (weight, scale)), bias)
    if release is not None:
        release(weight)
    return product


def widened(weight: Tensor, release: Release | None) -> Tensor:
    """Convert to float32, and release the original; return a float32 weight unchanged."""
    wide = weight.float()
    if wide is not weight and release is not None:
        release(weight)
    return wide


def to_fp16(weight: Tensor) -> Tensor:
    """Convert to float16; clamp to its largest number."""
    return weight.clamp(-MOST, MOST).half()


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize (N, K) -> q, int8 (N, K), and the scales s, float32 (N,)."""
    largest = torch.linalg.vector_norm(weight.float(), float("inf"), dim=1)  # (N,)
    scale = (largest / 127).clamp_(min=LEAST)
    q = torch.empty(weight.shape, dtype=torch.int8)
    # in chunks: the embedding alone is a third of the model
    for part, rows, s in zip(*(t.split(CHUNK) for t in (q, weight, scale)), strict=True):
        part.copy_((rows / s[:, None]).round_())
    return q, scale


def runs_prepacked(kernels: str, device: str, dtype: torch.dtype) -> bool:
    """Return True where few rows are multiplied fastest by prepacked layers."""
    return kernels == "torch" and device == "cpu" and dtype == torch.float32 and can_multiply()


def can_multiply() -> bool:
    """Return True for a PyTorch with these products, which its stable interface lacks."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
