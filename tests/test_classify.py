"""sample.py --classify as its users meet it."""

import csv
import gzip
import io
import json
import shutil

import pytest
import torch
from reference import run_script

import sample
from nanogpt2 import evaluate
from nanogpt2.checkpoints.load import load_classifier
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, SampleConfig, parse
from nanogpt2.metrics import accuracy, macro_f1
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
        "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts)
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
    assert "line 2 has no column 'text'" in err and "--skip_bad" in err
    out, _ = run(capsys, folder, "--prompts", str(path), "--skip_bad")
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["a", "c"]


# ---- what train.py reads

TEXTS = ("Cheap pills, now!", "Lunch at noon?", "He said \u201cyes\u201d", "a b", "x")
TRUE = ("spam", "ham", "spam", "\u65e5\u672c", "ham")


def rows(text="text", label="label"):
    return [{"n": i, text: t, label: y} for i, (t, y) in enumerate(zip(TEXTS, TRUE, strict=True))]


def write_rows(path, found, encoding="utf-8"):
    """Write records in the format that the file's name tells."""
    kind = path.name.split(".", 1)[1]
    names = list(found[0])
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(found), path)
        return
    if kind.startswith("json"):
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        text = "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines)
    else:
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t" if kind.startswith("tsv") else ",")
        writer.writerows([names, *([row[name] for name in names] for row in found)])
        text = out.getvalue()
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)


def checked(out, err, folder, texts=TEXTS, true=TRUE):
    """The texts alone are labelled, and the note has the accuracy."""
    found = [json.loads(line) for line in out.splitlines()]
    for record, text in zip(found, texts, strict=True):
        check(record, folder, text)
    said = [record["label"] for record in found]
    figures = f"accuracy {accuracy(true, said):.4f}, macro F1 {macro_f1(true, said):.4f}"
    assert err == f"{figures} on {len(texts)} of {len(texts)} texts\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz"])
def test_records_are_read_as_in_training(capsys, folder, tmp_path, kind):
    path = tmp_path / f"mails.{kind}"
    write_rows(path, rows(), "utf-8-sig" if kind == "tsv" else "utf-8")
    checked(*run(capsys, folder, "--prompts", str(path)), folder)
    write_rows(path, rows("body", "kind"))
    columns = ["--text_column", "body", "--label_column", "kind"]
    checked(*run(capsys, folder, "--prompts", str(path), *columns), folder)
    # evaluate reads the same
    evaluate.main(
        parse(
            evaluate.EvaluateConfig,
            [str(path), "--model", str(folder), "--task", "classify", "--json", *columns],
        )
    )
    figures = json.loads(capsys.readouterr().out)
    _, err = run(capsys, folder, "--prompts", str(path), *columns)
    assert f"accuracy {figures['accuracy']:.4f}, macro F1 {figures['macro_f1']:.4f} " in err


def test_the_columns_of_the_training_are_the_default(capsys, folder, tmp_path):
    model = tmp_path / "run"
    shutil.copytree(folder, model)
    config = {"config": {"text_column": "body", "label_column": "kind"}}
    (model / "run.json").write_text(json.dumps(config))
    path = tmp_path / "mails.csv"
    for names in (("body", "kind"), ("text", "label")):
        write_rows(path, rows(*names))
        checked(*run(capsys, model, "--prompts", str(path)), folder)
        evaluate.main(
            parse(evaluate.EvaluateConfig, [str(path), "--model", str(model), "--task", "classify"])
        )
        assert "accuracy" in capsys.readouterr().out
    # a damaged or another run.json is no obstacle
    for content in ("{", "[]", '{"config": 1}', '{"config": {}}'):
        (model / "run.json").write_text(content)
        checked(*run(capsys, model, "--prompts", str(path)), folder)


def test_the_encoding_is_named(capsys, folder, tmp_path):
    path = tmp_path / "mails.csv"
    found = [row | {"label": "ham"} for row in rows()]
    write_rows(path, found, "cp1252")
    err = wrong(capsys, 2, "--prompts", str(path), "--model", str(folder), "--classify")
    assert "is not UTF-8: byte 0x93" in err
    out, err = run(capsys, folder, "--prompts", str(path), "--encoding", "cp1252")
    checked(out, err, folder, true=["ham"] * 5)


