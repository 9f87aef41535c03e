"""Where chance comes from: torch's stream, as transformers draws, or a counter.

A draw of token i with probability p_i is argmax p_i / q_i, where the q_i are independent
exponential variables: torch.multinomial does this inside. All that differs is where q comes from.
Stochastic beams take q itself: -log q is Gumbel noise.

- `StreamNoise` takes the next numbers of a torch generator. A text depends on all that was drawn
  before it, on its batch too.
- `CounterNoise` computes q from (seed, sample, step, token) by a hash, so that text number 7 of 64
  can be made again alone.

Source of the hash: Steele, Lea and Flood 2014, SplitMix64's finaliser.
"""

from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Draws from rows of probabilities."""

    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        """Return int64 (R, count): different columns of each row of (R, N), in draw order."""

    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        """Return q itself, positive float64 (R, N)."""


def nothing_left(step: int) -> Exception:
    """What a draw raises where it has nothing to draw from."""
    return (FloatingPointError if step else ValueError)(
        "do_sample must have tokens left to draw, which the other options do not leave"
    )


class StreamNoise:
    """torch.multinomial with the global generator, or with one of its own where a seed is given."""

    def __init__(self, seed: int | None, device: torch.device) -> None:
        self._generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        self._device = device

    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        """See Noise.

        Where too few columns are possible or one is no number, raises ValueError at the first step,
        which is for the options to blame, and FloatingPointError after it.
        """
        try:
            return torch.multinomial(probabilities, count, generator=self._generator)
        except RuntimeError as error:
            raise nothing_left(step) from error

    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        """See Noise."""
        q = torch.empty(shape, dtype=torch.float64, device=self._device)
        return q.exponential_(generator=self._generator)


class CounterNoise:
    """Draws that are functions of the seed, the row's sample number, the step and the column."""

    def __init__(self, seed: int, samples: Tensor) -> None:
        """samples: int64 (R,), the number of each row's text among those of its prompt."""
        self.seed, self.samples = seed, samples

    def draw(self, probabilities: Tensor, count: int, step: int) -> Tensor:
        """See Noise; raises what StreamNoise does where a row's are no numbers."""
        if probabilities.isnan().any():
            raise nothing_left(step)
        R, N = probabilities.shape
        # a token of probability 0 is never preferred to one that is possible
        return (probabilities.double() / self.exponential((R, N), step)).topk(count, dim=1).indices

    def exponential(self, shape: tuple[int, int], step: int) -> Tensor:
        """See Noise."""
        columns = torch.arange(shape[1], device=self.samples.device)
        # one key a row, mixed before the columns come in: (R, 1)
        row = _mix(_mix(self.samples + _mix_int(self.seed)) + step)[:, None]
        bits = _mix(row + columns)  # int64 (R, N)
        # 53 random bits in (0, 1): never 0, so the logarithm is finite
        uniform = ((bits >> 11 & (2**53 - 1)).double() + 0.5) * 2.0**-53
        return -uniform.log()


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_M1, _M2 = -4658895280553007687, -7723592293110705685  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap: every bit of x moves half of them."""
    x = x * _GOLDEN
    x = (x ^ (x >> 30 & (2**34 - 1))) * _M1
    x = (x ^ (x >> 27 & (2**37 - 1))) * _M2
    return x ^ (x >> 31 & (2**33 - 1))


def _mix_int(seed: int) -> int:
    return int(_mix(torch.tensor(seed, dtype=torch.int64)))
