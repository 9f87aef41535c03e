"""sample.py beyond one plain text: beams, many prompts, the prompt loop, two models."""

import io
import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt2.cli import compare
from nanogpt2.cli.decode import OutputSink, decode_texts
from nanogpt2.cli.interactive import Conversation, run_interactive
from nanogpt2.cli.output import Prompt
from nanogpt2.cli.prompts import Job, read_prompts, run_prompts
from nanogpt2.cli.text import as_line
from nanogpt2.cli.tree import BeamTree
from nanogpt2.config import GenerationConfig, GPTConfig
from nanogpt2.generation import generate
from nanogpt2.generation.beam import Beams, Group
from nanogpt2.generation.explain import explain
from nanogpt2.generation.stopping import StopStrings
from nanogpt2.generation.text import Completion, pieces, request_for
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer

BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A small byte-level model that likes letters, spaces and the bytes of some wide characters."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(257, 64, 2, 2, 16, bos_token_id=256, eos_token_id=256)).eval()
    for p in model.parameters():
        p.data *= 6
    return model


def texts_of(model, prompt, sink=None, **options):
    config = GenerationConfig(**{"max_new_tokens": 12, "seed": 1} | options)
    request = request_for(model, BYTES, [prompt], config)
    return decode_texts(model, BYTES, request, sink)[0]


# ---- text


def feed(tokenizer, prompt, ids, stops):
    """Return the pieces of text as they are printed, and the completion."""
    completion = Completion(tokenizer, tokenizer.encode(prompt), [tokenizer.end_of_text], stops)
    # tokens after the end must be ignored
    pieces = [*map(completion.add, ids), completion.finish()]
    assert "".join(pieces) == completion.text
    return pieces, completion


@pytest.mark.parametrize("tokenizer", [BYTES, gpt2_tokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", [], "one two"),
        ("one. two", ["."], "one"),
        ("日本語。次", ["。"], "日本語"),
        ("🙂👩‍👩‍👧 end", ["👩‍👩‍👧"], "🙂"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("aaab", ["aab", "b"], "a"),
        ("no such", ["never", "nor"], "no such"),
        ("tail ##", ["###"], "tail ##"),
        ("x\n\nYou: hi", ["\nYou:"], "x\n"),
    ],
)
def test_stop_strings_are_cut_off(tokenizer, text, stops, expected):
    pieces, completion = feed(tokenizer, "", tokenizer.encode(text), stops)
    assert completion.text == expected
    assert completion.finish_reason == ("stop" if expected != text else "length")
    # no printed text had to be taken back
    for i in range(len(pieces)):
        assert expected.startswith("".join(pieces[:i]))


def test_a_stop_string_may_begin_in_the_prompt():
    _, completion = feed(BYTES, "x ##", b"# y", ["###"])
    assert completion.text == "" and completion.finish_reason == "stop"
    _, completion = feed(BYTES, "x ###", b" y", ["###"])
    assert completion.text == " y" and completion.finish_reason == "length"
    # text that may belong to the stop string is held back
    assert feed(BYTES, "x #", b"## y", ["###"])[0] == [""] * 5
    assert feed(BYTES, "x #", b"#y", ["###"])[1].text == "#y"


def test_nothing_comes_after_the_end():
    _, completion = feed(BYTES, "", b"one END two END", ["END"])
    assert completion.text == "one " and completion.token_ids == [*b"one END"]
    _, completion = feed(BYTES, "", [*b"one", BYTES.end_of_text, *b"two"], [])
    assert completion.text == "one" and completion.token_ids == [*b"one", BYTES.end_of_text]


PIECES = [b"\xef", b"\xbf", b"\xbd", b"\xe4", b"\xbd", b"\xa0", b"a", b"b"]


@given(
    st.lists(st.sampled_from(PIECES), max_size=4),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8),
    st.lists(st.text("ab你\ufffd", min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_a_text_is_cut_where_the_search_ends_it(before, new, stops):
    """Broken characters included: they are shown as U+FFFD, but not written that way."""
    prompt, ids = [*b"".join(before)], [*b"".join(new)]
    strings, completion = StopStrings(stops, BYTES), Completion(BYTES, prompt, [], stops)
    shown = ""
    for n, token in enumerate(ids, start=1):
        shown += completion.add(token)
        if strings.ended(torch.tensor([prompt + ids[:n]])).item():
            assert completion.finish_reason == "stop"
            break
        assert completion.finish_reason == "length"
    shown += completion.finish()
    seen = bytes(ids[:n])
    if completion.finish_reason == "stop":
        whole = bytes(prompt) + seen
        starts = [len(whole) - len(s.encode()) for s in stops if whole.endswith(s.encode())]
        seen = seen[: max(0, min(starts) - len(prompt))]
    assert shown == completion.text == seen.decode("utf-8", "replace")


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), BYTES], ids=lambda t: t.name)
def test_half_a_character_is_never_shown(tokenizer):
    for text in ("naïve 日本語", "🙂👩‍👩‍👧 end", "é" * 9, "", "\x00\n\t"):
        pieces, completion = feed(tokenizer, "", tokenizer.encode(text), [])
        assert completion.text == text
        for i in range(len(pieces)):
            assert text.startswith("".join(pieces[:i]))


