"""The server: its command line, its checks, its queue, its clients, its end."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from reference import HUNG, ROOT, run_module
from serve_process import BYTES, Running, events, save_byte_model, serving

from nanogpt2 import generate
from nanogpt2.checkpoints.load import load_generator
from nanogpt2.config import GenerationConfig, parse
from nanogpt2.serve.options import ServeConfig
from nanogpt2.serve.worker import QueueFullError, ReaderLeftError, StoppingError, Worker

# modules that need starlette or uvicorn are imported where they are used: see test_bare_image.py
OPTIONS = {f.name: f for f in fields(GenerationConfig) if f.metadata}
MOST_BYTES = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_byte_model(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--model", "plain", "--max_tokens", "6000") as running:
        yield running
    assert "Traceback" not in running.log()


# ---- the command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--host 0.0.0.0", "--host must be 127.0.0.1 without --api_key, not '0.0.0.0'"),
        ("--host ::", "--host must be 127.0.0.1 without --api_key, not '::'"),
        ("--host no.such.host.invalid --api_key 12345678", "--host must be an address of this"),
        ("--api_key short", "--api_key must be 8 or more plain characters"),
        ("--model no-such-model", "--model 'no-such-model' is not a file, a folder or a known"),
        ("--model empty", "--model"),
        ("--model torn", "--model 'torn/model.safetensors'"),
        ("--model plain --compare_model no", "--compare_model 'no' is not a file, a folder"),
        ("--model plain --compare_model plain", "--compare_model must be another model"),
        ("--model plain --compare_model demo", "--compare_model 'demo' has another vocabulary"),
        ("--port 65536", "--port must be a whole number >= 0 and <= 65535, not 65536"),
        ("--queue 0", "--queue must be a whole number >= 1, not 0"),
        ("--model plain --quantize int8 --dtype float16", "--quantize must come with dtype"),
        ("--device mps --model plain", "--device 'mps' is not on this machine"),
        ("plain", "'plain' is not a flag; the model is --model NAME"),
        ("--cors '*'", "--cors is not a flag; no page of another site may call the server"),
        ("--portt 1", "--portt is not a flag; did you mean --port?"),
    ],
)
def test_wrong_use_is_one_line(folder, words, said):
    (folder / "empty").mkdir(exist_ok=True)
    if not (folder / "torn").exists():
        (folder / "torn").mkdir()
        data = (folder / "plain/model.safetensors").read_bytes()
        (folder / "torn/model.safetensors").write_bytes(data[: len(data) // 2])
        config = (folder / "plain/config.json").read_bytes()
        (folder / "torn/config.json").write_bytes(config)
    argv = words.replace("'", "").split()
    if "--port" not in argv and "--portt" not in argv:
        argv += ["--port", "0"]
    done = run_module("nanogpt2.serve", *argv, cwd=folder)
    line = done.stderr.decode()
    assert done.returncode == 2 and not done.stdout
    assert line.startswith(f"error: {said}") and line.count("\n") == 1 and len(line) <= 201


def test_a_port_in_use_is_told_before_the_model_is_read(folder, server):
    port = str(server.port)
    done = run_module("nanogpt2.serve", "--model", "empty", "--port", port, cwd=folder)
    assert done.returncode == 2 and not done.stdout
    expected = f"error: --port {port} on 127.0.0.1 cannot be had: Address already in use"
    assert done.stderr.decode().startswith(expected)


def test_without_the_extra_the_command_is_named(folder):
    code = (
        "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv = ['serve', '--port', '0'];"
        "runpy.run_module('nanogpt2.serve', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    line = "error: serve needs starlette and uvicorn: pip install 'nanogpt2[serve]'\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, line, "")


def test_help_and_mistakes_import_no_torch(folder):
    code = (
        "import sys, runpy; sys.argv = ['serve', '--help']\n"
        "try:\n    runpy.run_module('nanogpt2.serve', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'starlette', 'uvicorn'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)


@pytest.mark.parametrize(
    ("typed", "flags"),
    [
        ("--model_name_or_path demo --server_port 7860", {"model": "demo", "port": 7860}),
        ("--model demo --listen 0.0.0.0 --api-key abcdefgh", {"host": "0.0.0.0"}),
        ("--model demo --api_key abcdefgh", {"host": "127.0.0.1", "api_key": "abcdefgh"}),
    ],
)
def test_names_from_other_programs(typed, flags):
    config = parse(ServeConfig, typed.split())
    assert {name: getattr(config, name) for name in flags} == flags


# ---- what is checked before a request


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_host_that_is_not_ours_is_refused(server, host):
    for path, body in (("/", None), ("/v1/models", None), ("/v1/completions", {"prompt": "a"})):
        status, headers, answer = server.ask(path, body, headers={"Host": host})
        assert status == 403 and "Host must be localhost" in answer["error"]["message"]
        assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1"])
def test_our_own_names_are_served(server, host):
    status, headers, _ = server.ask("/v1/models", headers={"Host": host, "Origin": "http://a.b"})
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_preflight_is_refused(server):
    asked = {"Origin": "http://a.b", "Access-Control-Request-Method": "POST"}
    status, headers, _ = server.ask("/v1/completions", method="OPTIONS", headers=asked)
    assert status == 405
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "method", "headers", "data", "status"),
    [
        ("/nothing", "GET", {}, None, 404),
        ("/v1/completions/", "POST", {}, b"{}", 404),
        ("/v1/completions", "GET", {}, None, 405),
        ("/", "POST", {}, b"{}", 405),
        ("/v1/completions", "POST", {"Content-Type": "text/plain"}, b"{}", 415),
        ("/v1/completions", "POST", {"Content-Type": ""}, b"{}", 415),
        ("/api/score", "POST", {}, b" " * (MOST_BYTES + 1), 413),
    ],
    ids=str,
)
def test_a_request_that_is_not_for_us(server, path, method, headers, data, status):
    got, _, answer = server.ask(path, method=method, headers=headers, data=data)
    assert got == status and answer["error"]["type"] == "invalid_request_error"


def test_a_long_body_in_chunks_is_refused(server):
    connection = server.connection()
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    for _ in range(MOST_BYTES // 2**16 + 1):
        connection.send(chunk)
    answer = connection.getresponse()
    assert answer.status == 413 and "1,048,576 bytes" in answer.read().decode()
    connection.close()


def test_a_key_is_asked_for_everywhere_but_at_the_page(folder):
    key = "correct-horse"
    with serving(folder, "--model", "plain", "--api_key", key, log="key.log") as server:
        assert server.ask("/")[0] == 200
        body = {"prompt": "a", "max_tokens": 1}
        for given in ({}, "Bearer wrong", key, "Bearer", f"Basic {key}", f"Bearer {key} "[:-2]):
            wrong = {"Authorization": given} if given else {}
            for path, sent in (("/v1/completions", body), ("/api/models", None)):
                status, headers, answer = server.ask(path, sent, headers=wrong)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
                assert headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer"):
            right = {"Authorization": f"{scheme} {key}"}
            assert server.ask("/v1/completions", body, headers=right)[0] == 200
        assert key not in server.log()


def test_on_another_address_any_host_with_the_key_is_served(folder):
    flags = ("--model", "plain", "--host", "0.0.0.0", "--api_key", "correct-horse")
    with serving(folder, *flags, log="any.log") as server:
        headers = {"Host": "box.lan", "Authorization": "Bearer correct-horse"}
        assert server.ask("/v1/models", headers=headers)[0] == 200
        assert server.ask("/v1/models", headers={"Host": "box.lan"})[0] == 401


def test_the_log_has_no_text(server):
    words = "zebra quagga"
    server.ask("/v1/completions", {"prompt": words, "max_tokens": 3, "stop": words, "seed": 1})
    server.ask(f"/{words.split()[0]}?{words.split()[1]}")
    server.ask("/v1/completions", {"prompt": [words, 1]})
    server.ask("/api/score", {"text": words})
    _, _, answer = server.ask("/", method="zebra" * 9_000)
    assert len(answer["error"]["message"]) < 200
    for line in (
        r"POST /v1/completions 200 \d+\.\d\d s, 12 \+ 3 tokens",
        r"GET \(another path\) 404 \d+\.\d\d s",
        r"\(another method\) / 405 \d+\.\d\d s",
    ):
        server.logged(f"^{line}$")
    assert "zebra" not in server.log() and "quagga" not in server.log()


# ---- malformed bodies

PATHS = ("/v1/completions", "/v1/chat/completions", "/api/generate", "/api/score", "/api/compare")
BROKEN = [b"", b"{", b"[", b"nul", b"null", b"3", b'"a"', b"[1, 2]", b"{'prompt': 1}", b"\xff\xfe"]
BROKEN += [b'{"prompt": NaN}', b'{"prompt": "a", "seed": 1e999}', b'{"prompt": "\\ud800"}']
BROKEN += [b'{"prompt": "a"} x', b'{"prompt": "\xe9"}', b"[" * 99_999, b'{"a":' * 9_999]
BROKEN += [b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": "a",}', b"\0" * 99]
# a value of each kind that a field cannot have
WRONG = [{"x": [1]}, -77, "wat", [[None]], 1e308, [{}], ["a", 1], True, 2**70]
IGNORED = ("model", "prompt", "stop", "messages")


def test_the_limits_named_here_are_the_servers():
    from nanogpt2.serve import house, web

    assert house.OPTIONS == OPTIONS and web.MOST_BYTES == MOST_BYTES


def malformed(number):
    """A body that no endpoint takes."""
    chance = random.Random(number)
    if number % 2:
        data = chance.choice(BROKEN)
        return data if number % 4 == 1 else data + chance.randbytes(chance.randrange(9)) + b"\x01"
    names = [name for name in sorted(OPTIONS) if OPTIONS[name].type is not bool]
    body = {chance.choice(names): chance.choice(WRONG[:1]) for _ in range(2)}
    body |= {chance.choice(names): chance.choice(WRONG) for _ in range(chance.randrange(3))}
    body |= {chance.choice(IGNORED): chance.choice(WRONG)}
    body |= {chance.choice(("nothing", "best_of", "n", "echo", "ids")): chance.choice(WRONG[:6])}
    return json.dumps(body).encode()


def test_a_thousand_malformed_bodies(server):
    for number in range(1000):
        data, path = malformed(number), PATHS[number % len(PATHS)]
        connection = server.connection()
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert 400 <= answer.status < 500, (path, data, content)
        assert answer.getheader("content-type") == "application/json" and b"\n" not in content
        error = json.loads(content)["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
    assert "Traceback" not in server.log() and "error:" not in server.log()
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("name", ["bad_words_ids", "sequence_bias", "force_words_ids"])
@pytest.mark.parametrize("depth", [8, 9, 300, 400, 600, 900])
def test_lists_in_lists_are_refused(server, name, depth):
    for path in ("/v1/completions", "/api/generate"):
        value = f'{{"{name}": {"[" * depth}{"]" * depth}}}'
        body = value if path.startswith("/v1") else f'{{"options": {value}}}'
        status, _, answer = server.ask(path, data=f'{{"prompt": "a", {body[1:]}'.encode())
        assert status == 400 and name in answer["error"]["message"], answer
    assert "error:" not in server.log()


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_any_value_of_an_option_is_an_answer(server, name):
    """Also of those options whose values only the search checks."""
    values = [*WRONG, [], [[]], [[1]], [1, 2], [[[1], 2]], {}, None, [[[1]]], 0, 1, 3, "true", 0.5]
    for value in values:
        if value == 3 and name == "max_time":
            continue
        for more in ({}, {"num_beams": 3}, {"num_beams": 4, "num_beam_groups": 2}):
            body = {"prompt": "ab", "max_tokens": 3} | more | {name: value}
            status, _, answer = server.ask("/v1/completions", body)
            assert status == 200 or 400 <= status < 500, (body, answer)
    assert "Traceback" not in server.log() and "error:" not in server.log()


# ---- the worker


def run_worker(test, most_waiting=2):
    """Run an asynchronous test with a Worker of its own."""

    async def run():
        worker = Worker(most_waiting)
        await asyncio.wait_for(test(worker), 600)

    asyncio.run(run())


class Gated:
    """Work whose steps a test lets through one by one."""

    def __init__(self, count=1000):
        self.gate, self.count = threading.Semaphore(0), count
        self.made, self.closed = [], threading.Event()

    def __call__(self):
        try:
            for number in range(self.count):
                self.gate.acquire()
                self.made.append(number)
                yield number
        finally:
            self.closed.set()


def letters(text):
    """Work that yields letters."""
    return lambda: (letter for letter in text)


async def event(happened):
    """Wait for a thread's event."""
    assert await asyncio.to_thread(happened.wait, 600)


