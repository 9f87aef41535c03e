"""A long text -> its token ids, by several processes: the same ids for any number of them.

The text is cut into batches. A cut is right behind the text of the end token, or between a
character that is no white space and a blank or a line end that follows it. No token of GPT-2's
pattern spans such a place, and the pattern looks at nothing before it: so the ids of the two sides,
joined, are the ids of the whole. Where an added token may span it, or the pattern is another one,
cuts are behind the end token alone. Where a million characters have no place to cut, the text is
encoded in this process, in one piece, until one comes.

A thread of this process waits for each worker (see worker.py). A worker that ends early costs time
and nothing else: its batch is encoded here. The results come in the order of the text, and no more
than a few batches a worker are in memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO

import numpy as np
from numpy.typing import NDArray

from nanogpt2.data.encode import encode_texts, id_type
from nanogpt2.data.worker import receive, send
from nanogpt2.tokenizer import Tokenizer

BATCH = 1 << 20  # characters
# a text up to its last word that a blank or a line end follows; found in linear time
BEHIND_WORD = re.compile(r".*\S(?=[ \n])", re.DOTALL)
WAITING = 2  # batches for each worker, beside the one that it encodes

Ids = NDArray[np.integer]


def batches(parts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Cut a text, given in parts, into batches of at most BATCH characters.

    Yields (text, whether the cut behind it is one that no token spans). The cuts depend on the text
    alone, not on its parts.
    """
    end, at_blanks = tokenizer.end_text, not _may_span_blanks(tokenizer)
    held = ""
    # a record may be one long part: in pieces, so that `held` stays short
    for part in (one[i : i + BATCH] for one in parts for i in range(0, len(one), BATCH)):
        held += part
        while len(held) >= BATCH:
            cut = last_cut(held[:BATCH], end, at_blanks)
            yield held[: cut or BATCH], cut > 0
            held = held[cut or BATCH :]
    if held:
        yield held, True


def _may_span_blanks(tokenizer: Tokenizer) -> bool:
    """Tell whether a token may span the place between a word and a blank."""
    return not tokenizer.shows_merges or any(
        token.lstrip or token.rstrip or token.content.split() != [token.content]
        for token in tokenizer.added
    )


def last_cut(text: str, end_text: str, at_blanks: bool = True) -> int:
    """Return the last place in a text where it may be cut; 0 for none."""
    marked = text.rfind(end_text)
    marked = marked + len(end_text) if marked >= 0 else 0
    found = BEHIND_WORD.match(text, marked) if at_blanks else None
    return marked if found is None else found.end()


class Encoder:
    """Encodes batches of text in order, in this process and, once asked to, in others too."""

    def __init__(self, tokenizer: Tokenizer, processes: int) -> None:
        self.tokenizer = tokenizer
        # a worker makes tokenizers of merges alone
        self.processes = processes if tokenizer.shows_merges else 1
        self._pool: ThreadPoolExecutor | None = None
        self._own = threading.local()  # .pipes: of the thread's process
        self._workers: list[subprocess.Popen] = []
        self._closed = False

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes, whatever they are doing."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.communicate()

    def start(self) -> None:
        """Start the other processes, if there may be several."""
        if self.processes > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(self.processes)

    def encode(self, texts: Iterable[tuple[str, bool]]) -> Iterator[tuple[int, Ids]]:
        """Yield (how many more of the `texts` are encoded, ids of theirs), in order.

        texts: as from `batches`. Where one is not cut between two tokens, its last ids may come
        with the next one's.
        """
        waiting: deque[Future[Ids]] = deque()
        source = iter(texts)
        for text, is_cut in source:
            if self._pool is None or not is_cut:
                while waiting:
                    yield 1, waiting.popleft().result()
                yield from self._encode_here(text, is_cut, source)
                continue
            waiting.append(self._pool.submit(self._encode_there, text))
            while len(waiting) > self.processes * (1 + WAITING) or (waiting and waiting[0].done()):
                yield 1, waiting.popleft().result()
        while waiting:
            yield 1, waiting.popleft().result()

    def _encode_here(
        self, text: str, is_cut: bool, source: Iterator[tuple[str, bool]]
    ) -> Iterator[tuple[int, Ids]]:
        """Encode a batch, and the following ones until they are cut where no token spans."""
        count = 0

        def parts() -> Iterator[str]:
            nonlocal count
            part, ended = text, is_cut
            while True:
                yield part
                count += 1
                if ended or (more := next(source, None)) is None:
                    return
                part, ended = more

        for ids in encode_texts(parts(), self.tokenizer):
            read, count = count, 0
            yield read, ids
        yield count, np.empty(0, id_type(self.tokenizer))

    def _encode_there(self, text: str) -> Ids:
        """Have this thread's process encode a batch; without the process, encode it here."""
        dtype = id_type(self.tokenizer)
        with suppress(OSError, EOFError, ValueError):
            source, sink = self._worker()
            send(source, text.encode())
            return np.frombuffer(receive(sink), dtype)
        if self._closed:
            return np.empty(0, dtype)
        with suppress(AttributeError):
            # the next batch gets a new one
            del self._own.pipes
        return np.concatenate([*encode_texts([text], self.tokenizer), np.empty(0, dtype)])

    def _worker(self) -> tuple[IO[bytes], IO[bytes]]:
        """Return the input and the output of this thread's process; start it if there is none."""
        if not hasattr(self._own, "pipes"):
            code = f"import sys; sys.path[:] = {sys.path!r}; from nanogpt2.data import worker"
            # a session of its own: Ctrl-C at the terminal is for this process
            worker = subprocess.Popen(
                [sys.executable, "-c", f"{code}; worker.main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._workers.append(worker)
            assert worker.stdin is not None and worker.stdout is not None
            self._own.pipes = worker.stdin, worker.stdout
            send(worker.stdin, json.dumps(self.tokenizer.arguments()).encode())
        return self._own.pipes
