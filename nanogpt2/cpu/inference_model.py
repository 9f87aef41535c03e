"""A model for generating only, on a CPU: weights prepacked for few rows, and narrowed on request.

A new token multiplies every weight by a single row, so a step takes as long as reading the weights.
Fewer bytes, in the order of their use, make a step faster; prepacked.py multiplies them. The
embedding is narrowed too, like the head that it is tied to. This model cannot be trained. This file
does not know how tokens are chosen, nor the format of a file.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from nanogpt2.config import IGNORE_INDEX, SCHEMES, GPTConfig
from nanogpt2.cpu import malloc
from nanogpt2.cpu.layouts import to_fp16
from nanogpt2.cpu.prepacked import (
    SCALE,
    PrepackedLinear,
    Release,
    can_multiply,
    prepacked_linear_for,
    scales,
    to_int8,
    widened,
)
from nanogpt2.model import GPT

EMBEDDING = "wte.weight"
HEAD = "lm_head.weight"
TABLES = (EMBEDDING, HEAD)  # (V, C)
MATRICES = (
    "attn.c_attn.weight",
    "attn.c_proj.weight",
    "mlp.c_fc.weight",
    "mlp.c_proj.weight",
    *TABLES,
)
CHUNK = 256  # rows of logits computed at once


class NarrowEmbedding(nn.Module):
    """Look up rows of a narrow matrix, or narrow them on lookup: int64 (...) -> (..., C)."""

    def __init__(self, weight: Tensor, scale: Tensor | None, scheme: str) -> None:
        """weight: (V, C), of any type. scale: float32 (V,), given with an int8 weight."""
        super().__init__()
        self.weight, self._scale, self._scheme = weight, scale, scheme

    @override
    def forward(self, ids: Tensor) -> Tensor:
        places = ids.flatten()
        rows = self.weight[places]
        if self._scheme == "fp16":
            x = to_fp16(rows).float()
        elif self._scale is None:
            scale = scales(rows)[:, None]
            x = (rows / scale).round_().mul_(scale)
        else:
            x = rows * self._scale[places][:, None]
        return x.view(*ids.shape, x.size(-1))

    def stored(self) -> dict[str, Tensor]:
        """Return the narrow matrix, with int8's scales, by the suffixes of their names."""
        if self._scheme == "fp16":
            return {"": to_fp16(self.weight)}
        q, scale = to_int8(self.weight) if self._scale is None else (self.weight, self._scale)
        return {"": q, SCALE: scale}


class InferenceGPT(GPT):
    """A GPT that generates, scores and measures, but cannot be trained."""

    def __init__(
        self,
        model: GPT,
        state: dict[str, Tensor],
        scheme: str | None,
        release: Release | None = None,
    ) -> None:
        """Take over the modules of `model` and the tensors of `state`; both are used up.

        state: matrices in any floating type, or int8 with scales; the rest in float32.
        release: given with mapped tensors; returns a tensor's pages to the system after use.
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
        # the head first: it is the largest, and narrowing holds it twice for a moment
        table, scale = state.pop(EMBEDDING), state.pop(EMBEDDING + SCALE, None)
        # lay out a tied head only beside a mapped embedding: a second copy would add a third of
        # the model to memory
        lays_out = release is not None and table.dtype == torch.float32
        table = widened(table, release) if self.scheme is None else table
        head = table, scale
        if not self.config.tie_word_embeddings:
            head, lays_out = (state.pop(HEAD), state.pop(HEAD + SCALE, None)), True
        self.head = prepacked_linear_for(*head, None, self.scheme, release, lays_out)
        if self.scheme is None:
            self.wte.weight = nn.Parameter(table, requires_grad=False)
        else:
            self.wte = NarrowEmbedding(table, scale, self.scheme)  # type: ignore[assignment]
        for n, block in enumerate(self.h):
            for part, name in (m.split(".")[:2] for m in MATRICES if m not in TABLES):
                module = getattr(block, part)
                bias = getattr(module, name).bias.detach()
                weight = f"h.{n}.{part}.{name}.weight"
                matrix = state.pop(weight), state.pop(weight + SCALE, None)
                product = prepacked_linear_for(*matrix, bias, self.scheme, release)
                product.register_buffer("bias", bias)
                setattr(module, name, product)

    @override
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.hidden_states(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x)
        # in chunks: all logits at once would take most of the memory
        parts = zip(x.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True)
        total = sum(F.cross_entropy(self.logits(x), y, reduction="sum") for x, y in parts)
        return total / (targets != IGNORE_INDEX).sum()

    @override
    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse `.half()`, `.to(...)` and the like: the products know one type and one device."""
        weight = fn(torch.empty(0))
        if (weight.dtype, weight.device.type) != (torch.float32, "cpu"):
            raise ValueError(
                f"a model for generating stays in float32 on a CPU, not {weight.dtype} on "
                f"{weight.device}: load_model takes a dtype and a device"
            )
        return self

    def __copy__(self) -> Self:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deep-copy the state: neither a file nor a packed matrix can be."""
        return _rebuilt, (self.config, self.kernels, self.scheme, dict(self.stored()))

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state that the model was made of, one tensor at a time."""
        for name, tensor in self.state_dict().items():
            if name != EMBEDDING:
                yield name, tensor
        tied, wte = self.config.tie_word_embeddings, self.wte
        if not tied:
            own = wte.stored() if isinstance(wte, NarrowEmbedding) else {"": wte.weight}
            for end, tensor in own.items():
                yield EMBEDDING + end, tensor
        products = {EMBEDDING if tied else HEAD: self.head} | {
            f"{name}.weight": m
            for name, m in self.h.named_modules(prefix="h")
            if isinstance(m, PrepackedLinear)
        }
        for name, product in products.items():
            for end, tensor in product.stored().items():
                yield name + end, tensor


def _rebuilt(
    config: GPTConfig, kernels: str, scheme: str | None, state: dict[str, Tensor]
) -> InferenceGPT:
    with torch.device("meta"):
        model = GPT(config)
    model.use_kernels(kernels, "cpu")
    return InferenceGPT(model, state, scheme)


def pack(model: GPT, scheme: str | None = None) -> InferenceGPT:
    """Turn a model on a CPU into a faster one that only generates; `model` itself is used up.

    scheme: fp16 or int8; None keeps float32. Raises ValueError for another scheme, and for a model
    that is not in float32 on a CPU.
    """
    weight = model.wpe.weight
    check_scheme(scheme, weight.device.type, weight.dtype)
    state = model.state_dict()
    # narrow the embedding first, so that the wide one can be freed
    if scheme == "fp16":
        state[EMBEDDING] = to_fp16(state[EMBEDDING])
    elif scheme == "int8":
        state[EMBEDDING], state[EMBEDDING + SCALE] = to_int8(state[EMBEDDING])
    return InferenceGPT(model, state, scheme)


def check_scheme(scheme: str | None, device: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a scheme, device or dtype that cannot be packed."""
    if scheme not in (None, *SCHEMES):
        raise ValueError(f"quantize must be one of {', '.join(SCHEMES)}, not {scheme!r}")
    if device != "cpu" or dtype != torch.float32:
        raise ValueError(
            f"quantize must come with device cpu and dtype float32, not {device} and "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if not can_multiply() or "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ValueError("quantize must come with a PyTorch for x86, with oneDNN and fbgemm")
