"""Tokenising and batches: MB/s by the number of processes, tokens/s of the loader. Writes nothing.

    python -m benchmarks.bench_data [--megabytes 32] [--rounds 3] [--quick]

The text is Python's language reference, over and over, cut into pages; the ids of all arms must be
equal. "read" is the reading of the text by itself, which one process does for all. The batches are
32 x 1024 tokens of one process, at random places of the ids in a mapped file; the long corpus
repeats that file, as far as its length goes.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import harness
from nanogpt2 import threads
from nanogpt2.data.content import Columns, Content
from nanogpt2.data.files import DataFile, find_files
from nanogpt2.data.loader import make_batches
from nanogpt2.data.parallel import batches
from nanogpt2.data.streams import Streams
from nanogpt2.tokenizer import gpt2_tokenizer

TOKENIZER = gpt2_tokenizer()
ROWS, T = 32, 1024
NODE = 8 * 540_000  # tokens/s of eight GPUs at the 124M model


class Repeated:
    """`count` ids: those of `ids` over and over; slices do not cross its end."""

    def __init__(self, ids, count):
        self.ids, self.count = ids, count

    def __len__(self):
        return self.count

    def __getitem__(self, places):
        start = places.start % (len(self.ids) - T - 1)
        return self.ids[start : start + places.stop - places.start]


def write_text(path: Path, megabytes: int) -> None:
    page = "".join(text for file in find_files("pydocs") for text in file.text())
    with path.open("w") as file:
        for i in range(1 + megabytes * 10**6 // len(page)):
            file.write(f"page {i}\n{page}<|endoftext|>")


def tokenise(path: Path, processes: int):
    def work() -> None:
        with tempfile.TemporaryDirectory() as cache:
            ids, _, _ = Streams(
                TOKENIZER, "lm", Columns(), 50257, Path(cache), processes=processes
            ).read(str(path))
            work.ids = np.array(ids)

    return work


def read(path: Path) -> None:
    file = DataFile(str(path), ".txt")
    content = Content(str(path), [file], TOKENIZER, "lm", Columns(), False)
    for text, _ in batches(content._texts(), content.tokenizer):
        text.encode()


def tokens_per_second(data, seconds: float) -> tuple[float, float]:
    """Return tokens/s of batches, and the milliseconds to the first one, a billion rows ahead."""
    found, first, started = make_batches(data, T, 0), 10**9, time.perf_counter()
    found.rows(first, 1)
    wait, started, count = time.perf_counter() - started, time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        found.rows(first + count, ROWS)
        count += ROWS
    return count * T / (time.perf_counter() - started), 1e3 * wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    megabytes, rounds = (9, 1) if options.quick else (options.megabytes, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        write_text(path, megabytes)
        size = path.stat().st_size / 1e6
        arms = {f"{n} processes": tokenise(path, n) for n in sorted({1, 2, threads.allowed()})}
        timings = harness.interleave({**arms, "read": lambda: read(path)}, rounds)
        first, *others = (work.ids for work in arms.values())
        assert all(np.array_equal(first, ids) for ids in others), "the ids differ"
        mapped = Path(folder, "ids.bin")
        first.tofile(mapped)
        ids = np.memmap(mapped, np.uint16, mode="r")
        loads = {}
        for name, data in (("short", ids), ("10 billion", Repeated(ids, 10**10))):
            loads[name] = tokens_per_second(data, 1.0)
    lines = [[name, f"{size / t.median:.1f} MB/s"] for name, t in timings.items()]
    lines += [
        [f"batches, {name}", f"{speed / 1e6:.1f} M tokens/s, first after {wait:.2f} ms"]
        for name, (speed, wait) in loads.items()
    ]
    print(harness.table(["work", "rate"], lines))
    print(f"a node of 8 GPUs reads {NODE / 1e6:.2f} M tokens/s, in 8 processes")
    rates = {name: size / t.median for name, t in timings.items()}
    print(json.dumps({"benchmark": "data", "megabytes": size, "rates": rates, "batches": loads}))


if __name__ == "__main__":
    main()
