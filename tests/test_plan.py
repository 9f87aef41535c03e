"""When matrices change their layout, by made-up tables of times."""

import pytest

from nanogpt2.cpu.plan import WORTH, Plan
from nanogpt2.cpu.tuning import Timing

SHAPE = (8, 4)


class Matrix:
    """Keeps the names of its layouts, in the order in which it took them."""

    layouts = ("plain", "one", "five")

    def __init__(self, shape=SHAPE, layout="plain", layouts=layouts):
        self.shape, self.layout, self.layouts, self.took = shape, layout, layouts, []

    def lay_out(self, name):
        assert name in self.layouts and name != self.layout
        self.layout = name
        self.took.append(name)


def timing(one, five, many, lay_out):
    return Timing({1: one, 5: five, 64: many}, lay_out)


# milliseconds: `one` saves 2 with a row and loses 4 with five; `five` saves 3 with five
TABLE = {
    SHAPE: {
        "plain": timing(10, 20, 100, 0),
        "one": timing(8, 24, 130, 9),
        "five": timing(10, 17, 100, 12),
    }
}


def steps_until(plan, rows, reached, most=10_000):
    for step in range(1, most):
        plan.count(rows)
        if reached():
            return step
    raise AssertionError("never reached")


def test_without_a_table_nothing_happens():
    for table in (None, {}, {(1, 1): TABLE[SHAPE]}):
        matrix = Matrix()
        plan = Plan([matrix], table)
        plan.begin(1, 100, 100)
        for rows in (0, 1, 5, 64, 1000):
            for _ in range(1000):
                plan.count(rows)
        assert matrix.took == []
    empty = Matrix(layout=None)
    Plan([empty], None).begin(1, 5, 5)
    assert empty.layout is None


def test_a_matrix_is_laid_out_once_the_account_covers_the_cost():
    """Each step loses 2 ms; laying out takes 9: the account holds more than 9 after 5 steps."""
    matrix = Matrix()
    plan = Plan([matrix], TABLE)
    for _ in range(4):
        plan.count(1)
    assert matrix.took == []
    plan.count(1)
    assert matrix.took == ["one"]
    for _ in range(1000):
        plan.count(1)
    assert matrix.took == ["one"]


def test_one_matrix_after_the_other():
    """Each of 10 matrices loses 2 ms a step, and 9 pay for it: from the fifth step, one a step."""
    matrices = [Matrix() for _ in range(10)]
    plan = Plan(matrices, TABLE)
    laid_out = []
    account, cost = 0.0, 0.0
    while "plain" in {m.layout for m in matrices}:
        account += 2 * [m.layout for m in matrices].count("plain")
        before = sum(len(m.took) for m in matrices)
        plan.count(1)
        laid_out.append(sum(len(m.took) for m in matrices) - before)
        cost += 9 * laid_out[-1]
        # never more time spent on laying out than was lost without it
        assert cost <= account
        # in the order of their use
        assert [m.layout for m in matrices] == sorted(m.layout for m in matrices)
    assert laid_out == [0] * 4 + [1] * 10
    assert all(m.took == ["one"] for m in matrices)


def test_rows_that_change():
    """1 -> 5 beams -> 1: `one` is left for `five`, and that for `one` again."""
    matrix = Matrix()
    plan = Plan([matrix], TABLE)
    assert steps_until(plan, 1, lambda: matrix.layout == "one") == 5
    # 7 ms a step against 12
    assert steps_until(plan, 5, lambda: matrix.layout == "five") == 2
    # 2 ms a step against `five`'s 12, the dearer of the two ways
    assert steps_until(plan, 1, lambda: matrix.layout == "one") == 7
    assert matrix.took == ["one", "five", "one"]


def test_one_prompt_does_not_undo_what_a_text_has_paid_for():
    """With 64 rows `plain` is 30 ms faster: that pays for a way of 9 back and forth at once.

    A way that costs more than a prompt saves is not taken.
    """
    for lay_out, took in ((9, ["one", "plain"]), (40, ["one"])):
        matrix = Matrix()
        table = {SHAPE: TABLE[SHAPE] | {"one": timing(8, 24, 130, lay_out)}}
        plan = Plan([matrix], table)
        steps_until(plan, 1, lambda: matrix.layout == "one")  # noqa: B023
        plan.count(64)
        assert matrix.took == took