def test_a_job_whose_reader_left_makes_one_token_more_at_most():
    async def test(worker):
        work = Gated()
        job = worker.submit(work)
        found = job.events()
        for number in range(3):
            work.gate.release()
            assert await anext(found) == number
        job.leave()
        work.gate.release(10)
        await event(work.closed)
        assert work.made == [0, 1, 2, 3]
        with pytest.raises(ReaderLeftError):
            await anext(found)
        # the model is free
        assert [each async for each in worker.submit(letters("ab")).events()] == ["a", "b"]

    run_worker(test)


def test_a_waiting_job_whose_reader_left_is_never_begun():
    async def test(worker):
        first, second = Gated(1), Gated(1)
        running = worker.submit(first)
        waiting = worker.submit(second)
        waiting.leave()
        first.gate.release()
        assert [each async for each in running.events()] == [0]
        assert [each async for each in worker.submit(letters("a")).events()] == ["a"]
        assert second.made == [] and not second.closed.is_set()

    run_worker(test)


def test_the_queue_is_bounded_and_frees_its_places():
    async def test(worker):
        work = Gated()
        jobs = [worker.submit(work)]
        work.gate.release()
        assert await anext(jobs[0].events()) == 0  # it runs, and two may wait
        jobs += [worker.submit(letters("a")) for _ in range(2)]
        with pytest.raises(QueueFullError) as refused:
            worker.submit(letters("a"))
        assert 1 <= refused.value.seconds <= 60
        jobs[1].leave()
        worker.done()
        jobs.append(worker.submit(letters("b")))
        jobs[0].leave()
        work.gate.release()
        assert [each async for each in jobs[3].events()] == ["b"]

    run_worker(test)