def test_label_folders(capsys, folder, tmp_path):
    for i, (text, label) in enumerate(zip(TEXTS, TRUE, strict=True)):
        (tmp_path / "mails" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mails" / label / f"{i}.txt").write_text(text, encoding="utf-8")
    order = sorted(range(5), key=lambda i: (TRUE[i], i))
    out, err = run(capsys, folder, "--prompts", str(tmp_path / "mails"))
    checked(out, err, folder, [TEXTS[i] for i in order], [TRUE[i] for i in order])
    (tmp_path / "mails" / "ham" / "x.txt").write_bytes(b"na\xefve")
    argv = ["--prompts", str(tmp_path / "mails")]
    assert "cp1252" in wrong(capsys, 2, *argv, "--model", str(folder), "--classify")
    assert run(capsys, folder, *argv, "--skip_bad")[0] == out


def test_standard_input_holds_lines_or_records(capsys, folder, tmp_path, monkeypatch):
    def piped(data, *argv):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run(capsys, folder, "--prompts", "-", *argv)

    write_rows(tmp_path / "a.jsonl", rows())
    checked(*piped((tmp_path / "a.jsonl").read_bytes()), folder)
    checked(*piped(json.dumps(rows(), indent=1).encode()), folder)
    for data in (b'{"a\n\n[b\n', b'"{\\"a"\n"[b"\n'):
        out, err = piped(data)
        assert [json.loads(line)["text"] for line in out.splitlines()] == ['{"a', "[b"] and not err


def test_lines_that_cannot_be_read_are_skipped_if_asked(capsys, folder, tmp_path):
    for name, data, line in [
        ("a.txt", b"a\n\xffb\r\nc", 2),
        ("a.jsonl", b'"a"\n7\n"c"\n', 2),
        ("b.jsonl", b'{"text": "a"}\n{"text": \n{"text": "c"}\n', 2),
        ("c.jsonl", b'{"text": "a"}\n{"text": " "}\n{"text": "c"}\n', 2),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n{"text": "c"}\n', 2),
    ]:
        (tmp_path / name).write_bytes(data)
        argv = ["--prompts", str(tmp_path / name)]
        assert "--skip_bad" in wrong(capsys, 2, *argv, "--model", str(folder), "--classify")
        out, err = run(capsys, folder, *argv, "--skip_bad")
        assert [json.loads(one)["text"] for one in out.splitlines()] == ["a", "c"]
        assert err.startswith("skipped ") and f"line {line}" in err and err.count("\n") == 1


def test_labels_that_are_missing_or_unknown(capsys, folder, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,ham\nb,\nc,eggs\n")
    out, err = run(capsys, folder, "--prompts", str(path))
    assert out.count("\n") == 3 and " on 2 of 3 texts" in err
    assert "the model does not know 1 of the labels ('eggs')" in err
    path.write_text("text,label\na,1\nb,\n")
    out, err = run(capsys, folder, "--prompts", str(path))
    assert out.count("\n") == 2
    assert err == "note: no accuracy, because the model knows none of the labels ('1')\n"
    argv = ["--prompts", str(path), "--model", str(folder), "--classify"]
    assert "no column 'labels'" in wrong(capsys, 2, *argv, "--label_column", "labels")
    assert "no column 'body'" in wrong(capsys, 2, *argv, "--text_column", "body")
    path.write_text("text,label\n")
    assert "is empty" in wrong(capsys, 2, *argv)


@pytest.mark.parametrize("flag", ["--text_column", "--label_column", "--encoding"])
def test_flags_of_reading_without_a_file(capsys, folder, flag):
    for mode in (["x", "--classify"], ["x"], ["--prompts", "a.jsonl"]):
        err = wrong(capsys, 2, *mode, "--model", str(folder), flag, "utf-8")
        assert err == f"error: {flag} must come with --classify --prompts\n"


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