@given(st.lists(st.integers(0, 255)))
@settings(deadline=None)
def test_any_bytes_are_shown_as_the_whole_decoded(ids):
    assert feed(BYTES, "", ids, [])[1].text == BYTES.decode(ids)


@given(
    st.text("ab\n日", max_size=12), st.lists(st.text("ab日", min_size=1, max_size=3), max_size=3)
)
@settings(deadline=None)
def test_any_text_is_cut_at_its_first_stop_string(text, stops):
    pieces, completion = feed(BYTES, "", BYTES.encode(text), stops)
    ends = [text.index(stop) + len(stop.encode()) * 0 for stop in stops if stop in text]
    # the first complete stop string ends the text, at the earliest start of a stop string
    complete = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    if complete:
        seen = text[: complete[0]]
        assert completion.text == seen[: min(seen.index(s) for s in stops if s in seen)]
    else:
        assert not ends and completion.text == text
    for i in range(len(pieces)):
        assert completion.text.startswith("".join(pieces[:i]))


# ---- one prompt


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 4, "do_sample": True, "top_k": 20},
        {"num_beams": 3, "eos_token_id": tuple(range(97, 110)), "max_new_tokens": 30},
        {"num_beams": 2, "stop_strings": ["e", "日"]},
    ],
    ids=str,
)
def test_the_streamed_text_is_the_finished_text(model, options, seed):
    heard = []
    options = options | {"seed": seed}
    texts = texts_of(model, "日本 🙂", OutputSink(on_text=heard.append), **options)
    assert "".join(heard) == texts[0].completion.text
    ids = torch.tensor([BYTES.encode("日本 🙂")])
    found = generate(model, ids, tokenizer=BYTES, **{"max_new_tokens": 12} | options)
    for i, text in enumerate(texts):
        new = found.sequences[i, ids.size(1) :].tolist()
        assert text.completion.token_ids == new[: len(text.completion.token_ids)]
        if found.sequences_scores is not None:
            assert text.score == pytest.approx(found.sequences_scores[i].item())


def test_beams_are_shown_as_soon_as_they_agree(model):
    shown = []
    for seed in range(4):
        heard = []
        options = {"num_beams": 3, "max_new_tokens": 40, "do_sample": True, "seed": seed}
        texts_of(model, "ab", OutputSink(on_text=heard.append), **options)
        shown.append(len([piece for piece in heard if piece]))
    assert max(shown) > 5, "all came at the end"


# ---- many prompts


def numbered(prompts):
    return {number: Prompt(text, {}) for number, text in enumerate(prompts, start=1)}


def run_all(model, prompts, job=Job("prompts.txt", 3), **options):  # noqa: B008
    config = GenerationConfig(**{"max_new_tokens": 6, "seed": 1, "do_sample": True} | options)
    return list(run_prompts(model, BYTES, numbered(prompts), config, job))


UNIQUE = Job("prompts.txt", 3, unique=True)
SKIP_BAD = Job("prompts.txt", 3, skip_bad=True)
IN_ORDER = Job("prompts.txt", 3, in_order=True)


