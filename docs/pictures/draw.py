"""Draw the pictures of the pages that teach as SVG: `python docs/pictures/draw.py`.

The numbers come from the packaged demo model, also trained for some steps, and from networks before
any training. The colours
are of middle brightness on no background, so that a picture reads on white and on black. The same
numbers give the same bytes; `tests/test_lessons.py` compares. This file does not know the pages'
text.
"""

import math
import runpy
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from nanogpt2 import GPT, GPTConfig, Tokenizer, load_model, load_tokenizer
from nanogpt2.generation.processors import keep_top_k, keep_top_p, scale_temperature
from nanogpt2.training.optim import learning_rate

GREY, BLUE, ORANGE = "#7a8088", "#3b82f6", "#d9782b"


class Picture:
    """Shapes on a canvas; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="12" '
            f'fill="{GREY}" role="img">',
            f"<title>{escape(title)}</title>",
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        anchor: str = "start",
        size: int = 12,
        colour: str = GREY,
        turn: int = 0,
    ) -> None:
        """Write words; `turn` is in degrees."""
        turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
        self._lines.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{colour}"{turned}>{escape(words)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, opacity: float = 1
    ) -> None:
        """Fill a rectangle."""
        self._lines.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'fill="{colour}" fill-opacity="{opacity:.2f}"/>'
        )

    def cells(self, places: list[tuple[int, int, float]], size: int) -> None:
        """Fill squares at (x, y) with an opacity each."""
        self._lines.append(f'<g fill="{BLUE}">')
        square = f'width="{size}" height="{size}"'
        for x, y, opacity in places:
            self._lines.append(f'<rect x="{x}" y="{y}" {square} opacity="{opacity:.2f}"/>')
        self._lines.append("</g>")

    def frame(self, x: float, y: float, width: float, height: float, colour: str = GREY) -> None:
        """Outline a rectangle."""
        self._lines.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" '
            f'fill="none" stroke="{colour}"/>'
        )

    def path(
        self,
        points: list[tuple[float, float]],
        colour: str = GREY,
        width: float = 1,
        dash: str = "",
    ) -> None:
        """Draw straight lines from point to point; dash: lengths of a stroke and of a gap."""
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._lines.append(
            f'<polyline points="{way}" fill="none" stroke="{colour}" '
            f'stroke-width="{width:.1f}"{dashed}/>'
        )

    def svg(self) -> str:
        """Return the file's text."""
        return "\n".join([*self._lines, "</svg>", ""])


def pictures() -> dict[str, str]:
    """Draw all pictures: file name -> SVG."""
    model, tok = load_model("demo").requires_grad_(False), load_tokenizer("demo")
    curve, changes = fine_tuning()
    return {
        "shapes.svg": shapes(model, tok),
        "attention.svg": attention(model, tok),
        "variance.svg": variance(),
        "parameters.svg": parameters(),
        "heads.svg": heads(model, tok),
        "choices.svg": choices(model, tok),
        "tree.svg": tree(model, tok),
        "online.svg": online(),
        "tiles.svg": tiles(),
        "schedule.svg": schedule(),
        "overfitting.svg": overfitting(curve),
        "changes.svg": weight_changes(changes),
        "lora.svg": lora(model),
    }


