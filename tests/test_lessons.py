"""The pages that teach: their Python runs, and their outputs and pictures come from it.

`python tests/test_lessons.py` writes the outputs into the pages and draws the pictures again.
"""

import inspect
import io
import os
import re
import runpy
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch
from reference import ROOT

TRAINS = "docs/training.md"
PAGES = ["docs/gpt2.md", "docs/decoding.md", "docs/relatives.md", "docs/model_card.md"]
PAGES += ["docs/exercises.md", "docs/kernels.md", TRAINS]
PICTURES = ROOT / "docs/pictures"
LARGEST = 100_000  # bytes of a picture
AGAIN = "python tests/test_lessons.py writes them anew"
# a python block and the output block after it
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n\n```text\n(?P<output>.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?")


def outputs(page):
    """What a page's blocks print, run top to bottom in one namespace."""
    namespace, printed = {"__name__": page}, []
    for number, block in enumerate(BLOCK.finditer(page_text(page)), start=1):
        if "@triton.jit" in block["code"]:
            printed.append(output_of_program(block["code"]))
            continue
        screen = io.StringIO()
        with redirect_stdout(screen):
            exec(compile(block["code"], f"{page}, block {number}", "exec"), namespace)
        printed.append(screen.getvalue())
    return printed


def output_of_program(code):
    """What a block prints as a file of its own, as a reader without a GPU runs it."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "double.py"
        file.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(file)],
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def page_text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def difference(expected, got):
    """The first difference between two texts, or None; numbers with a point may differ a little.

    They may differ by two units of their last digit: sums round by the processor's width.
    """
    for one, other in zip(expected.splitlines(), got.splitlines(), strict=False):
        # a minus more or less moves the spaces
        words = [" ".join(NUMBER.sub("#", line).split()) for line in (one, other)]
        pairs = list(zip(NUMBER.findall(one), NUMBER.findall(other), strict=False))
        if words[0] != words[1] or not all(near(a, b) for a, b in pairs):
            return f"expected {one!r}, got {other!r}"
    lengths = len(expected.splitlines()), len(got.splitlines())
    return None if lengths[0] == lengths[1] else f"{lengths[0]} lines expected, got {lengths[1]}"


def near(a, b):
    digits, _, power = a.partition("e")
    unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(a) - float(b)) <= 2.01 * unit


def drawn():
    """The pictures, name -> SVG, as their scripts draw them."""
    scripts = sorted(PICTURES.glob("*.py"))
    return {k: v for path in scripts for k, v in runpy.run_path(str(path))["pictures"]().items()}


@pytest.mark.parametrize("page", [*PAGES[:-1], pytest.param(TRAINS, marks=pytest.mark.slow)])
def test_every_output_of_a_page_comes_from_its_code(page):
    blocks = list(BLOCK.finditer(page_text(page)))
    assert len(blocks) == page_text(page).count("```python\n")
    for number, (block, got) in enumerate(zip(blocks, outputs(page), strict=True), start=1):
        wrong = difference(block["output"], got)
        assert wrong is None, f"{page}, block {number}: {wrong}; {AGAIN}"


@pytest.mark.slow
def test_every_picture_is_the_one_its_script_draws():
    committed = {path.name: path.read_text() for path in PICTURES.glob("*.svg")}
    new = drawn()
    assert committed.keys() == new.keys()
    for name, svg in new.items():
        assert len(svg.encode()) < LARGEST, name
        wrong = difference(committed[name], svg)
        assert wrong is None, f"{name}: {wrong}; {AGAIN}"


def test_every_picture_is_shown_on_a_page():
    shown = {name for page in PAGES for name in re.findall(r"\(pictures/(.*?)\)", page_text(page))}
    assert shown == {path.name for path in PICTURES.glob("*.svg")}


def test_the_readings_take_the_three_hours_that_the_readme_promises():
    text = page_text("README.md").split("Three hours lead")[1].split("\n## ")[0]
    assert sum(map(int, re.findall(r"^\| (\d+) \|", text, flags=re.M))) == 180


ROOMS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
# a row of the map: the room, its functions, what it waits for, the tour's sections
ROW = re.compile(r"^\| `(\w+)\.py` \| (.*?) \| .*? \| ([\d-]+) \|$", re.M)


