"""A model's tokenizer, read from the files of a folder; tokenizer_files.py writes them.

    tokenizer.json             the library's format: the vocabulary, the merges, the steps
    vocab.json, merges.txt     OpenAI's format
    tokenizer_config.json      the special tokens, and the added ones as added_tokens_decoder
    added_tokens.json, special_tokens_map.json      the same two, as older releases wrote them

They are read as transformers' AutoTokenizer reads them. Its class GPT2Tokenizer, also where none is
named, takes the vocabulary and the merges, and GPT-2's steps whatever tokenizer.json says; another
class takes tokenizer.json as it is. An added token that has no row in the model is ignored.

A model may have more rows than its vocabulary has ids. They are padding, which made its training
faster, and are dropped on loading: see `Vocabulary.vocab_size`.
This file reads no tensor and does not import torch.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nanogpt2.added_tokens import AddedToken
from nanogpt2.checkpoints.folder import LARGEST_JSON, read_object
from nanogpt2.checkpoints.tokenizer_files import library_file
from nanogpt2.config.flags import show
from nanogpt2.filesystem import open_regular
from nanogpt2.library_tokenizer import LibraryTokenizer
from nanogpt2.tokenizer import (
    END_OF_TEXT,
    ROLES,
    SURROGATE,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    reproduces,
)

GPT2, BYTES = 50257, 257  # ids of the two vocabularies that are known by their size
# rows of a GPT-2 whose vocabulary was padded, to a multiple of 64 or 128
PADDED = (50304, 50432)
# in the order in which transformers adds them
LIBRARY_ROLES = tuple(f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# options of a BPE model that GPT-2's does not have
OPTIONS = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
EXTRA = ("additional_special_tokens", "extra_special_tokens")


def by_size(rows: int) -> Tokenizer | None:
    """Return the tokenizer of a model without files of one; None where the size tells nothing."""
    make = {GPT2: gpt2_tokenizer, BYTES: byte_tokenizer}.get(unpadded_size(rows))
    return None if make is None else make()


def unpadded_size(rows: int) -> int:
    """Return how many ids a model without a tokenizer's files has, of so many rows."""
    return GPT2 if rows in PADDED else rows


@dataclass(frozen=True)
class Vocabulary:
    """What a folder's files state about the tokens of a model with so many rows."""

    folder: Path
    rows: int
    tokens: dict[str, int] = field(repr=False)
    whole: dict[str, Any] | None = field(repr=False)  # tokenizer.json
    settings: dict[str, Any] = field(repr=False)  # tokenizer_config.json, special_tokens_map.json
    added: tuple[AddedToken, ...]
    is_gpt2: bool  # of the class GPT2Tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of ids; the rows behind them are padding."""
        return 1 + max(*self.tokens.values(), *(token.id for token in self.added), -1)

    @property
    def roles(self) -> dict[str, str]:
        """The text of each special token that has an id, by its name in tokenizer_config.json."""
        stated = _defaults(self.is_gpt2) | self.settings
        named = {role: stated.get(role) for role in LIBRARY_ROLES}
        texts = {r: v.get("content") if isinstance(v, dict) else v for r, v in named.items()}
        known = {token.content for token in self.added}
        return {r: text for r, text in texts.items() if isinstance(text, str) and text in known}

    def tokenizer(self, eos: int | None = None) -> Tokenizer:
        """Build the tokenizer. eos: the model's, for a vocabulary whose files name none.

        Raises ValueError for files that cannot be read.
        """
        roles, ids = self.roles, {token.content: token.id for token in self.added} | self.tokens
        end = ids.get(END_OF_TEXT) if eos is None or not 0 <= eos < self.vocab_size else eos
        if end == eos and "eos_token" not in self.settings and END_OF_TEXT not in self.tokens:
            # transformers' default, which this vocabulary does not have
            roles.pop("eos_token", None)
        known = next((t for t in _known() if t.vocabulary == self.tokens | _end_of(t)), None)
        is_plain = self._is_plain()
        if known is not None and is_plain:
            plain = known.added[0]
            if {*self.added} <= {plain} and {*roles.values()} <= {END_OF_TEXT}:
                return known
            return Tokenizer(known.name, known.merges, None, self.added, roles, end)
        pairs = self._pairs(known)
        if pairs is not None and is_plain and reproduces(pairs, self.tokens):
            merges = "\n".join(["#version: 0.2", *map(" ".join, pairs), ""])
            return Tokenizer("bpe", merges, self.tokens, self.added, roles, end)
        stated = self.whole
        if self.is_gpt2 or stated is None:
            stated = library_file(self.tokens, pairs or [], bool(self._prefixes()))
        try:
            return LibraryTokenizer(stated, self.added, roles, end)
        except ValueError as error:
            raise ValueError(f"{self._name('tokenizer.json')}: {error}") from None

    def _name(self, file: str) -> str:
        """Return the name of a file, or of the one that stands in its place."""
        return repr(str(self.folder / (file if self.whole is not None else "vocab.json")))

    def _prefixes(self) -> Any:
        return self.settings.get("add_prefix_space")

    def _is_plain(self) -> bool:
        """Tell whether the steps around the model are GPT-2's."""
        if self.is_gpt2 or self.whole is None:
            return not self._prefixes()
        model, steps = self.whole["model"], self.whole.get("pre_tokenizer")
        if isinstance(steps, dict) and steps.get("type") == "Sequence":
            listed = steps.get("pretokenizers")
            steps = listed[0] if isinstance(listed, list) and len(listed) == 1 else None
        decoder = self.whole.get("decoder")
        return (
            model.get("type", "BPE") == "BPE"
            and not any(model.get(option) for option in (*OPTIONS, "dropout"))
            and self.whole.get("normalizer") is None
            and isinstance(steps, dict)
            and steps.get("type") == "ByteLevel"
            and steps.get("add_prefix_space") is False
            and steps.get("use_regex", True) is True
            and isinstance(decoder, dict)
            and decoder.get("type") == "ByteLevel"
        )

    def _pairs(self, known: Tokenizer | None) -> list[tuple[str, str]] | None:
        """Return the merges; None for a model without them. Raises ValueError for invalid ones."""
        if self.whole is None:
            path = self.folder / "merges.txt"
            if not path.exists() and known is not None:
                listed: Any = known.merges.splitlines()[1:]
            else:
                with open_regular(path, LARGEST_JSON) as file:
                    lines = file.read().decode("utf-8", "replace").split("\n")
                listed = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
                listed = listed[: -1 if listed[-1:] == [""] else None]
        else:
            path, listed = self.folder / "tokenizer.json", self.whole["model"].get("merges")
            if listed is None and not self.is_gpt2:
                return None
        pairs = []
        for merge in listed if isinstance(listed, list) else [None]:
            pair: Any = merge.split(" ") if isinstance(merge, str) else merge
            is_pair = isinstance(pair, list) and [*map(type, pair)] == [str, str]
            if not is_pair or not {*pair, "".join(pair)} <= self.tokens.keys():
                raise ValueError(f"{str(path)!r} has a merge of another vocabulary: {show(merge)}")
            pairs.append((pair[0], pair[1]))
        return pairs


