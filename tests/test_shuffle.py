"""The order of sequences: a bijection, uniform, of the same cost for every corpus."""

import tracemalloc

import numpy as np
import pytest

from nanogpt2.data import shuffle
from nanogpt2.data.loader import WindowBatches
from nanogpt2.data.shuffle import LISTED, Order, Permutation


def drawn(count, seed=0):
    return Permutation(count, np.random.default_rng(seed))


@pytest.mark.parametrize("count", [*range(1, 70), 127, 128, 255, 256, 257, 1000, 4095, 4096, 4097])
def test_every_item_comes_once(count):
    for seed in (0, 1):
        order = drawn(count, seed)
        assert sorted(order[place] for place in range(count)) == [*range(count)]


def test_no_place_outside():
    for place in (-1, 12):
        with pytest.raises(IndexError):
            drawn(12)[place]


def chi_square(counts):
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("count", [11, 16])
def test_every_item_is_as_likely_at_every_place(count):
    counts, pairs = np.zeros((count, count)), np.zeros((count, count))
    for seed in range(3000):
        order = drawn(count, seed)
        items = [order[place] for place in range(count)]
        counts[range(count), items] += 1
        pairs[items[3], items[4]] += 1
    # its mean is the degrees of freedom f, its deviation the root of 2 f: allow four of them
    f = (count - 1) ** 2
    assert abs(chi_square(counts) - f) < 4 * (2 * f) ** 0.5
    # neighbours are as if drawn one after the other
    f = count * (count - 1) - 1
    assert pairs.trace() == 0
    assert abs(chi_square(pairs[~np.eye(count, dtype=bool)]) - f) < 4 * (2 * f) ** 0.5


def test_a_large_order_has_no_line_in_it():
    count = 10**7
    order = drawn(count)
    items = np.array([order[place] for place in range(20_000)])
    # the items of the first places are spread evenly, and do not follow the places
    f = 99
    histogram = np.bincount(items * 100 // count, minlength=100)
    assert abs(chi_square(histogram) - f) < 4 * (2 * f) ** 0.5
    assert abs(np.corrcoef(np.arange(len(items)), items)[0, 1]) < 4 / len(items) ** 0.5
    steps = np.diff(items) % count
    assert np.unique(steps).size > 0.99 * steps.size


def test_seeds_and_epochs_have_orders_of_their_own():
    count = LISTED + 5
    orders = [[Order(count, seed)(e * count + i)[0] for i in range(50)] for seed, e in PLACES]
    assert len({tuple(order) for order in orders}) == len(PLACES)
    again = [[Order(count, 1)(n) for n in (7, 3 * count)] for _ in range(2)]
    assert again[0] == again[1]


PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 - 1, 10**6)]


def test_small_runs_keep_the_order_that_they_always_had(monkeypatch):
    """A run of an earlier release goes on bit for bit."""
    rng = np.random.default_rng([5, 3])
    offset, order = int(rng.integers(0, 4)), rng.permutation(90).tolist()
    assert [Order(90, 5, 4)(3 * 90 + i) for i in range(90)] == [(i, offset) for i in order]
    assert LISTED == 2**20
    monkeypatch.setattr(shuffle, "LISTED", 89)
    found = [Order(90, 5, 4)(3 * 90 + i) for i in range(90)]
    assert found != [(i, offset) for i in order]
    assert sorted(found) == [(i, offset) for i in range(90)]


def test_the_cost_does_not_grow_with_the_corpus():
    class Tokens:
        """As many ids as asked for, none of them in memory."""

        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, places):
            return np.arange(places.start, places.stop, dtype=np.int64)

    peaks = []
    for count in (10**10, 10**15):
        batches = WindowBatches(Tokens(count), 1024, 7)
        tracemalloc.start()
        x, y = batches.rows(10**16 + 3, 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert x.shape == (2, 1024) and (y == x + 1).all() and x.min() >= 0 and y.max() < count
    assert max(peaks) < 2**18, peaks
