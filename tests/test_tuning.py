"""The table of times: what it holds, where it is kept, when it is ignored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import ROOT

from nanogpt2.cpu import layouts, tuning
from nanogpt2.cpu.layouts import BYTES
from nanogpt2.cpu.layouts import FLOAT as ALL
from nanogpt2.cpu.prepacked import FloatLinear, Int7Linear, Int8Linear, onednn_sums_exactly, to_int8
from nanogpt2.cpu.tuning import HEAD_PART, ROWS, Timing, cache_folder, measure, table_for

# without the layout of the step in C, which nobody has compiled here: see test_native.py
FLOAT = {name: layout for name, layout in ALL.items() if name != "rows"}

KIND = Int8Linear if onednn_sums_exactly() else Int7Linear
# a block's four, and a head that is timed in part
SHAPES = [(72, 24), (24, 24), (96, 24), (24, 96), (1000, 24)]


def products(kind, shapes=SHAPES):
    weights = [torch.randn(shape) for shape in shapes]
    if kind == "float":
        return [FloatLinear(weight, None) for weight in weights]
    return [KIND(*to_int8(weight), None) for weight in weights]


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """A process that has measured nothing, on an idle machine, for which no model is too small."""
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(tuning, "LEAST_BYTES", 0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture
def measured(monkeypatch):
    """Count the measurements."""
    calls = []
    usual = tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda *given: (calls.append(1), usual(*given))[1])
    return calls


def files():
    return sorted(cache_folder().glob("*")) if cache_folder().exists() else []


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_it_holds_every_shape_layout_and_number_of_rows(kind):
    given = products(kind)
    table = measure(given)
    assert [*table] == SHAPES
    names = set(FLOAT) if kind == "float" else set(given[0].layouts)
    assert names == {n for n in (FLOAT if kind == "float" else BYTES) if n in given[0].layouts}
    assert len(names) >= 3
    for timings in table.values():
        assert timings.keys() == names
        for name, timing in timings.items():
            assert timing.rows.keys() == {*ROWS} and min(timing.rows.values()) > 0
            assert (timing.lay_out == 0) == (name == given[0].usual)
    # the matrices themselves are as they were
    assert {p.layout for p in given} == {"onednn" if kind == "float" else None}


def test_a_head_is_timed_in_part(monkeypatch):
    seen = []
    usual = tuning._make
    monkeypatch.setattr(tuning, "_make", lambda p: (seen.append(m := usual(p)), m)[1])
    measure(products("float", [(24, 24), (1000, 24)]), 1)
    assert {m.shape for m in seen} == {(24, 24), (1000 // HEAD_PART, 24)}


def test_only_what_a_matrix_may_take_is_listed():
    head = FloatLinear(torch.randn(1000, 24), None, lays_out=False)
    table = measure([*products("float", [(24, 24)]), head], 1)
    assert table[24, 24].keys() == set(FLOAT)
    assert table[1000, 24].keys() == set(layouts.AS_STORED)


@pytest.mark.parametrize("wrong", ["a number", "an order", "nan"])
@pytest.mark.parametrize("kind", ["float", "int8"])
def test_a_wrong_layout_is_left_out(monkeypatch, kind, wrong):
    """As fbgemm's or oneDNN's would be on a processor on which it is wrong."""
    maker, names = (layouts.Tiles, FLOAT) if kind == "float" else (layouts.ByteTiles, BYTES)
    product = maker.product

    def broken(self, x, other):
        y = product(self, x, other)
        if wrong == "an order":
            return y.flip(-1)
        y[..., 3] += torch.nan if wrong == "nan" else 0.01 * y.norm()
        return y

    monkeypatch.setattr(maker, "product", broken)
    given = products(kind, SHAPES[:2])
    table = measure(given, 1)
    expected = {n for n in names if n in given[0].layouts and not n.startswith("tiles")}
    assert len(expected) >= 1
    for shape in SHAPES[:2]:
        assert shape not in table or table[shape].keys() == expected


def test_a_sample_stands_for_a_large_model(monkeypatch):
    """The first matrices and the head; shapes that are not among them have no times."""
    monkeypatch.setattr(tuning, "SAMPLE_BYTES", 4 * (72 * 24 + 1))
    given = products("float", [(72, 24), (24, 24), (24, 48), (1000, 24)])
    assert [*measure(given, 1)] == [(72, 24), (24, 24), (1000, 24)]


# ---- the file


def test_it_is_kept_and_read_back(measured, monkeypatch):
    given = products("float", SHAPES[:2])
    table = table_for(given)
    (file,) = files()
    assert file.parent == Path.home() / ".cache" / "nanogpt2"
    assert table_for(given) == table and len(measured) == 1
    # as another process does
    monkeypatch.setattr(tuning, "_measured", {})
    assert table_for(products("float", SHAPES[:2])) == table and len(measured) == 1
    assert all(type(t) is Timing for timings in table.values() for t in timings.values())
    assert files() == [file]
    again = table_for(given, anew=True, passes=1)
    assert len(measured) == 2 and again.keys() == table.keys()
    monkeypatch.setattr(tuning, "_measured", {})
    assert table_for(given) == again and len(measured) == 2


def rewritten(change):
    def rewrite(file):
        stored = json.loads(file.read_text())
        change(stored)
        file.write_text(json.dumps(stored))

    return rewrite


def first_layout(stored):
    return next(iter(stored["times"][0][2].values()))


DAMAGES = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "empty": lambda file: file.write_bytes(b""),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00" * 9),
    "a list": lambda file: file.write_text("[]"),
    "a number": lambda file: file.write_text("7"),
    "null": lambda file: file.write_text("null"),
    "no key": rewritten(lambda stored: stored.pop("key")),
    "no times": rewritten(lambda stored: stored.pop("times")),
    "times of another kind": rewritten(lambda stored: stored.update(times={"a": 1})),
    "short times": rewritten(lambda stored: stored.update(times=[[1, 2]])),
    "empty times": rewritten(lambda stored: stored.update(times=[])),
    "no rows": rewritten(lambda stored: first_layout(stored).update(rows={})),
    "rows of another number": rewritten(lambda stored: first_layout(stored)["rows"].pop("5")),
    "words for times": rewritten(lambda stored: first_layout(stored)["rows"].update({"5": "x"})),
    "no laying out": rewritten(lambda stored: first_layout(stored).pop("lay_out")),
    "words for laying out": rewritten(lambda stored: first_layout(stored).update(lay_out="x")),
    "null for laying out": rewritten(lambda stored: first_layout(stored).update(lay_out=None)),
    "another version": rewritten(lambda stored: stored["key"].update(version=0)),
    "another processor": rewritten(lambda stored: stored["key"].update(processor="80386")),
    "another torch": rewritten(lambda stored: stored["key"].update(torch="1.0")),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_or_anothers_is_ignored(measured, monkeypatch, damage):
    given = products("float", SHAPES[:2])
    table_for(given)
    (file,) = files()
    DAMAGES[damage](file)
    monkeypatch.setattr(tuning, "_measured", {})
    table = table_for(given)
    assert len(measured) == 2 and [*table] == SHAPES[:2]
    # it is written anew, unless something stands in its place
    monkeypatch.setattr(tuning, "_measured", {})
    assert damage == "a folder" or (table_for(given) == table and len(measured) == 2)


def in_the_way(monkeypatch, tmp_path):
    home = tmp_path / "file"
    home.write_text("")
    monkeypatch.setenv("HOME", str(home))


def read_only(monkeypatch, tmp_path):
    # root may write anywhere: /proc refuses even that
    monkeypatch.setenv("HOME", "/proc/self")


def homeless(monkeypatch, tmp_path):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning.Path, "home", home)


@pytest.mark.parametrize("problem", [in_the_way, read_only, homeless])
def test_a_folder_that_cannot_be_written_is_no_error(measured, monkeypatch, tmp_path, problem):
    problem(monkeypatch, tmp_path)
    given = products("float", SHAPES[:2])
    table = table_for(given)
    assert [*table] == SHAPES[:2]
    # this process remembers it
    assert table_for(given) is table and len(measured) == 1
    assert [*table_for(given, anew=True, passes=1)] == SHAPES[:2]


def test_a_busy_machines_table_is_not_kept(measured, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1e3, 0.0, 0.0))
    given = products("float", SHAPES[:2])
    table = table_for(given)
    assert files() == []
    # but for this process: else each text after a training step would measure again
    assert table_for(given) is table and len(measured) == 1
    # asked for by the user
    table_for(given, anew=True, passes=1)
    assert len(files()) == 1


def test_a_small_model_is_not_timed(measured, monkeypatch):
    given = products("float", SHAPES[:2])
    size = 4 * sum(N * K for N, K in SHAPES[:2])
    monkeypatch.setattr(tuning, "LEAST_BYTES", size + 1)
    assert table_for(given) is None and files() == [] and measured == []
    monkeypatch.setattr(tuning, "LEAST_BYTES", size)
    assert table_for(given) is not None


def test_what_the_times_depend_on_makes_another_file(measured):
    before = torch.get_num_threads()
    try:
        for count, change in enumerate(
            (
                lambda: products("float", SHAPES[:1]),
                lambda: products("float", SHAPES[:2]),
                lambda: products("int8", SHAPES[:2]),
                lambda: [FloatLinear(torch.randn(72, 24), None, lays_out=False)],
                lambda: torch.set_num_threads(before + 1) or products("float", SHAPES[:1]),
            )
        ):
            table_for(change())
            assert len(files()) == len(measured) == count + 1
    finally:
        torch.set_num_threads(before)
    # the order of the matrices and their number do not matter
    table_for(products("float", [SHAPES[1], SHAPES[0], SHAPES[1]]))
    assert len(measured) == 5


PROCESS = """
import os, sys, torch
from nanogpt2.cpu import tuning
from nanogpt2.cpu.prepacked import FloatLinear
tuning.LEAST_BYTES = 0
os.getloadavg = lambda: (0.0, 0.0, 0.0)
if sys.argv[1:]:
    def measure(*given):
        raise AssertionError("measured again")
    tuning.measure = measure
table = tuning.table_for([FloatLinear(torch.randn(72, 24), None)])
for shape, layouts in table.items():
    print(shape, sorted((name, sorted(t.rows.items()), t.lay_out) for name, t in layouts.items()))
"""


def test_the_second_process_reads_the_first_ones_file():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", PROCESS, *extra],
            env=environment,
            capture_output=True,
            text=True,
        )
        for extra in ([], ["reads"])
    ]
    assert outputs[0].returncode == outputs[1].returncode == 0, outputs[1].stderr
    assert outputs[0].stdout == outputs[1].stdout and "(72, 24)" in outputs[0].stdout
