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
from hub_server import go
from reference import HUNG, ROOT

from nanogpt2 import download, hub

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


@pytest.mark.slow
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


# ---- a hostile or broken mirror

# set when a test ends: a thread that was given up ends with its connection
over = threading.Event()


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """Serve one answer to every GET; yield a function that sets it and fetches, in this process."""
    plays = {}
    over.clear()

    class Mirror(Hub):
        protocol_version = "HTTP/1.0"

        def do_GET(self):
            seen.append((self.path, dict(self.headers)))
            plays["get"](self)

        def do_HEAD(self):
            plays["get"](self)

    seen: list[tuple[str, dict]] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        go(monkeypatch, url, tmp_path)
        digest = hashlib.sha256(CONTENT).hexdigest()
        release = hub.Release("someone/some-model", REVISION, SIZE, digest)
        monkeypatch.setitem(hub.RELEASES, "gpt2", release)

        def fetch(get):
            plays["get"] = get
            return hub.fetch_weights("gpt2")

        fetch.seen = seen
        yield fetch
        over.set()
        server.shutdown()


def reply(body=CONTENT, status=200, length=None, **headers):
    def get(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(body)

    return get


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


DIGEST = hashlib.sha256(CONTENT).hexdigest()
STORED = [
    f"hf/hub/models--someone--some-model/blobs/{DIGEST}",
    f"hf/hub/models--someone--some-model/snapshots/{REVISION}/model.safetensors",
]
PARTIAL = f"{STORED[0]}.nanogpt2.incomplete"
HOSTILE = [
    {"ETag": '"{out}"'},
    {"ETag": '"../../../../evil"'},
    {"X_Linked_Etag": '"{out}"', "ETag": f'"{DIGEST}"'},
    {"ETag": f'"{"0" * 64}"'},
    {"ETag": f'"{DIGEST}"', "X_Repo_Commit": "../../../evil"},
    {"ETag": f'"{DIGEST}"', "X_Repo_Commit": "/tmp/evil", "X_Xet_Hash": "../evil"},
    {"ETag": f'"{DIGEST}"', "Content_Disposition": 'attachment; filename="../evil"'},
]


@pytest.mark.parametrize("headers", HOSTILE)
@pytest.mark.parametrize("body", [CONTENT, b"import evil"])
def test_no_header_of_a_mirror_becomes_a_path(mirror, tmp_path, headers, body):
    out = tmp_path / "out.pth"
    headers = {"X_Repo_Commit": REVISION, "X_Linked_Size": str(len(body))} | {
        name: value.format(out=out) for name, value in headers.items()
    }
    if body == CONTENT:
        assert mirror(reply(**headers)).read_bytes() == CONTENT
        assert [f for f in files_in(tmp_path) if not f.startswith("cache/")] == STORED
    else:
        with pytest.raises(ValueError, match=r"^the file downloaded for 'gpt2' is not OpenAI's"):
            mirror(reply(body, **headers))
        assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    "get",
    [
        reply(b"T" + CONTENT[1:], ETag=f'"{DIGEST}"'),
        reply(CONTENT + b"more"),
        reply(CONTENT[:-1]),
        reply(b"<html>please log in</html>", Content_Type="text/html"),
        reply(b"", length=2**62),
    ],
)
def test_other_bytes_never_reach_the_cache(mirror, tmp_path, get):
    with pytest.raises(ValueError, match="not OpenAI's") as error:
        mirror(get)
    assert files_in(tmp_path) == [] and len(str(error.value)) < 190
    # nor do they stand in the way of the right ones
    assert mirror(reply()).read_bytes() == CONTENT


def test_a_blob_and_a_link_of_an_earlier_attack_are_replaced(mirror, tmp_path):
    blob, link = (tmp_path / name for name in STORED)
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    blob.write_bytes(b"import evil")
    link.symlink_to("/nowhere/evil")
    assert mirror(reply()).read_bytes() == CONTENT
    assert link.resolve() == blob.resolve()


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{other}/x", "file://{file}", "ftp://127.0.0.1/x", "//127.0.0.1:1/"]
)
def test_a_redirect_leads_to_https_or_back(mirror, server, tmp_path, target):
    (tmp_path / "local").write_bytes(CONTENT)
    target = target.format(other=server.rpartition(":")[2], file=tmp_path / "local")
    with pytest.raises(OSError, match="cannot be downloaded"):
        mirror(reply(b"", 302, Location=target))
    assert Hub.requests == []
    assert files_in(tmp_path) == ["local"]


def test_a_redirect_within_the_mirror_is_followed(mirror):
    def get(handler):
        moved = reply(b"", 307, Location="/elsewhere")
        (reply() if handler.path == "/elsewhere" else moved)(handler)

    assert mirror(get).read_bytes() == CONTENT


def test_the_token_is_not_sent_over_http(mirror, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    mirror(reply())
    assert len(mirror.seen) == 1 and "hf_secret" not in str(mirror.seen)


def dribble(where):
    """Send a byte at a time and never end, in the headers or in the body."""

    def get(handler):
        start = b"HTTP/1.0 200 OK\r\n" + (b"" if where == "headers" else b"\r\n")
        with contextlib.suppress(OSError):
            handler.wfile.write(start)
            while not over.wait(0.02):
                handler.wfile.write(b"x")

    return get


@pytest.mark.parametrize("where", ["headers", "body"])
def test_an_endless_slow_answer_is_given_up(mirror, tmp_path, monkeypatch, where):
    monkeypatch.setattr(download, "WINDOW", 0.2)
    with pytest.raises(OSError, match="TimeoutError"):
        mirror(dribble(where))
    # the next try starts with what came
    assert files_in(tmp_path) == ([PARTIAL] if where == "body" else [])


def test_a_steady_server_that_never_gets_on_is_given_up(mirror, monkeypatch):
    """It sends fast enough, but each try breaks off a byte further: the whole has a time too."""
    monkeypatch.setattr(download, "WINDOW", 0.2)
    monkeypatch.setattr(download, "SLOWEST", 20_000)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    lengths = iter(range(SIZE // 2, SIZE))
    with pytest.raises(OSError, match="cannot be downloaded"):
        mirror(lambda handler: reply(CONTENT[: next(lengths)], length=SIZE)(handler))


def test_a_download_goes_on_where_it_broke_off(mirror, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    asked = []

    def get(handler):
        asked.append(handler.headers["Range"])
        if len(asked) == 1:
            reply(CONTENT[:4000], length=SIZE)(handler)
        else:
            part = f"bytes 4000-{SIZE - 1}/{SIZE}"
            reply(CONTENT[4000:], 206, Content_Range=part)(handler)

    assert mirror(get).read_bytes() == CONTENT
    assert asked == [None, "bytes=4000-"]


def test_another_part_than_asked_for(mirror, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with pytest.raises(ValueError, match="not OpenAI's"):
        mirror(reply(CONTENT, 206, Content_Range="bytes 7-9/9"))
