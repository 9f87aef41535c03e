"""The evaluation against transformers' model and simple computations; its errors."""

import json
import math
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from reference import ROOT, run_module, twins

from nanogpt2 import evaluate
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, parse
from nanogpt2.evaluation import hellaswag, lambada
from nanogpt2.evaluation.continuations import Continuation, Score, score
from nanogpt2.evaluation.examples import read_examples
from nanogpt2.evaluation.hellaswag import clean, read_hellaswag
from nanogpt2.evaluation.lambada import STOP_WORDS
from nanogpt2.evaluation.perplexity import measure_perplexity, windows
from nanogpt2.evaluation.published import FIGURES, published
from nanogpt2.metrics import accuracy, macro_f1
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

BLOCK = 16
BYTES = GPTConfig(257, BLOCK, 2, 3, 24, bos_token_id=256, eos_token_id=256)
TOKENIZER = byte_tokenizer()
TEXT = "It was the b\u00e9st of times;\nit was  the worst of times, it was the age of wisdom."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return *twins(folder, BYTES), str(folder)


def their_log_probability(theirs, context, token):
    with torch.no_grad():
        logits = theirs(torch.tensor([context])).logits[0, -1]
    return logits.double().log_softmax(0)[token].item()


def their_nats(theirs, ids, block_size, stride):
    """Sum the nats token by token, from the docstring's definition of the context."""
    total = 0.0
    for i in range(1, len(ids)):
        k = max(0, math.ceil((i - block_size) / stride))
        total -= their_log_probability(theirs, ids[k * stride : i], ids[i])
    return total


def their_score(theirs, context, target):
    """Return a continuation's log-probability, and whether each token is the likeliest."""
    ids = (context + target)[:-1][-BLOCK:]
    total, greedy = 0.0, True
    for j, token in enumerate(target):
        with torch.no_grad():
            row = torch.tensor([ids[: len(ids) - len(target) + 1 + j]])
            scores = theirs(row).logits[0, -1].double().log_softmax(0)
        total += scores[token].item()
        greedy &= scores.argmax().item() == token
    return total, greedy


def run(capsys, *argv):
    evaluate.main(parse(evaluate.EvaluateConfig, argv))
    return capsys.readouterr().out


def run_json(capsys, *argv):
    return json.loads(run(capsys, *argv, "--json"))


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(parse(evaluate.EvaluateConfig, argv))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1 and len(shown.err) < 202
    return shown.err


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# ---- perplexity


@pytest.mark.parametrize("stride", [1, 5, BLOCK - 1, BLOCK])
@pytest.mark.parametrize("length", [2, 3, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1, 61])
def test_perplexity_is_transformers(models, length, stride):
    ours, theirs, _ = models
    ids = TOKENIZER.encode(TEXT)[:length]
    expected = their_nats(theirs, ids, BLOCK, stride)
    found = measure_perplexity(ours, TOKENIZER, ids, block_size=BLOCK, stride=stride, batch_size=3)
    assert found.tokens == length - 1
    assert found.nats_per_token == pytest.approx(expected / (length - 1), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / (length - 1)), rel=1e-4)
    # every token is one byte, and the first one is not scored
    assert found.bits_per_byte == pytest.approx(found.nats_per_token / math.log(2))


