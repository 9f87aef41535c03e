"""sample.py --html: the findings about a text as a page for a browser.

The page is one file of HTML with its style inside: no script, nothing loaded from anywhere, light
or dark as the reader's system is. The strength of a colour shows a probability, or the root of a
weight; a title on each cell gives the number. All text is escaped. This file does not know how the
findings are computed.
"""

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from torch import Tensor

from nanogpt2.atomic import whole_file
from nanogpt2.cli.findings import Head, Inside, counts, layer_names, spelled
from nanogpt2.filesystem import open_regular
from nanogpt2.inspect import Guesses, Piece
from nanogpt2.terminal import visible

# how a page of ours begins: only such a file is written over
OPENING = (
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    '<meta name="generator" content="nanogpt2 sample.py --html">\n'
)
HEAD = """\
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --dim: #777; --heat: #4d94ff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #ddd; --dim: #8a8f98; --heat: #2f6fd6; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  margin: 2em; }
.wide { overflow-x: auto; }
pre, table, text { font: 13px/1.5 ui-monospace, monospace; white-space: pre; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
th, td { padding: 0 .5em; text-align: left; font-weight: normal; }
th, .dim { color: var(--dim); }
td[style] { background: color-mix(in srgb, var(--heat) calc(100% * var(--p)), transparent); }
svg { fill: var(--heat); }
svg text { fill: var(--ink); }
.small { width: 96px; height: 96px; border: 1px solid var(--dim); }
details { margin: .5em 0; }
</style>
"""
CELL = 16  # pixels of a weight in the picture of one head
LETTER = 8  # pixels of a character beside it
LEAST = 0.005  # the smallest weight drawn
LEVELS = 10  # shades in a small picture


def path_of(name: str) -> Path:
    """Return the path of a page to write. Raises ValueError or OSError where it cannot be one."""
    path = Path(name)
    if path.is_dir() or name.endswith(("/", os.sep)):
        raise ValueError(f"must be a file, not the folder {name!r}")
    if path.exists() or path.is_symlink():
        with open_regular(path) as file:
            if file.read(len(OPENING)) != OPENING.encode():
                raise ValueError(f"must be a new file: {name!r} exists and is no page of --html")
    elif not path.parent.is_dir():
        raise ValueError(f"must be in a folder: {str(path.parent)!r} is not a folder")
    return path


def write(path: Path, text: str) -> None:
    """Write a page, whole or not at all. Raises OSError that names the file."""
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def page(inside: Inside) -> str:
    """Return the whole page."""
    parts = [OPENING, HEAD, f"<title>{escape(inside.model)}, inside</title>\n"]
    parts.append(
        f"<h1>{escape(inside.model)}, inside</h1>\n<pre>{escape(visible(inside.text))}</pre>\n"
    )
    named = [f"{place} {name}" for place, name in enumerate(inside.names)]
    if inside.heads is not None:
        parts += _heads(inside.heads, named)
    if inside.head is not None:
        parts += _head(*inside.head, named)
    if inside.lens is not None:
        parts += _lens(*inside.lens, named)
    if inside.pieces is not None:
        parts += _merges(inside.pieces)
    return "".join([*parts, "</html>\n"])


def _heads(heads: Sequence[Head], names: Sequence[str]) -> Iterator[str]:
    yield "<h2>Attention</h2>\n<p>Each head's weights: a row for each token, a column for each "
    yield f"token that it looks at. The pictures show the last {len(heads[0].picture)} tokens. "
    yield "--attention LAYER.HEAD shows one head in detail.</p>\n"
    yield '<div class="wide"><table>\n'
    layer = ""
    for head in heads:
        if head.name.split(".")[0] != layer:
            yield "<tr>" if not layer else "</tr>\n<tr>"
            layer = head.name.split(".")[0]
        means = zip(("itself", "one before", "first"), head[1:4], strict=True)
        said = [f"{name} {mean:.2f}" for name, mean in means if mean is not None]
        said.append(f"the last token looks most at {names[head.most]}: {head.weight:.2f}")
        yield f'<td title="{escape(f"head {head.name}: " + ", ".join(said))}">{head.name}<br>'
        yield f"{_small_picture(head.picture)}</td>"
    yield "</tr>\n</table></div>\n"