def shapes(model: GPT, tok: Tokenizer) -> str:
    """Draw the path of a prompt through the model, with the shape of each result."""
    c, ids = model.config, torch.tensor(tok.encode("The people of the United"))
    T, C, H, D = len(ids), c.n_embd, c.n_head, c.n_embd // c.n_head
    words = [tok.decode([i]) for i in ids.tolist()]
    p = model(ids[None])[0, -1].softmax(dim=0)
    at = Picture(740, 520, "The path of five tokens through GPT-2")

    def step(x: float, y: float, name: str, shape: str, width: float = 112) -> None:
        at.frame(x, y, width, 40)
        at.text(x + width / 2, y + 16, name, "middle")
        at.text(x + width / 2, y + 32, shape, "middle", 11, BLUE)

    for n, word in enumerate(words):
        at.text(20 + n * 74, 20, repr(word))
        at.text(20 + n * 74, 36, str(ids[n].item()), colour=BLUE)
    step(20, 50, "wte[id] + wpe[t]", f"({T}, {C})", 130)
    # the stream runs down; its branches leave to the right and come back
    at.path([(40, 90), (40, 372)], ORANGE, 4)
    at.text(52, 112, "the residual stream", colour=ORANGE)
    branches = [
        [
            ("ln_1", f"({T}, {C})"),
            ("c_attn: q, k, v", f"({T}, 3, {H}, {D})"),
            ("masked weights", f"({H}, {T}, {T})"),
            ("heads together", f"({T}, {H} x {D})"),
            ("c_proj", f"({T}, {C})"),
        ],
        [
            ("ln_2", f"({T}, {C})"),
            ("c_fc", f"({T}, {4 * C})"),
            ("gelu", f"({T}, {4 * C})"),
            ("c_proj", f"({T}, {C})"),
        ],
    ]
    at.frame(10, 122, 720, 240)
    at.text(720, 140, f"a block, {c.n_layer} times", "end")
    for n, branch in enumerate(branches):
        y = 152 + n * 110
        at.path([(40, y + 20), (84, y + 20)])
        for i, (name, shape) in enumerate(branch):
            step(84 + i * 126, y, name, shape)
            if i:
                at.path([(70 + i * 126, y + 20), (84 + i * 126, y + 20)])
        end = 84 + len(branch) * 126 - 70
        at.path([(end, y + 40), (end, y + 66), (40, y + 66)])
        at.text(52, y + 80, "+ added to the stream", size=11, colour=ORANGE)
    step(20, 374, "ln_f", f"({T}, {C})", 130)
    at.path([(150, 394), (170, 394)])
    step(170, 374, "times wte transposed", f"({T}, {c.vocab_size})", 140)
    at.path([(310, 394), (330, 394)])
    step(330, 374, "softmax", f"({T}, {c.vocab_size})")
    at.text(20, 444, f"likeliest tokens after {words[-1]!r}:")
    for n, i in enumerate(p.topk(2).indices.tolist()):
        at.box(110, 456 + n * 24, 400 * p[i].item(), 16, BLUE, 0.7)
        at.text(20, 468 + n * 24, repr(tok.decode([i])))
        at.text(118 + 400 * p[i].item(), 468 + n * 24, f"{p[i]:.3f}")
    return at.svg()


