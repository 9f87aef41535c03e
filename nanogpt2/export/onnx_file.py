"""--to onnx: model.onnx with a cache, by torch's exporter, and its weights in model.onnx_data.

The names are those of optimum's decoders, which transformers.js reads too:

    input_ids int64 (B, T), attention_mask int64 (B, P + T), position_ids int64 (B, T),
    past_key_values.N.key and .value float32 (B, H, P, D)
    -> logits float32 (B, T, V), present.N.key and .value (B, H, P + T, D)

P is 0 for a prompt. The mask is 0 for padding. The weights lie beside the graph at any size: a
protobuf ends at 2 GB, and this way one tensor at a time is in memory.

The check runs ten prompts by onnxruntime, the prompt first and then the model's greedy tokens one a
step with the cache: logits within 1e-4.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt2.checkpoints.folder import config_files
from nanogpt2.checkpoints.tokenizer_files import tokenizer_files
from nanogpt2.export.counterpart import answers, largest_difference
from nanogpt2.export.prompts import greedy_logits, prompts_for
from nanogpt2.export.source import Source
from nanogpt2.model import GPT

FILE, DATA = "model.onnx", "model.onnx_data"
CACHED = 8  # steps with the cache
OPSET = 20  # the first with a GELU
Pair = tuple[Tensor, Tensor]


class GrowingCache:
    """A KVCache as a graph needs it: given keys and values, and new tensors of both together."""

    def __init__(self, past: Sequence[Pair]) -> None:
        """past: of each layer k and v, (B, H, P, D)."""
        self.past, self.present = past, list[Pair]()

    def extend(self, layer: int, k: Tensor, v: Tensor) -> Pair:
        """Return all keys and values, (B, H, P + T, D), for those of T new tokens."""
        old_k, old_v = self.past[layer]
        self.present.append((torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)))
        return self.present[-1]


class Step(nn.Module):
    """What the graph computes: GPT.hidden_states and logits, with the cache as arguments."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Pair]
    ) -> tuple[Tensor, list[Pair]]:
        """Score the next token after each; the shapes are at the top of the file."""
        T, S = input_ids.size(1), attention_mask.size(1)
        key = torch.arange(S)  # (S,)
        query = torch.arange(S - T, S)[:, None]  # (T, 1)
        # padding sees itself: a row of softmax with nothing to see would be NaN
        mask = (attention_mask[:, None].bool() & (key < query)) | (key == query)  # (B, T, S)
        cache: Any = GrowingCache(past)
        x = self.model.wte(input_ids) + self.model.wpe(position_ids)  # (B, T, C)
        for block in self.model.h:
            x = block(x, mask[:, None], cache)
        return self.model.logits(self.model.ln_f(x)), cache.present


def write(source: Source, folder: Path) -> None:
    """Write the graph, its weights, and the texts that optimum and transformers.js read."""
    import onnx_ir

    with _quiet():
        program = _exported(source.model)
        onnx_ir.save(program.model, folder / FILE, external_data=DATA, size_threshold_bytes=1024)
    c = source.model.config
    texts = config_files(c, "float32", options=source.model.generation_options)
    if source.tokenizer is not None:
        texts |= tokenizer_files(source.tokenizer, c.block_size, source.is_chat)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())


def _exported(model: GPT) -> Any:
    """Return torch's ONNXProgram for any batch size, length and past."""
    c = model.config
    # examples; the exporter would fix a size of 1
    B, T, P = 2, 3, 4
    shape = (B, c.n_head, P, c.n_embd // c.n_head)
    # each its own tensor: the exporter takes the same one twice for one input
    past = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(c.n_layer)]
    ids, positions = (torch.zeros(B, T, dtype=torch.int64) for _ in range(2))
    mask = torch.ones(B, P + T, dtype=torch.int64)
    new, grown, old = {0: "batch", 1: "length"}, {0: "batch", 1: "total"}, {0: "batch", 2: "past"}
    layers = [f"{n}.{kind}" for n in range(c.n_layer) for kind in ("key", "value")]
    return torch.onnx.export(
        Step(model).eval(),
        (ids, mask, positions, past),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        dynamic_shapes=(new, grown, new, [(old, old)] * c.n_layer),
        input_names=[
            "input_ids",
            "attention_mask",
            "position_ids",
            *(f"past_key_values.{layer}" for layer in layers),
        ],
        output_names=["logits", *(f"present.{layer}" for layer in layers)],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and logs, which concern its own parts, from the user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def check(source: Source, folder: Path) -> dict[str, Any]:
    """Run ten prompts by onnxruntime. Raises CheckError where it differs."""
    prompts = prompts_for(source.model, source.tokenizer, CACHED)
    ours = [torch.stack([*greedy_logits(source.model, p, 1 + CACHED)]) for p in prompts]
    del source.model
    job = {"prompts": prompts, "tokens": [logits.argmax(dim=1).tolist() for logits in ours]}
    found = answers("with_onnxruntime", folder, job)
    expected = torch.cat(ours).numpy()  # (all steps, V)
    difference = largest_difference(expected, found["logits"], "onnxruntime")
    # of each prompt: whether every step's likeliest token is the model's
    ends = np.cumsum([len(logits) for logits in ours])[:-1]
    same = np.split(expected.argmax(axis=1) == found["logits"].argmax(axis=1), ends)
    return {
        "onnxruntime": str(found["version"]),
        "logits_difference": difference,
        "prompts": len(prompts),
        "prompts_equal": sum(bool(steps.all()) for steps in same),
        "cached_steps": len(expected) - len(prompts),
    }