def _known() -> tuple[Tokenizer, Tokenizer]:
    return gpt2_tokenizer(), byte_tokenizer()


def _end_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Return <|endoftext|>, which files may keep apart from the vocabulary."""
    return {END_OF_TEXT: tokenizer.end_of_text}


def read_vocabulary(folder: Path, rows: int, declared: Any = None) -> Vocabulary | None:
    """Read the tokenizer's files of a model with so many rows; None without any.

    declared: the tokenizer_class of config.json. Raises ValueError or OSError, in one line.
    """
    own = read_object(folder / "vocab.json")
    whole = read_object(folder / "tokenizer.json")
    config = read_object(folder / "tokenizer_config.json") or {}
    if own is None and whole is None:
        return None
    declared = config.get("tokenizer_class") or declared or "GPT2Tokenizer"
    is_gpt2 = str(declared).removesuffix("Fast") == "GPT2Tokenizer"
    if whole is None and not is_gpt2:
        raise ValueError(f"{str(folder)!r} needs tokenizer.json: its tokenizer is a {declared}")
    path = folder / ("vocab.json" if whole is None else "tokenizer.json")
    tokens = _tokens_of(path, own if whole is None else whole.get("model"), whole is not None)
    if whole is not None and whole["model"].get("type", "BPE") != "BPE":
        is_gpt2 = False
    if (last := max(tokens.values())) >= rows:
        raise ValueError(
            f"{str(path)!r} is another vocabulary: it has a token {last}, the model {rows} rows"
        )
    former = read_object(folder / "special_tokens_map.json") or {}
    settings = config if "added_tokens_decoder" in config else config | former
    added = _added(folder, whole, settings, tokens, rows, is_gpt2)
    if is_gpt2 and own is not None and whole is not None:
        apart = {token.content: token.id for token in added}
        if apart | own != apart | tokens:
            raise ValueError(
                f"{str(folder / 'vocab.json')!r} is another vocabulary than tokenizer.json's"
            )
    return Vocabulary(folder, rows, tokens, whole, settings, added, is_gpt2)


def _tokens_of(path: Path, stated: Any, is_model: bool) -> dict[str, int]:
    """Return {token: id} of vocab.json, or of the model in tokenizer.json."""
    model = stated if is_model and isinstance(stated, dict) else {"vocab": stated}
    tokens = model.get("vocab")
    if isinstance(tokens, list) and model.get("type") == "Unigram":
        pieces = [p[0] for p in tokens if isinstance(p, list) and p and isinstance(p[0], str)]
        tokens = {piece: i for i, piece in enumerate(pieces)} if len(pieces) == len(tokens) else {}
    if not isinstance(tokens, dict) or not tokens:
        raise ValueError(f"{str(path)!r} states no vocabulary")
    ids = [*tokens.values()]
    if not all(type(i) is int and i >= 0 for i in ids) or len({*ids}) < len(ids):
        raise ValueError(f"{str(path)!r} is no vocabulary: each token must have an id of its own")
    return tokens


# ---- added and special tokens


def _added(
    folder: Path,
    whole: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    tokens: Mapping[str, int],
    rows: int,
    is_gpt2: bool,
) -> tuple[AddedToken, ...]:
    """Collect the added tokens and check that their ids are those that transformers gives.

    It takes the id of the vocabulary's token of the same text, or else the next free one. A special
    token that is nowhere listed comes last.
    """
    named = _named(settings, is_gpt2)
    special = {token.content for token in named}
    found: dict[str, tuple[Path, AddedToken]] = {}
    for path, token in _listed(folder, whole, settings, special):
        if token.id < rows and token.content:
            other = found.setdefault(token.content, (path, token))[1]
            if other.id != token.id:
                raise ValueError(f"{str(path)!r}: token {show(token.content)} has two ids")
    added, after = list[AddedToken](), len(tokens)
    for path, token in sorted(found.values(), key=lambda pair: pair[1].id):
        wanted = tokens.get(token.content, after)
        if token.id != wanted:
            raise ValueError(
                f"{str(path)!r}: token {show(token.content)} must have the id {wanted}, as "
                f"transformers reads it, not {token.id}"
            )
        after += token.content not in tokens
        is_special = token.special or (is_gpt2 and token.content in special)
        added.append(replace(token, special=is_special))
    for token in named:
        if token.content not in found and token.content:
            token = replace(token, id=tokens.get(token.content, after))
            after += token.id == after
            found[token.content] = folder, token
            added += [token] if token.id < rows else []
    return tuple(sorted(added, key=lambda token: token.id))


def _named(settings: Mapping[str, Any], is_gpt2: bool) -> list[AddedToken]:
    """Return the special tokens that the settings name, without ids yet, in transformers' order."""
    roles = {**dict.fromkeys(LIBRARY_ROLES), **_defaults(is_gpt2), **settings}
    values = [value for role, value in roles.items() if role.endswith("_token")]
    for name in EXTRA:
        more = settings.get(name)
        more = [*more.values()] if isinstance(more, dict) else more
        values += more if isinstance(more, list) else []
    tokens = [_special(value) for value in values if isinstance(value, str | dict)]
    return [*{token.content: token for token in reversed(tokens)}.values()][::-1]


