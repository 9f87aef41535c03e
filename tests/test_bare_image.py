"""The tests and the benchmarks that run on a machine with PyTorch and little besides it.

Such machines have the run-time dependencies, pytest, hypothesis and transformers. There
`pytest -m gpu` must collect every module. So a module imports every other package where it is used.
"""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
from reference import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# tokenizers comes with transformers
BARE = {"pytest", "hypothesis", "transformers", "tokenizers"} | {
    re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in PROJECT["dependencies"]
}
OURS = {"nanogpt2", "benchmarks", "train", "sample"}
# these write documents and are never run on a bare machine
NOT_BARE = {"demo_report.py"}
MODULES = sorted(
    path
    for folder in ("tests", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if path.name not in NOT_BARE
)


def imported_first(source):
    """The packages that a module imports as soon as it is imported: not those of its functions."""
    found, left = set(), list(ast.parse(source).body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)
    return {name.split(".")[0] for name in found}


def extras(source):
    siblings = {path.stem for path in MODULES}
    return imported_first(source) - set(sys.stdlib_module_names) - BARE - OURS - siblings


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_no_extra_at_its_top(path):
    assert not extras(path.read_text())


def test_what_counts_as_the_top():
    source = """
import torch, peft.tuners
try:
    from zstandard import open
except ImportError:
    pass
class A:
    import onnx
def f():
    import pyarrow
async def g():
    import nbclient
"""
    assert extras(source) == {"peft", "zstandard", "onnx"}


# ---- the tests in shares, and those to run first


def collected(*words):
    """The names of chosen tests, as pytest in a process of its own collects them."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", *words, "tests/test_gelu.py", "tests/test_layer_norm.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line.removeprefix("tests/") for line in done.stdout.splitlines() if "::" in line]
    return found, done


def test_the_shares_are_the_whole():
    whole, _ = collected("-m", "gpu")
    shares = [collected("-m", "gpu", "--share", f"{k}/3")[0] for k in (1, 2, 3)]
    assert sorted(name for share in shares for name in share) == sorted(whole)
    assert min(map(len, shares)) >= len(whole) // 3 > 0


def test_the_first_are_of_gpt2():
    found, _ = collected("-m", "gpu and first")
    assert found == [
        "test_gelu.py::test_natively[3072-dtype0]",
        "test_gelu.py::test_natively[3072-dtype2]",
        "test_gelu.py::test_in_a_cuda_graph",
        "test_layer_norm.py::test_natively[768-dtype0]",
        "test_layer_norm.py::test_natively[768-dtype2]",
        "test_layer_norm.py::test_in_a_cuda_graph",
    ]


@pytest.mark.parametrize("share", ["4/3", "a/b"])
def test_a_share_that_is_none(share):
    found, done = collected("--share", share)
    assert not found and done.returncode == 4
    assert f"'{share}' is not K/N with K from 1 to N" in done.stderr