def test_unread_answers_are_bounded_too():
    async def test(worker):
        count = 0
        while True:
            try:
                job = worker.submit(letters("a"))
            except QueueFullError:
                break
            assert [each async for each in job.events()] == ["a"]
            count += 1
        assert count == 9  # 4 for each place of the queue, and the one that runs
        worker.done()
        worker.submit(letters("a"))

    run_worker(test)


def test_what_a_job_raises_reaches_its_reader_and_no_other():
    async def test(worker):
        def fails():
            yield 1
            raise ValueError("top_k must be 3")

        found = worker.submit(fails).events()
        assert await anext(found) == 1
        with pytest.raises(ValueError, match="top_k"):
            await anext(found)
        assert [each async for each in worker.submit(letters("a")).events()] == ["a"]

    run_worker(test)


def test_stopping_refuses_those_that_wait_and_finishes_the_one_that_runs():
    async def test(worker):
        work = Gated(3)
        running = worker.submit(work)
        work.gate.release()
        found = running.events()
        assert await anext(found) == 0
        waiting = worker.submit(letters("a"))
        worker.stop()
        with pytest.raises(StoppingError):
            await anext(waiting.events())
        with pytest.raises(StoppingError):
            worker.submit(letters("a"))
        work.gate.release(2)
        assert [each async for each in found] == [1, 2]

    run_worker(test)


