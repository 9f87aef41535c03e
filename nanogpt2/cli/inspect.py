"""sample.py --attention, --lens and --tokens: the inside of a model that reads the prompt.

findings.py computes, this file draws at most 80 columns of text, inspect_page.py makes a page for a
browser. No text is generated.
"""

import textwrap
from collections.abc import Sequence

from torch import Tensor

from nanogpt2 import ops, terminal
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.cli import inspect_page
from nanogpt2.cli.findings import SEVERAL, Head, Inside, counts, layer_names, look, spelled
from nanogpt2.config import GPTConfig, SampleConfig, fail, official_name, usage_error
from nanogpt2.inspect import Guesses, Piece
from nanogpt2.memory import is_out_of_memory
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer, gpt2_tokenizer

COLUMNS = 80
NAME = 9  # columns of a token's name in a table
POSITIONS = 4  # positions of the lens that fit side by side


def show_inside(config: SampleConfig, device: str, prompt: str, template: str) -> None:
    """Load the model, read the prompt and print what is asked for, or write it as a page."""
    if not prompt:
        where = "PROMPT" if config.prompt_file is None else f"--prompt_file {config.prompt_file!r}"
        fail(f"{where} is empty: there is nothing to look into")
    with usage_error("--html"):
        page = None if config.html is None else inspect_page.path_of(config.html)
    text = template.format(prompt)
    with usage_error("--model"):
        tokenizer, ids, model = load(config, device, text)
    if model is not None:
        terminal.note(ops.describe_kernels(config.kernels, model.kernels, device))
    try:
        inside = look(config, model, tokenizer, ids, text)
        shown = draw(inside) if page is None else inspect_page.page(inside)
    except FloatingPointError as error:
        fail(str(error), code=1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail("out of memory: shorten PROMPT, or name one head: --attention LAYER.HEAD", code=1)
    if page is None:
        terminal.write(shown + "\n")
    else:
        inspect_page.write(page, shown)
        terminal.note(f"wrote {config.html}")


def load(config: SampleConfig, device: str, text: str) -> tuple[Tokenizer, list[int], GPT | None]:
    """Return the tokenizer, the text's ids, and the model where one must read them.

    Raises ValueError or OSError as `open_checkpoint` does.
    """
    special = not config.literal_prompt
    if not config.reads and official_name(config.model):
        # the tokens alone need no weights, which may have to be downloaded
        tokenizer = gpt2_tokenizer()
        return tokenizer, tokenizer.encode(text, allow_special=special), None
    with open_checkpoint(config.model) as checkpoint:
        tokenizer = checkpoint.tokenizer
        ids = tokenizer.encode(text, allow_special=special)
        if not config.reads:
            return tokenizer, ids, None
        check(config, checkpoint.config, len(ids))
        how = device, config.dtype, config.quantize, config.kernels
        return tokenizer, ids, checkpoint.generator(*how)


def check(config: SampleConfig, shape: GPTConfig, length: int) -> None:
    """Fail for a prompt that the context cannot hold, and for a head that the model lacks."""
    if length > shape.block_size:
        fail(f"PROMPT must be at most {shape.block_size} tokens, the model's context, not {length}")
    if config.attention not in (None, "all"):
        layer, head = map(int, config.attention.split("."))
        if layer >= shape.n_layer or head >= shape.n_head:
            fail(
                f"--attention must be LAYER.HEAD, layers 0 to {shape.n_layer - 1} and heads 0 to "
                f"{shape.n_head - 1}, not {config.attention}"
            )


def draw(inside: Inside) -> str:
    """Draw all findings, block after block."""
    blocks = []
    if inside.heads is not None:
        blocks.append(draw_heads(inside.heads, inside.names))
    if inside.head is not None:
        blocks.append(draw_head(*inside.head, inside.names))
    if inside.lens is not None:
        blocks.append(draw_lens(*inside.lens, inside.names))
    if inside.pieces is not None:
        blocks.append(draw_merges(inside.pieces))
    return "\n\n".join(blocks)


def draw_heads(heads: Sequence[Head], names: Sequence[str]) -> str:
    """Draw a table with a row for each head."""
    rows = [["head", "itself", "one before", "first", "the last token looks at"]]
    for head in heads:
        means = ("-" if x is None else f"{x:.2f}" for x in (head.itself, head.before, head.first))
        rows.append([head.name, *means, f"{_short(names[head.most])} {head.weight:.2f}"])
    return (
        "attention: each head's mean weight on the token itself, the one before and\n"
        "the first, and where the last token looks most (one head: --attention 0.0)\n"
        f"{terminal.table(rows)}"
    )


def draw_head(name: str, weights: Tensor, names: Sequence[str]) -> str:
    """Draw a table with a row for each token: the tokens that it looks at most."""
    rows = [["token", "looks at", *[""] * (SEVERAL - 1)]]
    for place, row in enumerate(weights):
        best = row[: place + 1].topk(min(SEVERAL, place + 1))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        cells = [f"{at} {_short(names[at])} {weight:.2f}" for weight, at in pairs]
        empty = [""] * (SEVERAL - len(cells))
        rows.append([f"{place} {_short(names[place])}", *cells, *empty])
    return f"attention of head {name}: where each token looks most\n{terminal.table(rows)}"


def draw_lens(guesses: Guesses, guessed: dict[int, str], names: Sequence[str]) -> str:
    """Draw tables with a row for each layer and a column for each token."""
    tables = []
    best = zip(guesses.ids[..., 0].tolist(), guesses.probabilities[..., 0].tolist(), strict=True)
    cells = [
        [f"{_short(guessed[i])} {p:.2f}" for i, p in zip(ids, chances, strict=True)]
        for ids, chances in best
    ]
    for start in range(0, len(names), POSITIONS):
        some = slice(start, start + POSITIONS)
        heads = [f"{start + i} {_short(name)}" for i, name in enumerate(names[some])]
        rows = [["after", *heads]]
        for layer, row in zip(layer_names(len(cells)), cells, strict=True):
            rows.append([layer, *row[some]])
        tables.append(terminal.table(rows))
    title = "lens: the likeliest next token after each layer, and its probability"
    return "\n\n".join([f"{title}\n{tables[0]}", *tables[1:]])


def draw_merges(pieces: Sequence[Piece]) -> str:
    """Draw each piece: its merges, and its tokens with their ids."""
    columns = min(COLUMNS, terminal.screen_columns() or COLUMNS)
    tokens, merges = counts(pieces)
    lines = [
        f"tokens: {tokens} by {merges} merges, each with its place in the list of merges",
        "(a letter stands for a byte; Ġ is a space)",
    ]
    for piece in pieces:
        lines += ["", terminal.shorten(repr(piece.text), columns)]
        for count, merge in enumerate(piece.merges, start=1):
            pair = terminal.shorten(f"{merge.left} + {merge.right}", columns - 9)
            line = f"{merge.rank:7}  {pair}"
            whole = f"{line:29}  {spelled(piece, count)}".rstrip()
            lines.append(whole if len(whole) <= columns else line)
        named = "  ".join(f"{t} {i}" for t, i in zip(piece.tokens, piece.ids, strict=True))
        lines += textwrap.wrap(
            f"= {named}",
            columns,
            initial_indent=" " * 7,
            subsequent_indent=" " * 9,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _short(name: str) -> str:
    return terminal.shorten(name, NAME, least=0)
