"""What sample.py does beyond one plain text: beams, many prompts, the loop, two models."""

import io
import json
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt2.cli import compare
from nanogpt2.cli.interactive import Conversation, run_interactive
from nanogpt2.cli.one import Show, decode_texts, request_for
from nanogpt2.cli.prompts import Job, read_prompts, run_prompts
from nanogpt2.cli.text import Completion
from nanogpt2.config import GenerationConfig, GPTConfig
from nanogpt2.generation import generate
from nanogpt2.generation.stopping import StopStrings
from nanogpt2.generation.tree import BeamTree
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


def texts_of(model, prompt, show=None, **options):
    config = GenerationConfig(**{"max_new_tokens": 12, "seed": 1} | options)
    request = request_for(model, BYTES, [prompt], config)
    return decode_texts(model, BYTES, [prompt], request, show)[0]


# ---- text


def feed(tokenizer, prompt, ids, stops):
    """What a person sees, piece by piece, and the whole."""
    completion = Completion(tokenizer, tokenizer.encode(prompt), [tokenizer.end_of_text], stops)
    # what comes after the end is left out
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
    # nothing was shown that had to be taken back
    for i in range(len(pieces)):
        assert expected.startswith("".join(pieces[:i]))


def test_a_stop_string_may_begin_in_the_prompt():
    _, completion = feed(BYTES, "x ##", b"# y", ["###"])
    assert completion.text == "" and completion.finish_reason == "stop"
    _, completion = feed(BYTES, "x ###", b" y", ["###"])
    assert completion.text == " y" and completion.finish_reason == "length"
    # what may belong to it is not shown either
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
    """Broken characters, whose U+FFFD is shown and not written, included."""
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
    # the first to be complete ends the text; those that begin within it cut it
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
def test_what_is_streamed_is_the_text(model, options, seed):
    heard = []
    options = options | {"seed": seed}
    texts = texts_of(model, "日本 🙂", Show(heard=heard.append), **options)
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
        texts_of(model, "ab", Show(heard=heard.append), **options)
        shown.append(len([piece for piece in heard if piece]))
    assert max(shown) > 5, "all came at the end"


# ---- many prompts


def run_all(model, prompts, unique=False, batch_size=3, **options):
    config = GenerationConfig(**{"max_new_tokens": 6, "seed": 1, "do_sample": True} | options)
    return list(run_prompts(model, BYTES, prompts, config, Job(batch_size, unique)))


def test_many_prompts_come_out_in_order(model):
    prompts = ["a", "a much longer prompt", "bb", "日本", "", "another of some length", "c"]
    found = run_all(model, prompts, num_return_sequences=2)
    assert [f["prompt"] for f in found] == [p for p in prompts for _ in range(2)]
    assert [f["index"] for f in found] == [0, 1] * len(prompts)
    for f in found:
        assert f["text"] == f["prompt"] + f["completion"]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}])
def test_a_prompt_gives_the_same_alone(model, options):
    prompts = ["a", "a much longer prompt", "bb"]
    found = run_all(model, prompts, **options)
    for prompt, both in zip(prompts, found, strict=True):
        (alone,) = run_all(model, [prompt], **options)
        assert alone["token_ids"] == both["token_ids"]
        assert alone["score"] == pytest.approx(both["score"], abs=1e-4)


def test_counted_noise_gives_the_same_alone_sampled(model):
    prompts = ["a", "a much longer prompt", "bb"]
    found = run_all(model, prompts, noise="counter", num_return_sequences=3)
    alone = run_all(model, ["bb"], noise="counter", first_sample=2)
    assert alone[0]["token_ids"] == found[8]["token_ids"]


@pytest.mark.parametrize("noise", ["hf", "counter"])
def test_unique_texts(model, noise):
    options = {"num_return_sequences": 30, "max_new_tokens": 1, "noise": noise, "top_k": 40}
    plain = [f["text"] for f in run_all(model, ["a", "b"], **options)]
    assert len(set(plain)) < 60
    found = run_all(model, ["a", "b"], unique=True, **options)
    for prompt in ("a", "b"):
        texts = [f["text"] for f in found if f["prompt"] == prompt]
        assert len(texts) == len(set(texts)) > len({t for t in plain if t.startswith(prompt)})
    assert run_all(model, ["a", "b"], unique=True, **options) == found