def scores_and_weights(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute every head's scores and weights, each (layers, H, T, T)."""
    T, H = len(ids), model.config.n_head
    before = torch.ones(T, T, dtype=torch.bool).tril()
    x = model.wte(ids) + model.wpe(torch.arange(T))
    all_scores = []
    for block in model.h:
        q, k, _ = block.attn.c_attn(block.ln_1(x)).view(T, 3, H, -1).permute(1, 2, 0, 3)
        all_scores.append(q @ k.transpose(1, 2) / math.sqrt(q.size(2)))
        x = block(x[None])[0]
    scores = torch.stack(all_scores)
    return scores, scores.masked_fill(~before, -torch.inf).softmax(dim=3)


def attention(model: GPT, tok: Tokenizer) -> str:
    """Draw a head's scores, with those that the mask hides, and its weights."""
    ids = torch.tensor(tok.encode("The people of the United"))
    scores, weights = (x[0, 0] for x in scores_and_weights(model, ids))
    words = [repr(tok.decode([i])) for i in ids.tolist()]
    at, cell = Picture(720, 300, "Scores and weights of one head"), 44
    low, high = scores.min().item(), scores.max().item()
    for left, name in ((90, "scores"), (430, "weights, after mask and softmax")):
        at.text(left, 16, name)
        for t, word in enumerate(words):
            at.text(left - 8, 52 + t * cell, word, "end")
            at.text(left + cell * (t + 0.5), 264, word, "middle", 11)
            for s in range(len(words)):
                x, y = left + s * cell, 26 + t * cell
                if left == 430:
                    at.box(x, y, cell - 2, cell - 2, BLUE, 0.06 + 0.9 * weights[t, s].item() ** 0.5)
                    continue
                share = (scores[t, s].item() - low) / (high - low)
                at.box(x, y, cell - 2, cell - 2, BLUE, 0.06 + 0.9 * share)
                if s > t:
                    # hidden by the mask: a later key
                    at.path([(x, y), (x + cell - 2, y + cell - 2)], ORANGE, 2)
        at.text(left, 286, "a row for each query, a column for each key", size=11)
    at.path([(340, 10), (360, 22)], ORANGE, 2)
    at.text(336, 20, "hidden by the mask", "end", 11)
    return at.svg()


def heads(model: GPT, tok: Tokenizer) -> str:
    """Draw the weights of all heads on one prompt."""
    text = "the people of the United States and the people of the United"
    ids = torch.tensor(tok.encode(text))
    _, weights = scores_and_weights(model, ids)
    words = [tok.decode([i]).strip() for i in ids.tolist()]
    cell, size = 12, 12 * len(ids)
    at = Picture(740, 752, "The weights of all heads on one prompt")
    for layer in range(weights.size(0)):
        for head in range(weights.size(1)):
            left, top = 70 + head * (size + 22), 26 + layer * (size + 30)
            at.text(left, top - 6, f"block {layer}, head {head}", size=11)
            at.path([(left, top), (left, top + size), (left + size, top + size)])
            for t, word in enumerate(words):
                if head == 0:
                    at.text(left - 6, top + 9 + t * cell, word, "end", 9)
                row = weights[layer, head, t, : t + 1].tolist()
                places = [(left + s * cell, top + t * cell, w**0.5) for s, w in enumerate(row)]
                at.cells(places, cell - 1)
                if layer == weights.size(0) - 1:
                    at.text(left + 8 + t * cell, top + size + 8, word, "end", 9, turn=-60)
    at.text(70, 744, "A row for each query, a column for each key; the stronger, the more weight.")
    return at.svg()


def variances(n_layer: int, scaled: bool) -> list[float]:
    """Measure the stream's variance after each block of an untrained network, over the start's."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=n_layer, n_head=4, n_embd=128))
    net.requires_grad_(False)
    for name, p in net.named_parameters():
        if name.endswith("c_proj.weight") and not scaled:
            p *= math.sqrt(2 * n_layer)
    x = net.wte(torch.randint(257, (4, 32))) + net.wpe(torch.arange(32))
    start, result = x.var().item(), [1.0]
    for block in net.h:
        x = block(x)
        result.append(x.var().item() / start)
    return result


def variance() -> str:
    """Plot the stream's variance by depth at the start of training."""
    at = Picture(720, 330, "The variance of the residual stream by depth, before training")
    left, bottom, width, height = 60, 280, 560, 240
    for power, label in enumerate(("1", "10", "100", "1000")):
        y = bottom - height * power / 3
        at.path([(left, y), (left + width, y)], dash="2 4")
        at.text(left - 8, y + 4, label, "end")
    for block in range(0, 49, 12):
        at.text(left + width * block / 48, bottom + 18, str(block), "middle")
    at.text(left + width / 2, bottom + 38, "after this block", "middle")
    at.text(left, 16, "variance of the stream / variance at the start")
    for scaled, colour in ((False, ORANGE), (True, BLUE)):
        for n_layer in (6, 12, 24, 48):
            values = variances(n_layer, scaled)
            points = [
                (left + width * n / 48, bottom - height * math.log10(value) / 3)
                for n, value in enumerate(values)
            ]
            at.path(points, colour, 2)
            x, y = points[-1]
            y += -4 if scaled else 14
            at.text(x + 4, y, f"{n_layer} blocks", "start", 10, colour)
    at.text(left + 8, bottom - height + 16, "c_proj at 0.02", colour=ORANGE)
    at.text(left + 200, bottom - 8, "c_proj at 0.02 / sqrt(2 n_layer)", colour=BLUE)
    return at.svg()


def parameters() -> str:
    """Draw where the parameters of gpt2 are."""
    c = GPTConfig()
    C, L = c.n_embd, c.n_layer
    parts = [
        ("wte: the token table, and the head", c.vocab_size * C, ORANGE),
        ("wpe: the position table", c.block_size * C, GREY),
        (f"attention of {L} blocks", L * (4 * C * C + 4 * C), BLUE),
        (f"MLPs of {L} blocks", L * (8 * C * C + 5 * C), BLUE),
        ("layer norms", (2 * L + 1) * 2 * C, GREY),
    ]
    at = Picture(720, 190, "Where the parameters of gpt2 are")
    for n, (name, count, colour) in enumerate(parts):
        y, length = 8 + n * 30, 360 * count / 57e6
        at.text(226, y + 15, name, "end")
        at.box(236, y, max(length, 1), 20, colour, 0.8)
        at.text(244 + length, y + 15, f"{count:,}")
    at.text(226, 174, "all", "end")
    at.text(236, 174, f"{sum(count for _, count, _ in parts):,}")
    return at.svg()


def choices(model: GPT, tok: Tokenizer) -> str:
    """Draw a distribution over eight tokens, and the distributions that the options make of it."""
    logits = model(torch.tensor([tok.encode("Thank you, and God bless")]))[0, -1]
    scores, eight = (x[None] for x in logits.topk(8))
    names = [repr(tok.decode([i])) for i in eight[0].tolist()]
    panels = [
        ("the model's own", scores),
        ("temperature 2", scale_temperature(eight, scores, 2.0)),
        ("temperature 0.7", scale_temperature(eight, scores, 0.7)),
        ("top-k 3", keep_top_k(eight, scores, 3)),
        ("top-p 0.8", keep_top_p(eight, scores, 0.8)),
    ]
    at = Picture(740, 220, "Eight tokens after temperature, top-k and top-p")
    for n, (name, changed) in enumerate(panels):
        left = 80 + n * 132
        at.text(left, 16, name)
        for i, p in enumerate(changed.softmax(dim=1)[0].tolist()):
            y = 28 + i * 23
            if n == 0:
                at.text(left - 8, y + 13, names[i], "end", 11)
            at.box(left, y, 80 * p, 16, BLUE if n < 3 else ORANGE, 0.8)
            at.text(left + 4 + 80 * p, y + 13, f"{p:.3f}" if p > 0 else "-", size=10)
    return at.svg()


def tree(model: GPT, tok: Tokenizer) -> str:
    """Draw three tokens, three steps: what greedy decoding and two beams see."""
    prompt, three = "The state of the Union is", (" in", " the", " world")
    allowed = [tok.encode(word)[0] for word in three]

    def log_p(path: tuple[str, ...]) -> list[float]:
        ids = torch.tensor([tok.encode(prompt + "".join(path))])
        return model(ids)[0, -1].log_softmax(dim=0)[allowed].tolist()

    at = Picture(740, 350, "A tree of three tokens and three steps")
    at.text(4, 178, prompt, size=11)
    columns = (140, 226, 390, 560)
    beams: list[tuple[tuple[str, ...], float, float]] = [((), 0.0, 174.0)]
    for depth in range(3):
        x, longer = columns[depth + 1], []
        # each beam's continuations, one below the other
        room = 330 / (3 * len(beams))
        for n, (path, score, y) in enumerate(sorted(beams, key=lambda beam: beam[2])):
            for i, (word, value) in enumerate(zip(three, log_p(path), strict=True)):
                to = 26 + room * (3 * n + i + 0.4)
                at.path([(columns[depth] + (86 if depth else 4), y), (x - 6, to)])
                longer.append(((*path, word), score + value, to, value))
        best = sorted(longer, key=lambda item: item[1], reverse=True)
        for path, score, y, value in longer:
            kept = path in [item[0] for item in best[:2]]
            first = path == best[0][0]
            colour = ORANGE if first else BLUE if kept else GREY
            at.text(x, y + 4, f"{path[-1]!r} {value:.2f}", colour=colour)
            at.text(x, y + 18, f"sum {score:.2f}", size=10, colour=colour)
        beams = [item[:3] for item in best[:2]]
    for n, step in enumerate(("first token", "second token", "third token")):
        at.text(columns[n + 1], 14, step, size=11)
    at.text(4, 330, "orange: the best sum of a step", size=11, colour=ORANGE)
    at.text(4, 344, "blue: the second beam", size=11, colour=BLUE)
    return at.svg()


def online() -> str:
    """Draw the online softmax of [1, 2 | 4, 0]: each block's terms, and how the old sum shrinks."""
    blocks, unit, left = [[1, 2], [4, 0]], 250, 150
    at = Picture(720, 250, "The online softmax: one factor corrects the old sum")
    m, total, y = -math.inf, 0.0, 20
    for n, block in enumerate(blocks):
        new = max(m, *block)
        factor = math.exp(m - new)
        at.text(10, y + 14, f"block {n + 1}: z = {block}")
        at.text(10, y + 30, f"m = {new}", size=11, colour=BLUE)
        x = float(left)
        if n:
            at.box(x, y, unit * total, 18, ORANGE, 0.35)
            at.text(x + unit * total + 8, y + 13, f"l = {total:.4f}, measured from {m}")
            y += 34
            at.text(x - 8, y + 13, f"times exp({m} - {new})", "end", 11, ORANGE)
        at.box(x, y, unit * total * factor, 18, ORANGE, 0.8)
        x += unit * total * factor
        for value in block:
            width = unit * math.exp(value - new)
            at.box(x + 1, y, width - 2, 18, BLUE, 0.8)
            at.text(x + 2, y + 32, f"exp({value} - {new})", size=9, turn=30)
            x += width
        total, m = total * factor + sum(math.exp(value - new) for value in block), new
        at.text(x + 8, y + 13, f"l = {total:.4f}")
        y += 92
    at.text(10, 244, "orange: the sum of earlier blocks; blue: the terms of this block", size=11)
    return at.svg()


def tiles() -> str:
    """Draw the tiles of one head's scores under the causal mask, and what is done with each."""
    count, cell, left, top = 6, 44, 130, 40
    at = Picture(720, 350, "The tiles of flash attention under the causal mask")
    at.text(left, 14, "keys and values, a block at a time")
    for i in range(count):
        y = top + i * cell
        at.text(left - 12, y + 26, f"queries, program {i}", "end", 11)
        at.text(left + i * cell + cell / 2, 32, f"{i}", "middle", 11)
        for j in range(count):
            x = left + j * cell
            if j > i:
                at.frame(x, y, cell - 3, cell - 3)
            elif j < i:
                at.box(x, y, cell - 3, cell - 3, BLUE, 0.7)
            else:
                # on the diagonal half of the tile is masked
                at.box(x, y, cell - 3, cell - 3, ORANGE, 0.8)
                at.path([(x, y), (x + cell - 3, y + cell - 3)], width=2)
        if i:
            middle = y + (cell - 3) / 2
            at.path([(left + 8, middle), (left + i * cell + 12, middle)], width=2)
    x = left + count * cell + 30
    at.box(x, 60, 16, 16, BLUE, 0.7)
    at.text(x + 24, 73, "every key is seen: no mask")
    at.box(x, 90, 16, 16, ORANGE, 0.8)
    at.text(x + 24, 103, "on the diagonal: masked")
    at.frame(x, 120, 16, 16)
    at.text(x + 24, 133, "later keys only: not read")
    at.text(x, 170, "in registers, from tile to tile:")
    at.text(x, 190, "q, acc, m, l of the program's queries", colour=BLUE)
    at.text(x, 214, "from memory, for each tile: a block of k and v")
    at.text(x, 238, "to memory, once: o = acc / l, lse = m + log l")
    at.text(
        left, 324, "A lane is a program's walk; program 5 starts first, for it has the most tiles."
    )
    return at.svg()


def schedule() -> str:
    """Plot the learning rate of the four schedules over 100 steps."""
    at, left, bottom = Picture(720, 220, "Learning rates by step"), 60, 180
    at.path([(left, bottom), (left + 500, bottom)])
    for name, colour, dash in (
        ("cosine", BLUE, ""),
        ("linear", ORANGE, ""),
        ("constant", GREY, "6 4"),
        ("wsd", BLUE, "2 4"),
    ):
        rates = [learning_rate(step, 100, 10, 1.0, name) for step in range(1, 101)]
        points = [(left + 5 * step, bottom - 150 * rate) for step, rate in enumerate(rates, 1)]
        at.path(points, colour, 2, dash)
        y = {"cosine": 120, "linear": 90, "constant": 34, "wsd": 60}[name]
        at.path([(left + 520, y - 4), (left + 550, y - 4)], colour, 2, dash)
        at.text(left + 558, y, name, colour=colour)
    for step in (0, 10, 50, 100):
        at.text(left + 5 * step, bottom + 18, str(step), "middle")
    at.text(left - 8, bottom - 146, "peak", "end")
    at.text(left + 250, bottom + 36, "step", "middle")
    return at.svg()


Curve = list[tuple[int, float, float]]


def fine_tuning() -> tuple[Curve, dict[str, float]]:
    """Train the demo model on a small text, as docs/training.md does.

    Return (step, loss on the text, loss on unseen text) and each matrix's relative change.
    """
    tools = runpy.run_path(str(Path(__file__).parent.parent / "exercises.py"))
    model, (seen, unseen) = load_model("demo"), tools["text"]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    generator, curve = torch.Generator().manual_seed(0), []
    for step in range(49):
        if step % 8 == 0:
            losses = (tools["loss_on"](model, ids) for ids in (seen[:198], unseen))
            curve.append((step, *losses))
        if step == 48:
            break
        x, y = tools["batch"](seen, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, 48, 8, 2e-3, "constant")
        model(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    changes = {
        name: ((p.detach() - before[name]).norm() / before[name].norm()).item()
        for name, p in model.named_parameters()
        if p.dim() == 2
    }
    return curve, changes


def overfitting(curve: Curve) -> str:
    """Plot the losses of a run that goes on for too long."""
    at, left, top, nat = (
        Picture(720, 240, "Overfitting: the demo model on 3400 characters"),
        60,
        10,
        34,
    )
    for loss in range(2, 7):
        y = top + nat * (7 - loss)
        at.path([(left, y), (left + 480, y)], dash="2 4")
        at.text(left - 8, y + 4, str(loss), "end")
    for n, colour, name in (
        (1, BLUE, "text that it trains on"),
        (2, ORANGE, "text that it never sees"),
    ):
        points = [(left + 10 * row[0], top + nat * (7 - row[n])) for row in curve]
        at.path(points, colour, 2)
        at.text(points[-1][0] + 8, points[-1][1] + 4, name, colour=colour)
    step, _, least = min(curve, key=lambda row: row[2])
    x, y = left + 10 * step, top + nat * (7 - least)
    at.path([(x, y + 6), (x, 196)], ORANGE, 1, "3 3")
    at.text(x + 6, 90, "stop here", colour=ORANGE)
    for tick in range(0, 49, 8):
        at.text(left + 10 * tick, 214, str(tick), "middle")
    at.text(left + 240, 234, "step", "middle")
    at.text(left + 490, 20, "loss in nats")
    return at.svg()


def weight_changes(changes: dict[str, float]) -> str:
    """Draw how far training moved each matrix, by layer: length of the change / of the matrix."""
    at = Picture(720, 330, "How far fine-tuning moved each matrix")
    at.text(150, 16, "length of the change / length of the matrix before")
    y = 28
    for name, change in changes.items():
        at.text(142, y + 11, name.removesuffix(".weight"), "end", 11)
        at.box(150, y, 1300 * change, 12, BLUE if name.startswith("h.") else ORANGE, 0.8)
        at.text(156 + 1300 * change, y + 11, f"{change:.3f}", size=11)
        y += 16
    return at.svg()


def lora(model: GPT) -> str:
    """Draw LoRA at one layer of the demo model, its sides to scale."""
    weight, rank = model.h[0].mlp.c_fc.weight, 8
    (rows, cols), unit = weight.shape, 0.4
    at = Picture(720, 290, "LoRA: a frozen matrix and a trained product of two thin ones")
    height, width, thin = rows * unit, cols * unit, rank * unit * 2
    at.box(60, 40, width, height, GREY, 0.5)
    at.text(60 + width / 2, 30, f"W ({rows}, {cols})", "middle")
    at.text(60 + width / 2, 262, f"frozen: {weight.numel():,} numbers", "middle", 11)
    at.text(150, 146, "+   s  x")
    at.box(220, 40, thin, height, ORANGE, 0.9)
    at.text(220, 30, f"B ({rows}, {rank})", colour=ORANGE)
    at.text(240, 146, "x")
    at.box(262, 138, width, thin, ORANGE, 0.9)
    at.text(262, 130, f"A ({rank}, {cols})", colour=ORANGE)
    at.text(240, 262, f"trained: {rank * (rows + cols):,} numbers", size=11, colour=ORANGE)
    at.text(340, 146, "=")
    at.box(372, 40, width, height, BLUE, 0.7)
    at.text(372, 30, "the matrix after training", colour=BLUE)
    at.text(460, 100, "B starts at 0, so B A = 0:")
    at.text(460, 118, "the first step sees the old model.")
    at.text(460, 146, f"s = alpha / {rank}")
    at.text(460, 174, "x A^T has 8 numbers: whatever comes")
    at.text(460, 192, "in, the change passes through them.")
    at.text(
        60,
        282,
        "Lengths to scale, but for the thin side, which is twice as wide as it should be.",
        size=10,
    )
    return at.svg()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, svg in pictures().items():
        (Path(__file__).parent / name).write_text(svg, encoding="utf-8")
