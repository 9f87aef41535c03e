"""Ways to lay out a weight W (N, K) in memory, each with its product x W^T for few rows.

    linear        as stored, by F.linear
    onednn        as stored, by oneDNN
    onednn_1, _5  in oneDNN's blocks for 1 or 5 rows
    tiles_64, _96 W^T in tiles (K, width), one row after the other
    rows          W's own rows, one after the other, as blocks.c reads them; here by oneDNN

The product of one row x with a tile is a weighted sum of the tile's rows, which fbgemm's embedding
bag computes: y = sum_k x_k T[k]. It reads the memory once from front to back, as fast as the memory
allows, on processors without AVX-512 too.

int8 has layouts of its own, for q of 8 bits with a scale s for each output: see prepacked.py for u
and m. Every product is exact: the sums are whole numbers below 2^24.

    onednn_u8s8   by oneDNN, for processors with VNNI; elsewhere it saturates at 16 bits
    fbgemm_7bit   by fbgemm; the input must have 7 bits
    tiles_64, _96 as above, in bytes
    rows          as above, in bytes

fp16 has two: fbgemm_fp16, by fbgemm, and rows. The sums are float32.

`nanogpt2/cpu/tuning.py` measures them and `nanogpt2/cpu/plan.py` chooses. This file does not know
the model. PyTorch's operations used here are outside its stable interface.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

ZERO = torch.zeros(1, dtype=torch.int64)  # oneDNN's zero point, for all outputs
# tiles multiply up to this number of rows one by one; more rows go through oneDNN, tile by tile
ROWS_ONE_BY_ONE = 8
CHUNK = 4096  # rows of int8 or float16 widened at once
FULL, REST = 512, 256  # inputs of one of fbgemm's fp16 blocks, and of a half-empty one
MOST = torch.finfo(torch.float16).max


class Layout(ABC):
    """A weight (N, K) of float32, laid out."""

    @abstractmethod
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + bias: (..., K) -> (..., N)."""

    def gelu(self, x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
        """Return GELU(x W^T + bias). approximate: tanh or none, as for F.gelu."""
        return F.gelu(self.product(x, bias), approximate=approximate)

    def plus(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Return x W^T + bias + residual; residual: (..., N)."""
        return self.product(x, bias).add_(residual)

    @abstractmethod
    def dense(self) -> Tensor:
        """Return W, (N, K), unchanged to the bit."""


class Linear(Layout):
    """The weight as it is stored, in either memory order, by F.linear."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @override
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._weight, bias)

    @override
    def dense(self) -> Tensor:
        return self._weight


class OneDNN(Layout):
    """The weight as it is stored, in either memory order, by oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @override
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")

    @override
    def gelu(self, x: Tensor, bias: Tensor | None, approximate: str = "tanh") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "gelu", [], approximate)

    @override
    def plus(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, bias, "add")

    @override
    def dense(self) -> Tensor:
        return self._weight


class OneDNNBlocks(OneDNN):
    """oneDNN's own blocks, chosen for a number of rows; they multiply any number."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight, rows))

    @override
    def dense(self) -> Tensor:
        return self._weight.to_dense()


class Rows(OneDNN):
    """The weight's rows, one after the other."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.contiguous()
        # a mapped file's tensor may begin at any byte, which C does not allow
        super().__init__(weight.clone() if weight.data_ptr() % weight.element_size() else weight)


class Tiles(Layout):
    """W^T in tiles (K, width). The last tile is padded with zeros."""

    def __init__(self, weight: Tensor, width: int) -> None:
        self._N = len(weight)
        self._tiles = _tiled(weight, width)  # (P, K, width)
        P, K, _ = self._tiles.shape
        self._bag = _Bag(P, K, width)

    @override
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= ROWS_ONE_BY_ONE:
            y = self._bag.sums(rows, self._tiles.flatten(0, 1), torch._embedding_bag_forward_only)
        else:
            y = _by_tiles(rows, self._tiles)
        y = y[:, : self._N].view(*x.shape[:-1], self._N)
        return y if bias is None else y.add_(bias)

    @override
    def dense(self) -> Tensor:
        return self._tiles.transpose(1, 2).flatten(0, 1)[: self._N]


class ByteLayout(ABC):
    """q (N, K) of int8, laid out, with a scale for each output, float32 (N,)."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self._N, self._scale = len(q), scale

    @abstractmethod
    def product(self, u: Tensor, middle: int) -> Tensor:
        """Return (u - middle) (scale q)^T: uint8 (..., K) -> float32 (..., N)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return q."""


class OneDNNBytes(ByteLayout):
    """oneDNN's blocks for inputs of 8 bits."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__(q, scale)
        # qlinear_prepack ignores strides
        self._packed = torch.ops.onednn.qlinear_prepack(q.contiguous(), None)

    @override
    def product(self, u: Tensor, middle: int) -> Tensor:
        # no bias, an output scale of 1, no fused operation
        rest: tuple[Any, ...] = None, 1.0, 0, torch.float32, "none", [], ""
        y = torch.ops.onednn.qlinear_pointwise(
            u, 1.0, middle, self._packed, self._scale, ZERO, *rest
        )
        # without rows it drops the leading dimensions
        return y.view(*u.shape[:-1], self._N)

    @override
    def dense(self) -> Tensor:
        return self._packed.to_dense().t()


class FbgemmBytes(ByteLayout):
    """fbgemm's blocks. It adds pairs of products in 16 bits, so u must have 7."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__(q, scale)
        with warnings.catch_warnings():
            # quantized tensors are deprecated, but linear_prepack requires one
            warnings.simplefilter("ignore")
            zero = torch.zeros(len(q), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(q, scale.double(), zero, 0)
            self._packed = torch.ops.quantized.linear_prepack(weight, None)

    @override
    def product(self, u: Tensor, middle: int) -> Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            u.float().sub_(middle), 1.0, middle, self._packed
        )

    @override
    def dense(self) -> Tensor:
        return torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()


class ByteTiles(ByteLayout):
    """q^T + 128 in tiles of uint8. Each row of a tile ends with fbgemm's scale 1 and bias -128."""

    def __init__(self, q: Tensor, scale: Tensor, width: int) -> None:
        super().__init__(q, scale)
        self._width = width
        tiles = _tiled(q, width)  # (P, K, width)
        self._shape = tiles.shape[:2]
        end = torch.tensor([1.0, -128.0]).view(torch.uint8)
        self._rows = torch.empty(tiles[..., 0].numel(), width + len(end), dtype=torch.uint8)
        # flip the top bit: q + 128 without a wider copy
        torch.bitwise_xor(tiles.view(torch.uint8).flatten(0, 1), 128, out=self._rows[:, :width])
        self._rows[:, width:] = end
        P, K = self._shape
        self._bag = _Bag(P, K, width)

    @override
    def product(self, u: Tensor, middle: int) -> Tensor:
        x = u.float().sub_(middle)
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= ROWS_ONE_BY_ONE:
            bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
            y = self._bag.sums(rows, self._rows, bag)
        else:
            y = _by_tiles(rows, (tile.float() for tile in self._tiles()))
        return y[:, : self._N].mul_(self._scale).view(*u.shape[:-1], self._N)

    def _tiles(self) -> Tensor:
        tiles = torch.bitwise_xor(self._rows[:, : self._width], 128).view(torch.int8)
        return tiles.view(*self._shape, self._width)

    @override
    def dense(self) -> Tensor:
        return self._tiles().transpose(1, 2).flatten(0, 1)[: self._N]


class ByteRows(ByteLayout):
    """q's rows, one after the other."""

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        super().__init__(q, scale)
        self._q = q.contiguous()

    @override
    def product(self, u: Tensor, middle: int) -> Tensor:
        x = u.float().sub_(middle)
        parts = [OneDNN(q.float()).product(x, None) for q in self._q.split(CHUNK)]
        return torch.cat(parts, dim=-1).mul_(self._scale)

    @override
    def dense(self) -> Tensor:
        return self._q


class FbgemmHalf(Layout):
    """fbgemm's blocks of float16. fbgemm rounds a weight of any floating type."""

    def __init__(self, weight: Tensor) -> None:
        wide = weight.float().contiguous()
        # clamp a copy: fbgemm clamps in place, and `wide` may be a file's or the model's weight
        low, high = torch.aminmax(wide)
        if max(-low, high) > MOST:
            wide = wide.clamp(-MOST, MOST)
        self._packed = torch.ops.quantized.linear_prepack_fp16(wide, None)

    @override
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return y if bias is None else y.add_(bias)

    @override
    def dense(self) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self._packed)[0].half()


