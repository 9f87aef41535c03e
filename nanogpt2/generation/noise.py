"""The source of random numbers: torch's stream, as transformers draws, or a counter.

argmax p_i / q_i draws token i with probability p_i, where the q_i are independent exponential
variables. torch.multinomial does this inside. The sources differ only in how they make q.
Stochastic beams use q itself: -log q is Gumbel noise.

- `StreamNoise` takes the next numbers of a torch generator. A text depends on all earlier draws,
  so on its batch as well.
- `SeparateNoise` gives each prompt its own source, so its texts do not depend on its batch.
- `CounterNoise` computes q from (seed, sample, step, token) by a hash. So text 7 of 64 can be made
  again alone.

After top_k most probabilities are 0, and q is computed only for the others. This works in torch's
stream as well: on a CPU its exponential variables are -log(1 - u) of its uniform variables u, which
cost a fifth of them. `_stream_is_uniform` checks this once before a draw relies on it.

Source of the hash: Steele, Lea and Flood 2014, SplitMix64's finaliser.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nanogpt2.cpu import native

# take the sparse path when at most this part of the probabilities is nonzero
SPARSE = 1 / 8


class Noise(Protocol):
    """Draws from rows of probabilities."""

    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        """Return int64 (R, count): different columns of each row of (R, N), in draw order.

        Where a probability is NaN, raises ValueError at step 0, when the options are to blame, and
        FloatingPointError later. StreamNoise also raises them where a row has fewer than `count`
        probabilities above 0.
        """

    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        """Return q itself, positive float64 (R, N)."""


def nothing_left(step: int) -> Exception:
    """Make the error of a draw without possible tokens."""
    return (FloatingPointError if step else ValueError)(
        "do_sample must have tokens left to draw; the other options leave none"
    )


class StreamNoise(Noise):
    """torch.multinomial with the global generator, or with a new generator if a seed is given."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self._device = device

    @override
    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        few = _possible(probabilities, count)
        if few is not None and _stream_is_uniform():
            uniform = self._uniform(probabilities.shape)
            dtype = probabilities.dtype
            return few.best(lambda *at: _exponential(uniform(*at)).to(dtype), count)
        try:
            return torch.multinomial(probabilities, count, generator=self._generator)
        except RuntimeError as error:
            raise nothing_left(step) from error

    def _uniform(self, shape: torch.Size) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of rows and columns, in order: torch.rand's numbers there, float64."""
        generator = self._generator
        # another thread may use torch's own generator meanwhile
        if generator is None or not native.knows_the_stream():
            every = torch.rand(shape, dtype=torch.float64, generator=generator)
            return lambda rows, columns: every[rows, columns]
        return lambda rows, columns: native.uniforms(
            generator, shape.numel(), rows * shape[1] + columns
        )

    @override
    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        q = torch.empty(shape, dtype=torch.float64, device=self._device)
        return q.exponential_(generator=self._generator)


class SeparateNoise(Noise):
    """A source for each prompt; the rows of a prompt stand side by side."""

    def __init__(self, sources: Sequence[Noise]) -> None:
        self._sources = sources

    @override
    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        parts = zip(self._sources, probabilities.chunk(len(self._sources)), strict=True)
        return torch.cat([source.draw(part, count, step) for source, part in parts])

    @override
    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        part = shape[0] // len(self._sources), shape[1]
        return torch.cat([source.exponential(part, step) for source in self._sources])


class CounterNoise(Noise):
    """Draws that are functions of the seed, the row's sample number, the step and the column."""

    def __init__(self, seed: int, samples: Tensor, row_seeds: Sequence[int] | None = None) -> None:
        """samples: int64 (R,), the number of each row's text among those of its prompt.

        row_seeds: R seeds to draw as `seed` would, one for each row; by default `seed`.
        """
        if row_seeds is not None:
            # only samples + mix(seed) is ever used, so move the difference of the seeds there
            mixed = torch.tensor([_mix_int(each) for each in row_seeds], device=samples.device)
            samples = samples + mixed - _mix_int(seed)
        self.seed, self.samples = seed, samples
        self._texts = _mix(samples + _mix_int(seed))  # (R,), a key for each text

    @override
    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        few = _possible(probabilities, count)
        if few is not None:
            keys = self._keys(step)
            return few.best(lambda rows, columns: _hashed(keys[rows] + columns), count)
        if probabilities.isnan().any():
            raise nothing_left(step)
        return self.draw_unchecked(probabilities, count, step)

    def draw_unchecked(self, probabilities: Tensor, count: int, step: int | Tensor) -> Tensor:
        """Draw as `draw` does, without a look at the values: nothing waits for a GPU.

        step: an int, or an int64 () that a CUDA graph reads.
        """
        columns = torch.arange(probabilities.size(1), device=probabilities.device)
        # 0 / q is 0, so a token of probability 0 never comes before a possible token
        q = _hashed(self._keys(step)[:, None] + columns)
        return (probabilities.double() / q).topk(count, dim=1).indices

    @override
    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        columns = torch.arange(shape[1], device=self.samples.device)
        return _hashed(self._keys(step)[:, None] + columns)

    def _keys(self, step: int | Tensor) -> Tensor:
        """A key for each row, int64 (R,), before a column is added."""
        return _mix(self._texts + step)


