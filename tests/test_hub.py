"""Downloads, from a server of the test's own: once, checked, honest when offline."""

import contextlib
import hashlib
import http.server
import os
import pty
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
from reference import HUNG, ROOT

from nanogpt2 import hub

CONTENT = b"the weights" * 1000
SIZE = len(CONTENT)
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download of one file needs."""

    requests: list[str] = []
    sent = CONTENT

    def answer(self, body):
        self.requests.append(f"{self.command} {self.path}")
        known = self.path == f"/someone/some-model/resolve/{REVISION}/model.safetensors"
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(CONTENT) if known else 0))
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if body and known:
            self.wfile.write(self.sent)

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    Hub.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch(
    tmp_path,
    endpoint="http://127.0.0.1:9",
    sha256=None,
    size=SIZE,
    stderr=subprocess.PIPE,
    **environment,
):
    """Call fetch_weights in a process of its own: huggingface-hub reads its settings once."""
    sha256 = sha256 or hashlib.sha256(CONTENT).hexdigest()
    code = (
        "from nanogpt2 import hub\n"
        f"release = hub.Release('someone/some-model', {REVISION!r}, {size}, {sha256!r})\n"
        "hub.RELEASES['gpt2'] = release\n"
        "try: print(hub.fetch_weights('gpt2'))\n"
        "except (OSError, ValueError) as error: print(type(error).__name__, error)\n"
    )
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "60",
    } | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        timeout=HUNG,
        env=os.environ | environment,
    )


def test_downloads_once_and_then_needs_no_network(tmp_path, server):
    first = fetch(tmp_path, server)
    path = first.stdout.strip()
    assert path.startswith(str(tmp_path / "hf")), first.stderr
    assert Path(path).read_bytes() == CONTENT
    asked = len(Hub.requests)
    assert fetch(tmp_path, server).stdout.strip() == path
    assert len(Hub.requests) == asked
    assert fetch(tmp_path, HF_HUB_OFFLINE="1").stdout.strip() == path


def test_a_download_shows_its_progress(tmp_path, server):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    fetch(tmp_path, server, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert b"model.safetensors" in shown and b"100%" in shown


def test_wrong_bytes_are_refused(tmp_path, server):
    assert fetch(tmp_path, server, sha256="0" * 64).stdout.startswith("ValueError")
    assert fetch(tmp_path, server, size=5).stdout.startswith("ValueError")


def test_a_file_changed_in_the_cache_is_refused(tmp_path, server):
    path = fetch(tmp_path, server).stdout.strip()
    Path(path).write_bytes(b"T" + CONTENT[1:])
    again = fetch(tmp_path, server).stdout
    assert again.startswith("ValueError") and path in again


# told so; nobody listens; a protocol that is none
@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {}, {"endpoint": "ftp://127.0.0.1"}]
)
def test_without_a_network_one_line_says_what_to_do(tmp_path, environment):
    ran = fetch(tmp_path, **environment)
    out = ran.stdout
    assert out.startswith("OSError") and out.count("\n") == 1 and ran.stderr == ""
    for words in ("'gpt2'", "cannot be downloaded", "demo", ".safetensors"):
        assert words in out


def test_a_download_that_breaks_off(tmp_path, server, monkeypatch):
    """The server closes the connection at half of what it promised, however often it is asked."""
    monkeypatch.setattr(Hub, "sent", CONTENT[: SIZE // 2])
    out = fetch(tmp_path, server).stdout
    assert out.startswith("OSError 'gpt2'") and out.count("\n") == 1, out


def test_the_script_says_it_too(tmp_path):
    from reference import run_script

    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for script, argv in (("sample.py", ["Hello"]), ("train.py", ["pydocs"])):
        ran = run_script(script, *argv, cwd=tmp_path, **environment)
        assert ran.returncode == 2 and ran.stdout == b""
        assert ran.stderr.startswith(b"error: --") and ran.stderr.count(b"\n") == 1
        assert len(ran.stderr) <= 201


def test_releases_are_the_official_ones():
    assert hub.RELEASES["gpt2"].size == 548_105_171
    for release in hub.RELEASES.values():
        assert len(release.revision) == 40 and len(release.sha256) == 64


def serve_shakespeare(monkeypatch, server, data):
    monkeypatch.setattr(
        Hub,
        "do_GET",
        lambda self: (self.send_response(200), self.end_headers(), self.wfile.write(data)),
    )
    monkeypatch.setattr(hub, "SHAKESPEARE_URL", server)


def test_shakespeare_is_downloaded_once(monkeypatch, server):
    data = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    serve_shakespeare(monkeypatch, server, data)
    monkeypatch.setattr(hub, "SHAKESPEARE_SHA256", hashlib.sha256(data).hexdigest())
    path = hub.fetch_shakespeare()
    assert path.read_bytes() == data
    monkeypatch.setattr(hub, "SHAKESPEARE_URL", "http://127.0.0.1:9")
    assert hub.fetch_shakespeare() == path
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="delete it and download again"):
        hub.fetch_shakespeare()


def test_shakespeare_that_is_not_or_cannot_be_had(monkeypatch, server):
    serve_shakespeare(monkeypatch, server, b"Second Citizen")
    with pytest.raises(ValueError, match="not tiny Shakespeare"):
        hub.fetch_shakespeare()
    monkeypatch.setattr(hub, "SHAKESPEARE_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="give a text file"):
        hub.fetch_shakespeare()


def test_a_server_that_speaks_something_else(monkeypatch, server):
    monkeypatch.setattr(Hub, "do_GET", lambda self: self.wfile.write(b"220 smtp ready\r\n"))
    monkeypatch.setattr(hub, "SHAKESPEARE_URL", server)
    with pytest.raises(OSError, match="BadStatusLine"):
        hub.fetch_shakespeare()
