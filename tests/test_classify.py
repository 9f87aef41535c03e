"""sample.py --classify as its users meet it."""

import json

import pytest
import torch
from reference import run_script

import sample
from nanogpt2.checkpoints.load import load_classifier
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, SampleConfig, parse
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

BLOCK = 32
LABELS = ("ham", "spam", "日本")


def classifier():
    torch.manual_seed(3)
    shape = GPTConfig(257, BLOCK, 2, 2, 16, bos_token_id=256, eos_token_id=256)
    model = GPTClassifier(GPT(shape), LABELS)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    save_model(classifier(), path, byte_tokenizer())
    return path


def run(capsys, folder, *argv):
    sample.main(parse(SampleConfig, ["--model", str(folder), "--classify", *argv]))
    out, err = capsys.readouterr()
    return out, err


def expected(folder, text):
    ids = byte_tokenizer().encode(text)[:BLOCK]
    row = load_classifier(folder).classify([ids])[0].tolist()
    return dict(zip(LABELS, row, strict=True))


def check(found, folder, text):
    probabilities = expected(folder, text)
    assert list(found) == ["text", "label", "probabilities"]
    assert found["text"] == text
    assert found["label"] == max(probabilities, key=probabilities.get)
    assert found["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    # the likeliest first
    figures = list(found["probabilities"].values())
    assert figures == sorted(figures, reverse=True)


def test_the_table(capsys, folder):
    out, err = run(capsys, folder, "Cheap pills!")
    assert not err
    head, *rows = (line.split() for line in out.splitlines())
    assert head == ["label", "probability"]
    probabilities = expected(folder, "Cheap pills!")
    assert [label for label, _ in rows] == sorted(LABELS, key=lambda x: -probabilities[x])
    for label, figure in rows:
        assert float(figure) == pytest.approx(probabilities[label], abs=1e-4)


def test_json_tells_the_same(capsys, folder):
    out, _ = run(capsys, folder, "Cheap pills!", "--json")
    check(json.loads(out), folder, "Cheap pills!")


def test_standard_input_and_files(capsys, folder, tmp_path):
    (tmp_path / "text").write_text("from a file\n")
    out, _ = run(capsys, folder, "--prompt_file", str(tmp_path / "text"), "--json")
    check(json.loads(out), folder, "from a file")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_many_texts_in_their_order(capsys, folder, tmp_path, batch_size):
    texts = ["one", "a much longer text", "x", "two", "日本語"]
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": 1}) + "\n" for t in texts)
    )
    (tmp_path / "t.txt").write_text("\n\n".join(texts))
    for name in ("t.jsonl", "t.txt"):
        out, err = run(
            capsys, folder, "--prompts", str(tmp_path / name), "--batch_size", str(batch_size)
        )
        assert not err
        for line, text in zip(out.splitlines(), texts, strict=True):
            check(json.loads(line), folder, text)


def test_broken_lines(capsys, folder, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"prompt": "b"}\n{"text": "c"}\n')
    with pytest.raises(SystemExit) as stop:
        run(capsys, folder, "--prompts", str(path))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out
    assert "line 2" in err and '"text"' in err
    out, _ = run(capsys, folder, "--prompts", str(path), "--skip_bad")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a", "c"]


def test_a_long_text_is_said(capsys, folder):
    text = "ab" * BLOCK
    out, err = run(capsys, folder, text, "--json")
    assert err.count("\n") == 1 and f"context of {BLOCK} tokens" in err
    check(json.loads(out), folder, text)


def wrong(capsys, code, *argv):
    """One line on stderr, nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        sample.main(parse(SampleConfig, argv))
    out, err = capsys.readouterr()
    assert stop.value.code == code and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 201
    return err


@pytest.mark.parametrize(
    "flags",
    [
        ["--do_sample"],
        ["--temperature", "0.5"],
        ["--max_new_tokens", "3"],
        ["--seed", "1"],
        ["--preset", "dialogue"],
        ["--explain"],
        ["--tree"],
        ["--color", "prob"],
        ["--interactive"],
        ["--compare", "demo"],
        ["--unique"],
    ],
)
def test_flags_that_a_classifier_ignores(capsys, folder, flags):
    err = wrong(capsys, 2, "text", "--model", str(folder), "--classify", *flags)
    assert err == f"error: {flags[0]} must be left out where --classify is given\n"


def test_no_text(capsys, folder, tmp_path):
    (tmp_path / "empty").write_text("\n")
    for argv in ([], [""], ["--prompt_file", str(tmp_path / "empty")]):
        assert "PROMPT" in wrong(capsys, 2, *argv, "--model", str(folder), "--classify")


def test_a_model_that_is_no_classifier(capsys, tmp_path):
    save_model(classifier().transformer, tmp_path / "gpt", byte_tokenizer())
    err = wrong(capsys, 2, "text", "--model", str(tmp_path / "gpt"), "--classify")
    assert "--model" in err and "is no classifier" in err
    # without a download or a look at a file
    for name in ("gpt2", "gpt2-xl", "demo"):
        err = wrong(capsys, 2, "text", "--model", name, "--classify")
        assert "--model must be the path of a classifier" in err
    assert "--model" in wrong(capsys, 2, "text", "--classify")


def test_a_classifier_writes_nothing(capsys, folder):
    err = wrong(capsys, 2, "text", "--model", str(folder))
    assert err.startswith("error: --model") and "--classify" in err


def test_damaged_weights_are_said(capsys, tmp_path):
    model = classifier()
    torch.nn.init.constant_(model.transformer.ln_f.bias, float("nan"))
    save_model(model, tmp_path / "nan", byte_tokenizer())
    err = wrong(capsys, 1, "text", "--model", str(tmp_path / "nan"), "--classify")
    assert "finite" in err


def test_too_little_memory_is_said(capsys, folder, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(GPTClassifier, "classify", fail)
    assert "--batch_size" in wrong(capsys, 1, "text", "--model", str(folder), "--classify")


def test_as_a_program(folder, tmp_path):
    done = run_script(
        "sample.py",
        "-",
        "--model",
        str(folder),
        "--classify",
        "--json",
        cwd=tmp_path,
        stdin=b"spam\n",
    )
    assert done.returncode == 0 and not done.stderr
    check(json.loads(done.stdout), folder, "spam")
