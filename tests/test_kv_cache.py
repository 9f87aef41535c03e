"""The caches: what a row sees of them, whatever was repeated and reordered."""

import random

import pytest
import torch

from nanogpt2.kv_cache import KVCache, SharedCache

SHAPE = {"layers": 2, "H": 3, "S": 23, "D": 5}


def caches(B):
    layers, H, S, D = SHAPE.values()
    return KVCache(layers, B, H, S, D), SharedCache(layers, B, H, S, D)


def extend(pair, T):
    """New tokens of every row and layer, the same for both."""
    plain, shared = pair
    seen = [cache.seen(T) for cache in pair]
    for layer in range(SHAPE["layers"]):
        k, v = torch.randn(2, plain.batch_size, SHAPE["H"], T, SHAPE["D"])
        results = [cache.extend(layer, k, v) for cache in pair]
        if shared.length == 0:
            assert results[1] == (k, v)
        else:
            assert torch.equal(results[0][0], gathered(results[1][0], shared, shared.length + T))
            assert torch.equal(results[0][1], gathered(results[1][1], shared, shared.length + T))
    for cache in pair:
        cache.advance(T)
    return seen


def gathered(buffer, cache, length):
    """What the table says that the rows are: (B, H, length, D)."""
    t = torch.arange(length)
    return buffer[cache.ancestors[:, :length].long(), :, t].transpose(1, 2)


def assert_equal(pair):
    plain, shared = pair
    for name in ("k", "v"):
        for layer in range(SHAPE["layers"]):
            buffer = getattr(shared, name)[layer]
            expected = getattr(plain, name)[layer, :, :, : plain.length]
            assert torch.equal(gathered(buffer, shared, shared.length), expected)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_what_a_copied_caches_are(seed):
    rng = random.Random(seed)
    B, rows = rng.randint(1, 3), rng.randint(1, 4)
    pair = caches(B)
    extend(pair, rng.randint(1, 5))
    for cache in pair:
        cache.repeat_interleave(rows)
    fork = pair[0].length
    assert_equal(pair)
    while pair[0].length < SHAPE["S"] - 5:
        extend(pair, rng.choice([1, 1, 1, 3]))
        # rows of one prompt go on from one another
        parents = torch.arange(B * rows) // rows * rows + torch.randint(rows, (B * rows,))
        for cache in pair:
            cache.reorder(parents, start=fork)
        assert_equal(pair)
    for cache in pair:
        cache.length = 0
    extend(pair, 4)
    for cache in pair:
        cache.reorder(torch.arange(B * rows).flip(0))
    assert_equal(pair)


def test_a_prompt_is_stored_once_and_a_beam_copies_no_keys():
    _, cache = pair = caches(2)
    extend(pair, 4)
    cache.k.fill_(1.0)
    cache.start = torch.tensor([0, 3], dtype=torch.int32)
    cache.repeat_interleave(3)
    assert cache.ancestors[:, :4].tolist() == [[0] * 4] * 3 + [[1] * 4] * 3
    assert cache.start.tolist() == [0, 0, 0, 3, 3, 3]
    cache.k[:, 2:, :, :4] = float("nan")
    before = cache.k.clone()
    cache.reorder(torch.tensor([2, 2, 0, 3, 5, 5]), start=4)
    assert torch.equal(cache.k.nan_to_num(), before.nan_to_num())
    seen = cache.seen(2)
    assert seen.lengths.tolist() == [6] * 6 and seen.lengths.dtype == torch.int32
    assert seen.ancestors is cache.ancestors and seen.start is cache.start


def test_what_new_tokens_see():
    plain, shared = pair = caches(1)
    assert plain.seen(3) is None and shared.seen(3).lengths is None
    extend(pair, 2)
    assert plain.seen(1) is None
    assert plain.seen(2).tolist() == [[True, True, True, False], [True] * 4]
    for cache in pair:
        with pytest.raises(ValueError, match="room for 23 positions, not 24"):
            cache.extend(0, *torch.randn(2, 1, 3, 22, 5))
