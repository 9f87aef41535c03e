"""A model for generating only: its weights laid out, and if asked for narrowed, for few rows.

One new token multiplies every weight by a single row, so a step takes as long as the weights take
to be read. Fewer bytes, in the order in which they are needed, are what makes it faster:

    float32   the same numbers; in oneDNN's blocks, once that pays
    fp16      2 bytes a weight
    int8      1 byte: W = s q, with one s for each output, |q| <= 127

The input of int8 has 8 bits as well, 7 on a processor without VNNI. Each row x has a range of its
own, so that a text does not depend on its neighbours. With d, the range over 255 (127), x is about
low + d u for whole numbers u from 0 to 255 (127). The product is given u - m, with m in the middle,
and

    x W^T = d (u - m) W^T + (low + m d) (the sum of W over its inputs)

The tied embedding is narrowed with its head. All of this is for a CPU, and none of it can be
trained. This file does not know how tokens are chosen, nor what a file looks like.
"""

import ctypes
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt2.config import SCHEMES
from nanogpt2.model import GPT

EMBEDDING = "wte.weight"
MATRICES = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
    EMBEDDING,
)
SCALE = "_scale"  # of int8, behind the matrix's name: float32 (N,)
# rows that oneDNN's blocks are laid out for: 1 to 16 are about as fast
FEW_ROWS = 8
# rows multiplied, few at a time, after which laying a matrix out has paid for itself: the head and
# the first block, then one block after the other, so that no step takes long
PAYS_AFTER = 128
CHUNK = 256  # rows of logits, or of a matrix that is narrowed, at once
MOST = torch.finfo(torch.float16).max
Release = Callable[[Tensor], None]
LEAST = 1e-30  # of a step or scale, which is divided by


class Product(nn.Module, ABC):
    """x W^T + b for a weight (N, K): (..., K) -> (..., N), and what often comes next."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""

    def gelu(self, x: Tensor) -> Tensor:
        """The tanh form of GELU, of x W^T + b."""
        return F.gelu(self(x), approximate="tanh")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """x W^T + b + residual, which is (..., N)."""
        return self(x).add_(residual)

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The weight, by the ends of its tensors' names."""


class FloatProduct(Product):
    """In float32 by oneDNN; its weight is laid out, for good, after products of so many rows."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        lays_out_after: int = 0,
        release: Release | None = None,
    ) -> None:
        """weight: in either order in memory. lays_out_after: 0 is never.

        release: called with the weight once it is laid out.
        """
        super().__init__()
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._left, self._release = lays_out_after, release

    def forward(self, x: Tensor) -> Tensor:
        """See Product."""
        weight = self._weight_for(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self._bias, "none", [], "")

    def gelu(self, x: Tensor) -> Tensor:
        """See Product."""
        weight = self._weight_for(x)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self._bias, "gelu", [], "tanh")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """See Product."""
        weight = self._weight_for(x)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, self._bias, "add")

    def stored(self) -> dict[str, Tensor]:
        """See Product."""
        return {"": self._weight.to_dense() if self._weight.is_mkldnn else self._weight}

    def _weight_for(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.size(-1)
        if self._left > 0 and rows <= FEW_ROWS:
            self._left -= rows
            if self._left <= 0:
                stored = self._weight
                self._weight = torch.ops.mkldnn._reorder_linear_weight(stored, FEW_ROWS)
                _return_free_memory()
                if self._release is not None:
                    self._release(stored)
        return self._weight


class HalfProduct(Product):
    """With a weight of 16 bits, by fbgemm; the sums are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: of any floating type; fbgemm rounds it."""
        super().__init__()
        wide = weight.float().contiguous()
        # or it would be written over: it may be a file's, or the model's own
        low, high = torch.aminmax(wide)
        if max(-low, high) > MOST:
            wide = wide.clamp(-MOST, MOST)
        self._packed = torch.ops.quantized.linear_prepack_fp16(wide, bias)

    def forward(self, x: Tensor) -> Tensor:
        """See Product."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)

    def stored(self) -> dict[str, Tensor]:
        """See Product."""
        return {"": torch.ops.quantized.linear_unpack_fp16(self._packed)[0].half()}


