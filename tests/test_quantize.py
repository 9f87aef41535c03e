"""python -m nanogpt2.quantize, and --quantize where a model is read."""

import json

import pytest
import torch
from reference import run_module, run_script

from nanogpt2 import GPT, load_model, load_tokenizer, quantize, save_model
from nanogpt2.config import GPTConfig, parse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level model, a text."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=257, block_size=32, n_layer=1, n_head=3, n_embd=24, eos_token_id=256
    )
    save_model(GPT(config), folder / "wide")
    (folder / "text.txt").write_text("Das ist ein Test.\n" * 9)
    return folder


def test_narrowed_compared_and_written(folder):
    done = run_module(
        "nanogpt2.quantize", "wide", "--text", "text.txt", "--out", "narrow", "--json", cwd=folder
    )
    assert done.stderr == b""
    found = json.loads(done.stdout)
    assert found["tokens"] == 9 * 18 - 1
    assert found["perplexity_after"] == pytest.approx(found["perplexity_before"], rel=0.02)
    assert found["top1_agreement"] > 0.8
    assert found["bytes"] == (folder / "narrow/model.int8.safetensors").stat().st_size
    assert load_tokenizer(folder / "narrow").vocab_size == 257
    flags = ("--max_new_tokens", "9", "--seed", "1")
    models = (("narrow",), ("wide", "--quantize", "int8"))
    one, two = (run_script(SAMPLE, "Das", "--model", *m, *flags, cwd=folder) for m in models)
    assert one.returncode == 0 and one.stdout == two.stdout
    again = run_module("nanogpt2.quantize", "narrow", "--text", "text.txt", cwd=folder)
    assert again.stderr.startswith(b"error: MODEL 'narrow' is narrow already")


def test_evaluated(folder):
    figures = []
    for flags in ((), ("--quantize", "fp16")):
        done = run_module(
            "nanogpt2.evaluate", "text.txt", "--model", "wide", "--json", *flags, cwd=folder
        )
        figures.append(json.loads(done.stdout)["perplexity"])
    assert figures[0] != figures[1] and figures[1] == pytest.approx(figures[0], rel=1e-3)


SAMPLE, QUANTIZE, TRAIN = "sample.py", "nanogpt2.quantize", "train.py"


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        (SAMPLE, ("a", "--quantize", "int4"), "--quantize must be one of fp16, int8"),
        (SAMPLE, ("a", "--quantize", "int8", "--dtype", "bfloat16"), "--quantize must come with"),
        (
            SAMPLE,
            ("a", "--model", "wide", "--quantize", "int8", "--classify"),
            "--quantize must be",
        ),
        (TRAIN, ("text.txt", "--init", "wide", "--quantize", "int8"), "--quantize is not a flag"),
        (TRAIN, ("text.txt", "--init", "small", "--out", "run"), "--init 'small' is int8"),
        (QUANTIZE, ("wide",), "--out must be given"),
        (QUANTIZE, ("wide", "--out", "text.txt"), "--out must be a folder that is not there yet"),
        (QUANTIZE, ("nothing", "--out", "x"), "MODEL"),
        (QUANTIZE, ("wide", "--quantize", "int2", "--out", "x"), "--quantize must be one of"),
        (QUANTIZE, ("wide", "--text", "none.txt"), "--text"),
        (QUANTIZE, ("wide", "--text", "text.txt", "--limit", "1"), "--limit must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_wrong_use_is_one_line(folder, program, arguments, said):
    if "small" in arguments and not (folder / "small").exists():
        run_module(QUANTIZE, "wide", "--out", "small", cwd=folder)
    run = run_script if program.endswith(".py") else run_module
    before = sorted(folder.rglob("*"))
    done = run(program, *arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith(f"error: {said}") and len(line) <= 200
    assert sorted(folder.rglob("*")) == before


def test_a_text_of_one_token(folder):
    (folder / "one.txt").write_text("a")
    done = run_module(QUANTIZE, "wide", "--text", "one.txt", cwd=folder)
    assert done.returncode == 2 and b"must hold 2 tokens or more" in done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["fp16", "int8"])
@pytest.mark.parametrize("flags", [("--out",), ("--text",)])
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, capsys, value, scheme, flags):
    """Two NaN agree in their likeliest token, so the agreement was 1.0."""
    model = load_model(folder / "wide")
    model.h[0].mlp.c_fc.weight.data[5, 7] = value
    save_model(model, tmp_path / "broken")
    before = sorted(tmp_path.rglob("*"))
    where = str(tmp_path / "narrow" if flags == ("--out",) else folder / "text.txt")
    argv = [str(tmp_path / "broken"), "--quantize", scheme, *flags, where, "--json"]
    with pytest.raises(SystemExit) as stopped:
        quantize.main(parse(quantize.QuantizeConfig, argv))
    shown = capsys.readouterr()
    assert stopped.value.code == 1 and shown.out == ""
    assert shown.err.startswith("error: the model's scores are not finite numbers")
    assert sorted(tmp_path.rglob("*")) == before
