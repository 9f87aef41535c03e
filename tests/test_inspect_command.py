"""sample.py --attention, --lens, --tokens and --html: the inside of a model at the terminal."""

import io
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from reference import hf_model

import sample
from nanogpt2.checkpoints.load import Checkpoint
from nanogpt2.checkpoints.save import save_model
from nanogpt2.cli import inspect_page
from nanogpt2.cli.findings import Head, Inside
from nanogpt2.config import GPTConfig, SampleConfig, parse
from nanogpt2.inspect import Guesses, Merge, Piece
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

TEXT = "7 sheep <b>&"  # a token a byte
SHAPE = GPTConfig(257, 128, 3, 2, 12, bos_token_id=256, eos_token_id=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_model(SHAPE).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def theirs():
    """transformers' maps, and its probabilities after each layer, for TEXT."""
    model, last = hf_model(SHAPE), []
    model.set_attn_implementation("eager")
    model.transformer.ln_f.register_forward_pre_hook(lambda _, x: last.append(x[0]))
    ids = torch.tensor([list(TEXT.encode())])
    with torch.no_grad():
        found = model(ids, output_attentions=True, output_hidden_states=True)
        stages = torch.cat([*found.hidden_states[:-1], last[0]])
        lens = model.lm_head(model.transformer.ln_f(stages)).softmax(2)
    return torch.cat(found.attentions), lens


def run(capsys, *argv):
    sample.main(parse(SampleConfig, [*argv]))
    return capsys.readouterr()


def printed(capsys, *argv):
    out, err = run(capsys, *argv)
    assert err == "" and max(map(len, out.splitlines())) <= 80
    return out


def named(token):
    """A byte's name: the character, or the byte where it is not one by itself."""
    return repr(chr(token)) if token < 128 else repr(bytes([token]))


def test_the_lens_is_that_of_transformers(capsys, folder, theirs):
    tables = printed(capsys, TEXT, "--model", folder, "--lens").split("\n\n")
    rows = [table.splitlines()[-5:] for table in tables]
    assert len(rows) == len(TEXT) / 4
    heads = [cell for table in rows for cell in re.findall(r"\d+ '.*?'", table[0])]
    assert heads == [f"{i} {char!r}" for i, char in enumerate(TEXT)]
    best = theirs[1].max(dim=2)
    for layer, name in enumerate(["embedding", "layer 0", "layer 1", "layer 2"]):
        assert all(table[1 + layer].startswith(f"{name} ") for table in rows)
        line = "".join(table[1 + layer].removeprefix(name) for table in rows)
        found = re.findall(r"  (\S.*?) (\d\.\d\d)(?=  |$)", line)
        assert [guess for guess, _ in found] == [named(i) for i in best.indices[layer].tolist()]
        expected = pytest.approx(best.values[layer].tolist(), abs=0.00501)
        assert [float(p) for _, p in found] == expected


def test_one_heads_attention_is_that_of_transformers(capsys, folder, theirs):
    lines = printed(capsys, TEXT, "--model", folder, "--attention", "2.1").splitlines()
    assert lines[0].startswith("attention of head 2.1")
    for place, line in enumerate(lines[2:]):
        found = re.findall(r"(\d+) '.' (\d\.\d\d)", line)
        best = theirs[0][2, 1, place, : place + 1].topk(min(3, place + 1))
        assert [int(at) for at, _ in found] == best.indices.tolist()
        assert [float(x) for _, x in found] == pytest.approx(best.values.tolist(), abs=0.00501)
    assert len(lines) == 2 + len(TEXT)


def test_every_heads_attention_in_short_is_that_of_transformers(capsys, folder, theirs):
    lines = printed(capsys, TEXT, "--model", folder, "--attention").splitlines()
    rows = {line.split()[0]: line for line in lines[3:]}
    assert list(rows) == [f"{layer}.{head}" for layer in range(3) for head in range(2)]
    for name, line in rows.items():
        layer, head = map(int, name.split("."))
        w = theirs[0][layer, head].double()
        means = [w.diag()[1:].mean(), w.diag(-1).mean(), w[1:, 0].mean(), w[-1].max()]
        found = [float(x) for x in re.findall(r" (\d\.\d\d)", line)]
        assert found == pytest.approx([float(x) for x in means], abs=0.00501)
        assert repr(TEXT[int(w[-1].argmax())]) in line
    assert printed(capsys, "--attention", "all", TEXT, "--model", folder).splitlines() == lines


def test_the_merges_are_those_of_the_pages_example(capsys):
    out = printed(capsys, "unbelievable", "--model", "demo", "--tokens")
    lines = [line.split() for line in out.splitlines()]
    # docs/gpt2.md has them
    assert ["147", "u", "+", "n", "un", "b", "e", "l", "ie", "v", "ab", "le"] not in lines
    assert ["147", "u", "+", "n", "un", "b", "e", "l", "i", "e", "v", "ab", "le"] in lines
    assert lines[-1] == ["=", "un", "403", "bel", "6667", "iev", "11203", "able", "540"]
    assert lines[0][:5] == ["tokens:", "4", "by", "8", "merges,"]


def test_the_tokens_need_no_model(capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "generator", None)
    text = "x " * 2000 + "1" * 5000 + "日本" * 50  # longer than any context, and one long piece
    out = printed(capsys, text, "--model", "demo", "--tokens")
    assert "' 1111" in out and "…" in out
    # nor are there weights of gpt2 here
    assert printed(capsys, text, "--tokens") == out


def test_everything_at_once_comes_in_blocks(capsys, folder):
    every = ["--attention", "--lens", "--tokens"]
    whole = printed(capsys, TEXT, "--model", folder, *every)
    parts = [printed(capsys, TEXT, "--model", folder, flag) for flag in every]
    assert whole == "\n".join(parts)


def test_the_prompt_is_read_as_always(capsys, monkeypatch, tmp_path, folder):
    lens = ["--model", folder, "--lens"]
    expected = printed(capsys, TEXT, *lens)
    (tmp_path / "prompt.txt").write_text(TEXT + "\n")
    assert printed(capsys, "--prompt_file", str(tmp_path / "prompt.txt"), *lens) == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert printed(capsys, "-", *lens) == expected
    end = "a<|endoftext|>"
    tokens = ["--model", folder, "--tokens"]
    assert "tokens: 2 by" in printed(capsys, end, *tokens)
    assert "tokens: 14 by" in printed(capsys, end, *tokens, "--literal_prompt")
    assert "'Summary" not in expected
    assert "TL" in printed(capsys, TEXT, *tokens, "--preset", "summarise")


@pytest.mark.parametrize(
    "flags",
    [["--quantize", "int8"], ["--quantize", "fp16"], ["--dtype", "bfloat16"], ["--kernels=torch"]],
    ids=["int8", "fp16", "bfloat16", "torch"],
)
def test_the_models_flags_have_their_effect(capsys, monkeypatch, folder, flags):
    seen = []
    original = Checkpoint.generator
    monkeypatch.setattr(
        Checkpoint, "generator", lambda *how: seen.append(how[1:]) or original(*how)
    )
    out, _ = run(capsys, TEXT, "--model", folder, "--lens", "--attention", *flags)
    config = parse(SampleConfig, ["--model", folder, *flags])
    assert seen == [("cpu", config.dtype, config.quantize, config.kernels)]
    assert out.count("layer 2") == 3


@pytest.mark.parametrize("flag", ["--attention", "--attention=0.1", "--lens", "--tokens"])
def test_one_token_and_a_full_context(capsys, tmp_path, folder, flag):
    for text in ("x", "\U0001f99c\x1b[31m" * 14, "y" * SHAPE.block_size):
        assert printed(capsys, text, "--model", folder, flag).count("\n") >= 3
        assert "\x1b" not in printed(capsys, text, "--model", folder, flag)
        page = tmp_path / "page.html"
        run(capsys, text, "--model", folder, flag, "--html", str(page))
        Page(page)


def test_a_head_of_twelve_layers(capsys, tmp_path):
    save_model(GPT(GPTConfig(257, 16, 12, 12, 12)), tmp_path, byte_tokenizer())
    assert "head 11.11" in printed(capsys, "x", "--model", str(tmp_path), "--attention", "11.11")
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "x", "--model", str(tmp_path), "--attention", "12.0")
    assert capsys.readouterr().err == (
        "error: --attention must be LAYER.HEAD, layers 0 to 11 and heads 0 to 11, not 12.0\n"
    )