class FbgemmHalfHead(Layout):
    """FbgemmHalf for a large weight whose last 256 inputs fbgemm would pad to 512.

    A second matrix holds these inputs: output n of the first half beside output n of the second.
    Multiplied by [x 0] it gives the first half of the outputs, by [0 x] the second.
    """

    def __init__(self, weight: Tensor) -> None:
        self._N = len(weight)
        first, last = weight.split([weight.size(1) - REST, REST], dim=1)
        # for an odd number of outputs, add an output of zeros
        last = F.pad(last, (0, 0, 0, self._N % 2))
        self._first = FbgemmHalf(first)
        self._last = FbgemmHalf(torch.cat(last.chunk(2), dim=1))

    @override
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        first, last = x.split([x.size(-1) - REST, REST], dim=-1)
        pair = torch.stack([F.pad(last, (0, REST)), F.pad(last, (REST, 0))], dim=-2)
        more = self._last.product(pair, None).flatten(-2)  # (..., N), or one more
        y = self._first.product(first.contiguous(), bias)
        return y.add_(more[..., : self._N])

    @override
    def dense(self) -> Tensor:
        first, last = self._first.dense(), self._last.dense()
        last = torch.cat(last.chunk(2, dim=1))[: self._N]
        return torch.cat([first, last], dim=1)