def test_a_reader_that_takes_nothing_is_cut_off(monkeypatch):
    from nanogpt2.serve import app

    monkeypatch.setattr(app, "STALLED_SECONDS", 0.01)
    cut = []

    async def sends(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def never(message):
        await asyncio.Event().wait()

    guard = app.Guard(sends, None, is_local=True, cut_off=cut.append)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, None, never))
    assert cut and cut[0] is scope


# ---- clients that leave, that do not read, many at once


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a", "max_tokens": 1}'
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        HEAD[:20],
        REQUEST + HEAD[:20],
        HEAD.replace(b"json", b"text") + b"Content-Length: 9\r\n\r\n",
    ],
    ids=["nothing", "a part", "a part after a request", "no body after a refusal"],
)
def test_a_client_that_sends_no_request_is_cut_off(sent):
    import uvicorn
    from uvicorn.server import ServerState

    from nanogpt2.serve.server import Connection

    async def test():
        # looks pass while a request runs, which keeps its connection
        answered = []

        async def app(scope, receive, send):
            await asyncio.sleep(0.5)
            start = {"type": "http.response.start", "status": 200}
            await send(start | {"headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
            answered.append(scope["path"])

        config = uvicorn.Config(app, lifespan="off", http=Connection, timeout_keep_alive=9999)
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        served = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1")
        reader, writer = await asyncio.open_connection(*served.sockets[0].getsockname())
        writer.write(sent)
        with suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), HUNG)
        while state.connections:
            await asyncio.sleep(0.01)
        writer.close()
        served.close()
        assert len(answered) == sent.count(b"\r\n\r\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogpt2.serve.server.IDLE_SECONDS", 0.2)
        asyncio.run(test())