def test_prompts_are_not_forgotten_between_texts():
    """Long prompts and short answers: in the end the prompts' layout is taken."""
    matrix = Matrix()
    table = {SHAPE: TABLE[SHAPE] | {"one": timing(8, 24, 130, 40)}}
    plan = Plan([matrix], table)
    steps_until(plan, 1, lambda: matrix.layout == "one")
    for prompt in range(2):
        assert matrix.took == ["one"], prompt
        plan.count(64)
        plan.count(1)
    assert matrix.took == ["one", "plain"]


def test_more_rows_count_more():
    """A prompt of 640 rows loses ten times as much as one of 64, a single row no less than one."""
    table = {SHAPE: {"plain": timing(10, 20, 100, 0), "one": timing(10, 20, 90, 99)}}
    steps = {}
    for rows in (17, 64, 128, 640):
        matrix = Matrix()
        plan = Plan([matrix], table)
        steps[rows] = steps_until(plan, rows, lambda: matrix.took)  # noqa: B023
    assert steps == {17: 10, 64: 10, 128: 5, 640: 1}


@pytest.mark.parametrize(("rows", "column"), [(2, 5), (5, 5), (16, 5), (17, 64), (1, 1)])
def test_the_column_of_a_number_of_rows(rows, column):
    fast = {1: 10.0, 5: 10.0, 64: 10.0} | {column: 1.0}
    matrix = Matrix()
    table = {SHAPE: {"plain": timing(10, 10, 10, 0), "one": Timing(fast, 0.5)}}
    Plan([matrix], table).count(rows)
    assert matrix.took == ["one"]


def test_what_saves_less_than_a_twentieth_is_not_worth_it():
    for part, is_worth in ((WORTH - 0.01, True), (WORTH + 0.01, False)):
        matrix = Matrix()
        table = {SHAPE: {"plain": timing(10, 10, 10, 0), "one": timing(10 * part, 10, 10, 1)}}
        plan = Plan([matrix], table)
        for _ in range(1000):
            plan.count(1)
        assert bool(matrix.took) == is_worth


def test_only_the_layouts_that_a_matrix_may_take():
    matrix = Matrix(layouts=("plain", "five"))
    plan = Plan([matrix], TABLE)
    for _ in range(1000):
        plan.count(1)
    assert matrix.took == []
    for _ in range(10):
        plan.count(5)
    assert matrix.took == ["five"]


def test_a_shape_has_its_own_account():
    other = (6, 2)
    table = TABLE | {other: {"plain": timing(10, 9, 9, 0), "one": timing(1, 9, 9, 1)}}
    first, second, absent = Matrix(), Matrix(other), Matrix((1, 1))
    plan = Plan([first, second, absent], table)
    plan.count(1)
    assert (first.took, second.took, absent.took) == ([], ["one"], [])


@pytest.mark.parametrize(
    ("rows", "prompt", "new", "best"),
    [
        # the prompt alone: `plain` and `five` are equal, the first one is taken
        (1, 640, 0, "plain"),
        (1, 64, 1, "plain"),
        # 30 ms lost in the prompt, 2 saved with each token
        (1, 64, 14, "plain"),
        (1, 64, 16, "one"),
        (5, 64, 1, "five"),
        (5, 1, 0, "one"),
    ],
)
def test_the_first_layout_follows_the_prompt_and_the_new_tokens(rows, prompt, new, best):
    matrices = [Matrix(layout=None), Matrix(layout=None), Matrix(layout="plain")]
    plan = Plan(matrices, TABLE)
    plan.begin(rows, prompt, new)
    # one that has a layout keeps it
    assert [m.layout for m in matrices] == [best, best, "plain"]
    plan.begin(1, 1, 10_000)
    assert [m.layout for m in matrices] == [best, best, "plain"]


def test_a_layout_that_the_table_lacks_stays():
    matrix = Matrix(layout="plain")
    table = {SHAPE: {name: t for name, t in TABLE[SHAPE].items() if name != "plain"}}
    plan = Plan([matrix], table)
    for _ in range(100):
        plan.count(1)
    assert matrix.took == []
