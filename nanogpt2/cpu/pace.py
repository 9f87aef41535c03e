"""Choose the threads of a decoding step: all of them, or one.

Several threads wait for each other dozens of times in a step. Beside other busy programs one of
them is always late, and a single thread is faster; for a small model it may be so on an idle
machine too. So both are timed while a text is generated: at the start, then every few seconds, and
at once where the steps become slower. The number of threads changes no result: each output of a
product is computed by one thread. Trials that fail take at most 2 % of the time, unless the steps
become slower again and again. This file does not know what a step computes.
"""

import time
from threading import Lock, get_ident
from typing import Self

import torch

from nanogpt2 import threads

TRIAL = 3  # steps of a trial, after one that wakes the threads
FIRST = 4  # steps before the first trial
SHORTEST, LONGEST = 0.5, 4.0  # seconds between two trials
BETTER = 0.95  # the other number must take less than this part of the time
LOST = 0.02  # the part of the time that failed trials may take
SLOWER = 1.5  # steps this much slower than before call for a trial
MEMORY = 8  # steps in the mean of the present number


class Pace:
    """Time each step inside `with pace:`; outside, torch has the caller's number of threads.

    Where several threads write texts by one model, one step at a time is timed; the others keep
    their own number.
    """

    def __init__(self) -> None:
        self._timed = Lock()
        self._owner: int | None = None  # the thread whose step is timed
        self._begin(torch.get_num_threads())

    def _begin(self, most: int) -> None:
        self._most = self.threads = most
        self._usual: float | None = None  # mean seconds of the present number's last steps
        self._left = FIRST  # steps before a trial may begin
        self._next_trial = 0.0
        self._between = SHORTEST
        self._trial: list[float] | None = None

    def __enter__(self) -> Self:
        if not self._timed.acquire(blocking=False):
            return self
        self._owner = get_ident()
        self._before = torch.get_num_threads()
        if self._before != self._most:
            # the caller has changed it
            self._begin(self._before)
        if self._before != self.threads:
            torch.set_num_threads(self.threads)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        now = time.perf_counter()
        if self._owner != get_ident():
            return
        if self._before != self.threads:
            torch.set_num_threads(self._before)
        if self._most > 1 and not threads.fixed and error[0] is None:
            self._count(now - self._start, now)
        self._owner = None
        self._timed.release()

    def _count(self, seconds: float, now: float) -> None:
        if self._trial is not None:
            self._trial.append(seconds)
            self._end_trial(now)
            return
        usual = seconds if self._usual is None else self._usual
        is_slower = self._left <= 0 and seconds > SLOWER * usual
        self._usual = usual + (seconds - usual) / MEMORY
        self._left -= 1
        if self._left < 0 and (now >= self._next_trial or is_slower):
            self._trial = []
            self._change()

    def _end_trial(self, now: float) -> None:
        assert self._trial is not None and self._usual is not None
        _, *counted = self._trial
        # much too slow already: the rest of the trial would only cost time
        is_hopeless = self._trial[-1] > 2 * self._usual
        if len(counted) < TRIAL and not is_hopeless:
            return
        mean = sum(counted) / len(counted) if counted else self._trial[0]
        if not is_hopeless and mean < BETTER * self._usual:
            self._usual, self._between = mean, SHORTEST
        else:
            self._change()
            self._between = min(LONGEST, 2 * self._between)
        lost = sum(self._trial) - len(self._trial) * self._usual
        self._trial, self._left = None, FIRST
        self._next_trial = now + max(self._between, lost / LOST)

    def _change(self) -> None:
        self.threads = 1 if self.threads > 1 else self._most