def _small_picture(weights: Tensor) -> str:
    """Draw weights (S, S) without words: one path for each shade."""
    shades, size = (weights.sqrt() * LEVELS).round().int(), len(weights)
    paths = []
    for shade in range(1, LEVELS + 1):
        places = (shades == shade).nonzero().tolist()
        if places:
            squares = "".join(f"M{x} {y}h1v1h-1z" for y, x in places)
            paths.append(f'<path fill-opacity="{shade / LEVELS}" d="{squares}"/>')
    return f'<svg class="small" viewBox="0 0 {size} {size}">{"".join(paths)}</svg>'


def _head(name: str, weights: Tensor, names: Sequence[str]) -> Iterator[str]:
    left = LETTER * max(map(len, names)) + LETTER
    size = left + CELL * len(names)
    yield f"<h2>Attention of head {name}</h2>\n<p>A row for each token, a column for each token "
    yield "that it looks at.</p>\n"
    yield f'<div class="wide"><svg width="{size}" height="{size}">\n'
    for place, said in enumerate(names):
        middle = left + CELL * place + CELL * 3 // 4
        yield f'<text x="{left - LETTER}" y="{middle}" text-anchor="end">{escape(said)}</text>\n'
        yield f'<text transform="translate({middle} {left - LETTER}) rotate(-90)">'
        yield f"{escape(said)}</text>\n"
    for y, row in enumerate(weights.tolist()):
        for x, weight in enumerate(row[: y + 1]):
            if weight >= LEAST:
                yield f'<rect x="{left + CELL * x}" y="{left + CELL * y}" width="{CELL}" '
                yield f'height="{CELL}" fill-opacity="{weight**0.5:.2f}"><title>'
                yield f"{escape(names[y])} looks at {escape(names[x])}: {weight:.2f}</title></rect>"
        yield "\n"
    yield "</svg></div>\n"


def _lens(guesses: Guesses, guessed: dict[int, str], names: Sequence[str]) -> Iterator[str]:
    yield "<h2>Lens</h2>\n<p>The likeliest next token after each layer; the last row is the "
    yield "model's own. Colour is its probability.</p>\n"
    yield '<div class="wide"><table>\n<tr><th>after</th>'
    yield from (f"<th>{escape(name)}</th>" for name in names)
    yield "</tr>\n"
    layers = layer_names(len(guesses.ids))
    for layer, ids, chances in zip(layers, *(x.tolist() for x in guesses), strict=True):
        yield f"<tr><th>{layer}</th>"
        for some, p in zip(ids, chances, strict=True):
            said = ", ".join(f"{guessed[i]} {x:.2f}" for i, x in zip(some, p, strict=True))
            yield f'<td style="--p:{p[0]:.2f}" title="{escape(said)}">{escape(guessed[some[0]])}'
            yield "</td>"
        yield "</tr>\n"
    yield "</table></div>\n"


def _merges(pieces: Sequence[Piece]) -> Iterator[str]:
    tokens, merges = counts(pieces)
    yield f"<h2>Tokens</h2>\n<p>{tokens} tokens by {merges} merges, each with its place in the "
    yield "list of merges. A letter stands for a byte; Ġ is a space.</p>\n"
    for piece in pieces:
        named = "  ".join(f"{t} {i}" for t, i in zip(piece.tokens, piece.ids, strict=True))
        yield f"<details open><summary><code>{escape(repr(piece.text))}</code> "
        yield f'<span class="dim">{escape(named)}</span></summary><div class="wide"><table>\n'
        for count, merge in enumerate(piece.merges, start=1):
            yield f'<tr><td class="dim">{merge.rank}</td><td>{escape(merge.left)} + '
            yield f"{escape(merge.right)}</td><td>{escape(spelled(piece, count))}</td></tr>\n"
        yield "</table></div></details>\n"