def open_stream(server, **body):
    """Begin a stream; return its socket's file after the first event."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    data = json.dumps({"prompt": "ab", "stream": True, "eos_token_id": None} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    connection.sendall(
        head.encode() + b"Connection: close\r\nContent-Type: application/json\r\n\r\n" + data
    )
    file = connection.makefile("rb")
    while not file.readline().startswith(b"data: "):
        pass
    return connection, file


def test_a_client_that_leaves_frees_the_model(folder):
    with serving(folder, "--model", "plain", "--max_tokens", "1000000", log="left.log") as server:
        connection, file = open_stream(server, max_tokens=1_000_000)
        file.close()
        connection.close()
        # it would not be answered while the other one ran
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
        assert server.end() == 128 + signal.SIGTERM
        line = r"^POST /v1/completions 499 .*s, 2 \+ (\d+) tokens$"
        (left,) = re.findall(line, server.log(), re.M)
        assert 0 < int(left) < 1_000_000


def test_a_client_that_leaves_without_a_stream_frees_the_model_too(folder):
    with serving(folder, "--model", "plain", "--max_tokens", "1000000", log="gone.log") as server:
        connection = server.connection()
        body = json.dumps({"prompt": "ab", "max_tokens": 1_000_000, "eos_token_id": None})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.close()
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_client_that_does_not_read_stops_nobody(server):
    body = {"max_tokens": 2000, "n": 8, "seed": 5}
    connection, file = open_stream(server, **body)
    # all of the long answer is written meanwhile
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
    rest = file.read()
    assert rest.count(b'"token_ids":[') >= 8 * 2000 and b"data: [DONE]" in rest
    file.close()
    connection.close()


def expected_texts(model, count):
    """{prompt: its greedy continuation}, each prompt another one."""
    found = {}
    for number in range(count):
        prompt = f"client {number:03}"
        ids = torch.tensor([BYTES.encode(prompt)])
        row = generate(model, ids, max_new_tokens=6).sequences[0, ids.size(1) :].tolist()
        found[prompt] = row[: row.index(256) + 1] if 256 in row else row
    return found


def rss(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


class Crowd:
    """A hundred clients at once, each of which knows its own answer."""

    def __init__(self, server, model, goes_on):
        self.server, self.goes_on = server, goes_on
        self.expected = expected_texts(model, 100)
        self.statuses, self.wrong = [], []

    def run(self):
        threads = [
            threading.Thread(target=self.client, args=item) for item in self.expected.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def client(self, prompt, expected):
        done = 0
        try:
            while self.goes_on(done):
                streams = done % 2 == 1
                body = {"prompt": prompt, "temperature": 0, "max_tokens": 6, "stream": streams}
                status, headers, found = self.server.ask("/v1/completions", body)
                self.statuses.append(status)
                if status == 429:
                    assert int(headers["retry-after"]) >= 1
                    continue
                assert status == 200, found
                chunks = events(found)[:-1] if streams else [found]
                ids = [i for chunk in chunks for c in chunk["choices"] for i in c["token_ids"]]
                assert ids == expected, (prompt, ids)
                done += 1
        except Exception as error:
            self.wrong.append((prompt, repr(error)))


def check_crowd(server, crowd):
    crowd.run()
    assert not crowd.wrong, crowd.wrong[:3]
    assert {*crowd.statuses} <= {200, 429} and 200 in crowd.statuses


def test_a_hundred_clients_at_once(folder):
    model = load_generator(folder / "plain")
    with serving(folder, "--model", "plain", "--queue", "40", log="crowd.log") as server:
        crowd = Crowd(server, model, lambda done: done < 2)
        check_crowd(server, crowd)
        assert crowd.statuses.count(200) == 200
        assert server.end() == 128 + signal.SIGTERM
        for status in (200, 429):
            logged = server.log().count(f"POST /v1/completions {status} ")
            assert logged == crowd.statuses.count(status)
        assert "Traceback" not in server.log()


@pytest.mark.slow
def test_a_hundred_clients_for_a_minute(folder):
    model = load_generator(folder / "plain")
    with serving(folder, "--model", "plain", "--queue", "40", log="minute.log") as server:
        # a third of the time to grow
        for seconds in (20, 40):
            end = time.monotonic() + seconds
            check_crowd(server, Crowd(server, model, lambda _, end=end: time.monotonic() < end))
            if seconds == 20:
                before = rss(server)
        assert rss(server) - before < 2**24
        assert "Traceback" not in server.log()


def test_a_log_that_nobody_reads_ends_nothing(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "nanogpt2.serve", "--port", "0", "--model", "plain"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        server = Running(process, folder)
        process.stderr.close()
        for _ in range(2):
            assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
        assert server.end() == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# ---- the end


def test_a_signal_lets_the_running_request_finish(folder):
    flags = ("--model", "plain", "--queue", "1", "--max_tokens", "4000")
    with serving(folder, *flags, log="end.log") as server:
        connection, file = open_stream(server, max_tokens=4000)
        # one of the two waits, so the other one is refused, and then both have arrived
        answers, arrived = [], threading.Semaphore(0)

        def ask():
            answers.append(server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0])
            arrived.release()

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        arrived.acquire()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert answers == [429, 503]
        rest = file.read()
        assert rest.count(b'"token_ids":[') >= 4000 - 1 and b'"finish_reason":"length"' in rest
        assert b"data: [DONE]" in rest
        assert server.process.wait(600) == 128 + signal.SIGTERM
        file.close()
        connection.close()
        with pytest.raises(ConnectionRefusedError):
            server.ask("/v1/models")


def test_an_interrupt_ends_an_idle_server(folder):
    with serving(folder, "--model", "plain", log="idle.log") as server:
        kept = server.connection()
        kept.request("GET", "/v1/models")
        kept.getresponse().read()  # the connection stays open
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
        kept.close()


def test_a_second_interrupt_ends_the_running_request(folder):
    with serving(folder, "--model", "plain", "--max_tokens", "1000000", log="twice.log") as server:
        connection, file = open_stream(server, max_tokens=1_000_000)
        server.process.send_signal(signal.SIGINT)
        refused = False
        while not refused:
            # no connection is taken any more: the first signal has arrived
            try:
                socket.create_connection(("127.0.0.1", server.port)).close()
            except OSError:
                refused = True
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
        file.close()
        connection.close()
        assert re.search(r"^POST /v1/completions 499 \d+\.\d\d s", server.log(), re.M)
        assert "Traceback" not in server.log() and "ASGI" not in server.log()


def test_a_failure_is_one_line_for_the_client_and_in_the_log(capsys):
    async def fails(scope, receive, send):
        raise RuntimeError("two\nlines")

    sent = []

    async def send(message):
        sent.append(message)

    from nanogpt2.serve import app

    guard = app.Guard(fails, None, is_local=True, cut_off=print)
    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(guard(scope, None, send))
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["type"] == "server_error"
    assert capsys.readouterr().err.splitlines()[0] == "error: RuntimeError: two lines"


def test_out_of_memory_and_a_damaged_model_are_said():
    for error, status in ((MemoryError(), 503), (FloatingPointError("not finite"), 500)):
        from nanogpt2.serve import web

        refused = web.refusal_of(error)
        assert refused.status == status and refused.as_json()["error"]["type"] == "server_error"
