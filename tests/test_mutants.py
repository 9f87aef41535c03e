"""The mutants' own command line; what they show is in benchmarks/mutants.md."""

import subprocess
import sys

from reference import ROOT


def test_a_word_that_no_mutant_has():
    """Without mutants the whole suite would run, and nothing would be shown."""
    command = [sys.executable, "tests/mutants.py", "--only", "no such mutant"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("error: --only 'no such mutant'") and ran.stderr.count("\n") == 1
