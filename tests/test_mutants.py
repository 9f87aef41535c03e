"""Each mutant of mutants.py still applies; under -m marathon, the test named for it kills it."""

import ast
import os
import re
import subprocess
import sys

import pytest
from mutants import MUTANTS, ROOT, Mutant, copy_repository, read

SECONDS = 600


def each_mutant():
    return pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)


@each_mutant()
def test_a_mutant_applies(mutant):
    """A rename that takes a snippet away is found at once, not in the next marathon."""
    path, source = mutant.mutated()
    compile(source, path, "exec")
    # comments and spaces make no mutant
    assert ast.dump(ast.parse(source)) != ast.dump(ast.parse((ROOT / path).read_text()))
    file, _, name = mutant.test.partition("::")
    tests = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^def {name}\b" if name else "^def test_", tests, re.MULTILINE)


def test_no_mutant_is_there_twice():
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


def test_the_table_is_read_as_it_is_written():
    table = "test_a.py::test_b\nfirst: x\n- a(b)\n+ c\nsecond\n- d\n+\n\n"
    table += "test_e.py\nthird\n- f\n+ g\n+ h\n"
    assert read(table) == [
        Mutant("first: x", "a(b)", "c", "test_a.py::test_b"),
        Mutant("second", "d", "", "test_a.py::test_b"),
        Mutant("third", "f", "g; h", "test_e.py"),
    ]


@pytest.mark.parametrize(
    ("snippet", "stands"), [("no such line", "nowhere"), ("import torch", r"kernels/\w+\.py:\d+, ")]
)
def test_a_mutant_that_does_not_apply_says_so(snippet, stands):
    with pytest.raises(ValueError, match=f"mutant 'w'.*{snippet}.*{stands}.*tests/mutants.py"):
        Mutant("w", snippet, "", "test_parity.py").mutated()


def run_tests(folder, *tests):
    """Run tests of a copy until one fails; pytest's exit status and what it wrote."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not marathon and not newest", *(f"tests/{name}" for name in tests)]
    alone = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | alone, capture_output=True, text=True, timeout=SECONDS
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.marathon
def test_without_a_mutant_the_tests_pass(tmp_path):
    """Or else what kills a mutant below would prove nothing."""
    copy_repository(tmp_path)
    status, said = run_tests(tmp_path, *sorted({mutant.test for mutant in MUTANTS}))
    assert status == 0, said


@pytest.mark.marathon
@each_mutant()
def test_a_mutant_is_killed(tmp_path, mutant):
    mutant.write_copy(tmp_path)
    status, said = run_tests(tmp_path, mutant.test)
    assert status != 0, f"survived {mutant.test}"
    # 1: a test failed; all else, such as a file that cannot be imported, shows nothing
    assert status == 1 and "\nFAILED " in said, said
