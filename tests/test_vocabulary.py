"""Vocabularies of a model's own: transformers' AutoTokenizer is the oracle."""

import json
import random
import sys

import pytest
import torch
from reference import hf_model, prompts
from tokenizers import AddedToken as TheirToken
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

from nanogpt2 import library_tokenizer
from nanogpt2 import tokenizer as tokenizer_module
from nanogpt2.added_tokens import AddedToken
from nanogpt2.checkpoints.load import load_classifier, load_model, load_tokenizer, open_checkpoint
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig
from nanogpt2.generation import generate
from nanogpt2.library_tokenizer import LibraryTokenizer
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer, reproduces

ALPHABET = [
    "a",
    "b",
    "the ",
    " the",
    "user",
    "<user>",
    "<|x|>",
    "<",
    ">",
    "|",
    " ",
    "  ",
    "\n",
    "\t",
]
ALPHABET += ["ü", "é", "日本", "🙂", "don't", "1", "42", "_", ".", "\u00a0", "\u0301", "½", "\x1c"]
ALPHABET += ["<|endoftext|>", "[PAD]", "x", "Hello", "World", "def f(x):\n    return x", "straße"]
CORPUS = [
    "the cat sat on the mat",
    "def f(x):\n    return x + 1",
    "Straße, Äpfel und Öl",
    "日本語 🙂",
]


def random_texts(rng, tokens=(), count=200):
    letters = [*ALPHABET, *tokens, *tokens, *(token[:-1] for token in tokens)]
    yield ""
    for _ in range(count):
        yield "".join(rng.choices(letters, k=rng.randrange(1, 14)))


def write(folder, rows, tokenizer=None, **config):
    """A tiny model with so many rows, and transformers' files of a tokenizer."""
    folder.mkdir(exist_ok=True)
    shape = GPTConfig(rows, 16, 1, 1, 2, bos_token_id=None, eos_token_id=None)
    save_model(GPT(shape), folder)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if config:
        edit(folder / "config.json", **config)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_agree(folder, ours, tokens=(), seed=0):
    """Ids, with special tokens and without, and texts are AutoTokenizer's."""
    theirs = AutoTokenizer.from_pretrained(folder)
    plain = AutoTokenizer.from_pretrained(folder)
    plain._tokenizer.encode_special_tokens = True
    for text in random_texts(random.Random(seed), tokens):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allow_special=True) == ids, ascii(text)
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        ids = plain._tokenizer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, ascii(text)
        parts = [text[i : i + 3] for i in range(0, len(text), 3)]
        assert [i for ids in ours.encode_parts(parts) for i in ids] == ids
    assert_streams(ours)
    return theirs


def assert_streams(ours):
    """The bytes of single tokens, joined, are those of all: a text can be shown as it grows."""
    ids = random.Random(1).choices(range(ours.vocab_size), k=50)
    assert b"".join(ours.decode_bytes([i]) for i in ids) == ours.decode_bytes(ids)


def trained(tmp_path, size=300, specials=(), alphabet=True, merges_first=False, corpus=CORPUS):
    """A byte-level BPE that the library trains on the spot."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=letters,
        show_progress=False,
    )
    library.train_from_iterator(corpus * 5, trainer)
    return library


# ---- padded


@pytest.mark.parametrize("rows", [50304, 50432])
def test_padding_without_tokenizer_files(tmp_path, rows):
    write(tmp_path, rows)
    assert load_tokenizer(tmp_path) is gpt2_tokenizer()
    assert load_model(tmp_path).config.vocab_size == 50257


def test_an_unknown_size_keeps_its_rows(tmp_path):
    write(tmp_path, 50300)
    assert load_model(tmp_path).config.vocab_size == 50300
    with pytest.raises(ValueError, match="no tokenizer here has a vocabulary of 50300"):
        load_tokenizer(tmp_path)


PADDED = GPTConfig(320, 37, 2, 3, 24, bos_token_id=256, eos_token_id=256)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A byte-level model whose 257 ids were padded to 320, and transformers'."""
    folder = tmp_path_factory.mktemp("padded")
    theirs = hf_model(PADDED)
    with torch.no_grad():
        # where it could be drawn, it would be
        theirs.transformer.wte.weight[257:] *= 20
    theirs.save_pretrained(folder)
    save_model(GPT(GPTConfig(257, 8, 1, 1, 2)), folder / "own", byte_tokenizer())
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / "own" / name).rename(folder / name)
    return folder, theirs


