"""A model's matrices as prepared layers for few rows, kept from one text to the next.

An InferenceGPT's layers are prepared already. Those of a GPT that may be trained are made here: as
the weights are stored, at first, and they read them live. A layout is a second copy of a weight.
It is dropped once a gradient is computed, and made again after the weight has changed. A change is
noticed before each text: by the module, by the weight's place in memory, by PyTorch's count of its
changes, and by a sum of its bits, for `.data` counts nothing. Only a change by `.data` that keeps
the sum, as swapping two weights does, stays unseen. This file does not know how tokens are chosen.
"""

from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from nanogpt2.cpu import native
from nanogpt2.cpu.inference_model import InferenceGPT
from nanogpt2.cpu.layouts import AS_STORED
from nanogpt2.cpu.pace import Pace
from nanogpt2.cpu.plan import Plan
from nanogpt2.cpu.prepacked import FloatLinear, HalfLinear, Int8Linear, PrepackedLinear
from nanogpt2.cpu.tuning import table_for
from nanogpt2.model import GPT, LayerNorm

# steps of few rows after which the layers are laid out for blocks.c: about as many repay it
PAYS_AFTER = 16


class Layer(NamedTuple):
    """The parts of a model.py Block, its matrices prepared for few rows."""

    ln_1: LayerNorm
    c_attn: PrepackedLinear
    attn_c_proj: PrepackedLinear
    ln_2: LayerNorm
    c_fc: PrepackedLinear
    mlp_c_proj: PrepackedLinear
    scale: float  # of the queries
    approximate: str  # GELU's form

    def products(self) -> tuple[PrepackedLinear, ...]:
        """Return the four matrices, in the order of their use."""
        return self.c_attn, self.attn_c_proj, self.c_fc, self.mlp_c_proj


class Prepared:
    """The layers of a model, their plan and their pace. head: (..., C) -> (..., V)."""

    layers: list[Layer]
    head: PrepackedLinear
    pace: Pace
    blocks: native.Blocks | None  # the layers compiled, for few rows; None where not ready

    def __init__(self, model: GPT, tuned: bool = True) -> None:
        """tuned: False leaves every layout as it is."""
        if isinstance(model, InferenceGPT):
            self.head = model.head
        else:
            self.head = FloatLinear(model.head_weight, None, keeps=True)
        self.layers = [_layer(block) for block in model.h]
        self._modules = _modules(model)
        self._seen = [_state(tensor) for tensor in _weights(model)]
        products = self.products()
        self._least = min(p.shape[0] for p in products)  # outputs of a matrix
        # of each weight that a layout copies, the sum of its bits when it was copied
        self._sums: dict[int, int] = {}
        self._may_change = [] if isinstance(model, InferenceGPT) else products
        timed = [p for p in products if not isinstance(p, HalfLinear)]
        table = table_for(timed) if timed and tuned else None
        head = [p for p in products if p is self.head]
        self._body = Plan([p for p in products if p is not self.head], table)
        self._head = Plan(head, table)
        self.pace = Pace()
        self.blocks = None
        self._model = ref(model)
        self._epsilons = _epsilons(self.layers)
        # blocks.c has GELU in the tanh form alone, and one epsilon
        self._can_compile = len({*self._epsilons}) == 1 and all(
            layer.approximate == "tanh" for layer in self.layers
        )
        self._steps = 0  # of few rows
        self._choosing = Lock()  # one thread at a time changes layouts

    def products(self) -> list[PrepackedLinear]:
        """Return all matrices, in the order of their use."""
        return [*(p for layer in self.layers for p in layer.products()), self.head]

    def is_current(self, model: GPT) -> bool:
        """Return False once a weight or a layer of this model was replaced or changed."""
        if [*map(id, _modules(model))] != [*map(id, self._modules)]:
            return False
        if [_state(tensor) for tensor in _weights(model)] != self._seen:
            return False
        if _epsilons(self.layers) != self._epsilons:
            return False
        stored = [product.stored()[""] for product in self._may_change]
        return all(_sum_of_bits(stored[n]) == total for n, total in self._sums.items())

    def begin(self, rows: int, prompt: int, new: int) -> None:
        """Choose the first layouts; see Plan.begin."""
        with self._choosing:
            if self._compiles(rows) and isinstance(self.head, Int8Linear):
                # at once: where a text changes from PyTorch's rounding to C's, it may change
                # its words
                while self.blocks is None:
                    self._prepare_blocks(at_once=True)
                return
            self._body.begin(rows, prompt, new)
            self._head.begin(rows, 1, new)

    def count(self, rows: int, tokens: int) -> None:
        """Account for reading this many tokens in each of some rows."""
        with self._choosing:
            if tokens == 1 and self._compiles(rows):
                self._prepare_blocks()
            elif tokens == 1 or self.blocks is None:
                self.blocks = None
                self._body.count(rows * tokens)
            self._sum_copies()

    def count_head(self, rows: int) -> None:
        """Account for scoring this many rows."""
        with self._choosing:
            if not self._compiles(rows):
                self._head.count(rows)
            self._sum_copies()

    def layouts(self) -> dict[str, str]:
        """Return the present layout of each kind of matrix; several are joined by `+`."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            for name, product in zip(Layer._fields, layer, strict=True):
                if isinstance(product, PrepackedLinear):
                    found.setdefault(name, []).append(product.layout or "none yet")
        found["head"] = [self.head.layout or "none yet"]
        return {name: "+".join(dict.fromkeys(layouts)) for name, layouts in found.items()}

    def _compiles(self, rows: int) -> bool:
        return self._can_compile and native.can_run(rows, self._least)

    def _prepare_blocks(self, at_once: bool = False) -> None:
        """Lay out a layer a step for blocks.c, once that pays, the head at last."""
        self._steps += 1
        if self.blocks is not None or (self._steps < PAYS_AFTER and not at_once):
            return
        head = [self.head] if "rows" in self.head.layouts else []
        for products in (*(layer.products() for layer in self.layers), head):
            changing = [p for p in products if p.layout != "rows"]
            if changing:
                for product in changing:
                    product.lay_out("rows")
                return
        self.blocks = self._compiled_blocks()

    def _compiled_blocks(self) -> native.Blocks:
        model = self._model()
        assert model is not None
        layers, tensors = [], []
        for layer in self.layers:
            norms = [
                t.detach().contiguous()
                for ln in (layer.ln_1, layer.ln_2)
                for t in (ln.weight, ln.bias)
            ]
            found = [p.matrix() for p in layer.products()]
            matrices = [matrix for matrix, _ in found]
            layers.append(native.Layer(*[t.data_ptr() for t in norms], *matrices, layer.scale))
            tensors += [*norms, *(t for _, kept in found for t in kept)]
        c, c_fc = model.config, self.layers[0].c_fc
        # of the layers that are there: some may have been dropped
        shape: dict[str, Any] = {"n_layer": len(layers), "n_embd": c.n_embd, "n_head": c.n_head}
        shape |= {"n_inner": c_fc.shape[0], "epsilon": self._epsilons[0]}
        shape |= {"kind": native.KINDS[c_fc.matrix()[1][0].dtype]}
        return native.Blocks(layers, tensors, shape | {"middle": c_fc.middle})

    def _sum_copies(self) -> None:
        """Sum the bits of each weight that has just been copied."""
        for n, product in enumerate(self._may_change):
            if product.layout in AS_STORED:
                self._sums.pop(n, None)
            elif n not in self._sums:
                self._sums[n] = _sum_of_bits(product.stored()[""])


_prepared: WeakKeyDictionary[GPT, Prepared] = WeakKeyDictionary()


def prepared_for(model: GPT, tuned: bool = True) -> Prepared:
    """Return a model's prepared layers: those of the last text where they still hold.

    tuned: see Prepared.
    """
    prepared = _prepared.get(model)
    if prepared is None or not prepared.is_current(model):
        first = prepared is None
        _prepared[model] = prepared = Prepared(model, tuned)
        if first:
            _drop_when_trained(model)
    return prepared


def forget(model: GPT) -> None:
    """Drop a model's layouts; the next text begins with the weights as they are stored."""
    _prepared.pop(model, None)


