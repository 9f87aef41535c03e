"""What training will cost: memory before it begins, arithmetic while it runs.

Axes as in model.py: C = n_embd, L = n_layer, H = n_head, V = vocabulary; P parameters, M = B T
tokens in a micro-batch. The memory formula follows this model's autograd graph, not transformers'
in general. This file does not know the loop.
"""

import time

import torch

from nanogpt2.config import GPTConfig
from nanogpt2.ops import CHUNK_ELEMENTS, CHUNK_ELEMENTS_ELSEWHERE


def count_parameters(config: GPTConfig) -> int:
    """P = V C + S C + L (12 C^2 + 13 C) + 2 C for a context of S; the head is tied to V C."""
    c = config
    block = 12 * c.n_embd**2 + 13 * c.n_embd
    return (c.vocab_size + c.block_size + 2) * c.n_embd + c.n_layer * block


def memory_estimate(
    config: GPTConfig,
    batch_size: int,
    block_size: int,
    *,
    trainable: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    grad_accum: int = 1,
) -> int:
    """Peak bytes of a training step with AdamW, above what the process takes before the model.

        weights      4 P                                 fp32, whatever the products' type
        optimizer    8 T                                 two moments of the T trainable parameters
        activations  M L (64 C + 4 H)                    fp32: per block and token 16 C floats (two
                                                         residuals C, two normalised C, q k v 3 C,
                                                         attention C, 4 C before and after GELU)
                     M L (36 C + 4 H) + 24 L C^2         bf16: the residuals stay fp32; autocast's
                                                         copies of the blocks' matrices
        head         8 V C + 8 R V + 12 M C              the embedding's gradient and the product
                                                         added to it; R rows of logits and their
                                                         exponentials; ln_f's input, output, dx
        gradients    4 T                                 kept through the forward pass only by
                                                         grad_accum > 1

    The peak is where the loss is made (activations + head, + gradients with grad_accum > 1) or at
    the backward pass's end (gradients, and 8 V C: the embedding's from both its uses), whichever is
    more. A frozen embedding (T < P) has no 8 V C. With dropout the masks come on top (5 M L C), and
    on a CPU the attention matrices (9 M L H B_size, PyTorch's way without a fused kernel).
    """
    c = config
    params = count_parameters(c)
    trained = params if trainable is None else trainable
    tokens, width, vocab = batch_size * block_size, c.n_embd, c.vocab_size
    low = dtype != "float32"
    activations = tokens * c.n_layer * ((36 if low else 64) * width + 4 * c.n_head)
    if low:
        activations += 24 * c.n_layer * width**2
    if c.dropout:
        activations += 5 * tokens * c.n_layer * width
        if device == "cpu":
            activations += 9 * tokens * c.n_layer * c.n_head * block_size
    chunk = CHUNK_ELEMENTS.get(device, CHUNK_ELEMENTS_ELSEWHERE)
    embedding = 8 * vocab * width if trained == params else 0
    head = embedding + 8 * min(tokens * vocab, max(chunk, vocab)) + 12 * tokens * width
    gradients = 4 * trained
    at_loss = activations + head + (gradients if grad_accum > 1 else 0)
    return 4 * params + 8 * trained + max(at_loss, gradients + embedding)
