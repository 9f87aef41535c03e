"""GPT-2: a stack of blocks that reads the tokens so far and scores every possible next token.

Read bottom up. Attention mixes information between positions. The MLP works on each position alone.
A Block adds both to a running sum, the residual stream. GPT embeds tokens, runs the blocks, and
compares the result with every token's embedding.

Axes: B batch, T new tokens, S all tokens (new and cached), C = n_embd, H heads, D = C // H,
V vocabulary. Names are OpenAI's, so the released checkpoints load as they are. The operations
themselves are in ops.py. This file knows neither training nor sampling nor files.

OpenAI's models are GPTConfig's defaults. Others' differ in the MLP's width, its GELU, the scale of
the queries, or have a head of their own; each takes a line here.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; openai/gpt-2
src/model.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanogpt2 import ops
from nanogpt2.config import GPTConfig
from nanogpt2.kv_cache import KVCache, SharedCache


class LayerNorm(nn.Module):
    """Bring each position to mean 0 and variance 1, then scale and shift."""

    kernels = "torch"  # GPT.use_kernels sets it

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.eps = config.layer_norm_epsilon

    def forward(self, x: ops.Residual) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps, self.kernels)


class CausalSelfAttention(nn.Module):
    """Let every position gather from itself and earlier positions, with H heads side by side."""

    kernels = "torch"  # GPT.use_kernels sets it

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.scale = config.query_scale(layer)
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: ops.Mask = None, cache: KVCache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C); `mask` (B, 1, T, S) is True where a query may look."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if self.scale != 1:
            qkv = torch.cat([self.scale * qkv[:, :, :1], qkv[:, :, 1:]], dim=2)
        if cache is None:
            dropout = self.dropout if self.training else 0.0
            y = ops.self_attention(qkv, mask, dropout, self.kernels)  # (B, T, H, D)
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, H, T, D)
            k, v = cache.extend(self.layer, k, v)  # each (B, H, S, D)
            # a single new query is the last position: it may see every key, so needs no mask
            causal = T > 1 and not isinstance(mask, Tensor)
            y = ops.attention(q, k, v, causal=causal, mask=mask, kernels=self.kernels)
            y = y.transpose(1, 2)  # (B, T, H, D)
        y = y.reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Transform each position on its own: widen four times, bend, narrow."""

    kernels = "torch"  # GPT.use_kernels sets it

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        # F.gelu's names
        self.approximate = "tanh" if config.activation_function == "gelu_new" else "none"
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = ops.linear_gelu(x, self.c_fc, self.kernels, self.approximate)  # (B, T, 4C)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Communicate, then compute. Both read a normalised copy and add to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: ops.Residual, mask: ops.Mask = None, cache: KVCache | None = None
    ) -> ops.Residual:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole network, freshly initialised. `nanogpt2.load_model` fills it from a checkpoint."""

    kernels = "torch"
    # generation_config.json's, the defaults of generate()
    generation_options: Mapping[str, Any] | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw GPT-2's initialisation.

        Every block adds twice to the residual stream. Shrinking those projections by
        sqrt(2 n_layer) keeps the stream's variance the same at any depth.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)
            else:
                std = 0.01 if "wpe" in name else residual_std if "c_proj" in name else 0.02
                nn.init.normal_(parameter, std=std)

    def use_kernels(self, asked: str, device: torch.device | str | None = None) -> None:
        """Compute by "reference", "torch" or "triton" from now on, or let "auto" choose.

        device: where the model will run, by default its present device. `ops.choose_kernels` says
        what auto chooses. Raises ValueError for triton where triton cannot run, or cannot take
        heads of this size.
        """
        device = self.wte.weight.device if device is None else device
        shape = self.config.n_embd, self.config.n_head
        self.kernels = ops.choose_kernels(asked, device, *shape)
        for module in self.modules():
            if isinstance(module, LayerNorm | CausalSelfAttention | MLP):
                module.kernels = self.kernels

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Score every next token, or measure how badly the given targets were predicted.

        idx: int64 (B, T), T <= block_size. Without targets -> logits (B, T, V). With targets, int64
        (B, T) where IGNORE_INDEX does not count -> their mean cross-entropy in nats, () in float32.
        """
        x = self.hidden_states(idx)  # (B, T, C)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def hidden_states(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: ops.Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run the blocks: int64 (B, T) -> (B, T, C), the last layer's output, normalised.

        positions: int64 (B, T) or (T,), by default the next after the cache's length. mask: bool
        (B, 1, T, S), True where a query may look, by default causal. cache: grows by T positions;
        a SharedCache takes no tensor as mask: it knows the padding itself.
        Raises ValueError for a context longer than block_size.
        """
        T = idx.size(1)
        past = cache.length if cache is not None else 0
        if past + T > self.config.block_size:
            raise ValueError(
                f"the context is at most {self.config.block_size} tokens, not {past + T}"
            )
        if positions is None:
            positions = torch.arange(past, past + T, device=idx.device)  # (T,)
        if mask is None and cache is not None:
            mask = cache.seen(T)
        x = self.wte(idx) + self.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        x = ops.residual_stream(x, self.kernels)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    @property
    def head_weight(self) -> Tensor:
        """The head (V, C): the embedding itself, but for untied models."""
        return self.wte.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, x: Tensor) -> Tensor:
        """Compare hidden states with every token's embedding: (B, T, C) -> (B, T, V)."""
        return F.linear(x, self.head_weight)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of x's logits, in chunks of rows: (B, T, C), int64 (B, T) -> ()."""
        rows, weight = x.flatten(0, 1), self.head_weight
        return ops.linear_cross_entropy(rows, weight, targets.flatten(), self.kernels)

    def new_cache(
        self, batch_size: int, max_length: int | None = None, masked: bool = False
    ) -> KVCache:
        """Return an empty cache for this model, on its device and in its dtype.

        masked: the caller will pass masks as tensors, which only a KVCache can serve.
        """
        c = self.config
        weight = self.wte.weight
        length = c.block_size if max_length is None else max_length
        kind = SharedCache if self.kernels == "triton" and not masked else KVCache
        return kind(
            c.n_layer,
            batch_size,
            c.n_head,
            length,
            c.n_embd // c.n_head,
            weight.device,
            weight.dtype,
        )