def _defaults(is_gpt2: bool) -> dict[str, str]:
    return dict.fromkeys(ROLES[:3], END_OF_TEXT) if is_gpt2 else {}


def _special(value: str | dict[str, Any]) -> AddedToken:
    stated = {"content": value} if isinstance(value, str) else value
    return _token(None, {"normalized": False} | stated | {"id": 0, "special": True})


def _listed(
    folder: Path, whole: Mapping[str, Any] | None, settings: Mapping[str, Any], special: set[str]
) -> Iterator[tuple[Path, AddedToken]]:
    """Yield the added tokens of each file, the file that counts most first."""
    path = folder / "tokenizer_config.json"
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{str(path)!r}: added_tokens_decoder must be a table of ids")
    for number, stated in decoder.items():
        if not isinstance(stated, dict):
            raise ValueError(f"{str(path)!r}: added_tokens_decoder must hold tokens with content")
        yield path, _token(path, stated | {"id": int(number) if number.isdecimal() else number})
    path = folder / "tokenizer.json"
    for stated in _list_of(path, (whole or {}).get("added_tokens") or []):
        yield path, _token(path, stated)
    path = folder / "added_tokens.json"
    # transformers reads it in place of added_tokens_decoder, never beside it
    older = {} if "added_tokens_decoder" in settings else read_object(path) or {}
    for content, i in older.items():
        is_special = content in special
        flags = {"special": is_special, "normalized": not is_special}
        yield path, _token(path, {"content": content, "id": i} | flags)


def _list_of(path: Path, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{str(path)!r}: added_tokens must be a list of tokens")
    return value


def _token(path: Path | None, stated: Mapping[str, Any]) -> AddedToken:
    """Read a token as the library states it. Raises ValueError for an invalid one."""
    values = {f.name: stated[f.name] for f in fields(AddedToken) if f.name in stated}
    flags = {name: values[name] for name in values.keys() - {"content", "id"}}
    content, i = values.get("content"), values.get("id")
    is_text = isinstance(content, str) and not SURROGATE.search(content)
    if not is_text or type(i) is not int or i < 0 or {*map(type, flags.values())} - {bool}:
        where = "a special token" if path is None else f"{str(path)!r}: an added token"
        raise ValueError(f"{where} must have an id, a text as content, and flags: {show(values)}")
    return AddedToken(**{"normalized": not values.get("special", False)} | values)
