"""The solutions of docs/exercises.md: direction and size of each, measured by its script."""

import re
import runpy

import pytest
import torch
from reference import ROOT
from test_lessons import difference, page_text

PAGE = "docs/exercises.md"
script = runpy.run_path(str(ROOT / "docs/exercises.py"))
NAMES = [name for name in script["EXERCISES"] if name != "as it is"]
# mistake, at once, after training
ROW = re.compile(r"^\| ([\w -]+) \| (within .*|[\d.]+ to .*) \| (.*) \|$", re.M)
SOLUTIONS = {name: (at_once, after) for name, at_once, after in ROW.findall(page_text(PAGE))}


def holds(solution, change):
    """Whether a change of the loss is what a solution says, such as "0.1 to 1 higher"."""
    if found := re.fullmatch(r"within ([\d.]+)", solution):
        return abs(change) < float(found[1])
    low, high, direction = re.fullmatch(r"([\d.]+) to ([\d.]+) (higher|lower)", solution).groups()
    return float(low) < (change if direction == "higher" else -change) < float(high)


@pytest.fixture(scope="module")
def unseen():
    return script["text"]()[1]


@pytest.fixture(scope="module")
def intact(unseen):
    return script["loss_on"](script["broken_model"]("as it is"), unseen)


def test_every_exercise_has_a_question_and_a_solution():
    assert list(SOLUTIONS) == NAMES
    diffs = "".join(re.findall(r"^```diff\n(.*?)^```", page_text(PAGE), re.M | re.S)).splitlines()
    for name in NAMES:
        assert f". {name}.**" in page_text(PAGE)
        for _, line, replacement in script["EXERCISES"][name]:
            assert diffs.index(f"- {line}") >= 0
            assert diffs.index(f"+ {replacement}") >= 0


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_changes_at_once_as_the_solution_says(name, unseen, intact):
    change = script["loss_on"](script["broken_model"](name), unseen) - intact
    assert holds(SOLUTIONS[name][0], change), change


def test_only_the_masks_that_are_wrong_let_a_later_token_through():
    ids = torch.tensor([[464, 661, 286, 262, 1578, 1829, 286, 2253]])
    other = ids.clone()
    other[0, -1] = 8
    # each of the four blocks lets it one position further
    leaks = {"mask one too far": [7 - 4], "mask one too short": [0]}
    for name in ("as it is", *leaks):
        with torch.no_grad():
            model = script["broken_model"](name)
            moved = (model(ids) - model(other))[0, :-1].abs().amax(dim=1) > 1e-4
        first = moved.nonzero().flatten().tolist()[:1]
        assert first == leaks.get(name, []), name


def test_an_exercise_whose_line_has_changed_is_seen():
    with pytest.raises(ValueError, match=r"ops\.py has 0 times, not once: no such line"):
        script["broken_module"]("ops.py", [("ops.py", "no such line", "")])


def test_a_wrong_solution_is_seen():
    assert holds("0.1 to 1 higher", 0.5)
    assert holds("0.1 to 1 lower", -0.5)
    assert holds("within 0.01", -0.005)
    assert not holds("0.1 to 1 higher", -0.5)
    assert not holds("0.1 to 1 higher", 2.0)
    assert not holds("within 0.01", 0.02)


@pytest.mark.slow
def test_the_script_prints_the_pages_table_and_the_solutions_hold(capsys):
    script["main"]([])
    printed = capsys.readouterr().out
    table = re.search(r"^```text\n(.*?)^```", page_text(PAGE), re.M | re.S)[1]
    assert difference(table, printed) is None
    after = {line[:20].strip(): float(line.split()[-1]) for line in printed.splitlines()[1:]}
    for name in NAMES:
        assert holds(SOLUTIONS[name][1], after[name] - after["as it is"]), name
