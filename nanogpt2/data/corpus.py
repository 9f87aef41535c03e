"""A name, a file or a folder -> its texts -> token ids for training and for validation.

Texts are joined by <|endoftext|>. The ids are kept in a cache keyed by the SHA-256 of the texts, as
a .npy file that later runs map into memory. This file does not know the model.
"""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanogpt2 import hub
from nanogpt2.config import check_data
from nanogpt2.tokenizer import Tokenizer

CACHE = Path("~/.cache/nanogpt2/tokens")
SHORTEST = 64  # tokens
VALIDATION_SHARE = 0.1
VALIDATION_MOST = 65_536  # tokens; more would only slow the evaluations down
# the split does not depend on the run's seed, so that runs can be compared
SPLIT_SEED = 1558

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Corpus:
    """Token ids, one-dimensional, and where they came from."""

    train: Ids
    validation: Ids
    sha256: str  # of the texts


def read_texts(source: str) -> list[str]:
    """Read the texts of a corpus: one for a file, one for each .txt of a folder, in order of name.

    Raises ValueError for a text that is not UTF-8 (with the byte's offset) and for an empty corpus.
    """
    check_data(source)
    path = Path(source)
    if source == "pydocs":
        from pydoc_data.topics import topics

        texts = [topics[name] for name in sorted(topics)]
    elif source == "shakespeare":
        texts = [read_text(hub.fetch_shakespeare())]
    elif path.is_dir():
        texts = [read_text(file) for file in sorted(path.rglob("*.txt"))]
    else:
        texts = [read_text(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{source!r} is empty: there is no text in it")
    return texts


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte-order mark.

    Raises ValueError that names the offset of a byte that is not UTF-8.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(
            f"{str(path)!r} is not UTF-8: byte 0x{byte:02x} at offset {error.start}"
        ) from None


def load_corpus(source: str, tokenizer: Tokenizer, cache: Path = CACHE) -> Corpus:
    """Tokenise a corpus, once for each content and tokenizer, and split it.

    Raises ValueError or OSError for a corpus that cannot be used.
    """
    texts = read_texts(source)
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    sha256 = digest.hexdigest()
    ids = _cached_ids(texts, tokenizer, cache.expanduser() / f"{sha256}-{tokenizer.name}.npy")
    if len(ids) < SHORTEST:
        raise ValueError(
            f"{source!r} is too short: {len(ids)} tokens, at least {SHORTEST} are needed"
        )
    held_out = min(int(len(ids) * VALIDATION_SHARE), VALIDATION_MOST)
    return Corpus(ids[: len(ids) - held_out], ids[len(ids) - held_out :], sha256)


def _cached_ids(texts: Sequence[str], tokenizer: Tokenizer, path: Path) -> Ids:
    with suppress(OSError, ValueError, EOFError):
        # absent or damaged: made below
        return np.load(path, mmap_mode="r", allow_pickle=False)
    ids = _encode(texts, tokenizer)
    with suppress(OSError):
        # a cache that cannot be written costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as file:
            np.save(file, ids, allow_pickle=False)
        partial.replace(path)
    return ids


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> Ids:
    """Put the texts in an order of their own, each followed by <|endoftext|>; the last validate.

    One text stays whole, so its end validates; of many, whole ones drawn at random do.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(len(texts))
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    pieces = [np.array([*tokenizer.encode(texts[i]), tokenizer.end_of_text], dtype) for i in order]
    return np.concatenate(pieces)