class _Possible:
    """The M probabilities above 0 among (R, N), where M is small."""

    def __init__(
        self, probabilities: Tensor, rows: Tensor, columns: Tensor, counts: Tensor
    ) -> None:
        """rows, columns: int64 (M,), in order; counts: how many in each row, int64 (R,)."""
        self._p = probabilities[rows, columns]  # (M,)
        self._rows, self._columns = rows, columns
        # each entry's place in a table with a line for each row
        first = counts.cumsum(0) - counts
        self._places = torch.arange(len(rows), device=rows.device) - first[rows]
        self._shape = (len(counts), int(counts.max()))

    def best(self, noise: Callable[[Tensor, Tensor], Tensor], count: int) -> Tensor:
        """Return the columns, int64 (R, count), with the largest p / q.

        noise(rows, columns) is q, in the dtype to compare in.
        """
        q = noise(self._rows, self._columns)
        ratio = self._p.to(q.dtype) / q
        table = ratio.new_full(self._shape, -1.0)  # (R, most in a row)
        table[self._rows, self._places] = ratio
        columns = self._columns.new_zeros(self._shape)
        columns[self._rows, self._places] = self._columns
        return columns.gather(1, table.topk(count, dim=1).indices)


def _possible(probabilities: Tensor, count: int) -> _Possible | None:
    """Return the entries above 0, or None where the draw must look at all columns.

    None if too many are above 0, a row has fewer than `count` of them, or a value is no
    probability. None on a GPU as well: the CPU would have to wait for the count.
    """
    if probabilities.device.type != "cpu":
        return None
    low, high = (float(x) for x in torch.aminmax(probabilities))
    # False for NaN
    if not (low >= 0 and high < float("inf")):
        return None
    # NumPy's search of bools takes a third of the time of torch's
    places = torch.from_numpy(np.flatnonzero(probabilities.bool().numpy()))
    columns = places % probabilities.size(1)
    rows = places // probabilities.size(1)
    counts = rows.bincount(minlength=len(probabilities))
    if len(rows) > SPARSE * probabilities.numel() or int(counts.min()) < count:
        return None
    return _Possible(probabilities, rows, columns, counts)


@cache
def _stream_is_uniform() -> bool:
    """Tell whether torch makes each exponential variable from one uniform variable, as we do."""
    a, b = (torch.Generator().manual_seed(0) for _ in range(2))
    exponential = torch.empty(64).exponential_(generator=a)
    uniform = torch.rand(64, dtype=torch.float64, generator=b)
    return torch.equal(exponential, _exponential(uniform).float()) and torch.equal(
        a.get_state(), b.get_state()
    )


def _exponential(uniform: Tensor) -> Tensor:
    """Turn uniform variables in [0, 1) into exponential variables."""
    return -torch.log1p(-uniform)


def _hashed(x: Tensor) -> Tensor:
    """Turn int64 numbers into exponential variables, float64."""
    bits = _mix(x)
    # 53 random bits in (0, 1): never 0, so the logarithm is finite
    uniform = ((bits >> 11 & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return -uniform.log()


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_M1, _M2 = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap: each bit of x flips half of them."""
    x = x * _GOLDEN
    x = (x ^ (x >> 30 & (2**34 - 1))) * _M1
    x = (x ^ (x >> 27 & (2**37 - 1))) * _M2
    return x ^ (x >> 31 & (2**33 - 1))


def _mix_int(seed: int) -> int:
    return int(_mix(torch.tensor(seed, dtype=torch.int64)))


def seed_of(seed: int, number: int) -> int:
    """Return the seed of the prompt with this number, from the seed of all prompts."""
    return int(_mix(_mix(torch.tensor(seed)) + number)) & (2**63 - 1)