def test_the_map_shows_every_room_and_its_functions():
    rows = ROW.findall(page_text("kernels/README.md"))
    assert sorted(room for room, _, _ in rows) == ROOMS
    for room, functions, _ in rows:
        module = import_module(f"nanogpt2.kernels.{room}")
        shown = dict(re.findall(r"`(\w+)(?:\((.*?)\))?`", functions))
        public = [
            name
            for name, f in inspect.getmembers(module, inspect.isfunction)
            if f.__module__ == module.__name__ and not name.startswith("_")
        ]
        assert set(shown) == {name for name in public if not name.endswith("_ref")}, room
        for name, arguments in shown.items():
            known = inspect.signature(getattr(module, name)).parameters
            assert set(re.findall(r"\w+", arguments)) <= set(known), name


def test_the_tour_visits_the_rooms_where_the_map_says():
    headings = re.findall(r"^## (\d+)\. (.*)$", page_text("docs/kernels.md"), flags=re.M)
    assert [int(number) for number, _ in headings] == list(range(1, len(headings) + 1))
    titles = {int(number): title for number, title in headings}
    subjects = {"cross_entropy": "The loss", "sampling": "The draw"}
    subjects |= {"decode_attention": "Decoding", "decode_linear": "Decoding"}
    for room, _, sections in ROW.findall(page_text("kernels/README.md")):
        subject = subjects.get(room, room.replace("_", " "))
        assert titles[int(sections.split("-")[0])].lower().startswith(subject.lower()), room


@pytest.mark.parametrize("page", ["docs/kernels.md", "kernels/README.md"])
def test_what_the_tour_names_in_the_rooms_is_there(page):
    source = "".join((ROOT / f"kernels/{room}.py").read_text() for room in ROOMS)
    prose = re.sub(r"^```.*?^```", "", page_text(page), flags=re.M | re.S)
    # kernels, helpers and tables; `_<op>_fwd` is a pattern
    names = set(re.findall(r"`(_[a-z_]+|[A-Z]+_?[A-Z]+)`", prose)) - {"_double_kernel", "WORD"}
    assert names
    assert not {name for name in names if not re.search(rf"\b{name}\b", source)}


def test_the_lines_that_the_kernels_exercises_change_are_there_once():
    changes = re.findall(r"make `([^`]+)`\s+(?:just|128)", page_text("docs/kernels.md"))
    files = re.findall(r"^\d\. `(kernels/\w+\.py)`", page_text("docs/kernels.md"), flags=re.M)
    assert len(changes) == len(files) == 3
    for file, line in zip(files, changes, strict=True):
        assert (ROOT / file).read_text().count(line) == 1, line


def test_every_link_into_a_page_leads_to_a_heading():
    for page in [*PAGES, "docs/glossary.md", "docs/questions.md"]:
        for path, name in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page_text(page)):
            target = f"docs/{path}" if path else page
            assert name in map(anchor, headings_of(target)), f"{page}: {path}#{name}"


def headings_of(page):
    prose = re.sub(r"^```.*?^```", "", page_text(page), flags=re.M | re.S)
    return re.findall(r"^#+ (.*)$", prose, flags=re.M)


def anchor(heading):
    """The anchor that code hosts make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_a_wrong_word_or_number_is_seen():
    assert difference("p 0.981 of 5\n", "p 0.982 of 5\n") is None
    assert difference("p -0.00\n", "p  0.00\n") is None
    assert difference("p 1.25e-03\n", "p 1.26e-03\n") is None
    assert difference("p 0.981\n", "p 0.985\n")
    assert difference("5 tokens\n", "6 tokens\n")
    assert difference("a\nb\n", "a\n")
    assert anchor("4. Why 1/sqrt(2 n_layer)?") == "4-why-1sqrt2-n_layer"


def write():
    """Write the outputs into the pages, and the pictures."""
    torch.set_num_threads(1)
    for page in PAGES:
        printed = iter(outputs(page))
        text = BLOCK.sub(
            lambda block: f"```python\n{block['code']}```\n\n```text\n{next(printed)}```",  # noqa: B023
            page_text(page),
        )
        (ROOT / page).write_text(text, encoding="utf-8")
    for name, svg in drawn().items():
        (PICTURES / name).write_text(svg)


if __name__ == "__main__":
    write()