class HalfRows(Layout):
    """The weight's rows in float16, one after the other."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = to_fp16(weight).contiguous()

    @override
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [OneDNN(w.float()).product(x, None) for w in self._weight.split(CHUNK)]
        y = torch.cat(parts, dim=-1)
        return y if bias is None else y.add_(bias)

    @override
    def dense(self) -> Tensor:
        return self._weight


def to_fp16(weight: Tensor) -> Tensor:
    """Convert to float16; clamp to its largest number."""
    return weight.clamp(-MOST, MOST).half()


class _Bag:
    """Weighted sums of the rows of P tiles, each (K, width), by an embedding bag for each tile."""

    def __init__(self, P: int, K: int, width: int) -> None:
        self._P, self._N = P, P * width
        self._rows = _numbers(P * K)
        self._starts = _numbers(P * K, K)

    def sums(self, x: Tensor, table: Tensor, bag: Callable[..., Any]) -> Tensor:
        """(M, K) -> (M, P width). table: (P K, ...), the rows of all tiles."""
        found = [x.new_empty(0, self._N)] if len(x) == 0 else []
        for row in x:
            weights = row.repeat(self._P)
            # mode 0: a sum
            y = bag(table, self._rows, self._starts, False, 0, False, weights)
            found.append((y[0] if isinstance(y, tuple) else y).view(1, -1))
        return found[0] if len(found) == 1 else torch.cat(found)


@cache
def _numbers(stop: int, step: int = 1) -> Tensor:
    """Return 0, step, ... below stop, int32. The layers of a model share them."""
    with torch.inference_mode(False):
        return torch.arange(0, stop, step, dtype=torch.int32)


def _tiled(weight: Tensor, width: int) -> Tensor:
    """Cut W^T into tiles: (N, K) -> (P, K, width), filled up with zeros."""
    N, K = weight.shape
    P = -(-N // width)
    tiles = weight.new_empty(P, K, width)
    whole = N // width
    tiles[:whole].copy_(weight[: whole * width].view(whole, width, K).transpose(1, 2))
    if whole < P:
        tiles[whole].zero_()
        tiles[whole, :, : N - whole * width] = weight[whole * width :].t()
    return tiles


def _by_tiles(x: Tensor, tiles: Any) -> Tensor:
    """Multiply many rows by each tile: (M, K), tiles (K, width) -> (M, P width)."""
    return torch.cat([OneDNN(tile.t()).product(x, None) for tile in tiles], dim=1)


# the layouts by name; the first one needs no copy
FLOAT: dict[str, Callable[[Tensor], Layout]] = {
    "onednn": OneDNN,
    "linear": Linear,
    "onednn_1": partial(OneDNNBlocks, rows=1),
    "onednn_5": partial(OneDNNBlocks, rows=5),
    "tiles_64": partial(Tiles, width=64),
    "tiles_96": partial(Tiles, width=96),
    "rows": Rows,
}
AS_STORED = ("onednn", "linear")
BYTES: dict[str, Callable[[Tensor, Tensor], ByteLayout]] = {
    "onednn_u8s8": OneDNNBytes,
    "fbgemm_7bit": FbgemmBytes,
    "tiles_64": partial(ByteTiles, width=64),
    "tiles_96": partial(ByteTiles, width=96),
    "rows": ByteRows,
}
HALVES: dict[str, Callable[[Tensor], Layout]] = {
    "fbgemm_fp16": FbgemmHalf,
    "fbgemm_fp16_head": FbgemmHalfHead,
    "rows": HalfRows,
}
