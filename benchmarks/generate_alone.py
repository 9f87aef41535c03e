"""Measure the memory of one bench_generate arm in its own process; print a JSON object.

    python -m benchmarks.generate_alone ARM FOLDER DEVICE LONG NEW

The figures are bytes above the memory of `import torch`, at the peak of loading a model and
decoding with 5 beams. `memory` is anonymous memory, the figure that counts: only the process can
free it. `resident` adds the pages of mapped files (weights, libraries), which the system may drop
and read again. `cache` is the cache of 5 beams for a prompt of LONG tokens with room for NEW more,
for arms that expose their cache. On a GPU, `memory` is the most that torch has allocated there.
"""

import json
import sys
import threading
from pathlib import Path

import torch

from benchmarks import harness


def anonymous() -> int:
    """Bytes of this process's anonymous memory, without mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class Peak:
    """Peak anonymous memory while the block runs, sampled about every millisecond.

    The kernel does not record this peak itself.
    """

    def __enter__(self) -> "Peak":
        self.most, self._done = 0, threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, anonymous())

    def __exit__(self, *error: object) -> None:
        self.most = max(self.most, anonymous())
        self._done.set()
        self._watch.join()


def tensor_bytes(thing: object) -> int:
    """Bytes of all tensors in a cache, each storage counted once."""
    storages, waiting, seen = {}, [thing], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
        else:
            waiting += getattr(each, "__dict__", {}).values()
    return sum(storages.values())


def main(argv: list[str]) -> None:
    name, folder, device = argv[0], Path(argv[1]), argv[2]
    long, new = map(int, argv[3:])
    # import before measuring, so that the benchmark's own memory is not counted
    from benchmarks.bench_generate import ARMS, BEAMS, SETTLED, prompt_of

    before, before_all = anonymous(), harness.memory_of_this_process()[0]
    with Peak() as peak:
        arm = ARMS[device][name](folder)
        arm.generate(prompt_of(16), SETTLED // BEAMS["num_beams"], **BEAMS)
    if device == "cuda":
        found = {"memory": torch.cuda.max_memory_allocated()}
    else:
        most = harness.memory_of_this_process()[1]
        found = {"memory": peak.most - before, "resident": most - before_all}
    if hasattr(arm, "cache"):
        found["cache"] = tensor_bytes(arm.cache(prompt_of(long), new, **BEAMS))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
