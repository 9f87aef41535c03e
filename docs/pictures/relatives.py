"""Draw the attention masks of docs/relatives.md as SVG: `python docs/pictures/relatives.py`.

The masks are read off transformers' own models, tiny and random: a cell is filled where a
weight is above 0. `tests/test_lessons.py` compares. This file does not know the page's text.
"""

import runpy
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

DRAW = runpy.run_path(str(Path(__file__).with_name("draw.py")))
Picture, GREY, BLUE, ORANGE = (DRAW[name] for name in ("Picture", "GREY", "BLUE", "ORANGE"))

WORDS = ["The", "people", "of", "the", "United", "States"]
# XLNet reads the words in this order; a word sees those read before it
ORDER = [2, 0, 4, 1, 5, 3]


def seen(weights: Tensor) -> Tensor:
    """Weights (1, H, T, S) -> bool (T, S), True where a query looks at a key."""
    return weights[0].sum(dim=0) > 0


@torch.no_grad()
def masks() -> dict[str, dict[str, Tensor]]:
    """Return each model's masks: model -> attention -> bool (queries, keys)."""
    torch.manual_seed(0)
    T = len(WORDS)
    ids = torch.arange(1, T + 1)[None]
    eager = {"attn_implementation": "eager", "vocab_size": 16}
    gpt2 = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, **eager))
    bert = BertModel(
        BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **eager
        )
    )
    t5 = T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, **eager))
    bart = BartModel(
        BartConfig(
            d_model=8,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            **eager,
        )
    )
    xlnet = XLNetModel(XLNetConfig(d_model=8, n_layer=1, n_head=2, d_inner=8, **eager))
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in (("GPT-2", gpt2), ("BERT", bert)):
        weights = model.eval()(ids, output_attentions=True).attentions[0]
        found[name] = {"self-attention": seen(weights)}
    for name, model in (("T5", t5), ("BART", bart)):
        out = model.eval()(ids, decoder_input_ids=ids, output_attentions=True)
        found[name] = {
            "encoder": seen(out.encoder_attentions[0]),
            "decoder": seen(out.decoder_attentions[0]),
            "decoder to encoder": seen(out.cross_attentions[0]),
        }
    step = torch.tensor(ORDER).argsort()  # when each word is read
    hidden = (step[:, None] <= step[None]).float()[None]  # 1: the query may not see the key
    every = torch.eye(T)[None]  # predict every word
    weights = xlnet.eval()(ids, perm_mask=hidden, target_mapping=every, output_attentions=True)
    content, query = weights.attentions[0]
    found["XLNet"] = {"content stream": seen(content), "query stream": seen(query)}
    return found


def mask_picture(name: str, parts: dict[str, Tensor]) -> str:
    """Draw a model's masks side by side."""
    T, cell, width = len(WORDS), 22, 236
    at = Picture(60 + width * len(parts), 220, f"What a token of {name} sees")
    for n, (part, mask) in enumerate(parts.items()):
        left, top = 60 + n * width, 62
        at.text(left, 14, f"{name}: {part}")
        for t, word in enumerate(WORDS):
            at.text(left - 6, top + 15 + t * cell, word, "end", 11)
            at.text(left + 12 + t * cell, top - 6, word, size=11, turn=-40)
            for s in range(T):
                x, y = left + s * cell, top + t * cell
                if mask[t, s]:
                    at.box(x, y, cell - 2, cell - 2, ORANGE if s == t else BLUE, 0.75)
                else:
                    at.box(x, y, cell - 2, cell - 2, GREY, 0.12)
    at.text(60, 212, "a row for each query, a column for each key", size=11)
    return at.svg()


def pictures() -> dict[str, str]:
    """Draw all pictures: file name -> SVG."""
    return {
        f"mask_{name.lower().replace('-', '')}.svg": mask_picture(name, parts)
        for name, parts in masks().items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, svg in pictures().items():
        (Path(__file__).parent / name).write_text(svg, encoding="utf-8")