def test_many_prompts_come_out_in_order(model):
    prompts = ["a", "a much longer prompt", "bb", "日本", "", "another of some length", "c"]
    found = run_all(model, prompts, IN_ORDER, num_return_sequences=2)
    assert [f["prompt"] for f in found] == [p for p in prompts for _ in range(2)]
    assert [f["line"] for f in found] == [n + 1 for n in range(len(prompts)) for _ in range(2)]
    assert [f["index"] for f in found] == [0, 1] * len(prompts)
    for f in found:
        assert f["text"] == f["prompt"] + f["completion"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"max_length": 25, "max_new_tokens": None, "eos_token_id": 101},
        {"min_length": 24, "max_new_tokens": 24, "eos_token_id": tuple(range(90, 120))},
        {"num_beams": 3, "force_words_ids": [[66, 67]], "max_length": 26, "max_new_tokens": None},
        {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3, "max_new_tokens": 20},
        {"forced_bos_token_id": 97, "begin_suppress_tokens": [98], "max_new_tokens": 4},
        {"sequence_bias": [[[0, 97], 50.0]], "exponential_decay_length_penalty": [2, 1.5]},
        {"penalty_alpha": 0.5, "top_k": 4},
    ],
    ids=str,
)
def test_a_prompt_gives_the_same_alone(model, options):
    prompts = ["a", "a much longer prompt", "bb", "b", "cc", "a", "as long a prompt, ya"]
    options = {"do_sample": False} | options
    found = run_all(model, prompts, IN_ORDER, **options)
    for prompt, both in zip(prompts, found, strict=True):
        (alone,) = run_all(model, [prompt], **options)
        assert alone["token_ids"] == both["token_ids"]
        assert alone["score"] == pytest.approx(both["score"], abs=1e-4)
        # the same as generate()
        ids = torch.tensor([BYTES.encode(prompt)])
        expected = generate(model, ids, **{"max_new_tokens": 6} | options).sequences[0]
        assert both["token_ids"] == expected[ids.size(1) :].tolist()


def test_a_prompt_that_fills_the_context_is_an_error_before_any_text(model, capsys):
    prompts = ["a", "much too long", "bb", "too long", "c"]
    options = {"max_length": 6, "max_new_tokens": None, "do_sample": False}
    with pytest.raises(ValueError, match=r"^prompts 'prompts.txt' line 2: max_length .*skip_bad"):
        run_all(model, prompts, **options)
    found = run_all(model, prompts, job=SKIP_BAD, **options)
    assert [f["prompt"] for f in found] == ["a", "c", "bb"]
    err = capsys.readouterr().err
    assert err.count("skipped") == 2 and "line 2: max_length" in err and "line 4: max_" in err
    # if every line fails, the option is at fault, so nothing is skipped
    with pytest.raises(ValueError, match=r"^max_length must be > 1"):
        run_all(model, ["a", "bb"], job=SKIP_BAD, max_length=1, max_new_tokens=None)
    with pytest.raises(ValueError, match="eos_token_id must"):
        run_all(model, ["a", "bb"], job=SKIP_BAD, eos_token_id=999)
    assert capsys.readouterr().err == ""


def test_a_failure_after_the_first_texts_is_not_wrong_use(model):
    # each token may occur once: the second prompt has used both
    allowed = [97, 98]
    options = {"suppress_tokens": [i for i in range(257) if i not in allowed], "max_new_tokens": 1}
    options |= {"no_repeat_ngram_size": 1, "eos_token_id": None}
    lines, job = numbered(["x", "ab"]), Job("-", 1)
    config = GenerationConfig(do_sample=True, seed=1, **options)
    texts = run_prompts(model, BYTES, lines, config, job)
    assert next(texts)["prompt"] == "x"
    with pytest.raises(FloatingPointError, match="tokens left to draw"):
        next(texts)
    with pytest.raises(ValueError, match="tokens left to draw"):
        next(run_prompts(model, BYTES, numbered(["ab"]), config, job))


def test_prompts_beyond_the_context_are_counted(model, capsys):
    run_all(model, ["a" * 70, "b", "c" * 80, "d" * 70])
    err = capsys.readouterr().err
    assert "3 of the prompts are longer than the context of 64" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_return_sequences": 3},
        {"noise": "counter", "num_return_sequences": 2},
        {"num_beams": 3, "temperature": 9.0, "top_k": 0},
        {"num_beams": 2, "stochastic_beams": True, "noise": "counter"},
    ],
    ids=str,
)
def test_a_line_gives_the_same_in_any_batch_and_alone_with_its_seed(model, options):
    prompts = ["aa", "cc", "longer", "aa", "bb", "aa", "aa"]
    found = run_all(model, prompts, **options)
    for size in (1, 2, 7):
        again = run_all(model, prompts, Job("prompts.txt", size, in_order=True), **options)
        found.sort(key=lambda f: (f["line"], f["index"]))
        for name in ("line", "index", "token_ids", "seed"):
            assert [f[name] for f in again] == [f[name] for f in found]
    for line in (1, 4, 5):
        texts = [f for f in found if f["line"] == line]
        asked = {"max_new_tokens": 6, "do_sample": True} | options | {"seed": texts[0]["seed"]}
        alone = texts_of(model, prompts[line - 1], **asked)
        assert [text.completion.token_ids for text in alone] == [f["token_ids"] for f in texts]
    # equal prompts draw differently
    assert len({str(f["token_ids"]) for f in found if f["prompt"] == "aa" and not f["index"]}) == 4
    # and another seed draws other texts
    assert run_all(model, prompts, **options | {"seed": 2}) != found


