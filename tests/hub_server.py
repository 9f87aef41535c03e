"""A server of the test's own that speaks as much of the hub's protocol as a download needs."""

import contextlib
import hashlib
import http.server
import json
import threading
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from nanogpt2 import hub, repository, terminal

REPO = "someone/tiny"
LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx")  # stored by LFS


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(files):
    """A commit's name: it changes with the files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def sibling(name, data):
    """What the API states of a file."""
    entry = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
    if name.endswith(LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
    return entry


class HubServer:
    """Repositories by name, each a dict of revisions, each a dict of files.

    requests: (path, headers) of each. plays: by path, a function of the handler that answers in
    place of the server.
    """

    def __init__(self):
        self.repos = {}
        self.requests = []
        self.plays = {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                with contextlib.suppress(OSError):
                    outer.plays.get(unquote(urlsplit(self.path).path), outer.answer)(self)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def paths(self):
        """The paths asked for since the last call."""
        asked = [unquote(path) for path, _ in self.requests]
        self.requests.clear()
        return asked

    def put(self, files, repo=REPO, revision="main"):
        """Commit files; return the commit."""
        self.repos.setdefault(repo, {})[revision] = dict(files)
        return commit_of(files)

    def answer(self, handler):
        parts = [unquote(part) for part in urlsplit(handler.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            files = self.files("/".join(parts[2:4]), parts[5])
            if files is not None:
                siblings = [sibling(*file) for file in files.items()]
                self.json(handler, {"sha": commit_of(files), "siblings": siblings})
                return
        elif parts[2:3] == ["resolve"] and len(parts) == 5:
            files = self.files("/".join(parts[:2]), parts[3])
            if files is not None and parts[4] in files:
                self.file(handler, files[parts[4]])
                return
        self.reply(handler, b"", 404)

    def files(self, repo, revision):
        revisions = self.repos.get(repo, {})
        commits = {commit_of(files): files for files in revisions.values()}
        return (revisions | commits).get(revision)

    def file(self, handler, data):
        """Send a file, or the part of it that is asked for."""
        start = handler.headers["Range"]
        if start is None:
            self.reply(handler, data)
            return
        first = int(start.removeprefix("bytes=").removesuffix("-"))
        span = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.reply(handler, data[first:], 206, Content_Range=span)

    def json(self, handler, value):
        self.reply(handler, json.dumps(value).encode())

    @staticmethod
    def reply(handler, body=b"", status=200, length=None, **headers):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)


def reply(*arguments, **options):
    """A play that answers so."""
    return lambda handler: HubServer.reply(handler, *arguments, **options)


def go(monkeypatch, url, folder, offline=False):
    """Let this process use a server and a cache of its own, as one that has just started."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hub, "CACHE", folder / "cache")
    monkeypatch.setattr(repository, "_asked", {})
    terminal.note_once.cache_clear()
