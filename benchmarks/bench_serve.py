"""What does the server cost? Time to the first token, and tokens per second, beside sample.py.

    pip install -e ".[serve]"
    python -m benchmarks.bench_serve                    the demo model
    python -m benchmarks.bench_serve --model gpt2 --rounds 20

Three arms write the same text, greedily, in turns: the decoding of sample.py in this process, the
server streaming to one client, and the server answering as a whole. The tokens are compared first.
Prints a table and, last, a JSON object; writes nothing.
"""

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from nanogpt2 import terminal
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.config import GenerationConfig
from nanogpt2.generation import steps
from nanogpt2.generation.text import request_for

PROMPT = "Once upon a time there was a king who"
# (seconds to the first token, seconds in all, tokens)
Figures = tuple[float, float, list[int]]


def in_process(name: str, count: int) -> Callable[[], Figures]:
    with open_checkpoint(name) as checkpoint:
        model, tokenizer = checkpoint.generator(), checkpoint.tokenizer
    options = GenerationConfig(max_new_tokens=count, eos_token_id=None)

    def work() -> Figures:
        begin, first, found = time.perf_counter(), 0.0, []
        for step in steps(model, request_for(model, tokenizer, [PROMPT], options)):
            first = first or time.perf_counter() - begin
            found.append(int(step.tokens[0]))
        return first, time.perf_counter() - begin, found

    return work


def over_http(port: int, count: int, stream: bool) -> Callable[[], Figures]:
    body = {"prompt": PROMPT, "max_tokens": count, "temperature": 0, "eos_token_id": None}
    data = json.dumps(body | {"stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def work() -> Figures:
        begin, first, found = time.perf_counter(), 0.0, []
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", data, headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        if not stream:
            found = json.loads(answer.read())["choices"][0]["token_ids"]
            first = time.perf_counter() - begin
        while stream and (line := answer.readline()):
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begin
                found += json.loads(line[6:])["choices"][0]["token_ids"]
        return first, time.perf_counter() - begin, found

    return work


def measure(arms: dict[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    expected = arms["in process"]()[2]
    for name, work in arms.items():
        assert work()[2] == expected, f"{name} writes other tokens"
    order, found = list(arms), {name: [] for name in arms}
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            found[name].append(arms[name]())
    return found


def report(found: dict[str, list[Figures]], count: int, name: str) -> None:
    rows = [["arm", "first token, ms", "least", "most", "tokens/s", "least", "most"]]
    summary = {}
    for arm, figures in found.items():
        firsts = [first * 1e3 for first, _, _ in figures]
        rates = [count / total for _, total, _ in figures]
        values = [(statistics.median(x), min(x), max(x)) for x in (firsts, rates)]
        rows.append([arm, *(f"{v:.1f}" for v in values[0]), *(f"{v:.0f}" for v in values[1])])
        summary[arm] = {"first_ms": values[0], "tokens_per_second": values[1]}
    print(f"{name}, {count} tokens, {len(next(iter(found.values())))} rounds, medians")
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(terminal.table(rows))
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "nanogpt2.serve", "--model", options.model, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rstrip("/\n").rpartition(":")[2])
        arms = {
            "in process": in_process(options.model, options.tokens),
            "server, streaming": over_http(port, options.tokens, stream=True),
            "server, whole": over_http(port, options.tokens, stream=False),
        }
        report(measure(arms, options.rounds), options.tokens, options.model)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
