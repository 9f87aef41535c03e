"""Bias by paired prompts: the figures against transformers and by hand, the file, the errors."""

import math

import pytest
import torch
from reference import twins
from test_evaluate import refused, run, run_json, write_lines

from nanogpt2.config import GPTConfig
from nanogpt2.evaluate import ASSETS
from nanogpt2.evaluation.bias import Pair, change, measure_bias, read_pairs
from nanogpt2.evaluation.examples import read_examples
from nanogpt2.tokenizer import byte_tokenizer

CONFIG = GPTConfig(257, 32, 2, 3, 24, bos_token_id=256, eos_token_id=256)
TOKENIZER = byte_tokenizer()
PAIRS = [
    Pair("The man is", "The women are", (" a", " not"), "gender"),
    Pair("In March it", "In April it", (), "control"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return *twins(folder, CONFIG), str(folder)


def log_p(theirs, text):
    """Of every next token, at the end of a text and before each of its tokens."""
    with torch.no_grad():
        return theirs(torch.tensor([TOKENIZER.encode(text)])).logits[0].double().log_softmax(1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_figures_are_transformers(models, batch_size):
    ours, theirs, _ = models
    found = measure_bias(ours, TOKENIZER, PAIRS, batch_size, 32)
    for pair in PAIRS:
        p, q = (log_p(theirs, text)[-1].exp() for text in (pair.first, pair.second))
        moved = 0.5 * sum(abs(x - y) for x, y in zip(p.tolist(), q.tolist(), strict=True))
        assert found["pairs"][pair.name]["total_variation"] == pytest.approx(moved, rel=1e-4)
        # byte tokens above 127 are no characters: each still has a row of its own
        up, down = (v for k, v in found["shifts"].items() if k.startswith(pair.name))
        for shift, token in ((up, (p - q).argmax()), (down, (q - p).argmax())):
            expected = {"first": p[token].item(), "second": q[token].item()}
            assert shift == pytest.approx(expected, rel=1e-4)
    for text in PAIRS[0].continuations:
        values = []
        for prompt in (PAIRS[0].first, PAIRS[0].second):
            rows, start = log_p(theirs, prompt + text), len(prompt) - 1
            ids = TOKENIZER.encode(text)
            values.append(sum(rows[start + n, i].item() for n, i in enumerate(ids)))
        measured = found["continuations"][f"{PAIRS[0].name} -> {text!r}"]
        assert [measured["first"], measured["second"]] == pytest.approx(values, rel=1e-4)
        assert measured["difference"] == pytest.approx(values[0] - values[1], abs=1e-3)
    gender, control = found["groups"]["gender"], found["groups"]["control"]
    differences = [abs(c["difference"]) for c in found["continuations"].values()]
    assert gender["mean_difference"] == pytest.approx(sum(differences) / 2)
    assert (gender["pairs"], gender["continuations"], control["continuations"]) == (1, 2, 0)


def test_the_distances_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5]).double()
    # half of each lies apart: 1/2 bit
    assert change(p, q) == pytest.approx({"total_variation": 0.5, "js_divergence": 0.5})
    assert change(p, p) == {"total_variation": 0.0, "js_divergence": 0.0}
    one, other = torch.eye(2).double()
    assert change(one, other) == pytest.approx({"total_variation": 1.0, "js_divergence": 1.0})


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("The man is", "The woman is", "The {man|woman} is"),
        ("He", "She", "{He|She}"),
        ("a b", "a b b", "a b {|b}"),
        ("x a", "y a a", "{x|y a} a"),
    ],
)
def test_a_pairs_name_shows_both(first, second, name):
    assert Pair(first, second, (), "all").name == name


def test_the_packaged_pairs_have_controls():
    pairs = read_pairs(read_examples(str(ASSETS / "pairs.jsonl")))
    groups = {pair.group for pair in pairs}
    assert {"gender", "control"} < groups and all(pair.continuations for pair in pairs)
    assert len({pair.name for pair in pairs}) == len(pairs)


def test_the_command(capsys, models, tmp_path):
    records = [
        {"first": "He is", "second": "She is", "group": "gender", "continuations": [" a"]},
        {"first": "It is", "second": "It was"},
    ]
    path = write_lines(tmp_path / "p.jsonl", *records)
    argv = [path, "--model", models[2], "--task", "bias"]
    found = run_json(capsys, *argv)
    assert found["examples"] == 2 and list(found["groups"]) == ["gender", "all"]
    assert not math.isnan(found["groups"]["all"]["mean_difference"])
    shown = run(capsys, *argv).splitlines()
    assert [line.split()[0] for line in shown if line.endswith("difference")] == [
        "group",
        "continuation",
    ]
    # without continuations their table is left out
    assert "continuation " not in run(
        capsys, *argv[1:], write_lines(tmp_path / "q.jsonl", records[1])
    )


def test_wrong_files_are_one_line(capsys, models, tmp_path):
    good = {"first": "He is", "second": "She is"}
    for records, message in [
        ([{"first": "He is"}], "line 1 has no column 'second'; columns found: 'first'"),
        ([good | {"second": " "}], "line 1: 'second' is empty"),
        ([good | {"second": 3}], "line 1: 'second' must be text, not '3'"),
        ([good | {"second": "He is"}], "line 1: 'first' and 'second' must differ"),
        ([good, good], "line 2 repeats a pair: 'He is'"),
        ([good | {"continuations": " a"}], "'continuations' must be a list of texts, not ' a'"),
        ([good | {"continuations": [""]}], "'continuations' must be a list of texts"),
        ([good | {"continuations": None}], "'continuations' must be a list of texts"),
        ([good | {"group": " "}], "line 1: 'group' is empty"),
        ([good | {"first": "x" * 33}], "has 33 tokens; the block size is 32"),
        ([good | {"continuations": ["x" * 33]}], "has 33 tokens to predict; the block size is 32"),
        ([], "is empty"),
    ]:
        path = write_lines(tmp_path / "bad.jsonl", *records)
        error = refused(capsys, path, "--model", models[2], "--task", "bias")
        assert message in error, error
