"""nanogpt2 tune: the table that it prints and keeps, and wrong uses of it."""

import json
import os
from pathlib import Path

import pytest
import torch
from reference import TINY, run_module

from nanogpt2 import GPT, load_generator, save_model
from nanogpt2.cpu import tuning
from nanogpt2.cpu.layouts import AS_STORED
from nanogpt2.cpu.layouts import FLOAT as ALL
from nanogpt2.cpu.prepacked import Int7Linear, Int8Linear, onednn_sums_exactly
from nanogpt2.cpu.prepared import prepared_for
from nanogpt2.cpu.tuning import ROWS, table_for

# without the layout of the step in C, which nobody has compiled here: see test_native.py
FLOAT = {name: layout for name, layout in ALL.items() if name != "rows"}

INT8 = Int8Linear if onednn_sums_exactly() else Int7Linear
C = TINY.n_embd
SHAPES = [f"{3 * C}x{C}", f"{C}x{C}", f"{4 * C}x{C}", f"{C}x{4 * C}", f"{TINY.vocab_size}x{C}"]


@pytest.fixture
def folder(tmp_path):
    save_model(GPT(TINY), tmp_path / "model")
    return tmp_path / "model"


def tune(*argv, cwd):
    done = run_module("nanogpt2.tune", *map(str, argv), "--passes", "1", cwd=cwd)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def kept():
    return sorted((Path.home() / ".cache" / "nanogpt2").glob("layouts-*.json"))


def test_the_demo_models_table(tmp_path):
    code, out, err = tune("demo", cwd=tmp_path)
    assert (code, err) == (0, "")
    head, *lines, legend = out.splitlines()
    assert " ".join(head.split()) == "matrix layout 1 row, ms 5 rows, ms 64 rows, ms laying out"
    assert legend == "* the fastest of this matrix"
    blocks = [line for line in lines if not line.startswith("50257")]
    assert len(blocks) == 4 * len(FLOAT)
    # a head is laid out where the embedding is looked up in a mapped file
    assert len(lines) - len(blocks) in (len(FLOAT), len(AS_STORED))
    for matrix in ("384 x 128", "128 x 128", "512 x 128", "128 x 512", "50257 x 128"):
        of_one = [line for line in lines if line.startswith(f"{matrix} ")]
        # one layout or more is the fastest for each number of rows
        assert sum(line.count(" *") for line in of_one) >= len(ROWS)
    assert len(kept()) == 1


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_what_it_keeps_is_what_a_text_reads(folder, tmp_path, monkeypatch, quantize):
    argv = ["--quantize", quantize] if quantize else []
    code, out, err = tune(folder, "--json", "--threads", "1", *argv, cwd=tmp_path)
    assert (code, err) == (0, "")
    table = json.loads(out)
    assert [*table] == SHAPES
    for n, shape in enumerate(SHAPES):
        names = INT8_LAYOUTS if quantize else FLOAT
        assert table[shape].keys() == {*names} or n == len(SHAPES) - 1
        for timing in table[shape].values():
            assert timing.keys() == {"rows", "lay_out"} and timing["rows"].keys() == {
                "1",
                "5",
                "64",
            }
            assert min(timing["rows"].values()) > 0 <= timing["lay_out"]
    # in this process, with the threads of that one, which is no small model's limit
    monkeypatch.setattr(tuning, "LEAST_BYTES", 0)
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setattr(tuning, "measure", lambda *given: pytest.fail("measured again"))
    torch.set_num_threads(1)
    model = load_generator(folder, quantize=quantize)
    found = table_for(prepared_for(model, tuned=False).products())
    assert [f"{N}x{K}" for N, K in found] == SHAPES
    for (N, K), timings in found.items():
        for name, timing in timings.items():
            stated = table[f"{N}x{K}"][name]
            assert timing.rows == {int(rows): ms for rows, ms in stated["rows"].items()}
            assert timing.lay_out == stated["lay_out"]


INT8_LAYOUTS = (INT8.usual, "tiles_64", "tiles_96")


def test_measuring_again_replaces_the_table(folder, tmp_path):
    tune(folder, cwd=tmp_path)
    (file,) = kept()
    file.write_text("damaged")
    assert tune(folder, cwd=tmp_path)[0] == 0
    assert kept() == [file] and json.loads(file.read_text())["times"]
    # another number of threads has a table of its own
    assert tune(folder, "--threads", "2", cwd=tmp_path)[0] == 0
    assert len(kept()) == 2


def test_a_folder_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", os.devnull)
    code, out, err = tune(folder, cwd=tmp_path)
    assert (code, err) == (0, "") and "tiles_64" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["demo", "--quantize", "fp16"], "--quantize must be int8"),
        (["demo", "--quantize", "int4"], "--quantize must be one of fp16, int8, not 'int4'"),
        (["absent"], "MODEL 'absent' is not a file, a folder or a known model"),
        (["demo", "gpt2"], "'gpt2' is a second MODEL; one is allowed"),
        (["demo", "--device", "cuda"], "--device is not a flag; a CPU's products are timed"),
        (["demo", "--threads", "0"], "--threads must be a whole number >= 1"),
        (["demo", "--passes", "1001"], "--passes must be a whole number >= 1 and <= 1000"),
        (["."], "MODEL"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else None,
)
def test_wrong_use_is_one_line(tmp_path, argv, said):
    done = run_module("nanogpt2.tune", *argv, cwd=tmp_path)
    err = done.stderr.decode()
    assert done.returncode == 2 and done.stdout == b""
    assert err.startswith(f"error: {said}") and err.count("\n") == 1 and len(err) <= 201
    assert kept() == []


def test_the_command_knows_it(tmp_path):
    done = run_module("nanogpt2", "tune", "--help", cwd=tmp_path)
    assert done.returncode == 0 and b"nanogpt2 tune gpt2" in done.stdout