def test_prompts_are_read(tmp_path, monkeypatch, capsys):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\n\n  two é\r\nthree".encode())
    assert read_prompts(str(path), skip_bad=False) == ["one", "  two é", "three"]
    lines = '{"prompt": "one", "id": 7}\n"two"\n\n{"text": "x"}\n{"prompt": "three"}\n'
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match="line 4: must be a string"):
        read_prompts(str(path), skip_bad=False)
    assert read_prompts(str(path), skip_bad=True) == ["one", "two", "three"]
    assert "skipped" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert read_prompts("-", skip_bad=True) == ["one", "two", "three"]
    path.write_bytes(b"ok\nbad \xff\n")
    with pytest.raises(ValueError, match="line 2"):
        read_prompts(str(path.rename(tmp_path / "q.txt")), skip_bad=False)
    (tmp_path / "empty").write_text("\n \n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(str(tmp_path / "empty"), skip_bad=False)


# ---- the loop


def talk(model, monkeypatch, lines, template="{}", opening="", **options):
    options = GenerationConfig(**{"max_new_tokens": 5, "do_sample": True, "seed": 3} | options)
    conversation = Conversation(model, BYTES, options, template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr("signal.signal", lambda *a: None)
    run_interactive(conversation, opening)
    return conversation


def test_the_text_grows(model, monkeypatch, capsys):
    c = talk(model, monkeypatch, ["Hello", "", " more"], opening="Once ")
    assert len(c.history) == 5
    texts = [text for text, _ in c.history]
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
    assert c.text == first and len(c.branches) == 2 and c.branches[1][-1][0] != first
    talk(model, monkeypatch, [":undo", ":retry", ":branch 9", ":nonsense", ":set", ":save"])
    err = capsys.readouterr().err
    assert err.count("error: ") == 6 and "Traceback" not in err


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
    assert path.read_text() == c.history[1][0] + "\n"
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
    c.obey("Hello")
    assert calls and c.text == "Hello" and "stopped" in capsys.readouterr().err


# ---- two models


def test_a_model_compared_with_itself_gains_nothing(model):
    options = GenerationConfig(do_sample=True, seed=3, max_new_tokens=20, eos_token_id=None)
    a, b = compare.compare(model, model, BYTES, "Hello", options)
    assert a == b and a.gain == 0 and max(map(abs, a.kl)) < 1e-5 and len(a.token_ids) == 20


def test_two_models_are_compared_by_their_formulas(model):
    torch.manual_seed(4)
    other = GPT(model.config).eval()
    options = GenerationConfig(do_sample=True, seed=3, max_new_tokens=9, eos_token_id=None)
    texts = compare.compare(model, other, BYTES, "Hello", options)
    for text in texts:
        ids = torch.tensor([BYTES.encode("Hello") + text.token_ids])
        with torch.no_grad():
            p, q = (m(ids)[0, 4:-1].double().softmax(-1) for m in (model, other))
        for i, token in enumerate(text.token_ids):
            assert text.logp_a[i] == pytest.approx(p[i, token].log().item(), abs=1e-3)
            assert text.logp_b[i] == pytest.approx(q[i, token].log().item(), abs=1e-3)
            assert text.kl[i] == pytest.approx((q[i] * (q[i] / p[i]).log()).sum().item(), abs=1e-3)
    assert texts[0].gain < 0 < texts[1].gain
    drawn = compare.draw(BYTES, ("A", "B"), texts)
    assert "KL(B||A)" in drawn and "\x1b[48;2;" in drawn
    record = json.loads(json.dumps(compare.as_json("Hello", ("A", "B"), texts, 3)))
    assert record["texts"][1]["gain"] == pytest.approx(texts[1].gain)


def test_comparing_past_the_context(model):
    options = GenerationConfig(do_sample=True, seed=3, max_new_tokens=90, eos_token_id=None)
    a, _ = compare.compare(model, model, BYTES, "Hello " * 5, options)
    assert 0 < len(a.token_ids) < 64 and a.gain == 0


# ---- the beams' tree


def test_the_tree_holds_every_text(model):
    options = GenerationConfig(num_beams=4, num_return_sequences=4, max_new_tokens=6, seed=0)
    request = request_for(model, BYTES, ["ab"], replace(options, eos_token_id=(101, 32)))
    tree = BeamTree(request.prompt_length)
    texts = decode_texts(model, BYTES, ["ab"], request, Show(tree=tree))[0]
    drawn = tree.draw(BYTES)
    assert drawn.count("ended, score") >= 4 and "pruned at" in drawn
    for text in texts:
        place = tree._root
        for token in text.completion.token_ids:
            place = place.children[token]
        assert place.final == pytest.approx(text.score)
        assert f"{text.score:.3f}" in drawn