class Int8Product(Product):
    """With q of 8 bits and a scale s for each output, by oneDNN; see the module."""

    middle = 128  # m

    def __init__(self, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """q: int8 (N, K); scale: float32 (N,)."""
        super().__init__()
        # some rows at a time, because they are summed in 8 bytes each
        sums = torch.cat([rows.sum(dim=1) for rows in q.split(CHUNK)])
        self._scale, self._sums = scale, sums * scale  # each (N,)
        self._bias = torch.zeros_like(scale) if bias is None else bias.detach()
        self._packed = self._pack(q)

    def forward(self, x: Tensor) -> Tensor:
        """See Product."""
        u, d, low = self._narrowed(x)
        y = self._times(u)
        return torch.addcmul(self._bias, low.add(d, alpha=self.middle), self._sums).addcmul_(d, y)

    def stored(self) -> dict[str, Tensor]:
        """See Product."""
        return {"": self._unpacked(), SCALE: self._scale}

    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, uint8 (..., K), with d and low, each (..., 1)."""
        # u, and in the last 8 bytes of a row d and low
        rows = torch.ops.quantized.embedding_bag_byte_prepack(x)
        d = rows[..., -8:-4].contiguous().view(torch.float32)
        # that one low does not know what is no number
        return rows[..., :-8], d, x.amin(dim=-1, keepdim=True)

    def _pack(self, q: Tensor) -> Any:
        self._zero = torch.zeros(len(q), dtype=torch.int64)
        # one that is not contiguous would be taken for another
        return torch.ops.onednn.qlinear_prepack(q.contiguous(), None)

    def _times(self, u: Tensor) -> Tensor:
        """(u - m) W^T."""
        weight = self._packed, self._scale, self._zero
        # no bias, no scale of the output, nothing after it
        rest: tuple[Any, ...] = None, 1.0, 0, torch.float32, "none", [], ""
        return torch.ops.onednn.qlinear_pointwise(u, 1.0, self.middle, *weight, *rest)

    def _unpacked(self) -> Tensor:
        return self._packed.to_dense().t()


class Int7Product(Int8Product):
    """The same with 7 bits of input, by fbgemm, which is faster on a processor without VNNI."""

    middle = 64

    def _narrowed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, d, low = super()._narrowed(x)
        # two steps become one, and its middle is half a step above the first
        return u >> 1, 2 * d, low + d / 2

    def _pack(self, q: Tensor) -> Any:
        with warnings.catch_warnings():
            # tensors of this kind are deprecated, but the product takes no other
            warnings.simplefilter("ignore")
            zero = torch.zeros(len(q), dtype=torch.int64)
            weight = torch._make_per_channel_quantized_tensor(q, self._scale.double(), zero, 0)
            return torch.ops.quantized.linear_prepack(weight, None)

    def _times(self, u: Tensor) -> Tensor:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            u.float().sub_(self.middle), 1.0, self.middle, self._packed
        )

    def _unpacked(self) -> Tensor:
        return torch.ops.quantized.linear_unpack(self._packed)[0].int_repr()


class NarrowEmbedding(nn.Module):
    """Rows of a matrix, narrow or narrowed when they are asked for: int64 (...) -> (..., C)."""

    def __init__(self, weight: Tensor, scale: Tensor | None, scheme: str) -> None:
        """weight: (V, C), of any type; scale: float32 (V,) where it is int8."""
        super().__init__()
        self.weight, self._scale, self._scheme = weight, scale, scheme

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        places = ids.flatten()
        rows = self.weight[places]
        if self._scheme == "fp16":
            x = to_fp16(rows).float()
        else:
            q, scale = to_int8(rows) if self._scale is None else (rows, self._scale[places])
            x = q * scale[:, None]
        return x.view(*ids.shape, x.size(-1))


class PackedGPT(GPT):
    """A GPT that generates, scores and measures, but cannot be trained."""

    def __init__(
        self,
        model: GPT,
        state: dict[str, Tensor],
        scheme: str | None,
        release: Release | None = None,
    ) -> None:
        """Make the parts of `model` anew from a GPT's tensors, which are used up, as is `model`.

        state: its matrices in any floating type, or int8 with scales; the rest in float32.
        release: what they are kept in is a file, whose pages are let go when they have been used.
        """
        nn.Module.__init__(self)
        self.config, self.scheme = model.config, scheme
        self.h, self.wte, self.wpe, self.ln_f = model.h, model.wte, model.wpe, model.ln_f
        rest = {n: t for n, t in state.items() if not n.removesuffix(SCALE).endswith(MATRICES)}
        self.load_state_dict(rest, strict=False, assign=True)
        for n, block in enumerate(self.h):
            for part, name in (m.split(".")[:2] for m in MATRICES if m != EMBEDDING):
                module = getattr(block, part)
                bias = getattr(module, name).bias.detach()
                weight = f"h.{n}.{part}.{name}.weight"
                matrix = state.pop(weight), state.pop(weight + SCALE, None)
                product = _product(*matrix, bias, scheme, PAYS_AFTER + FEW_ROWS * n, release)
                product.register_buffer("bias", bias)
                setattr(module, name, product)
        table, scale = state.pop(EMBEDDING), state.pop(EMBEDDING + SCALE, None)
        # laid out beside its rows it would be a third of the model more, unless they are in a file
        after = PAYS_AFTER if release is not None and table.dtype == torch.float32 else 0
        table = _wide(table, release) if scheme is None else table
        self.head = _product(table, scale, None, scheme, after, release)
        if scheme is None:
            self.wte.weight = nn.Parameter(table, requires_grad=False)
        else:
            self.wte = NarrowEmbedding(table, scale, scheme)  # type: ignore[assignment]
            _return_free_memory()
        self.requires_grad_(False).eval()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """See GPT."""
        x = self.hidden_states(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        # some rows at a time, or the logits would be most of the memory
        parts = zip(x.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True)
        total = sum(F.cross_entropy(self.logits(x), y, reduction="sum") for x, y in parts)
        return total / (targets != -100).sum()

    def logits(self, x: Tensor) -> Tensor:
        """See GPT."""
        return self.head(x)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The state that this was made of, a tensor at a time."""
        for name, tensor in self.state_dict().items():
            if name != EMBEDDING:
                yield name, tensor
        products = {EMBEDDING: self.head} | {
            f"{name}.weight": m
            for name, m in self.h.named_modules(prefix="h")
            if isinstance(m, Product)
        }
        for name, product in products.items():
            for end, tensor in product.stored().items():
                yield name + end, tensor


def pack(model: GPT, scheme: str | None = None) -> PackedGPT:
    """Make a model on a CPU one that only generates, faster; `model` itself is used up.

    scheme: fp16 or int8, by default float32 as it is. Raises ValueError for another one, and for a
    model that is not in float32 on a CPU.
    """
    weight = model.wpe.weight
    check_scheme(scheme, weight.device.type, weight.dtype)
    state = model.state_dict()
    # the products are made of the narrow one, so that the wide one can go
    if scheme == "fp16":
        state[EMBEDDING] = to_fp16(state[EMBEDDING])
    elif scheme == "int8":
        state[EMBEDDING], state[EMBEDDING + SCALE] = to_int8(state[EMBEDDING])
    return PackedGPT(model, state, scheme)


def check_scheme(scheme: str | None, device: str, dtype: torch.dtype) -> None:
    """Raise ValueError where a model cannot be packed so."""
    if scheme not in (None, *SCHEMES):
        raise ValueError(f"quantize must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    if device != "cpu" or dtype != torch.float32:
        raise ValueError(
            f"quantize must come with device cpu and dtype float32, not {device} and "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if not can_pack() or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("quantize must come with a PyTorch for x86, with oneDNN and fbgemm")


def can_pack() -> bool:
    """Whether this PyTorch has the products, which are no part of its stable interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def to_fp16(weight: Tensor) -> Tensor:
    """To float16; what is too large becomes the largest number there is."""
    return weight.clamp(-MOST, MOST).half()


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> q, int8 (N, K), and the scales s, float32 (N,); see the module."""
    largest = torch.linalg.vector_norm(weight.float(), float("inf"), dim=1)  # (N,)
    scale = (largest / 127).clamp_(min=LEAST)
    q = torch.empty(weight.shape, dtype=torch.int8)
    # some rows at a time: the embedding is a third of the model
    for part, rows, s in zip(*(t.split(CHUNK) for t in (q, weight, scale)), strict=True):
        part.copy_((rows / s[:, None]).round_())
    return q, scale


def _product(
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    scheme: str | None,
    lays_out_after: int,
    release: Release | None,
) -> Product:
    """scale: of a weight that is int8 already."""
    if scheme is None:
        return FloatProduct(_wide(weight, release), bias, lays_out_after, release)
    product: Product
    if scheme == "fp16":
        product = HalfProduct(weight, bias)
    else:
        # without it two products are added in 16 bits
        kind = Int8Product if torch.cpu._is_vnni_supported() else Int7Product
        product = kind(*(to_int8(weight) if scale is None else (weight, scale)), bias)
    if release is not None:
        release(weight)
    return product


def _wide(weight: Tensor, release: Release | None) -> Tensor:
    wide = weight.float()
    if wide is not weight and release is not None:
        release(weight)
    return wide


def _return_free_memory() -> None:
    """Give the system what malloc holds free, where malloc is glibc's.

    glibc does not put a matrix where another one of its size was, and would keep room for both.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