def test_counted_texts_come_again_by_their_number(model):
    found = run_all(model, ["a", "bb"], noise="counter", num_return_sequences=3)
    again = run_all(model, ["a", "bb"], noise="counter", first_sample=2)
    assert [f["token_ids"] for f in again] == [found[n]["token_ids"] for n in (2, 5)]


@pytest.mark.parametrize("noise", ["hf", "counter"])
def test_unique_texts(model, noise):
    options = {"num_return_sequences": 30, "max_new_tokens": 1, "noise": noise, "top_k": 40}
    plain = [f["text"] for f in run_all(model, ["a", "b"], **options)]
    assert len(set(plain)) < 60
    found = run_all(model, ["a", "b"], job=UNIQUE, **options)
    for prompt in ("a", "b"):
        texts = [f["text"] for f in found if f["prompt"] == prompt]
        assert len(texts) == len(set(texts)) > len({t for t in plain if t.startswith(prompt)})
    assert run_all(model, ["a", "b"], job=UNIQUE, **options) == found


def test_too_few_unique_texts_are_noted(model, capsys):
    options = {"num_return_sequences": 4, "max_new_tokens": 1, "top_k": 2}
    found = run_all(model, ["a", "b"], job=UNIQUE, **options)
    assert len(found) <= 4
    assert f"--unique left {len(found)} of 8 texts" in capsys.readouterr().err
    run_all(model, ["a", "b"], **options)
    assert capsys.readouterr().err == ""


def texts_in(*arguments, **options):
    return {number: line.text for number, line in read_prompts(*arguments, **options)[0].items()}


