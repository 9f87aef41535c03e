"""The newest transformers, which may be another than the one that our tokens are held to.

Left out of the default run, because another project's release would turn it red:
`pytest -m newest`. A failure says which release to look at; docs/generation.md names ours.
"""

import os
import subprocess
import sys

import pytest
from reference import ROOT


@pytest.mark.newest
def test_our_tokens_are_those_of_the_newest_transformers(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path)]
    subprocess.run([*pip, "transformers"], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    code = "import transformers as t; print(t.__version__, t.__file__)"
    named = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    version, file = named.stdout.split()
    assert file.startswith(str(tmp_path))
    tests = ["tests/test_parity.py", "tests/test_processors.py", "tests/test_stopping.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", *tests],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"transformers {version}:\n{done.stdout[-5000:]}"
