"""The cost of training: an estimate of the memory, and the arithmetic's speed.

Axes as in model.py: C = n_embd, F = the MLP's width, L = n_layer, H = n_head, V = vocabulary;
P parameters, M = B T tokens in a micro-batch. The memory formula follows this model's autograd
graph, not transformers' in general. This file does not know the loop.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch

from nanogpt2.chunked_loss import chunk_rows
from nanogpt2.config import GPTConfig
from nanogpt2.cpu.training import linear
from nanogpt2.memory import peak_memory


def memory_estimate(
    config: GPTConfig,
    batch_size: int,
    block_size: int,
    *,
    trainable: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    grad_accum: int = 1,
    labels: int = 0,
) -> int:
    """Peak bytes of a training step with AdamW, above what the process takes before the model.

        weights      4 P                                 fp32, whatever the products' type
        optimizer    8 T                                 two moments of the T trainable parameters
        activations  M L (24 C + 4 F + 4 H)              fp32 on a CPU: per block and token these
                                                         floats (two residuals C, q k v 3 C,
                                                         attention C, F before GELU)
                     M L (32 C + 8 F + 4 H)              fp32 elsewhere: two normalised C and F
                                                         after GELU more, which are not recomputed
                     M L (20 C + 4 F + 4 H)              bf16: the residuals stay fp32; autocast's
                       + L (8 C^2 + 4 C F)               copies of the blocks' matrices
        head         4 V C + 4 R V + 12 M C              the embedding's gradient; R rows of logits
                                                         (6 R V in bf16); ln_f's input, output, dx
        gradients    4 T                                 kept through the forward pass only by
                                                         grad_accum > 1

    The peak is the larger of two: at the loss (activations + head, + gradients with grad_accum > 1)
    or at the end of the backward pass (gradients, and on a GPU 8 V C: a tied embedding's gradient
    from each of its two uses). A frozen embedding (T < P) has no gradient. A classifier's embedding
    has none at the loss, and its loss has `labels` logits a token in place of V. Dropout adds its
    masks: 2 M L C on a GPU; on a CPU M L (16 C + 12 H block_size), because they are floats and
    PyTorch has no fused attention with dropout. On a CPU malloc leaves holes between tensors of
    many sizes: they add a third (a quarter in bf16) of everything but weights and optimizer. The
    effects of --compile and of several processes are not counted.

    Measured as VmHWM on a CPU after three steps of a `Trainer`, above a process that had trained a
    tiny model. The estimate was too low by 13 % (7 M parameters, 8 x 256 tokens), 4 % (11 M, V =
    257, 32 x 256), 2 % (the same with dropout, 16 x 256), 14 % (a classifier of 30 M, 16 x 256),
    and for 124 M at 4 x 256 by 2 % (2,256 MiB), 10 % with LoRA. It was too high by 1 % with
    grad_accum=2. The processor's products differ: on an Intel Xeon with AMX it was too low by 18 %
    (3 M parameters, 24 x 100, both types). Not compared on a GPU.
    """
    c = config
    params = c.n_parameters
    trained = params if trainable is None else trainable
    tokens, width, vocab = batch_size * block_size, c.n_embd, c.vocab_size
    low = dtype != "float32"
    per_width, per_inner = (20, 4) if low else (24, 4) if device == "cpu" else (32, 8)
    kept = per_width * width + per_inner * c.mlp_width + 4 * c.n_head
    activations = tokens * c.n_layer * kept
    if low:
        activations += c.n_layer * width * (8 * width + 4 * c.mlp_width)
    if c.dropout and device == "cpu":
        activations += tokens * c.n_layer * (16 * width + 12 * c.n_head * block_size)
    elif c.dropout:
        activations += tokens * c.n_layer * 2 * width
    scored = labels or vocab
    rows = min(tokens, chunk_rows(scored, width, device))
    embedding = 0 if labels or trained < params else 4 * vocab * width
    head = embedding + (6 if low else 4) * rows * scored + 12 * tokens * width
    gradients = 4 * trained
    at_loss = activations + head + (gradients if grad_accum > 1 else 0)
    if device != "cpu":
        uses = 2 * embedding if c.tie_word_embeddings else 0
        return 4 * params + 8 * trained + max(at_loss, gradients + uses)
    passing = max(at_loss, gradients)
    return 4 * params + 8 * trained + passing + passing // (4 if low else 3)


# ---- arithmetic

# bf16 peak of the tensor cores without sparsity, FLOP/s, from NVIDIA's datasheets. Keys are
# prefixes of the device's name, longer prefixes first
DATASHEET = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}
PROBE_SECONDS = 0.08


@dataclass(frozen=True)
class Rate:
    """A device's rate of matrix products, in FLOP/s, and the source of that number."""

    flops: float
    source: str


def model_flops(config: GPTConfig, tokens: int, block_size: int) -> float:
    """Count the FLOP of a forward and backward pass over `tokens`: tokens (6 N + 12 L C T).

    N is every parameter but the embeddings, which are added and never multiplied, unless the head
    is tied to one. 12 L C T is attention's two products, the masked half included (Chowdhery et al.
    2022, appendix B). Frozen weights and recomputation are ignored.
    """
    c = config
    looked_up = c.block_size + (0 if c.tie_word_embeddings else c.vocab_size)
    multiplied = c.n_parameters - looked_up * c.n_embd
    return float(tokens) * (6 * multiplied + 12 * c.n_layer * c.n_embd * block_size)


def device_rate(device: str, dtype: str) -> Rate:
    """Return the peak rate for mfu: a known GPU's bf16 datasheet, else a measurement."""
    if device == "cuda" and dtype == "bfloat16":
        name = torch.cuda.get_device_name()
        for beginning, flops in DATASHEET.items():
            if name.startswith(beginning):
                return Rate(flops, f"{name}'s bf16 peak by its datasheet")
    return Rate(measure_matmul_rate(device, dtype), "this device's own matrix products")


@cache
def measure_matmul_rate(device: str, dtype: str) -> float:
    """Measure the FLOP/s of square matrix products, the best within about PROBE_SECONDS.

    dtype: as in `--dtype`. The global random generator is not used.
    """
    size = 4096 if device == "cuda" else 512
    # random inputs: a GPU multiplies constants unrealistically fast
    own = torch.Generator(device).manual_seed(0)
    a = torch.rand(size, size, generator=own, device=device).to(getattr(torch, dtype))

    def seconds(products: int) -> float:
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(products):
            linear(a, a)
        _synchronize(device)
        return time.perf_counter() - started

    # the first product loads the library
    seconds(1)
    # time many products at once, to hide the cost of launch and synchronization
    products = max(1, min(50, int(PROBE_SECONDS / 5 / max(seconds(1), 1e-6))))
    best, until = seconds(products), time.perf_counter() + PROBE_SECONDS / 2
    while time.perf_counter() < until:
        best = min(best, seconds(products))
    return products * 2 * size**3 / best


def memory_used(device: str) -> int:
    """Return the peak memory in bytes: the GPU's, or this process's."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else peak_memory()


def _synchronize(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()