@pytest.mark.parametrize("load", ["model", "generator"])
def test_the_padding_is_dropped(padded, load):
    folder, theirs = padded
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tokenizer is byte_tokenizer()
        ours = getattr(checkpoint, load)()
    ids = prompts(2, 7, vocab_size=257)
    assert ours.config.vocab_size == 257 and ours.config.eos_token_id == 256
    logits = ours(ids)
    torch.testing.assert_close(logits, theirs(ids).logits[..., :257], rtol=1e-5, atol=1e-4)
    for options in ({}, {"num_beams": 3}):
        # the padding's part of the probability is nobody's
        options |= {"do_sample": False, "renormalize_logits": True, "max_new_tokens": 12}
        never = {"suppress_tokens": list(range(257, 320)), "pad_token_id": 256}
        expected = theirs.generate(ids, **options, **never)
        assert torch.equal(generate(ours, ids, **options).sequences, expected)


def test_a_saved_model_has_no_padding(padded, tmp_path):
    model = load_model(padded[0])
    save_model(model, tmp_path, byte_tokenizer())
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.config.vocab_size == 257
    ids = prompts(2, 7, vocab_size=257)
    torch.testing.assert_close(again(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


def test_narrow_models_and_classifiers_drop_it_too(padded, tmp_path):
    ids = prompts(2, 7, vocab_size=257)
    narrow = load_model(padded[0], quantize="int8")
    # the file holds the padding: as another program would quantize it
    own = tmp_path / "bare"
    own.mkdir()
    for name in ("model.safetensors", "config.json"):
        (own / name).write_bytes((padded[0] / name).read_bytes())
    save_model(load_model(own, quantize="int8"), tmp_path / "int8", byte_tokenizer())
    assert json.loads((tmp_path / "int8/config.json").read_text())["vocab_size"] == 320
    again = load_model(tmp_path / "int8")
    assert again.config.vocab_size == 257
    torch.testing.assert_close(again(ids), narrow(ids))
    classifier = GPTClassifier(load_model(own), ("x", "y")).eval()
    save_model(classifier, tmp_path / "classifier", byte_tokenizer())
    found = load_classifier(tmp_path / "classifier")
    assert found.config.vocab_size == 257
    torch.testing.assert_close(found(ids), classifier(ids))


# ---- grown


def grown(tmp_path, tokens, base=None, special=()):
    """GPT-2's or the byte-level tokenizer, grown by transformers."""
    base = base or byte_tokenizer()
    save_model(GPT(GPTConfig(base.vocab_size, 16, 1, 1, 2)), tmp_path / "base", base)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "base")
    theirs.add_tokens(list(tokens))
    if special:
        theirs.add_special_tokens({"additional_special_tokens": list(special)})
    return theirs


FLAGGED = [
    TheirToken("<l>", lstrip=True),
    TheirToken("<r>", rstrip=True),
    TheirToken("<lr>", lstrip=True, rstrip=True),
    TheirToken("user", single_word=True),
    TheirToken("<n>", normalized=False),
    TheirToken("<n><l>", normalized=False),
    TheirToken("us", normalized=False, single_word=True, lstrip=True),
]
PREFIXES = ["<a>", "<a>b", "<a>bc", "c<", " d", "the the"]


@pytest.mark.parametrize("base", [byte_tokenizer(), gpt2_tokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("tokens", "special"),
    [
        (["<user>", "<bot>"], ()),
        ([], ["<|im_end|>", "<a>"]),
        (PREFIXES, ["<a>b<"]),
        (FLAGGED, ["<s"]),
    ],
    ids=["plain", "special", "prefixes", "flags"],
)
def test_added_tokens(tmp_path, base, tokens, special):
    theirs = grown(tmp_path, tokens, base, special)
    texts = [str(token) for token in [*tokens, *special]]
    write(tmp_path / "m", len(theirs), theirs)
    ours = load_tokenizer(tmp_path / "m")
    new = [text for text in texts if text not in base.vocabulary]
    assert ours.vocab_size == len(theirs) == base.vocab_size + len(new)
    assert ours.end_of_text == base.end_of_text
    for text in texts:
        assert ours.decode(theirs.encode(text)) == text
    assert_agree(tmp_path / "m", ours, [*texts, *(f"{text} " for text in texts), "  ", "_"])
    # saved again by us, for them
    save_model(load_model(tmp_path / "m"), tmp_path / "again", ours)
    assert load_tokenizer(tmp_path / "again") == ours
    assert_agree(tmp_path / "again", ours, texts, seed=1)


def test_a_long_text_with_added_tokens(tmp_path, monkeypatch):
    """Parts of any size give the ids of the whole: no cut parts a token or its white space."""
    monkeypatch.setattr(tokenizer_module, "WINDOW", 50)
    theirs = grown(tmp_path, [*FLAGGED, *PREFIXES], gpt2_tokenizer())
    write(tmp_path / "m", len(theirs), theirs)
    ours, rng = load_tokenizer(tmp_path / "m"), random.Random(0)
    texts = [str(token) for token in [*FLAGGED, *PREFIXES]]
    for _ in range(200):
        text = "".join(rng.choices([*texts, *ALPHABET, " ", "   "], k=100))
        size = rng.choice([1, 2, 5, 40, 1000])
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        found = [i for ids in ours.encode_parts(parts, allow_special=True) for i in ids]
        assert found == theirs(text)["input_ids"], ascii(text)


def test_older_files(tmp_path):
    """vocab.json, merges.txt, added_tokens.json and special_tokens_map.json alone."""
    base = byte_tokenizer()
    save_model(GPT(GPTConfig(260, 16, 1, 1, 2)), tmp_path, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<user>": 257, "[PAD]": 258}))
    roles = {"pad_token": "[PAD]", "eos_token": {"content": "</s>", "lstrip": True}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 260 and ours.end_text == "</s>" and ours.end_of_text == 259
    theirs = assert_agree(tmp_path, ours, ["<user>", "[PAD]", " </s>"])
    assert (theirs.pad_token_id, theirs.eos_token_id) == (258, 259)
    assert [token.special for token in ours.added][1:] == [False, True, True]


BAD_ADDED = [
    ({"added_tokens.json": {"<u>": 258}}, "'<u>' must have the id 257.*not 258"),
    ({"added_tokens.json": {"<u>": 3}}, "'<u>' must have the id 257.*not 3"),
    ({"added_tokens.json": {"<u>": 257, "<v>": 257}}, "must have the id 258"),
    ({"added_tokens.json": {"<u>": "257"}}, "must have an id"),
    ({"added_tokens.json": {"<u>": -1}}, "must have an id"),
    ({"added_tokens.json": {"<u>": True}}, "must have an id"),
    ({"added_tokens.json": {"\ud800": 257}}, "must have an id, a text"),
    ({"added_tokens.json": {"": 257, "<u>": 258}}, "must have the id 257"),
    ({"added_tokens.json": []}, "added_tokens.json"),
    ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, "must be a table"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"257": "<u>"}}}, "hold tokens"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<u>"}}}}, "an id"),
    (
        {"tokenizer_config.json": {"added_tokens_decoder": {"257": {"content": "a", "lstrip": 1}}}},
        "flags",
    ),
    ({"special_tokens_map.json": {"eos_token": {"content": 5}}}, "special token"),
]


@pytest.mark.parametrize(("files", "line"), BAD_ADDED, ids=lambda v: json.dumps(v)[:60])
def test_bad_added_tokens(tmp_path, files, line):
    save_model(GPT(GPTConfig(260, 16, 1, 1, 2)), tmp_path, byte_tokenizer())
    (tmp_path / "tokenizer.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=line) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    # the model itself can be loaded, with all its rows
    assert load_model(tmp_path).config.vocab_size == 260


@pytest.mark.parametrize("model", [[], ["a"], None, "a", 5, {}, {"vocab": ["a"]}])
def test_a_tokenizer_json_without_a_vocabulary(tmp_path, model):
    save_model(GPT(GPTConfig(260, 16, 1, 1, 2)), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(ValueError, match=r"tokenizer.json' states no vocabulary"):
        load_tokenizer(tmp_path)
    assert load_model(tmp_path).config.vocab_size == 260


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("value", ["<u>", 5, True, [None], {"a": 5}])
def test_special_tokens_that_are_no_list_are_ignored(tmp_path, name, value):
    save_model(GPT(GPTConfig(260, 16, 1, 1, 2)), tmp_path, byte_tokenizer())
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert load_tokenizer(tmp_path) == byte_tokenizer()


def test_added_tokens_json_does_not_count_beside_added_tokens_decoder(tmp_path):
    """As transformers has it: a folder may keep the file from an older model."""
    ours = byte_tokenizer().with_added(["<u> x"])
    for stale in ({"<old>": 257}, {"<old>": 258}):
        save_model(GPT(GPTConfig(260, 16, 1, 1, 2)), tmp_path, ours)
        (tmp_path / "added_tokens.json").write_text(json.dumps(stale))
        assert load_tokenizer(tmp_path) == ours
        assert_agree(tmp_path, ours, ["<u> x", "<old>"])


def test_vocab_json_does_not_count_beside_another_class_s_tokenizer_json(tmp_path):
    """As transformers has it: a model saved over another leaves that one's file."""
    words = {"hello": 0, "[UNK]": 1, "</s>": 2}
    steps = {"pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel"}}
    steps["model"] |= {"vocab": words, "unk_token": "[UNK]"}
    tokens = [AddedToken("</s>", 2, special=True)]
    ours = LibraryTokenizer(steps, tokens, {"eos_token": "</s>"}, 2)
    for rows, tokenizer in ((257, byte_tokenizer()), (3, ours)):
        save_model(GPT(GPTConfig(rows, 16, 1, 1, 2)), tmp_path, tokenizer)
    assert (tmp_path / "vocab.json").exists()
    assert_agree(tmp_path, load_tokenizer(tmp_path), ["hello", "you"])


def test_tokens_without_a_row_are_ignored(tmp_path):
    theirs = grown(tmp_path, ["<u>", "<v>"])
    write(tmp_path / "m", 258, theirs)
    assert [token.content for token in load_tokenizer(tmp_path / "m").added][1:] == ["<u>"]


# ---- smaller, and others


@pytest.mark.parametrize("size", [259, 300, 420])
@pytest.mark.parametrize("specials", [(), ("<s>", "<pad>", "</s>", "<unk>")], ids=["none", "first"])
@pytest.mark.parametrize("how", ["tokenizer.json", "vocab.json", "fast"])
def test_byte_level_bpe_of_its_own(tmp_path, size, specials, how):
    library = trained(tmp_path, size, specials)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    names = names if specials else {}
    rows = library.get_vocab_size() + 7
    if how == "fast":
        theirs = PreTrainedTokenizerFast(tokenizer_object=library, **names)
        write(tmp_path / "m", rows, theirs)
    else:
        write(tmp_path / "m", rows)
        if how == "tokenizer.json":
            library.save(str(tmp_path / "m/tokenizer.json"))
        else:
            library.model.save(str(tmp_path / "m"))
        (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(names))
    ours = load_tokenizer(tmp_path / "m")
    assert type(ours) is Tokenizer
    theirs = assert_agree(tmp_path / "m", ours, specials)
    assert load_model(tmp_path / "m").config.vocab_size == ours.vocab_size
    if specials:
        assert (ours.end_text, ours.end_of_text) == ("</s>", theirs.eos_token_id)
    save_model(load_model(tmp_path / "m"), tmp_path / "again", ours)
    assert load_tokenizer(tmp_path / "again") == ours
    again = assert_agree(tmp_path / "again", ours, specials, seed=2)
    assert again.eos_token_id == (theirs.eos_token_id if specials or how != "fast" else None)


def wordpiece():
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[PAD]"])
    library.train_from_iterator(CORPUS * 5, trainer)
    return library


def unigram(scheme="always"):
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>"], unk_token="<unk>")
    library.train_from_iterator(CORPUS * 5, trainer)
    return library


def with_steps(**steps):
    library = trained(None, 320, ["<s>"])
    for name, step in steps.items():
        setattr(library, name, step)
    return library


def no_bytes():
    return trained(None, 60, ["<s>"], alphabet=False)


OTHERS = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "unigram, never": lambda: unigram("never"),
    "normalizer": lambda: with_steps(normalizer=normalizers.NFKC()),
    "prefix": lambda: with_steps(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no regex": lambda: with_steps(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ),
    "digits": lambda: with_steps(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "letters missing": no_bytes,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_vocabularies_go_through_the_library(tmp_path, name):
    library = OTHERS[name]()
    library.add_tokens([TheirToken("<user>"), TheirToken("<r>", rstrip=True)])
    library.add_special_tokens(["</s>"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>")
    write(tmp_path / "m", library.get_vocab_size(), theirs)
    ours = load_tokenizer(tmp_path / "m")
    assert isinstance(ours, LibraryTokenizer) and ours.end_text == "</s>"
    assert ours.end_of_text == theirs.eos_token_id
    tokens = ["<user>", "</s>", "<r> "]
    assert_agree(tmp_path / "m", ours, tokens)
    save_model(load_model(tmp_path / "m"), tmp_path / "again", ours)
    again = load_tokenizer(tmp_path / "again")
    assert again.key == ours.key and again == ours
    assert_agree(tmp_path / "again", ours, tokens, seed=3)
    assert ours.with_added(["<z>"]).encode("a<z>")[-1] == ours.vocab_size


@pytest.mark.parametrize("name", OTHERS)
def test_the_library_reads_a_long_text_in_windows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(library_tokenizer, "WINDOW", 60)
    theirs = PreTrainedTokenizerFast(tokenizer_object=OTHERS[name]())
    write(tmp_path / "m", len(theirs), theirs)
    ours, rng = load_tokenizer(tmp_path / "m"), random.Random(4)
    for _ in range(40):
        text = "".join(rng.choices([*ALPHABET, *CORPUS, " ", "\n"], k=rng.choice([3, 60, 300])))
        assert ours.encode(text, allow_special=True) == theirs(text)["input_ids"], ascii(text)


def test_gpt2s_class_ignores_the_steps_of_tokenizer_json(tmp_path):
    """As transformers does; only the prefix of tokenizer_config.json counts."""
    library = with_steps(pre_tokenizer=pre_tokenizers.Whitespace())
    write(tmp_path, library.get_vocab_size() + 2)
    library.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert type(ours) is Tokenizer
    assert_agree(tmp_path, ours)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": True}))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, LibraryTokenizer)
    assert_agree(tmp_path, ours)
    # GPT-2's own, with the prefix
    save_model(GPT(GPTConfig(50257, 16, 1, 1, 2)), tmp_path / "gpt2")
    edit(tmp_path / "gpt2/tokenizer_config.json", add_prefix_space=True)
    assert_agree(tmp_path / "gpt2", load_tokenizer(tmp_path / "gpt2"))


def test_merges_that_tiktoken_would_join_otherwise(tmp_path):
    """After "b c" the pair "ab c" cannot be met: tiktoken would still make "abc" of a and bc."""
    letters = [*pre_tokenizers.ByteLevel.alphabet()]
    for merges in (
        ["b c", "a b", "ab c"],
        ["ab c", "a b"],
        ["a b", "ab c", "b c", "a bc"],
        ["a b", "ab a", "b a"],
    ):
        pairs = [tuple(merge.split()) for merge in merges]
        tokens = [*letters, *dict.fromkeys(left + right for left, right in pairs)]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        write(tmp_path / "m", len(vocabulary) + 1)
        (tmp_path / "m/vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "m/merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        ours = load_tokenizer(tmp_path / "m")
        assert type(ours) is (Tokenizer if reproduces(pairs, vocabulary) else LibraryTokenizer)
        theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
        rng = random.Random(0)
        for _ in range(200):
            text = "".join(rng.choices("abc", k=12))
            assert ours.encode(text) == theirs(text)["input_ids"]
    assert not reproduces([("b", "c"), ("a", "b"), ("ab", "c")], vocabulary | {"abc": 900})


def test_random_merges(tmp_path):
    """Merges in any order: by tiktoken where they hold, by the library otherwise."""
    letters, rng, kinds = [*pre_tokenizers.ByteLevel.alphabet()], random.Random(5), set()
    for _ in range(40):
        tokens, pairs = [*letters], []
        pool = list("abc")
        for _ in range(rng.randrange(1, 8)):
            pair = (rng.choice(pool), rng.choice(pool))
            pairs.append(pair)
            pool.append("".join(pair))
        tokens += dict.fromkeys("".join(pair) for pair in pairs)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        write(tmp_path / "m", len(vocabulary) + 1)
        (tmp_path / "m/vocab.json").write_text(json.dumps(vocabulary))
        lines = ["#version: 0.2", *map(" ".join, pairs), ""]
        (tmp_path / "m/merges.txt").write_text("\n".join(lines))
        ours = load_tokenizer(tmp_path / "m")
        kinds.add(type(ours))
        theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
        for _ in range(100):
            text = "".join(rng.choices("abc", k=14))
            assert ours.encode(text) == theirs(text)["input_ids"], (pairs, text)
    assert kinds == {Tokenizer, LibraryTokenizer}


BAD_FILES = [
    ({"merges.txt": None}, "merges.txt"),
    ({"merges.txt": "#version: 0.2\nx y z\n"}, "merges.txt.*another vocabulary"),
    ({"merges.txt": "#version: 0.2\nQ Q\n"}, "merges.txt.*another vocabulary"),
    ({"vocab.json": {"a": 0, "b": 0}}, "vocab.json.*id of its own"),
    ({"vocab.json": {"a": 10**9}}, "vocab.json.*another vocabulary"),
    ({"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}, "needs tokenizer.json"),
]


@pytest.mark.parametrize(("files", "line"), BAD_FILES, ids=lambda v: json.dumps(v)[:60])
def test_bad_files_of_a_vocabulary(tmp_path, files, line):
    library = trained(tmp_path, 300)
    write(tmp_path, 300)
    library.model.save(str(tmp_path))
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=line) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_without_the_library(tmp_path, monkeypatch):
    theirs = PreTrainedTokenizerFast(tokenizer_object=wordpiece())
    write(tmp_path, len(theirs), theirs)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"tokenizer.json.*pip install 'nanogpt2\[tokenizers\]'"):
        load_tokenizer(tmp_path)
    assert load_model(tmp_path).config.vocab_size == len(theirs)


def test_no_damage_to_a_vocabulary_is_a_traceback(tmp_path):
    """Bytes changed anywhere in the files: a tokenizer, or one line."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=unigram(), eos_token="</s>")
    write(tmp_path / "library", len(theirs), theirs)
    library = trained(tmp_path, 270, ["<s>"])
    write(tmp_path / "own", 280)
    library.save(str(tmp_path / "own/tokenizer.json"))
    rng = random.Random(0)
    for folder in (tmp_path / "library", tmp_path / "own"):
        whole = (folder / "tokenizer.json").read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.choice(b'{}[]",:.-019eE\x00\xff\\ntf')
            (folder / "tokenizer.json").write_bytes(data)
            try:
                load_tokenizer(folder).encode("the cat")
            except (ValueError, OSError) as error:
                assert "\n" not in str(error) and "tokenizer.json" in str(error)


HOSTILE = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "decoder": {"type": "Strip", "content": "a", "start": 1000, "stop": 1000},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"},
    "model": {"type": "WordLevel", "vocab": {"the": 0, "cat": 1}, "unk_token": "[UNK]"},
}


@pytest.mark.parametrize("part", HOSTILE)
def test_what_the_library_panics_at_is_one_line(tmp_path, part):
    theirs = PreTrainedTokenizerFast(tokenizer_object=unigram())
    write(tmp_path, len(theirs), theirs)
    edit(tmp_path / "tokenizer.json", **{part: HOSTILE[part]}, added_tokens=[])
    edit(tmp_path / "tokenizer_config.json", unk_token=None)
    with pytest.raises(ValueError, match=r"tokenizers cannot|tokenizer cannot encode the text"):
        load_tokenizer(tmp_path).encode("the dog")


@pytest.mark.parametrize("eos", [2, None, 10**6, -1, [2]])
def test_the_end_of_a_vocabulary_that_states_none(tmp_path, eos):
    """config.json's, where the vocabulary lacks transformers' default."""
    library = trained(tmp_path, 300, ["<s>", "<pad>", "</s>"])
    write(tmp_path / "m", 310, eos_token_id=eos)
    library.model.save(str(tmp_path / "m"))
    ours = load_tokenizer(tmp_path / "m")
    # the next free row is what AutoTokenizer gives <|endoftext|>
    assert ours.end_of_text == (2 if eos in (2, [2]) else 300)
    assert ours.end_text == ("</s>" if eos in (2, [2]) else "<|endoftext|>")
    assert_agree(tmp_path / "m", ours, ["<|endoftext|>"])
    save_model(load_model(tmp_path / "m"), tmp_path / "again", ours)
    if eos in (2, [2]):
        edit(tmp_path / "again/config.json", eos_token_id=2)
    assert load_tokenizer(tmp_path / "again") == ours
