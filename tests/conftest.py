"""Settings for all tests: no network, no user's cache, one seed."""

import argparse
import os
import re

# before any test imports transformers or huggingface-hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # without a GPU kernels are interpreted; triton reads this when it is imported, after this line
    os.environ["TRITON_INTERPRET"] = "1"

# tiny models gain nothing from threads, and the scripts' own processes use one too
torch.set_num_threads(1)

# no test asserts a time, and the same examples are tried everywhere
settings.register_profile("nanogpt2", deadline=None, derandomize=True)
settings.load_profile("nanogpt2")

# train.py and sample.py are no package
sys.path.insert(0, str(Path(__file__).parent.parent))


# GPT-2's sizes and the dtypes that it trains with, by the names of the tests' parameters
GPT2 = {"D": [64], "N": [768, 3072], "V": [50257], "dtype": [torch.float32, torch.bfloat16]}


@pytest.fixture(autouse=True)
def home_of_its_own(tmp_path_factory, monkeypatch):
    """Caches go to a temporary folder, from which no compiled library is left open."""
    from nanogpt2.cpu import native

    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    native.library.cache_clear()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """What is allocated and not written is NaN, True or the smallest whole number; for kernels.

    The interpreter computes with numpy, which would warn of what a GPU computes in silence.
    """

    def poison(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            if x.dtype is torch.bool:
                return x.fill_(True)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).min)

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    with np.errstate(all="ignore"):
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in one process a core, by pytest-xdist; chosen tests run in one alone.

    Without pytest-xdist, or with a GPU, which the processes would share, all tests run in one.
    """
    whole = config.args_source is config.ArgsSource.TESTPATHS
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # one of these processes, or a pytest that a test of theirs runs
    asked = getattr(config.option, "numprocesses", 0)
    if whole and asked is None and not config.option.usepdb and not torch.cuda.is_available():
        # a worker takes over from another in the order of the files: they share their fixtures
        config.option.numprocesses, config.option.dist = os.cpu_count(), "worksteal"


def share(text):
    """Read --share."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N")
    return number, count


def pytest_addoption(parser):
    parser.addoption("--share", type=share, metavar="K/N", help="run every Nth test, from the Kth")


def is_of_gpt2(item):
    """Whether this is a kernel's test at GPT-2's sizes: of `-m "gpu and first"`."""
    kernel = Path(__file__).parent.parent / "kernels" / f"{item.path.stem.removeprefix('test_')}.py"
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    sizes = parameters.keys() & GPT2
    return kernel.exists() and all(parameters[name] in GPT2[name] for name in sizes)


# before pytest chooses by the markers
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu"):
            if is_of_gpt2(item):
                item.add_marker(pytest.mark.first)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(trylast=True, specname="pytest_collection_modifyitems")
def pytest_share(config, items):
    """Keep the share of the chosen tests that --share asks for; several processes run them all."""
    if asked := config.getoption("--share"):
        number, count = asked
        mine = items[number - 1 :: count]
        left = [item for n, item in enumerate(items) if n % count != number - 1]
        config.hook.pytest_deselected(items=left)
        items[:] = mine


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A process interprets its kernels or compiles them: the other sort of test gets its own."""
    if not (pyfuncitem.get_closest_marker("interpreted") and torch.cuda.is_available()):
        return None
    command = [sys.executable, "-m", "pytest", "-q", pyfuncitem.nodeid]
    unseen = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=unseen, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    return True
