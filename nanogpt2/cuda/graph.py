"""A function of static buffers, captured once as a CUDA graph and replayed.

A replay starts all kernels of the function by a single call. The host's time per kernel, several
microseconds, is saved. A captured function must

- read and write its lasting values in tensors that exist before it and stay where they are;
- depend on no Python number that changes between calls: the capture freezes it;
- never wait for the GPU (`.item()`, `nonzero`), and have shapes that do not depend on values.

The function runs eagerly the first time, which compiles kernels and creates library handles. The
second call captures, which runs nothing, and replays. Where a capture fails, by the driver or for
want of memory, the function goes on eagerly: the results are the same, only slower. On a CPU it
always runs eagerly. This file does not know what the function computes.
"""

from collections.abc import Callable
from typing import Any

import torch

from nanogpt2 import terminal


class Graphs:
    """The graphs of one decoder. They share their memory, because they never run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._captures = device, device.type == "cuda"
        self._replays: dict[object, Callable[[], None]] = {}
        self._ran: set[object] = set()
        self._pool: Any = None
        self._stream: Any = None

    def run(self, key: object, function: Callable[[], None]) -> None:
        """Run the function that this key stands for: eagerly, then by capture, then by replay."""
        replay = self._replays.get(key)
        if replay is None and key in self._ran and self._captures:
            replay = self._capture(key, function)
        self._ran.add(key)
        (replay or function)()

    def _capture(self, key: object, function: Callable[[], None]) -> Callable[[], None] | None:
        try:
            self._replays[key] = self.captured(function)
        except RuntimeError as error:
            self._captures = False
            warn_once(error)
        return self._replays.get(key)

    def captured(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture the function without running it; return its replay.

        Raises RuntimeError where CUDA cannot capture it.
        """
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # thread_local: other threads may use the GPU meanwhile
            mode = "thread_local"
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
                    function()
            finally:
                # a capture that fails leaves its own stream behind
                torch.cuda.set_stream(before)
        return graph.replay


_warned = False


def warn_once(error: RuntimeError) -> None:
    """Say in one line that decoding goes on without graphs, once in this process."""
    global _warned
    if not _warned:
        _warned = True
        cause = (str(error).strip().splitlines() or ["unknown"])[0][:120]
        terminal.note(f"warning: no CUDA graph, so decoding is slower: {cause}")