def test_a_smaller_block_sees_less(models):
    ours, theirs, _ = models
    ids = TOKENIZER.encode(TEXT)[:29]
    found = measure_perplexity(ours, TOKENIZER, ids, block_size=7, stride=3)
    assert found.nats_per_token == pytest.approx(their_nats(theirs, ids, 7, 3) / 28, rel=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("batch_size", [1, 2, 50])
def test_every_token_but_the_first_is_scored_once(length, stride, batch_size):
    ids = list(range(100, 100 + length))
    scored = []
    for inputs, targets in windows(ids, 4, stride, batch_size):
        assert inputs.shape == targets.shape and len(inputs) <= batch_size
        for row_in, row_out in zip(inputs.tolist(), targets.tolist(), strict=True):
            for before, after in zip(row_in, row_out, strict=True):
                if after != -100:
                    assert after == before + 1
                    scored.append(after)
    assert scored == ids[1:]


def test_perplexity_counts_bytes_and_words(capsys, models, tmp_path):
    _, theirs, folder = models
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    found = run_json(capsys, str(path), "--model", folder, "--stride", "5")
    ids = TOKENIZER.encode(TEXT)
    nats = their_nats(theirs, ids, BLOCK, 5)
    assert found["tokens"] == len(ids) - 1 == len(TEXT.encode()) - 1
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / len(TEXT.split())), rel=1e-4)
    assert (found["task"], found["model"], found["block_size"]) == ("perplexity", folder, BLOCK)
    assert found["stride"] == 5 and "published" not in found
    # the default stride is half a block; --limit evaluates the first tokens only
    short = run_json(capsys, str(path), "--model", folder, "--limit", "20", "--batch_size", "1")
    assert (short["stride"], short["tokens"]) == (BLOCK // 2, 19)
    expected = their_nats(theirs, ids[:20], BLOCK, BLOCK // 2) / 19
    assert short["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_a_folder_of_texts_is_joined_as_for_training(capsys, models, tmp_path):
    _, theirs, folder = models
    for name, text in [("b", "two"), ("a", "one one")]:
        (tmp_path / f"{name}.txt").write_text(text)
    found = run_json(capsys, str(tmp_path), "--model", folder)
    ids = [*b"one one", 256, *b"two"]
    nats = their_nats(theirs, ids, BLOCK, BLOCK // 2)
    assert found["nats_per_token"] == pytest.approx(nats / 10, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / 9, rel=1e-5)


def test_records_are_texts_as_for_training(capsys, models, tmp_path):
    folder = models[2]
    (tmp_path / "a.txt").write_text("one one<|endoftext|>two<|endoftext|> \n")
    expected = run_json(capsys, str(tmp_path / "a.txt"), "--model", folder)
    ids = [*b"one one", 256, *b"two"]
    assert expected["tokens"] == len(ids) - 1
    (tmp_path / "b.csv").write_text("n,body\n1,one one\n2,\n3,two\n")
    write_lines(tmp_path / "c.json", {"body": "one one"}, {"text": "x"}, {"body": "two"})
    for name in ("b.csv", "c.json"):
        argv = [str(tmp_path / name), "--model", folder, "--text_column", "body"]
        assert "--skip_bad skips it" in refused(capsys, *argv)
        assert run_json(capsys, *argv, "--skip_bad") == expected | {"file": argv[0]}
    (tmp_path / "d.csv").write_bytes("text\nna\xefve\n".encode("latin-1"))
    argv = [str(tmp_path / "d.csv"), "--model", folder]
    assert "byte 0xef at offset 7; --encoding cp1252" in refused(capsys, *argv)
    assert run_json(capsys, *argv, "--encoding", "cp1252")["tokens"] == 5
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("one one<|endoftext|>two")
    (tmp_path / "d/b.txt").write_bytes("na\xefve".encode("latin-1"))
    argv = [str(tmp_path / "d"), "--model", folder]
    assert "b.txt' is not UTF-8" in refused(capsys, *argv)
    assert run_json(capsys, *argv, "--skip_bad") == expected | {"file": argv[0]}


def test_a_perplexity_beyond_the_floats_is_null(capsys, models, tmp_path):
    # exp of the nats of one word of 400 bytes
    (tmp_path / "a.txt").write_text("x" * 400)
    found = run_json(capsys, str(tmp_path / "a.txt"), "--model", models[2])
    assert found["word_perplexity"] is None and found["perplexity"] > 1
    assert "inf" in run(capsys, str(tmp_path / "a.txt"), "--model", models[2])


def test_bits_per_byte_of_tokens_of_several_bytes(tmp_path):
    from nanogpt2.tokenizer import gpt2_tokenizer

    model, tokenizer = GPT(GPTConfig(50257, 8, 1, 2, 4)).eval(), gpt2_tokenizer()
    ids = tokenizer.encode("Hello wonderful world")
    assert len(ids) == 3
    found = measure_perplexity(model, tokenizer, ids, block_size=8, stride=8)
    nats = found.nats_per_token * 2
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(" wonderful world"))
    assert found.word_perplexity == pytest.approx(math.exp(nats / 3))


# ---- continuations


def test_continuations_alone_and_together(models):
    ours, theirs, _ = models
    generator = torch.Generator().manual_seed(1)
    batch = []
    for context, target in [(1, 1), (3, 2), (BLOCK, 1), (2 * BLOCK, 5), (1, BLOCK), (7, 3)]:
        ids = torch.randint(257, (context + target,), generator=generator).tolist()
        batch.append(Continuation(ids[:context], ids[context:]))
    together = score(ours, batch, 4, BLOCK)
    for c, found in zip(batch, together, strict=True):
        total, greedy = their_score(theirs, c.context, c.target)
        assert found.log_probability == pytest.approx(total, rel=1e-5)
        assert found.greedy == greedy
        [alone] = score(ours, [c], 1, BLOCK)
        assert alone.log_probability == pytest.approx(found.log_probability, rel=1e-5)


def test_greedy_means_every_token(models):
    ours, theirs, _ = models
    context = TOKENIZER.encode("it was")
    best = []
    for _ in range(3):
        with torch.no_grad():
            best.append(theirs(torch.tensor([context + best])).logits[0, -1].argmax().item())
    wrong = (best[1] + 1) % 256
    pairs = [Continuation(context, target) for target in (best, [best[0], wrong], best[:1])]
    assert [s.greedy for s in score(ours, pairs, 2, BLOCK)] == [True, False, True]
    # with the likeliest first token banned, the second likeliest is the greedy choice
    with torch.no_grad():
        second = theirs(torch.tensor([context])).logits[0, -1].topk(2).indices[1].item()
    [found] = score(ours, [Continuation(context, [second])], 1, BLOCK, banned_first=best[:1])
    assert not found.greedy and found.greedy_allowed


def test_invalid_continuations():
    for pair, message in [
        (Continuation([1], []), "continuation 0 has no token to predict"),
        (Continuation([], [1]), "or none before it"),
        (Continuation([1], [1] * 5), "continuation 0 has 5 tokens to predict; the block size is 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(None, [pair], 1, 4)


# ---- LAMBADA


def test_lambada(capsys, models, tmp_path):
    _, theirs, folder = models
    texts = ["a b", "it was the best of ti", "one\ntwo  xy", "so it goes \n"]
    path = write_lines(tmp_path / "l.jsonl", *({"text": text} for text in texts))
    with Path(path).open("a") as file:
        file.write("\n")
    found = run_json(capsys, path, "--model", folder, "--task", "lambada", "--batch_size", "3")
    pairs = [("a", " b"), ("it was the best of", " ti"), ("one\ntwo ", " xy"), ("so it", " goes")]
    scores = [their_score(theirs, list(a.encode()), list(b.encode())) for a, b in pairs]
    nats, tokens = -sum(total for total, _ in scores), sum(len(b) for _, b in pairs)
    assert found["examples"] == 4
    assert found["accuracy"] == sum(greedy for _, greedy in scores) / 4
    assert found["perplexity"] == pytest.approx(math.exp(nats / 4), rel=1e-4)
    assert found["token_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    limited = run_json(capsys, path, "--model", folder, "--task", "lambada", "--limit", "1")
    assert limited["examples"] == 1
    assert limited["perplexity"] == pytest.approx(math.exp(-scores[0][0]), rel=1e-4)


def test_lambada_counts_whole_words_and_bans_stop_words(monkeypatch):
    from nanogpt2.tokenizer import gpt2_tokenizer

    told = []

    def fake(model, passages, batch_size, block_size, banned, advance):
        told.extend(banned)
        return [Score(-3.0, True, True), Score(-1.0, False, True), Score(-2.0, False, False)]

    monkeypatch.setattr(lambada, "score", fake)
    passages = [Continuation([1], [2]), Continuation([1], [2, 3]), Continuation([1], [2])]
    found = lambada.measure_lambada(None, gpt2_tokenizer(), passages, 8, 16)
    assert (found.accuracy, found.accuracy_filtered) == (1 / 3, 2 / 3)
    assert found.perplexity == pytest.approx(math.exp(6 / 3))
    assert found.token_perplexity == pytest.approx(math.exp(6 / 4))
    assert {gpt2_tokenizer().encode(word)[0] for word in (" the", " me")} < set(told)


def test_stop_words_are_tokens_of_gpt2():
    from nanogpt2.tokenizer import gpt2_tokenizer

    words = STOP_WORDS.split()
    assert len(words) == len(set(words))
    assert all(len(gpt2_tokenizer().encode(" " + word)) == 1 for word in words)


# ---- HellaSwag

QUESTION = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": ["is ok.", "rips it", "holds a", "starts"],
    "label": 3,
}


def read_questions(path):
    return read_hellaswag(read_examples(str(path)))


def test_readings_of_a_question(tmp_path):
    marked = QUESTION | {"ctx_b": "", "label": "1", "ctx_a": "How to [substeps] go [title] Up  on."}
    path = tmp_path / "h.jsonl"
    write_lines(path, QUESTION, marked)
    readings = read_questions(path)
    assert [q.context for q in readings["plain"]] == [QUESTION["ctx"]] * 2
    assert [q.context for q in readings["harness"]] == [
        "Roof shingle removal: A man is sitting on a roof. He",
        "Roof shingle removal: How to go. Up on.",
    ]
    assert [q.label for q in readings["plain"]] == [3, 1]
    # without `ctx`, its parts make the context; without the activity only plain is read
    parts = {name: QUESTION[name] for name in ("ctx_a", "ctx_b", "endings", "label")}
    with pytest.raises(ValueError, match="line 1 has no column 'ctx'"):
        write_lines(path, {"endings": ["a", "b"], "label": 0})
        read_questions(path)
    write_lines(path, QUESTION, {name: QUESTION[name] for name in ("ctx", "endings", "label")})
    assert list(read_questions(path)) == ["plain"]
    write_lines(path, parts)
    assert read_questions(path)["plain"][0].context == QUESTION["ctx"]
    assert clean(" a [header] b [title] c ") == "a b. c"


def test_markup_is_removed_in_linear_time():
    rng = random.Random(4)
    for _ in range(300):
        text = "".join(
            rng.choices(["[", "]", "[title]", " ", "\n", "\r", "a"], k=rng.randrange(20))
        )
        expected = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        assert clean(text) == expected.replace("  ", " ")
    # each takes minutes if every bracket searches to the end
    for text in ("[" * 500_000, "[a" * 250_000 + "\n]", "]" + "[" * 500_000):
        assert clean(text) == text


def their_choice(theirs, context, endings, lengths):
    best = []
    for ending, length in zip(endings, lengths, strict=True):
        total, _ = their_score(theirs, TOKENIZER.encode(context), TOKENIZER.encode(" " + ending))
        best.append(total / length)
    return best.index(max(best))


def test_hellaswag(capsys, models, tmp_path):
    _, theirs, folder = models
    questions = []
    for label in range(4):
        for context in ("a man he", "the dog w\u00e9"):
            a, b = context.rsplit(" ", 1)
            endings = [
                ("runs", "is \u00e9", "sleeps a lot", "x")[(i + label) % 4] for i in range(4)
            ]
            questions.append(
                QUESTION | {"ctx": context, "ctx_a": a, "ctx_b": b, "endings": endings, "label": 2}
            )
    path = write_lines(tmp_path / "h.jsonl", *questions)
    found = run_json(capsys, path, "--model", folder, "--task", "hellaswag", "--batch_size", "5")
    expected = dict.fromkeys(("acc", "tokens", "harness acc", "chars", "bytes"), 0.0)
    for q in questions:
        endings = q["endings"]
        harness = f"{q['activity_label']}: {q['ctx_a']} {q['ctx_b'].capitalize()}"
        ones, sizes = [1] * 4, [len(e.encode()) for e in endings]
        for name, context, lengths in [
            ("acc", q["ctx"], ones),
            ("tokens", q["ctx"], [1 + size for size in sizes]),
            ("harness acc", harness, ones),
            ("chars", harness, [len(e) for e in endings]),
            ("bytes", harness, sizes),
        ]:
            expected[name] += (their_choice(theirs, context, endings, lengths) == 2) / 8
    assert found["plain"] == {"acc": expected["acc"], "acc_norm": expected["tokens"]}
    assert found["harness"] == {
        "acc": expected["harness acc"],
        "acc_norm": expected["chars"],
        "acc_bytes": expected["bytes"],
    }
    assert found["examples"] == 8
    shown = run(capsys, path, "--model", folder, "--task", "hellaswag", "--limit", "3")
    assert "harness acc_norm" in shown and "published" not in shown


def test_hellaswag_by_each_length(monkeypatch):
    # the best ending depends on the length that divides its log-probability
    endings = ("a", "\u00e9" * 4, "abcdef", "abcd")
    found = [Score(total, False, False) for total in (-2.0, -4.5, -7.0, -4.2)]
    monkeypatch.setattr(hellaswag, "score", lambda *_, advance: found)
    for label in range(4):
        readings = {
            name: [hellaswag.Question("x", endings, label)] for name in ("plain", "harness")
        }
        shown = hellaswag.measure_hellaswag(None, TOKENIZER, readings, 8, BLOCK)
        # tokens with the space, characters and bytes: 2, 1, 1; 9, 4, 8; 7, 6, 6; 5, 4, 4
        winners = {"acc": 0, "tokens": 1, "characters": 3, "bytes": 1}
        assert shown["plain"] == {
            "acc": float(label == winners["acc"]),
            "acc_norm": float(label == winners["tokens"]),
        }
        assert shown["harness"] == {
            "acc": float(label == winners["acc"]),
            "acc_norm": float(label == winners["characters"]),
            "acc_bytes": float(label == winners["bytes"]),
        }


# ---- classification


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(2)
    model = GPTClassifier(GPT(BYTES), ("ham", "spam", "2"))
    for p in model.parameters():
        p.data *= 20
    save_model(model.eval(), folder, TOKENIZER)
    return model, str(folder)


def test_classification(capsys, classifier, tmp_path):
    from transformers import GPT2ForSequenceClassification

    model, folder = classifier
    texts = [
        "abc",
        "x",
        "it was the best of times and longer than the block",
        "zz",
        "\u00e9h",
        "9 9",
    ]
    labels = ["ham", "spam", 2, "ham", "ham", "2"]
    records = [{"body": t, "kind": label} for t, label in zip(texts, labels, strict=True)]
    path = write_lines(tmp_path / "c.jsonl", *records)
    argv = [path, "--model", folder, "--task", "classify", "--batch_size", "4"]
    argv += ["--text_column", "body", "--label_column", "kind"]
    found = run_json(capsys, *argv)
    theirs = GPT2ForSequenceClassification.from_pretrained(folder).eval()
    predictions = []
    for text in texts:
        with torch.no_grad():
            logits = theirs(torch.tensor([TOKENIZER.encode(text)[:BLOCK]])).logits[0]
        predictions.append(model.labels[int(logits.argmax())])
    targets = [str(label) for label in labels]
    assert len(set(predictions)) > 1
    assert found["examples"] == 6
    assert found["accuracy"] == accuracy(targets, predictions)
    assert found["macro_f1"] == macro_f1(targets, predictions)
    assert found["classes"]["ham"]["support"] == 3
    for target in model.labels:
        for predicted in model.labels:
            count = list(zip(targets, predictions, strict=True)).count((target, predicted))
            assert found["confusion"][target][predicted] == count
    shown = run(capsys, *argv)
    assert "macro_f1" in shown and "precision" in shown
    # the table has a row for each label, with the counts of its predicted labels
    row = [str(n) for n in found["confusion"]["ham"].values()]
    assert ["ham", *row] in [line.split() for line in shown.splitlines()]


def test_labels_and_models_that_do_not_fit(capsys, classifier, models, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", {"text": "a", "label": "eggs"})
    error = refused(capsys, path, "--model", classifier[1], "--task", "classify")
    assert "knows no label 'eggs'" in error
    assert "classif" in refused(capsys, path, "--model", models[2], "--task", "classify")
    write_lines(Path(path), {"text": "a b"})
    assert "classif" in refused(capsys, path, "--model", classifier[1], "--task", "lambada")


# ---- published figures


def test_published_figures_are_named_as_ours(capsys, models, monkeypatch, tmp_path):
    ours = models[0]
    path = write_lines(tmp_path / "h.jsonl", QUESTION)
    opened = nullcontext()
    opened.tokenizer, opened.model = TOKENIZER, lambda *_, **__: ours
    monkeypatch.setattr(evaluate, "open_checkpoint", lambda _: opened)
    shown = run(capsys, path, "--model", "gpt2", "--task", "hellaswag")
    rows = [line.split("  ")[0] for line in shown.splitlines()]
    for figure in published("hellaswag", "gpt2"):
        assert rows.count(figure.figure) == 2
    assert "0.3114" in shown and "llm.c" in shown
    found = run_json(capsys, path, "--model", "gpt2", "--task", "hellaswag")
    assert len(found["published"]) == 4
    known = {"word_perplexity", "perplexity", "accuracy", "accuracy_filtered"}
    assert {f.figure for f in FIGURES if f.task != "hellaswag"} <= known


# ---- errors


def test_wrong_files_are_one_line(capsys, models, tmp_path, monkeypatch):
    folder, path = models[2], Path("bad.jsonl")
    monkeypatch.chdir(tmp_path)
    for task, content, message in [
        ("perplexity", b"", "must hold 2 tokens or more, not 0"),
        ("perplexity", b'{"txt": "a b"}', "has no column 'text'; columns found: 'txt'"),
        ("lambada", b"", "is empty"),
        ("lambada", b'{"text": "a b"}\n{"text": ', 'line 2 is not a JSON object: \'{"text":'),
        ("lambada", b"a\xff", "is not UTF-8: byte 0xff at offset 1"),
        ("lambada", b"\n[1]\n", "line 2 is not a JSON object: '[1]'"),
        ("lambada", b'{"txt": "a b", "id": 1}', "has no column 'text'; columns found: 'txt', 'id'"),
        ("lambada", b'{"text": 7}', "line 1: 'text' must be text, not '7'"),
        ("lambada", b'{"text": "word "}', "line 1 must hold two words or more, not 'word'"),
        ("lambada", b'{"text": "an abcdefghijklmnopq"}', "has 18 tokens to predict; the block"),
        ("hellaswag", b"\n", "is empty"),
        ("hellaswag", b'{"ctx": "a", "endings": ["b"], "label": 0}', "'endings' must be two"),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", 1], "label": 0}', "'endings' must be two"),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c"], "label": 2}', "0 to 1, not '2'"),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c"], "label": "x"}', "0 to 1, not 'x'"),
        ("hellaswag", b'{"ctx": "a", "endings": ["b", "c"]}', "no column 'label'"),
        ("hellaswag", b'{"ctx": " ", "endings": ["b", "c"], "label": 0}', "'ctx' is empty"),
        ("classify", b'{"text": "a"}', "no column 'label'"),
        ("classify", b'{"text": "", "label": "a"}', "'text' is empty"),
    ]:
        path.write_bytes(content)
        error = refused(capsys, str(path), "--model", folder, "--task", task)
        assert message in error and ("bad.jsonl" in error or "continuation 0" in error)
    for content, message in [
        (b"", "must hold 2 tokens or more, not 0"),
        (b"a", "must hold 2 tokens or more, not 1"),
        (b"ab\xff", "is not UTF-8: byte 0xff at offset 2"),
    ]:
        Path("bad.txt").write_bytes(content)
        error = refused(capsys, "bad.txt", "--model", folder)
        assert message in error and "bad.txt" in error
    assert "must be one of .jsonl" in refused(
        capsys, "bad.txt", "--model", folder, "--task", "lambada"
    )


def test_wrong_flags_are_one_line(capsys, models, tmp_path):
    folder = models[2]
    path = str(tmp_path / "text.txt")
    Path(path).write_text("some text")
    for argv, message in [
        (["--task", "lambada", "--stride", "4"], "--stride must come with --task perplexity"),
        (["--label_column", "y"], "--label_column must come with --task classify"),
        (["--block_size", "17"], "--block_size must be <= 16, the model's, not 17"),
        (["--block_size", "4", "--stride", "5"], "--stride must be <= 4, the block size, not 5"),
        (["--encoding", "utf-99"], "--encoding must be a text encoding, not 'utf-99'"),
        (["--task", "lambada", "--skip_bad"], "--skip_bad must come with --task classify or perpl"),
        (["--task", "glue"], "--task must be one of perplexity, lambada, hellaswag, classify"),
        (["--limit", "0"], "--limit must be a whole number >= 1"),
        (["--limit", "1"], "--limit must be >= 2, tokens of a text, not 1"),
        (["--device", "mps"], "--device 'mps' is not on this machine"),
    ]:
        assert message in refused(capsys, path, "--model", folder, *argv)
    assert "'nowhere' is not a file" in refused(capsys, "nowhere", "--model", folder)
    assert "FILE is missing" in refused(capsys, "--model", folder)
    assert "--model 'nothing' is not a file" in refused(capsys, path, "--model", "nothing")


def test_as_a_command(models, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    done = run_module("nanogpt2.evaluate", str(path), "--model", models[2], "--json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == b""
    assert json.loads(done.stdout)["tokens"] == len(TEXT.encode()) - 1
    done = run_module("nanogpt2.evaluate", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")


def test_help_imports_no_torch():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['evaluate', '--help']\n"
        "try:\n    runpy.run_module('nanogpt2.evaluate', run_name='__main__')\n"
        "except SystemExit as stopped:\n    assert stopped.code == 0\n"
        "assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, capture_output=True
    )
    assert b"--stride" in done.stdout


# ---- damaged weights


def broken(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(parse(evaluate.EvaluateConfig, argv))
    shown = capsys.readouterr()
    assert stopped.value.code == 1 and shown.out == ""
    assert shown.err.splitlines()[-1].startswith("error: the model's scores are not finite numbers")


RECORDS = {
    "lambada": {"text": "it was the best"},
    "hellaswag": {"ctx": "it was", "endings": ["the best", "the worst"], "label": 0},
    "classify": {"text": "it was", "label": "ham"},
    "perplexity": {"text": "it was the best"},
    "repetition": {"text": "it"},
    "bias": {"first": "he was", "second": "she was"},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("task", RECORDS)
def test_weights_that_are_not_finite_are_refused(capsys, tmp_path, task, value):
    gpt = GPT(BYTES)
    model = GPTClassifier(gpt, ("ham", "spam")) if task == "classify" else gpt
    gpt.ln_f.bias.data[3] = value
    save_model(model, tmp_path / "model", TOKENIZER)
    name = "text.txt" if task == "perplexity" else "records.jsonl"
    path = write_lines(tmp_path / name, RECORDS[task])
    for form in ("--json", "--no_json"):
        broken(capsys, path, "--task", task, "--model", str(tmp_path / "model"), form)


def test_a_figure_too_large_for_a_float_is_null_in_json(capsys, tmp_path):
    """A text of one long word: exp(nats / words) overflows, and JSON knows no Infinity."""
    save_model(GPT(BYTES), tmp_path / "model", TOKENIZER)
    (tmp_path / "word.txt").write_text("x" * 400)
    argv = str(tmp_path / "word.txt"), "--model", str(tmp_path / "model"), "--json"
    text = run(capsys, *argv)
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["word_perplexity"] is None and found["perplexity"] > 0
    assert text.count("\n") == 1
