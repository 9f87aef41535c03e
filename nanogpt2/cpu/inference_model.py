"""A model for generating only: its weights laid out, and if asked for narrowed, for few rows.

One new token multiplies every weight by a single row, so a step takes as long as the weights take
to be read. Fewer bytes, in the order in which they are needed, are what makes it faster; how they
are multiplied is in prepacked.py. The tied embedding is narrowed with its head. All of this is for
a CPU, and none of it can be trained. This file does not know how tokens are chosen, nor what a
file looks like.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt2.config import SCHEMES
from nanogpt2.cpu import malloc
from nanogpt2.cpu.prepacked import (
    FEW_ROWS,
    SCALE,
    PrepackedLinear,
    Release,
    can_multiply,
    prepacked_linear_for,
    to_fp16,
    to_int8,
    widened,
)
from nanogpt2.model import GPT

EMBEDDING = "wte.weight"
MATRICES = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
    EMBEDDING,
)
# rows multiplied, few at a time, after which laying a matrix out has paid for itself: the head and
# the first block, then one block after the other, so that no step takes long
PAYS_AFTER = 128
CHUNK = 256  # rows of logits at once


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


class InferenceGPT(GPT):
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
        self._make_products(state, release)
        malloc.return_free()
        self.requires_grad_(False).eval()

    def _make_products(self, state: dict[str, Tensor], release: Release | None) -> None:
        # the head first: it is the largest, and narrow it is there twice for a moment
        table, scale = state.pop(EMBEDDING), state.pop(EMBEDDING + SCALE, None)
        # laid out beside its rows it would be a third of the model more, unless they are in a file
        after = PAYS_AFTER if release is not None and table.dtype == torch.float32 else 0
        table = widened(table, release) if self.scheme is None else table
        self.head = prepacked_linear_for(table, scale, None, self.scheme, after, release)
        if self.scheme is None:
            self.wte.weight = nn.Parameter(table, requires_grad=False)
        else:
            self.wte = NarrowEmbedding(table, scale, self.scheme)  # type: ignore[assignment]
        for n, block in enumerate(self.h):
            for part, name in (m.split(".")[:2] for m in MATRICES if m != EMBEDDING):
                module = getattr(block, part)
                bias = getattr(module, name).bias.detach()
                weight = f"h.{n}.{part}.{name}.weight"
                matrix = state.pop(weight), state.pop(weight + SCALE, None)
                after = PAYS_AFTER + FEW_ROWS * n
                product = prepacked_linear_for(*matrix, bias, self.scheme, after, release)
                product.register_buffer("bias", bias)
                setattr(module, name, product)

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
            if isinstance(m, PrepackedLinear)
        }
        for name, product in products.items():
            for end, tensor in product.stored().items():
                yield name + end, tensor


def pack(model: GPT, scheme: str | None = None) -> InferenceGPT:
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
    return InferenceGPT(model, state, scheme)


def check_scheme(scheme: str | None, device: str, dtype: torch.dtype) -> None:
    """Raise ValueError where a model cannot be packed so."""
    if scheme not in (None, *SCHEMES):
        raise ValueError(f"quantize must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    if device != "cpu" or dtype != torch.float32:
        raise ValueError(
            f"quantize must come with device cpu and dtype float32, not {device} and "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if not can_multiply() or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("quantize must come with a PyTorch for x86, with oneDNN and fbgemm")
