"""Batches depend only on the seed and the sequence's number, however the ranges are cut."""

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt2.data.encode import encode_chat, encode_labelled
from nanogpt2.data.examples import chat_examples, labelled_examples
from nanogpt2.data.loader import make_batches, validation_batches
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
IDS = np.arange(1000, dtype=np.uint16)
CHAT = chat_examples(
    np.concatenate(
        [encode_chat([("p" * i, False), ("c" * (7 % i), True)], BYTES) for i in range(1, 14)]
    )
)
LABELLED = labelled_examples(
    np.concatenate([encode_labelled("t" * (1 + 5 * i % 11), f"{i}", BYTES) for i in range(11)])
)
DATA = {"lm": IDS, "chat": CHAT, "classify": LABELLED}


def whole_rows(batches, first, count):
    """Return rows as lists of (input, target), without padding."""
    x, y = batches.rows(first, count)
    assert x.shape == y.shape and len(x) == count and x.dtype == y.dtype == torch.int64
    assert x.size(1) <= batches.block_size
    rows = [[*zip(a.tolist(), b.tolist(), strict=True)] for a, b in zip(x, y, strict=True)]
    for row in rows:
        while row[-1] == (0, -100):
            row.pop()
    assert max(map(len, rows)) == x.size(1), "no wider than the longest"
    return rows


@pytest.mark.parametrize("task", DATA)
@given(cuts=st.lists(st.integers(0, 60)), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_any_way_of_cutting_the_run_gives_the_same_rows(task, cuts, seed, data):
    batches = make_batches(DATA[task], 7, seed)
    expected = whole_rows(batches, 0, 60)
    edges = sorted({0, 60, *cuts})
    ranges = [(a, b - a) for a, b in pairwise(edges)]
    # read in another order: by threads that share a loader, then with a new loader each
    shuffled = data.draw(st.permutations(ranges))
    with ThreadPoolExecutor(3) as pool:
        found = dict(
            zip(shuffled, pool.map(lambda r: whole_rows(batches, *r), shuffled), strict=True)
        )
    assert [row for r in ranges for row in found[r]] == expected
    for r in shuffled[:2]:
        assert whole_rows(make_batches(DATA[task], 7, seed), *r) == found[r]


def test_threads_in_different_epochs_do_not_disturb_one_another():
    batches = make_batches(IDS, 7, 0)
    numbers = [epoch * batches.sequences for epoch in range(3)]
    expected = [batches.rows(n, 1)[0].tolist() for n in numbers]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            for found in pool.map(
                lambda _: [batches.rows(n, 1)[0].tolist() for n in numbers], range(300)
            ):
                assert found == expected
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("task", DATA)
def test_a_far_position_costs_no_more_operations_than_the_first(task, monkeypatch):
    calls = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: calls.append(key) or real(key))
    near = make_batches(DATA[task], 7, 5)
    near.rows(0, 2)
    cost = len(calls)
    far = make_batches(DATA[task], 7, 5)
    far.rows(10**9 - 10**9 % far.sequences, 2)
    assert cost == len(calls) - cost == 1


@pytest.mark.parametrize("task", DATA)
def test_seeds_and_epochs_differ_and_an_epoch_has_all(task):
    batches = make_batches(DATA[task], 7, 0)
    count = batches.sequences
    first, second = (whole_rows(batches, e * count, count) for e in (0, 1))
    assert first != second and first != whole_rows(make_batches(DATA[task], 7, 1), 0, count)
    if task != "lm":
        everything = sorted(
            [*zip(*(ids.tolist() for ids in DATA[task].example(i, 7)), strict=True)]
            for i in range(count)
        )
        assert sorted(first) == sorted(second) == everything and count == len(DATA[task])


def test_targets_of_a_text_are_the_next_tokens():
    x, y = make_batches(IDS, 5, 0).rows(22, 3)
    assert x.shape == (3, 5) and torch.equal(y, x + 1)


def test_an_epoch_sees_every_window_once_and_the_next_is_shuffled_anew():
    batches = make_batches(np.arange(107, dtype=np.uint16), 10, 0)
    assert batches.sequences == 9
    epochs = [batches.rows(e * 9, 9)[0][:, 0].tolist() for e in range(20)]
    for starts in epochs:
        ordered = sorted(starts)
        assert [b - a for a, b in pairwise(ordered)] == [10] * 8
        assert starts != ordered
    assert len({min(starts) for starts in epochs}) > 3, "the cuts never move"
    assert len({tuple(starts) for starts in epochs}) == 20


def test_the_shortest_text_has_one_window():
    batches = make_batches(np.arange(9, dtype=np.uint16), 8, 0)
    assert batches.rows(3, 2)[0].tolist() == [list(range(8))] * 2
    with pytest.raises(ValueError, match="block_size must be < 9"):
        make_batches(np.arange(9, dtype=np.uint16), 9, 0)


@pytest.mark.parametrize("count", [2, 7, 8, 9, 40, 41, 57])
def test_validation_counts_every_token_once(count):
    batches = validation_batches(np.arange(100, 100 + count, dtype=np.uint16), 3, 8)
    found = []
    for x, y in batches:
        assert x.shape == y.shape and x.size(0) <= 3 and x.size(1) <= 8
        counted = y != -100
        assert torch.equal(y[counted], x[counted] + 1)
        found += y[counted].tolist()
    assert found == list(range(101, 100 + count))


@pytest.mark.parametrize("task", ["chat", "classify"])
@pytest.mark.parametrize("batch_size", [1, 4, 13, 99])
def test_validation_of_examples_counts_every_target_once(task, batch_size):
    data = DATA[task]
    found = [t for _, y in validation_batches(data, batch_size, 99) for t in y[y != -100].tolist()]
    expected = [t for i in range(len(data)) for t in data.example(i, 99)[1].tolist() if t != -100]
    assert found == expected


@pytest.mark.parametrize("task", DATA)
def test_processes_divide_the_validation_batches(task):
    batches = validation_batches(DATA[task], 3, 7)
    parts = [[batches[i] for i in range(rank, len(batches), 3)] for rank in range(3)]
    assert sum(map(len, parts)) == len(batches)
    for i, (x, y) in enumerate(batches):
        assert torch.equal(parts[i % 3][i // 3][0], x) and torch.equal(parts[i % 3][i // 3][1], y)
    for i in (-1, len(batches)):
        with pytest.raises(IndexError):
            batches[i]
