"""Choose the layout of a model's matrices from measured times, while it generates.

A layout costs time before it saves any. No one knows how many tokens will follow, so the plan
keeps an account: each step adds the time that another layout would have saved one matrix. Once the
account covers the cost of laying out a matrix, one of its shape is laid out in each step. So laying
out never takes longer than the time already lost without it, and no single step takes long. This
file does not know what the matrices mean.
"""

from collections import Counter
from collections.abc import Sequence

from nanogpt2.cpu.prepacked import PrepackedLinear
from nanogpt2.cpu.tuning import ROWS, Shape, Table, Timing

WORTH = 0.95  # another layout must take less than this part of the present one's time


class Plan:
    """The layouts of some matrices. Without a table they stay as they are."""

    def __init__(self, products: Sequence[PrepackedLinear], table: Table | None) -> None:
        groups: dict[Shape, list[PrepackedLinear]] = {}
        for product in products:
            groups.setdefault(product.shape, []).append(product)
        self._groups = [
            _Group(group, table[shape])
            for shape, group in groups.items()
            if table is not None and shape in table
        ]

    def begin(self, rows: int, prompt: int, new: int) -> None:
        """Choose the first layout of matrices that have none.

        rows: those read in each step. prompt: the rows read before. new: the most steps.
        """
        for group in self._groups:
            group.begin(rows, prompt, new)

    def count(self, rows: int) -> None:
        """Account for products of this many rows; lay out what has paid for itself."""
        for group in self._groups:
            group.count(rows)


class _Group:
    """Matrices of one shape, with each layout's account: milliseconds saved, of one matrix."""

    def __init__(self, products: Sequence[PrepackedLinear], timings: dict[str, Timing]) -> None:
        self._products = products
        allowed = products[0].layouts
        self._timings = {name: t for name, t in timings.items() if name in allowed}
        self._saved = dict.fromkeys(self._timings, 0.0)
        self._settled: int | None = None  # the column whose best layout all matrices have

    def begin(self, rows: int, prompt: int, new: int) -> None:
        if not self._timings:
            return

        def total(name: str) -> float:
            t = self._timings[name].rows
            return _times(prompt) * t[_column(prompt)] + new * _times(rows) * t[_column(rows)]

        best = min(self._timings, key=total)
        for product in self._products:
            if product.layout is None:
                product.lay_out(best)

    def count(self, rows: int) -> None:
        column = _column(rows)
        if not rows or (column == self._settled and not any(self._saved.values())):
            return
        now = Counter(product.layout for product in self._products)
        if not now.keys() <= self._timings.keys():
            return
        best = min(self._timings, key=lambda name: self._timings[name].rows[column])
        for name, timing in self._timings.items():
            others = sum(n for was, n in now.items() if was != name)
            gains = sum(n * self._gain(was, timing, column) for was, n in now.items())
            gain = gains / max(1, others)
            self._saved[name] = max(0.0, self._saved[name] + gain * _times(rows))
        self._lay_out(best)
        is_best = all(product.layout == best for product in self._products)
        self._settled = column if is_best else None

    def _gain(self, was: str | None, timing: Timing, column: int) -> float:
        assert was is not None
        before, after = self._timings[was].rows[column], timing.rows[column]
        return before - after if after < WORTH * before or after > before else 0.0

    def _lay_out(self, name: str) -> None:
        """Lay out the next matrix, once the account covers it."""
        others = [product for product in self._products if product.layout != name]
        if not others:
            return
        present = others[0].layout
        assert present is not None
        # the way back costs as much: a single prompt must not undo what a text has paid for
        if self._saved[name] > max(self._timings[n].lay_out for n in (name, present)):
            others[0].lay_out(name)
            if len(others) == 1:
                self._saved = dict.fromkeys(self._saved, 0.0)


def _column(rows: int) -> int:
    """Return the measured number of rows that stands for this one."""
    return 1 if rows == 1 else 5 if rows <= 16 else 64


def _times(rows: int) -> float:
    """Return the products of ROWS[-1] rows that many rows take; 1 for a few."""
    return max(1.0, rows / ROWS[-1]) if rows else 0.0