def test_prompts_are_read(tmp_path, monkeypatch, capsys):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\n\n  two é\r\nthree".encode())
    assert texts_in(str(path), skip_bad=False) == {1: "one", 3: "  two é", 4: "three"}
    lines = '{"prompt": "one", "id": 7}\n"two"\n\n{"text": "x"}\n{"prompt": "three"}\n'
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match="line 4: must be a string"):
        texts_in(str(path), skip_bad=False)
    expected = {1: "one", 2: "two", 5: "three"}
    assert texts_in(str(path), skip_bad=True) == expected
    assert "skipped" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert texts_in("-", skip_bad=True) == expected
    path.write_bytes(b"ok\nbad \xff\n")
    with pytest.raises(ValueError, match="line 2"):
        texts_in(str(path.rename(tmp_path / "q.txt")), skip_bad=False)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="no prompt"):
        texts_in(str(tmp_path / "empty"), skip_bad=False)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", '"Hello", she said.\nx', {1: '"Hello", she said.', 2: "x"}),
        ("p.txt", '{"prompt": "a"}', {1: '{"prompt": "a"}'}),
        ("p", '{curly}\n"quoted"', {1: "{curly}", 2: '"quoted"'}),
        ("P.JSONL", '"a"\n{"prompt": "b"}', {1: "a", 2: "b"}),
        ("p.json", '\n"a"', {2: "a"}),
        ("-", '\n{"prompt": "a"}\n"b"', {2: "a", 3: "b"}),
        ("-", '"Hello", she said.\n"x"', {1: '"Hello", she said.', 2: '"x"'}),
        ("-", "{curly}", {1: "{curly}"}),
        ("-", "12", {1: "12"}),
    ],
    ids=str,
)
def test_jsonl_is_recognised(tmp_path, monkeypatch, name, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").touch()
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    else:
        (tmp_path / name).write_text(text)
    assert texts_in(name, skip_bad=False) == expected


# ---- the prompt loop


def talk(model, monkeypatch, lines, template="{}", opening="", **options):
    options = GenerationConfig(**{"max_new_tokens": 5, "do_sample": True, "seed": 3} | options)
    conversation = Conversation(model, BYTES, options, template)
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    monkeypatch.setattr("signal.signal", lambda *a: None)
    run_interactive(conversation, opening)
    return conversation


def test_the_text_grows(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, ["Hello", "", " more"], opening="Once ")
    assert len(c.history) == 5
    texts = [BYTES.decode(ids) for ids, _ in c.history]
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert texts[1].startswith("Once ") and "Hello" in texts[2] and " more" in c.text
    assert len(c.text.encode("utf-8", "replace")) > 0
    assert texts[2][len(texts[1]) :][5:] in capsys.readouterr().out


def test_undo_retry_and_branches(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, ["Hello"])
    first = c.text
    c = talk(model, monkeypatch, ["Hello", ":retry"])
    assert c.text.startswith("Hello") and c.text != first and len(c.history) == 2
    c = talk(model, monkeypatch, ["Hello", "x", ":undo"])
    assert c.text == first
    c = talk(model, monkeypatch, ["Hello", ":branch", "x", ":branch 1"])
    assert c.text == first and len(c.branches) == 2 and c.branches[1][-1] != c.history[-1]
    talk(model, monkeypatch, [":undo", ":retry", ":branch 9", ":nonsense", ":set", ":save"])
    err = capsys.readouterr().err
    assert err.count("error: ") == 6 and "Traceback" not in err


def test_a_failed_command_keeps_the_text(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, ["Hello", ":set max_length 3", ":retry", "more"])
    assert len(c.history) == 2 and c.text.startswith("Hello")
    assert capsys.readouterr().err.count("error: max_length must be > ") == 2


def test_a_limit_set_in_the_loop_holds(model, monkeypatch):
    options = {"eos_token_id": None, "max_new_tokens": 5}
    c = talk(model, monkeypatch, [":set max_length 30", "Hello"], **options)
    assert len(c.text.encode("utf-8")) >= 25 and c.options.max_new_tokens is None
    c = talk(model, monkeypatch, [":set max_length 30", ":set max_new_tokens 4"], **options)
    assert (c.options.max_length, c.options.max_new_tokens) == (None, 4)
    lines = [":set min_length 3", ":set min_new_tokens 4"]
    c = talk(model, monkeypatch, lines, **options)
    assert (c.options.min_length, c.options.min_new_tokens) == (0, 4)
    c = talk(model, monkeypatch, lines[::-1], **options)
    assert (c.options.min_length, c.options.min_new_tokens) == (3, None)


def test_nothing_is_ignored(model, monkeypatch, capsys):
    lines = [":quit now", ":undo 2", ":retry x", ":text x", ":help x"]
    lines += [":set num_return_sequences 3", ":set num_beams 2", ":set length_penalty 2"]
    c = talk(model, monkeypatch, ["Hello", *lines, ":set num_beams 1", ":set early_stopping true"])
    err = capsys.readouterr().err
    assert err.count("error: ") == 7 and "error: :quit takes no argument, not 'now'" in err
    assert "early_stopping must come with num_beams" in err and c.options.length_penalty == 2
    assert len(c.history) == 2
    c = talk(model, monkeypatch, [":set do_sample false", ":set top_p 0.5"])
    assert "top_p must come with do_sample" in capsys.readouterr().err
    options = {"do_sample": False, "penalty_alpha": 0.5, "top_k": 4}
    c = talk(model, monkeypatch, [":set top_k 6"], **options)
    assert c.options.top_k == 6 and "error" not in capsys.readouterr().err


def test_a_byte_outside_utf8_makes_only_its_line_invalid(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, ["Hello", "a\udcffb", ":save \udcfe", " é", ":quit", "x"])
    assert len(c.history) == 3 and " é" in c.text
    err = capsys.readouterr().err
    assert err.count("error: ") == 2 and "cannot decode the byte 0xff" in err


def test_saving_leaves_no_partial_file(model, monkeypatch, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    names = ("no/such", "", "link")
    talk(model, monkeypatch, [f":save {tmp_path}/{name}" for name in names], opening="Hello")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
    assert capsys.readouterr().err.count("error: ") == 3
    (tmp_path / "text.part").write_text("mine")
    talk(model, monkeypatch, [f":save {tmp_path}/text"], opening="Hello")
    assert (tmp_path / "text.part").read_text() == "mine" and (tmp_path / "text").is_file()


def test_failed_saving_leaves_no_file(model, monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise OSError(28, "no space")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    talk(model, monkeypatch, [f":save {tmp_path}/text"], opening="Hello")
    assert not [*tmp_path.iterdir()] and "no space" in capsys.readouterr().err


def test_an_opening_that_fills_the_context_prints_nothing(model, monkeypatch, capsys):
    with pytest.raises(ValueError, match="max_length"):
        talk(model, monkeypatch, [], opening="Hello", max_length=3, max_new_tokens=None)
    assert capsys.readouterr() == ("", "")


def test_options_can_be_set(model, monkeypatch, capsys):
    lines = [":set temperature 0", ":set max-new-tokens 2", ":set stop_strings zz", "Hello"]
    c = talk(model, monkeypatch, lines)
    assert (c.options.temperature, c.options.max_new_tokens) == (0, 2)
    wrong = [":set temperature -1", ":set temperature x", ":set warmth 3", ":set num_beams 0"]
    c = talk(model, monkeypatch, wrong)
    assert c.options.temperature == 1.0 and capsys.readouterr().err.count("error: ") == 4


def test_saving_does_not_overwrite(model, monkeypatch, tmp_path, capsys):
    path = tmp_path / "text.txt"
    c = talk(model, monkeypatch, ["Hello", f":save {path}", "x", f":save {path}", ":quit", "y"])
    assert path.read_text() == BYTES.decode(c.history[1][0]) + "\n"
    assert "error: " in capsys.readouterr().err and len(c.history) == 3


def test_a_dialogue_alternates_speakers(model, monkeypatch):
    lines = ["Hello", "How are you?"]
    c = talk(model, monkeypatch, lines, template="You: {}\nFriend:", stop_strings=["\nYou:", "e"])
    assert c.text.startswith("You: Hello\nFriend:") and "\nYou: How are you?\nFriend:" in c.text


def test_ctrl_c_stops_the_text_only(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, [])
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("nanogpt2.cli.interactive.decode_texts", interrupted)
    c.execute("Hello")
    assert calls and c.text == "Hello" and "stopped" in capsys.readouterr().err


def test_a_second_ctrl_c_loses_nothing(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, [], eos_token_id=None)
    pieces = []

    def interrupted(screen, text):
        pieces.append(text)
        if len(pieces) == 3:
            c.interrupts.receive(2, None)

    monkeypatch.setattr("nanogpt2.terminal.Screen.write", interrupted)
    # the second one comes while the first is dealt with
    monkeypatch.setattr("nanogpt2.terminal.note", lambda text: c.interrupts.receive(2, None))
    c.execute("Hello")
    ids, words = c.history[1]
    assert words == "Hello" and c.text.startswith("Hello") and len(ids) == 5 + 3
    with pytest.raises(KeyboardInterrupt), c.interrupts:
        c.interrupts.receive(2, None)


SMILE = [[[a, b], 1e5] for a, b in pairwise(b"o\xf0\x9f\x99\x82")]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_character_across_turns_stays_whole(model, monkeypatch, capsys, beams):
    options = {"sequence_bias": SMILE, "max_new_tokens": 1, "do_sample": False, "num_beams": beams}
    c = talk(model, monkeypatch, ["Hello", "", "", "", ":text"], **options)
    assert c.text == "Hello\U0001f642"
    # once written by the model, once by :text
    assert capsys.readouterr().out.count("\U0001f642") == 2
    # bytes that make no character stay what they are, and the context does not grow
    c = talk(model, monkeypatch, ["Hello", "", "x"], **options)
    ids = c.history[-1][0]
    assert bytes(ids[:8]) == b"Hello\xf0\x9fx" and len(ids) == 9


@pytest.mark.parametrize("tokenizer", [BYTES, gpt2_tokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("hello world!!", "ld!", "hello wor"),
        ("one\nYou: two", "\nYou:", "one"),
        ("ab", "ab", ""),
        ("no stop \U0001f642", "never", "no stop \U0001f642"),
        ("\U0001f642\U0001f643.", "\U0001f643", "\U0001f642"),
    ],
)
def test_the_ids_to_go_on_from_are_those_of_the_text(tokenizer, text, stop, kept):
    ids = tokenizer.encode(text)
    _, completion = feed(tokenizer, "", [*ids, tokenizer.end_of_text], [stop])
    assert tokenizer.decode(completion.kept_ids()) == completion.text == kept


@given(st.binary(min_size=1, max_size=9), st.integers(0, 9))
@settings(deadline=None)
def test_any_cut_of_any_bytes_keeps_its_bytes(data, size):
    completion = Completion(gpt2_tokenizer(), [], [])
    for token in gpt2_tokenizer().encode(data.decode("latin-1")):
        completion.add(token)
    completion.finish()
    whole = data.decode("latin-1").encode()
    completion._size = min(size, len(whole))
    assert gpt2_tokenizer().decode_bytes(completion.kept_ids()) == whole[:size]


# ---- two models


def test_a_model_compared_with_itself_gains_nothing(model):
    options = GenerationConfig(do_sample=True, seed=3, max_new_tokens=20, eos_token_id=None)
    a, b = compare.compare(model, model, BYTES, "Hello", options)
    assert a.completion.token_ids == b.completion.token_ids and len(a.completion.token_ids) == 20
    assert a.logp_a == b.logp_a and a.gain == 0 and max(map(abs, a.kl)) < 1e-5


def test_two_models_are_compared_by_their_formulas(model):
    torch.manual_seed(4)
    other = GPT(model.config).eval()
    options = GenerationConfig(do_sample=True, seed=3, max_new_tokens=9, eos_token_id=None)
    texts = compare.compare(model, other, BYTES, "Hello", options)
    for text in texts:
        ids = torch.tensor([BYTES.encode("Hello") + text.completion.token_ids])
        with torch.no_grad():
            p, q = (m(ids)[0, 4:-1].double().softmax(-1) for m in (model, other))
        for i, token in enumerate(text.completion.token_ids):
            assert text.logp_a[i] == pytest.approx(p[i, token].log().item(), abs=1e-3)
            assert text.logp_b[i] == pytest.approx(q[i, token].log().item(), abs=1e-3)
            assert text.kl[i] == pytest.approx((q[i] * (q[i] / p[i]).log()).sum().item(), abs=1e-3)
    assert texts[0].gain < 0 < texts[1].gain
    drawn = compare.draw(BYTES, ("A", "B"), texts)
    assert "KL(B||A)" in drawn and "\x1b[48;2;" in drawn
    record = json.loads(json.dumps(compare.as_json("Hello", ("A", "B"), texts, 3)))
    assert record["texts"][1]["gain"] == pytest.approx(texts[1].gain)


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_comparing_past_the_context(block_size, capsys):
    """Every token is scored, each in the context in which it was written."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(257, block_size, 1, 1, 8, bos_token_id=256, eos_token_id=256)).eval()
    options = GenerationConfig(max_new_tokens=40, eos_token_id=None)
    a, b = compare.compare(model, model, BYTES, "Hello " * 5, options)
    assert len(a.completion.token_ids) == len(a.logp_a) == len(b.kl) == 40 and a.gain == 0
    request = request_for(model, BYTES, ["Hello " * 5], options)
    why = [*explain(model, request, a.completion.token_ids, BYTES)]
    expected = [w.chosen.probabilities[0] for w in why]
    assert torch.tensor(a.logp_a).exp().tolist() == pytest.approx(expected, rel=1e-4)
    err = capsys.readouterr().err
    assert err.count("are dropped") == err.count("\n") == 1


def test_several_texts_are_compared(model, capsys):
    options = GenerationConfig(do_sample=True, seed=3, max_new_tokens=5, num_return_sequences=3)
    texts = compare.compare(model, model, BYTES, "Hello", options)
    assert [(text.writer, text.index) for text in texts] == [
        (w, i) for w in (0, 1) for i in (0, 1, 2)
    ]
    expected = [
        text.completion.text
        for text in texts_of(
            model, "Hello", seed=3, do_sample=True, max_new_tokens=5, num_return_sequences=3
        )
    ]
    assert [text.completion.text for text in texts] == expected * 2
    drawn = compare.draw(BYTES, ("A", "B"), texts)
    assert "--- A, 1 of 3 ---" in drawn and "--- B, 3 of 3 ---" in drawn


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("tokenizer", [BYTES, gpt2_tokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("a 🙂日本é👩‍👧 b", []),
        ("one 🙂🙃. two", [". t"]),
        ("\ufffd tail", []),
        ("x", ["x"]),
        ("a two", ["wo"]),
    ],
)
def test_whole_characters_and_nothing_beyond_the_end(tokenizer, text, stops):
    for ids in (tokenizer.encode(text), tokenizer.encode(text)[:-1]):
        completion = Completion(tokenizer, [], [tokenizer.end_of_text], stops)
        for token in [*ids, tokenizer.end_of_text]:
            completion.add(token)
        completion.finish()
        parts = [*pieces(tokenizer, completion)]
        assert "".join(piece for piece, _ in parts) == completion.text
        # every token once, in the shortest pieces of whole characters
        indices = [i for _, tokens in parts for i in range(*tokens.indices(10**6))]
        assert indices == [*range(len(indices))]
        for piece, tokens in parts[:-1]:
            assert tokenizer.decode(completion.token_ids[tokens]) == piece
    values = [0.0] * len(completion.token_ids)
    scored = compare.Scored(0, 0, completion, values, values, values)
    shown = plain(compare.draw(tokenizer, ("A", "B"), [scored, scored]))
    assert shown.startswith(f"--- A ---\n{completion.text}\n\ntoken ")


@given(st.binary(max_size=9), st.sampled_from([[], [0x9F, 0x41], [256]]))
@settings(deadline=None)
def test_any_bytes_in_whole_characters(data, ends):
    completion = Completion(BYTES, [], ends)
    for token in data:
        completion.add(token)
    completion.finish()
    assert "".join(piece for piece, _ in pieces(BYTES, completion)) == completion.text


def test_nan_and_infinities_are_null_in_json():
    value = {"a": [float("nan"), float("inf"), -float("inf"), 0.1], "b": "NaN é"}
    assert json.loads(as_line(value)) == {"a": [None, None, None, 0.1], "b": "NaN é"}
    assert as_line(value).count("\n") == 1


# ---- the beams' tree


class Numbers:
    """Writes token ids as numbers, so that a drawn line shows exactly which tokens it holds."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def parsed(drawn):
    """A drawn tree as nested lists of (token ids, score of the text that ends there, children)."""
    levels = [[]]
    for line in drawn.splitlines():
        found = re.match(r"(\W*)'([\d ]+)'(?:  ended, score (\S+))?", line)
        indent, numbers, score = found.groups()
        # "├─ " and each level of indentation above it take three columns
        del levels[len(indent) // 3 :]
        node = ([*map(int, numbers.split())], score and float(score), [])
        levels[-1].append(node)
        levels.append(node[2])
    return levels[0]


def ended(nodes, path=()):
    """Yield (token ids from the root, score) of each ended text."""
    for tokens, score, children in nodes:
        if score is not None:
            yield (*path, *tokens), score
        yield from ended(children, (*path, *tokens))


def test_the_tree_holds_every_text(model):
    options = GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=6, seed=0)
    request = request_for(model, BYTES, ["ab"], replace(options, eos_token_id=(101, 32)))
    tree = BeamTree(request.prompt_length)
    texts = decode_texts(model, BYTES, request, OutputSink(tree=tree))[0]
    drawn = tree.draw(Numbers())
    assert drawn.count("ended, score") >= 4 and "pruned at" in drawn
    scores = dict(ended(parsed(drawn)))
    for text in texts:
        assert scores[tuple(text.completion.token_ids)] == pytest.approx(text.score, abs=6e-4)
        assert f"{text.score:.3f}" in tree.draw(BYTES)


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_is_best_first(model, seed):
    options = GenerationConfig(
        num_beams=5, max_new_tokens=8, seed=seed, do_sample=True, top_k=9, eos_token_id=(101, 32)
    )
    request = request_for(model, BYTES, ["ab"], options)
    tree = BeamTree(request.prompt_length)
    decode_texts(model, BYTES, request, OutputSink(tree=tree))
    counts = []

    def walk(nodes):
        """All final scores in a subtree; siblings must be in the order of their best."""
        below = []
        for _, score, children in nodes:
            below.append(([] if score is None else [score]) + walk(children))
        tops = [max(scores, default=-math.inf) for scores in below]
        assert tops == sorted(tops, reverse=True)
        counts.append(len(nodes))
        return [score for scores in below for score in scores]

    drawn = tree.draw(Numbers())
    scores = walk(parsed(drawn))
    assert len(scores) >= 5 and max(counts) > 1
    first = re.search(r"score (-?[0-9.]+)", drawn).group(1)
    assert first == f"{max(scores):.3f}"


def test_a_tree_deeper_than_the_stack_is_drawn():
    """Each step drops a beam at another token: as many splits as steps."""
    tree, steps = BeamTree(1), sys.getrecursionlimit() + 9
    none = torch.zeros(1, 0, dtype=torch.bool)
    for step in range(steps):
        path = [0] + [97] * step
        ids = torch.tensor([[[*path, 98], [*path, 97]]])  # (1, K, T)
        rows = torch.zeros(1, 2, step + 1, dtype=torch.int32)
        running = Group(ids, torch.tensor([[-2.0, -1.0]]), rows)
        finished = Group(ids[:, :0], torch.zeros(1, 0), rows[:, :0])
        tree.record(Beams(running, finished, none, torch.tensor([[True]])))
    lines = tree.draw(BYTES).splitlines()
    assert (
        len(lines) == 2 * steps
        and lines[0] == "├─ 'a'"
        and lines[-1].startswith("└─ 'b'  pruned at 1")
    )
    assert lines[steps - 1].endswith("'a'  running, sum -1.000")