def _drop_when_trained(model: GPT) -> None:
    """Forget the layouts with the next gradient."""
    weight = model.wpe.weight
    if weight.requires_grad and weight.is_leaf:
        # no reference to the model: it must be able to die
        place = ref(model)

        def drop(_: Tensor) -> None:
            handle.remove()
            if (trained := place()) is not None:
                forget(trained)

        handle = weight.register_post_accumulate_grad_hook(drop)


def matrices(block: Any) -> tuple[nn.Module, ...]:
    """Return the four matrices of a Block, in the order of their use."""
    return block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj


def is_product(layer: nn.Module) -> bool:
    """Tell whether a layer computes x W^T + b and nothing more; LoRA's layers add a product."""
    if isinstance(layer, PrepackedLinear):
        return True
    parameters = {name for name, _ in layer.named_parameters()}
    return isinstance(layer, nn.Linear) and parameters == {"weight", "bias"}


def _layer(block: Any) -> Layer:
    c_attn, attn_c_proj, c_fc, mlp_c_proj = map(_product, matrices(block))
    scale, approximate = block.attn.scale, block.mlp.approximate
    return Layer(block.ln_1, c_attn, attn_c_proj, block.ln_2, c_fc, mlp_c_proj, scale, approximate)


def _epsilons(layers: Sequence[Layer]) -> list[float]:
    return [ln.eps for layer in layers for ln in (layer.ln_1, layer.ln_2)]


def _product(layer: Any) -> PrepackedLinear:
    if isinstance(layer, PrepackedLinear):
        return layer
    return FloatLinear(layer.weight, layer.bias, keeps=True)


def _modules(model: GPT) -> list[nn.Module]:
    """Return all modules that prepared layers read."""
    own = "head" if isinstance(model, InferenceGPT) else "lm_head"
    head = getattr(model, own, model.wte)
    blocks: list[Any] = [*model.h]
    return [head, *(m for b in blocks for m in (b.ln_1, b.ln_2, *matrices(b)))]


def _weights(model: GPT) -> list[Tensor]:
    """Return all weights and biases that prepared layers or blocks.c read and that may change."""
    blocks: list[Any] = [*model.h]
    layers: list[Any] = [ln for block in blocks for ln in (block.ln_1, block.ln_2)]
    weights: list[Tensor] = []
    if not isinstance(model, InferenceGPT):
        layers += [m for block in blocks for m in matrices(block)]
        weights.append(model.head_weight)
    return [*weights, *(t for m in layers for t in (m.weight, m.bias))]


def _state(tensor: Tensor) -> tuple[int, int]:
    """Return a tensor's place in memory and PyTorch's count of its changes."""
    # PyTorch counts no changes of an inference tensor
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _sum_of_bits(weight: Tensor) -> int:
    """Sum a weight's bits as whole numbers, so that one changed number changes the sum."""
    flat = weight.detach().t() if weight.t().is_contiguous() else weight.detach().contiguous()
    flat = flat.reshape(-1)
    even = len(flat) // 2 * 2
    total = int(flat[even:].view(torch.int32).sum())
    if flat.data_ptr() % 8 == 0 and flat.storage_offset() % 2 == 0:
        return total + int(flat[:even].view(torch.int64).sum())
    return total + int(flat[:even].view(torch.int32).sum())
