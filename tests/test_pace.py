"""The choice between all threads and one, with a clock and a torch that the test moves."""

import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanogpt2 import threads
from nanogpt2.cpu import pace as pace_module
from nanogpt2.cpu.pace import BETTER, FIRST, LOST, SHORTEST, TRIAL, Pace

MOST = 8


class Machine:
    """A clock, torch's number of threads, and the seconds that a step takes with a number."""

    def __init__(self):
        self.now, self.present, self.set = 100.0, MOST, []
        self.seconds = lambda number: 0.01

    def get_num_threads(self):
        return self.present

    def set_num_threads(self, number):
        self.present = number
        self.set.append(number)

    def perf_counter(self):
        return self.now

    def run(self, pace, steps):
        """Take steps; return the number of threads of each."""
        used = []
        for _ in range(steps):
            outside = self.present
            with pace:
                used.append(self.present)
                self.now += self.seconds(self.present)
            assert self.present == outside
        return used


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(pace_module, "torch", machine)
    monkeypatch.setattr(pace_module, "time", machine)
    monkeypatch.setattr(threads, "fixed", False)
    return machine


@pytest.mark.parametrize("step", [0.002, 0.02, 0.3])
@pytest.mark.parametrize("ratio", [1.0, 1.3, 1.9, 5.0])
def test_an_idle_machine_keeps_its_threads(machine, step, ratio):
    """Failed trials cost less than 3 % of the time, for fast steps and slow ones."""
    machine.seconds = lambda number: step if number == MOST else step * ratio
    pace, start, count = Pace(), machine.now, round(300 / step)
    used = machine.run(pace, count)
    # it did try, and went back each time
    assert 0 < used.count(1) < (0.4 if ratio == 1 else 0.1) * count
    assert machine.now - start < 1.03 * count * step


def test_what_is_hardly_faster_is_not_taken(machine):
    machine.seconds = lambda number: 0.01 if number == MOST else 0.01 * (BETTER + 0.01)
    assert machine.run(Pace(), 2000).count(MOST) > 1800


def test_a_busy_machine_gets_one_thread_within_a_few_steps(machine):
    machine.seconds = lambda number: 0.03 if number == MOST else 0.015
    pace = Pace()
    used = machine.run(pace, 2000)
    assert used[: FIRST + 1] == [MOST] * (FIRST + 1)
    assert used[FIRST + 1 : 30] == [1] * (30 - FIRST - 1)
    assert used.count(1) > 0.97 * 2000
    assert pace.threads in (1, MOST)


def test_load_that_comes_and_goes(machine):
    idle = lambda number: 0.01 if number == MOST else 0.016  # noqa: E731
    busy = lambda number: 0.04 if number == MOST else 0.018  # noqa: E731
    pace = Pace()
    for _ in range(3):
        machine.seconds = idle
        # seconds pass before the next trial is due
        machine.run(pace, 1500)
        assert machine.run(pace, 100).count(MOST) >= 90
        machine.seconds = busy
        # the steps became slower than usual: no trial has to be due
        machine.run(pace, 20)
        assert machine.run(pace, 100).count(1) >= 90


def test_a_thread_that_the_user_asked_for_stays(machine, monkeypatch):
    monkeypatch.setattr(threads, "fixed", True)
    machine.seconds = lambda number: 0.03 if number == MOST else 0.001
    assert machine.run(Pace(), 500) == [MOST] * 500
    assert machine.set == []


def test_one_thread_has_no_other_number(machine):
    machine.present = 1
    assert machine.run(Pace(), 500) == [1] * 500
    assert machine.set == []


def test_an_error_restores_the_callers_number_and_is_not_timed(machine):
    machine.seconds = lambda number: 0.03 if number == MOST else 0.015
    pace = Pace()
    machine.run(pace, 20)
    assert pace.threads == 1
    for _ in range(50):
        with pytest.raises(KeyError), pace:
            assert machine.present == 1
            machine.now += 60
            raise KeyError
        assert machine.present == MOST
    assert machine.run(pace, 1) == [1]


def test_a_step_of_another_thread_meanwhile(machine):
    """It runs with its own number, and the caller's is restored all the same."""
    pace = Pace()
    machine.run(pace, FIRST + 1)
    with pace:
        assert machine.present == 1
        before = [*machine.set]
        with ThreadPoolExecutor(1) as other:
            other.submit(pace.__enter__).result()
            other.submit(pace.__exit__, None).result()
        assert machine.set == before
    assert machine.present == MOST
    # and steps are timed again
    machine.seconds = lambda number: 0.01 * number
    assert machine.run(pace, 100)[-1] == 1


def test_a_number_that_the_caller_changes_holds(machine):
    machine.seconds = lambda number: 0.03 if number > 1 else 0.015
    pace = Pace()
    assert machine.run(pace, 20)[-1] == 1
    machine.present = 3
    assert machine.run(pace, FIRST + 1) == [3] * (FIRST + 1)
    assert machine.run(pace, 10) == [1] * 10
    machine.present = 1
    assert machine.run(pace, 200) == [1] * 200
    machine.present = MOST
    assert machine.run(pace, 1) == [MOST]


def test_the_next_trial_waits_longer_the_more_the_last_one_lost(machine):
    """Not even a short text's trials follow one another closely."""
    machine.seconds = lambda number: 0.5 if number == MOST else 0.9
    used = machine.run(Pace(), 60)
    assert 0 < used.count(1) <= TRIAL + 1
    assert SHORTEST < 0.4 * (TRIAL + 1) / LOST


def test_torch_itself_is_set(monkeypatch):
    """The names are torch's: no fake of theirs could be misspelt."""
    import torch

    assert isinstance(pace_module.torch, types.ModuleType)
    before = torch.get_num_threads()
    pace = Pace()
    with pace:
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