@pytest.mark.parametrize(
    ("argv", "attention", "prompt"),
    [
        (["--attention", "3.0", "Hi"], "3.0", "Hi"),
        (["--attention", "Hi"], "all", "Hi"),
        (["Hi", "--attention", "all"], "all", "Hi"),
        (["Hi", "--attention"], "all", "Hi"),
        (["--attention", "--lens", "Hi"], "all", "Hi"),
        (["--attention=1.2", "3.0"], "1.2", "3.0"),
        (["--attention", "--", "3.0"], "all", "3.0"),
        (["--attention", "3 apples"], "all", "3 apples"),
        (["Hi", "--attention", "0.1", "--attention", "0.2"], "0.2", "Hi"),
        (["Hi", "--attention=none"], None, "Hi"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_attention_takes_the_next_word_only_if_it_is_a_number(argv, attention, prompt):
    config = parse(SampleConfig, ["--model", "demo", *argv])
    assert (config.attention, config.prompt) == (attention, prompt)


def test_damaged_weights_are_a_failure_in_one_line(capsys, tmp_path):
    model = GPT(SHAPE)
    model.h[1].ln_1.weight.data[0] = float("inf")
    save_model(model, tmp_path, byte_tokenizer())
    with pytest.raises(SystemExit, match="1"):
        run(capsys, "x", "--model", str(tmp_path), "--lens", "--html", str(tmp_path / "new.html"))
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the model's numbers are not finite")
    assert err.count("\n") == 1 and not (tmp_path / "new.html").exists()


def test_too_little_memory_is_a_failure_in_one_line(capsys, monkeypatch, folder):
    def too_much(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("nanogpt2.inspect.attention_by_layer", too_much)
    with pytest.raises(SystemExit, match="1"):
        run(capsys, "x", "--model", folder, "--attention")
    assert capsys.readouterr().err.startswith("error: out of memory: shorten PROMPT")


# ---- the page

# what an element may carry: nothing here names another file
PLAIN = {"charset", "name", "content", "http-equiv", "lang", "style", "title", "class", "open", "d"}
PLAIN |= {"x", "y", "width", "height", "viewbox", "fill-opacity", "text-anchor", "transform"}
TAGS = {"html", "meta", "title", "style", "h1", "h2", "p", "pre", "div", "table", "tr", "th", "td"}
TAGS |= {"br", "svg", "path", "rect", "text", "details", "summary", "code", "span"}


class Page(HTMLParser):
    """A page: its elements balanced and harmless; the text, and the titles of its cells."""

    def __init__(self, path):
        super().__init__()
        self.words, self.titles, self.open, self.cells = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == ["html"][: len(self.open)] and "url(" not in self.source
        assert "@import" not in self.source

    def handle_starttag(self, tag, attributes):
        assert tag in TAGS and {name for name, _ in attributes} <= PLAIN, (tag, attributes)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.titles += [value for name, value in attributes if name == "title"]
        if tag in ("td", "rect", "path"):
            self.cells.append(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["title"] and "rect" in self.open:
            self.titles.append(data)
        elif self.open[-1:] != ["style"]:
            self.words.append(data)


def test_the_page_says_what_the_terminal_says(capsys, tmp_path, folder, theirs):
    page = tmp_path / "page.html"
    every = ["--attention", "2.1", "--lens", "--tokens", "--html", str(page)]
    out, err = run(capsys, TEXT, "--model", folder, *every)
    assert (out, err) == ("", f"wrote {page}\n")
    found = Page(page)
    words = " ".join(found.words)
    assert TEXT in words and "'<'" in words
    # every weight of the head, and every layer's guess with its probability
    looks = [re.fullmatch(r"(\d+) '.' looks at (\d+) '.': (.*)", t) for t in found.titles]
    weights = {(int(m[1]), int(m[2])): float(m[3]) for m in looks if m}
    rows = theirs[0][2, 1]
    assert weights.keys() == {(t, s) for t, s in (rows >= 0.005).nonzero().tolist()}
    assert all(abs(rows[place] - w) < 0.00501 for place, w in weights.items())
    chances = [float(c["style"].removeprefix("--p:")) for c in found.cells if "style" in c]
    assert chances == pytest.approx(theirs[1].amax(2).flatten().tolist(), abs=0.00501)


def test_the_page_of_all_heads_has_a_picture_for_each(capsys, tmp_path, folder, theirs):
    page = tmp_path / "page.html"
    run(capsys, TEXT, "--model", folder, "--attention", "--html", str(page))
    found = Page(page)
    svgs = re.findall(r'<svg class="small" viewBox="0 0 12 12">(.*?)</svg>', found.source)
    assert len(svgs) == 6 and found.source.count("<tr>") == 3
    for svg, weights in zip(svgs, theirs[0].flatten(0, 1), strict=True):
        drawn = torch.zeros(12, 12)
        for opacity, path in re.findall(r'fill-opacity="(.*?)" d="(.*?)"', svg):
            for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path):
                drawn[int(y), int(x)] = float(opacity)
        assert (drawn - weights.sqrt()).abs().max() < 0.0501
    titles = [t for t in found.titles if t.startswith("head 1.0: itself")]
    assert len(titles) == 1 and f"{theirs[0][1, 0].diag()[1:].mean():.2f}" in titles[0]


def test_the_page_is_light_or_dark_and_loads_nothing(capsys, tmp_path, folder):
    page = tmp_path / "page.html"
    evil = "</title></style><script>alert(1)</script><img src=http://x>\"'&amp;\x1b\u202e"
    every = ["--attention=0.0", "--lens", "--tokens", "--html", str(page)]
    run(capsys, evil, "--model", folder, *every)
    found = Page(page)
    assert "prefers-color-scheme: dark" in found.source and "default-src 'none'" in found.source
    assert "<script" not in found.source and "\x1b" not in found.source
    assert "\u202e" not in found.source and "\\u202e" in "".join(found.words)


def test_every_text_of_the_page_is_escaped(tmp_path):
    evil = "<script>\"'&amp;"
    one = torch.ones(1, 1)
    inside = Inside(
        model=evil,
        text=evil,
        names=[evil],
        heads=[Head("0.0", None, None, None, 0, 1.0, one)],
        head=("0.0", one),
        lens=(Guesses(torch.zeros(2, 1, 1, dtype=torch.int64), torch.ones(2, 1, 1)), {0: evil}),
        pieces=[Piece(evil, evil, (Merge(0, 0, "<", "s"),), (evil,), (5,))],
    )
    (tmp_path / "page.html").write_text(inspect_page.page(inside))
    found = Page(tmp_path / "page.html")
    assert found.source.count("&lt;script&gt;") == found.source.count("script") >= 10
    assert "".join(found.words).count(evil) >= 8


def test_only_a_page_of_ours_is_written_over(capsys, tmp_path, folder):
    page = tmp_path / "page.html"
    for text in ("one", "two"):
        run(capsys, text, "--model", folder, "--tokens", "--html", str(page))
        assert f"<pre>{text}</pre>" in page.read_text()
    other = tmp_path / "other.html"
    other.write_text("<!doctype html>\nmine")
    with pytest.raises(SystemExit, match="2"):
        run(capsys, "x", "--model", folder, "--tokens", "--html", str(other))
    assert other.read_text() == "<!doctype html>\nmine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.html", "page.html"]


def test_a_disk_that_fills_is_a_failure_in_one_line(capsys, monkeypatch, tmp_path, folder):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(inspect_page, "whole_file", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html'"):
        run(capsys, "x", "--model", folder, "--lens", "--html", str(tmp_path / "page.html"))
