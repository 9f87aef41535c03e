"""A server in a process of its own, as a user starts it, and plain requests to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from reference import HUNG, ROOT

from nanogpt2 import GPT, GPTConfig, save_model
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()


def save_byte_model(folder, seed=3, chat=False, block_size=64):
    """A small byte-level model that likes some letters and blanks."""
    torch.manual_seed(seed)
    config = GPTConfig(257, block_size, 2, 2, 16, bos_token_id=256, eos_token_id=256)
    model = GPT(config).eval()
    liked = [*b"abcdefghijk,. \n"]
    with torch.no_grad():
        for p in model.parameters():
            p *= 6
        # a direction that every position has, and the liked tokens too
        model.ln_f.weight[0], model.ln_f.bias[0] = 0.0, 3.0
        model.wte.weight[liked, 0] += 4.0
    save_model(model, folder, BYTES, chat=chat)
    return folder


class Running:
    """A server that runs: its port, its process and what it wrote."""

    def __init__(self, process, log):
        self.process, self._log = process, log
        line = process.stdout.readline()
        assert " on http://" in line, line + self.log()
        self.url = line.split(" on ")[1].strip()
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def log(self):
        return self._log.read_text()

    def logged(self, pattern):
        """Wait for a line of the log, which may come after its answer; return the match."""
        end = time.monotonic() + HUNG
        while not (found := re.search(pattern, self.log(), re.M)):
            assert time.monotonic() < end, self.log()
            time.sleep(0.01)
        return found

    def ask(self, path, body=None, method=None, headers=None, data=None):
        """Return (status, headers, parsed JSON or text)."""
        connection = self.connection()
        if body is not None:
            data = json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} if data is not None else {}
        method = method or ("GET" if data is None else "POST")
        connection.request(method, path, data, sent | (headers or {}))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kind = answer.getheader("content-type", "")
        found = json.loads(content) if kind == "application/json" else content.decode()
        return answer.status, dict(answer.getheaders()), found

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=HUNG)

    def stream(self, path, body):
        """Return the objects of an event stream."""
        status, headers, text = self.ask(path, body)
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        return events(text)

    def end(self, number=signal.SIGTERM):
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(HUNG)


def events(text):
    """The data of an event stream, JSON read."""
    parts = text.split("\n\n")
    assert parts.pop() == "" and all(part.startswith("data: ") for part in parts)
    return [part if part == "[DONE]" else json.loads(part) for part in (p[6:] for p in parts)]


@contextmanager
def serving(folder: Path, *flags, log="server.log"):
    """Run a server in `folder`; warnings are errors there too."""
    path = folder / log
    with path.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "nanogpt2.serve", "--port", "0", *flags],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
    try:
        yield Running(process, path)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
