"""The tests and the benchmarks that run on a machine with PyTorch and little besides it.

Such machines have the run-time dependencies, pytest, hypothesis and transformers. There
`pytest -m gpu` must collect every module. So a module imports every other package where it is used.
"""

import ast
import re
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
