"""Models by their names on the hub, from a server of the test's own: honest, broken and hostile."""

import contextlib
import errno
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hub_server import REPO, HubServer, git_sha1, go, reply, sibling
from huggingface_hub import constants
from reference import HUNG, ROOT
from serve_process import save_byte_model
from transformers import GPT2LMHeadModel

from nanogpt2 import download, load_model, load_tokenizer, repository
from nanogpt2.checkpoints.folder import find_files, name_for_others
from nanogpt2.checkpoints.load import open_checkpoint
from nanogpt2.checkpoints.tokenizer_files import CHAT_TEMPLATE
from nanogpt2.config import (
    SampleConfig,
    TrainConfig,
    check_model,
    official_name,
    parse,
    repository_of,
)
from nanogpt2.evaluate import EvaluateConfig
from nanogpt2.quantize import QuantizeConfig
from nanogpt2.serve.options import ServeConfig
from nanogpt2.training.adapter import load_adapter, save_adapter
from nanogpt2.training.lora import add_lora
from nanogpt2.tune import TuneConfig

API = f"/api/models/{REPO}/revision/main"
NEVER = {
    "modeling_evil.py": b"raise SystemExit('run')",
    "tf_model.h5": b"h5",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "rust_model.ot": b"rust",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "README.md": b"# tiny",
    ".gitattributes": b"*.bin lfs",
}


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """The files of a small model, and those of another, of the same shape."""
    folders = [save_byte_model(tmp_path_factory.mktemp("m") / str(n), seed=n) for n in (3, 4)]
    return [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]


@pytest.fixture
def tiny(model_files):
    """The files that a download of the small model has."""
    return {n: d for n, d in model_files[0].items() if n != "manifest.json"}


@pytest.fixture
def server(monkeypatch, tmp_path, tiny):
    """A server that has the small model, among files that nobody needs."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = HubServer()
    server.put(tiny | NEVER)
    go(monkeypatch, server.url, tmp_path)
    yield server
    server.close()


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def folder_of(name):
    return find_files(name).files[0].parent


def files_in(folder):
    """The files in huggingface-hub's cache, links and their folders by their names alone."""
    top = folder / "hf" / "hub"
    return sorted(str(p.relative_to(top)) for p in top.rglob("*") if not p.is_dir())


def outside(folder):
    """What lies in a test's folder beside the two caches."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("hf", "cache"))


def failure(name=REPO):
    """The one line that a failed download gives."""
    with pytest.raises((ValueError, OSError)) as caught:
        find_files(name)
    line = str(caught.value)
    assert "\n" not in line and len(f"error: --model {line}") <= 200
    return line


# ---- names

SHA = "0123456789abcdef0123456789abcdef01234567"
NAMES = [
    ("someone/tiny", ("someone/tiny", "main")),
    ("someone/tiny@main", ("someone/tiny", "main")),
    ("some-one/t.i_n-y", ("some-one/t.i_n-y", "main")),
    ("someone/tiny@v1.0", ("someone/tiny", "v1.0")),
    ("someone/tiny@refs/pr/1", ("someone/tiny", "refs/pr/1")),
    ("someone/tiny@a--b", ("someone/tiny", "a--b")),
    (f"someone/tiny@{SHA}", ("someone/tiny", SHA)),
    ("distilgpt2", ("distilbert/distilgpt2", "main")),
    ("distilgpt2@v1", ("distilbert/distilgpt2", "v1")),
    ("gpt2@main", ("openai-community/gpt2", "main")),
    (f"gpt2-xl@{SHA}", ("openai-community/gpt2-xl", SHA)),
    ("openai-community/gpt2@main", ("openai-community/gpt2", "main")),
]
NO_REPOSITORY = [
    *("gpt2", "gpt2-xl", "openai-community/gpt2", "demo", "", " ", "someone", "someone@main"),
    *("./someone/tiny", "/someone/tiny", "someone/tiny/", "a/b/c", "someone//tiny", "/gpt2"),
    *("../tiny", "someone/..", "someone/.tiny", "some..one/tiny", "someone/ti--ny", "a/b.git"),
    *("-a/b", "a/-b", "a/b-", "some one/tiny", "someone/tïny", "someone/tiny\n", "a\0/b"),
    *("someone/tiny@", "someone/tiny@../x", "someone/tiny@a/../b", "someone/tiny@.x", "a/b@-x"),
    *("someone/tiny@/x", "someone/tiny@x/", "someone/tiny@x y", "someone/tiny@x@y", "a/b@\u0661"),
    *("someone/model.safetensors", "someone/pytorch_model.bin", "out/config.json", "demo@main"),
    *(f"{'a' * 97}/b", f"a/{'b' * 97}", f"a/b@{'c' * 101}", f"a/b@{'c' * 5000}", "a\\b", "C:/b"),
    *("https://huggingface.co/someone/tiny", "hf.co/someone/tiny"),
]


@pytest.mark.parametrize(("name", "found"), NAMES)
def test_names_of_repositories(name, found):
    assert repository_of(name) == found
    assert official_name(name) is None
    check_model(name)
    assert name_for_others(name) == found[0]
    # a Path is a path
    assert repository_of(Path(name)) is None


@pytest.mark.parametrize("name", NO_REPOSITORY)
def test_names_of_no_repository(name):
    assert repository_of(name) is None
    if official_name(name) is None and name != "demo":
        with pytest.raises((ValueError, OSError)):
            check_model(name)


def test_openai_s_old_and_new_names():
    assert official_name("gpt2") == official_name("openai-community/gpt2") == "gpt2"
    assert official_name("openai-community/gpt2-large") == "gpt2-large"
    assert name_for_others("openai-community/gpt2-large") == "openai-community/gpt2-large"
    for name in (
        "openai-community/demo",
        "openai/gpt2",
        "/gpt2",
        "x/gpt2",
        "gpt2@main",
        Path("gpt2"),
    ):
        assert official_name(name) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-2", "did you mean gpt2?"),
        ("GPT2-Medium", "did you mean gpt2-medium?"),
        ("gpt2-small", "did you mean gpt2?"),
        ("distillgpt2", "did you mean distilgpt2?"),
        ("https://huggingface.co/someone/tiny/tree/main", ": write someone/tiny"),
        ("hf.co/someone/tiny", ": write someone/tiny"),
        ("someone/tiny@", "the revision after @ must be a branch, a tag or a commit, not ''"),
        ("DialoGPT-small", "gpt2-xl, demo, USER/NAME of the hub)"),
        ("x" * 90, "gpt2-xl, demo, USER/NAME of the hub)"),
    ],
)
def test_a_wrong_name_says_what_to_write(name, said):
    with pytest.raises(ValueError, match="is not a file, a folder or a known model") as caught:
        check_model(name)
    assert said in str(caught.value) and len(f"error: --compare_model {caught.value}") <= 200


def test_a_path_of_that_name_wins(server, tmp_path, monkeypatch, model_files):
    monkeypatch.chdir(tmp_path)
    save_byte_model(tmp_path / REPO, seed=4)
    save_byte_model(tmp_path / "openai-community/gpt2", seed=4)
    save_byte_model(tmp_path / "distilgpt2", seed=4)
    for name in (REPO, f"./{REPO}", "openai-community/gpt2", "distilgpt2"):
        assert weights(folder_of(name)) == model_files[1]["model.safetensors"]
    assert server.paths() == []
    # with its revision it is a name again
    assert weights(folder_of(f"{REPO}@main")) == model_files[0]["model.safetensors"]
    (tmp_path / "someone/file").write_text("text")
    assert "is not a .safetensors file" in failure("someone/file")


# ---- downloads


def test_a_repository_is_a_model(server, tmp_path, tiny):
    ours = load_model(REPO)
    ids = torch.tensor([load_tokenizer(REPO).encode("A fine day")])
    asked = server.paths()
    assert asked[:2] == [f"{API}?blobs=true", f"/{REPO}/resolve/{folder_of(REPO).name}/config.json"]
    assert {Path(path).name for path in asked[1:]} == {*tiny} and len(asked) == len(tiny) + 1
    # in the layout that transformers reads without a network
    theirs = GPT2LMHeadModel.from_pretrained(REPO, cache_dir=constants.HF_HUB_CACHE)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)
    place = tmp_path / "hf/hub/models--someone--tiny"
    for name, data in tiny.items():
        link = folder_of(REPO) / name
        assert link.is_symlink() and link.read_bytes() == data
        assert link.resolve().parent == place / "blobs"
    assert (place / "refs/main").read_text() == folder_of(REPO).name
    assert (folder_of(REPO) / "vocab.json").resolve().name == git_sha1(tiny["vocab.json"])


def test_what_is_here_is_not_downloaded_again(server, tmp_path, monkeypatch):
    folder = folder_of(REPO)
    server.paths()
    # in this process not even asked for
    assert folder_of(REPO) == folder and server.paths() == []
    go(monkeypatch, server.url, tmp_path)
    assert folder_of(REPO) == folder and server.paths() == [f"{API}?blobs=true"]
    # a commit does not change
    assert folder_of(f"{REPO}@{folder.name}") == folder and server.paths() == []
    go(monkeypatch, server.url, tmp_path, offline=True)
    assert folder_of(REPO) == folder_of(f"{REPO}@{folder.name}") == folder and server.paths() == []
    assert "cannot be downloaded (HF_HUB_OFFLINE is set); go online" in failure(f"{REPO}@other")


def test_revisions(server, tmp_path, monkeypatch, model_files, tiny):
    old = folder_of(REPO)
    server.put(model_files[1], revision="refs/pr/1")
    other = folder_of(f"{REPO}@refs/pr/1")
    assert weights(other) != weights(old)
    server.paths()
    moved = {"README.md": b"new", "model.safetensors": model_files[1]["model.safetensors"]}
    server.put(tiny | moved)
    # a process sees one model, the next one the new
    assert folder_of(REPO) == old and server.paths() == []
    go(monkeypatch, server.url, tmp_path)
    new = folder_of(REPO)
    # the blobs are here under other commits
    assert server.paths() == [f"{API}?blobs=true"]
    assert new not in (old, other) and weights(new) == weights(other) and weights(old)
    go(monkeypatch, server.url, tmp_path, offline=True)
    assert folder_of(REPO) == new and folder_of(f"{REPO}@refs/pr/1") == other
    assert folder_of(f"{REPO}@{old.name}") == old


def test_a_commit_that_another_program_left_without_a_vocabulary(server, monkeypatch, tmp_path):
    folder = folder_of(REPO)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    go(monkeypatch, server.url, tmp_path)
    server.paths()
    assert load_tokenizer(f"{REPO}@{folder.name}").vocab_size == 257
    assert (folder / "merges.txt").exists() and len(server.paths()) == 1


@pytest.mark.parametrize("answer", [None, reply(status=503), reply(b"<html>"), reply(status=429)])
def test_without_an_answer_the_copy_is_used(server, tmp_path, monkeypatch, capsys, answer):
    folder = folder_of(REPO)
    go(monkeypatch, server.url if answer else "http://127.0.0.1:9", tmp_path)
    server.plays[API] = answer
    assert folder_of(REPO) == folder == folder_of(REPO)
    err = capsys.readouterr().err
    assert (
        err.count("note: ")
        == err.count("gives no answer: using the copy of someone/tiny here")
        == 1
    )
    # not where the hub says no
    go(monkeypatch, server.url, tmp_path)
    server.plays[API] = reply(status=404)
    assert "has no repository of that name" in failure()
    # nor where a part is missing
    (folder / "model.safetensors").unlink()
    server.plays[API] = answer or reply(status=500)
    assert "cannot be downloaded" in failure()


def test_the_template_of_a_chat_in_a_file_of_its_own(server, tiny):
    """As newer transformers write it."""
    server.put(tiny | {"chat_template.jinja": CHAT_TEMPLATE.encode()})
    with open_checkpoint(REPO) as checkpoint:
        assert checkpoint.is_chat


def test_a_moved_repository(server):
    server.plays["/api/models/old/name/revision/main"] = reply(status=307, Location=API)
    for name in server.files(REPO, "main"):
        commit = repository_commit(server)
        moved = reply(status=307, Location=f"/{REPO}/resolve/{commit}/{name}")
        server.plays[f"/old/name/resolve/{commit}/{name}"] = moved
    assert folder_of("old/name").name == commit


def repository_commit(server):
    return server.put(server.files(REPO, "main"))


def test_distilgpt2_and_an_official_name_with_a_revision(server, tiny):
    server.put(tiny, "distilbert/distilgpt2")
    server.put(tiny, "openai-community/gpt2", "dev")
    assert folder_of("distilgpt2").parent.parent.name == "models--distilbert--distilgpt2"
    assert folder_of("gpt2@dev").parent.parent.name == "models--openai-community--gpt2"
    assert load_tokenizer("gpt2@dev").vocab_size == 257


def shards(data, parts, suffix):
    """Weights under the names of an index; their content does not matter here."""
    names = [f"model-{n + 1:05}-of-{parts:05}{suffix}" for n in range(parts)]
    index = {"weight_map": {f"tensor{n}": name for n, name in enumerate(names)}}
    return {name: data + bytes([n]) for n, name in enumerate(names)}, json.dumps(index).encode()


def without_weights(tiny):
    return {n: d for n, d in tiny.items() if n != "model.safetensors"}


@pytest.mark.parametrize(
    ("index_name", "suffix"),
    [("model.safetensors.index.json", ".safetensors"), ("pytorch_model.bin.index.json", ".bin")],
)
def test_weights_in_shards(server, tiny, index_name, suffix):
    parts, index = shards(b"part", 3, suffix)
    server.put(without_weights(tiny) | parts | {index_name: index, f"model-x{suffix}": b"x"})
    folder = repository.fetch_repository(REPO, "main", lambda folder: None)
    assert {p.name for p in folder.iterdir()} == {*without_weights(tiny), *parts, index_name}


def test_a_pickle_only_without_safetensors(server, tiny):
    server.put(without_weights(tiny) | {"pytorch_model.bin": b"pickle", "model.py": b"evil"})
    folder = repository.fetch_repository(REPO, "main", lambda folder: None)
    assert {p.name for p in folder.iterdir()} == {*without_weights(tiny), "pytorch_model.bin"}


# ---- refusals, each in one line


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply(status=401), ["'someone/tiny'", "private, gated or missing", "HF_TOKEN", "login"]),
        (reply(status=403), ["'someone/tiny'", "private, gated or missing", "HF_TOKEN"]),
        (reply(status=404), ["'someone/tiny'", "not a path", "revision 'main'", "127.0.0.1"]),
        (reply(status=429), ["too many requests", "try again later"]),
        (reply(status=429, Retry_After="77"), ["too many requests", "try again in 77 s"]),
        (reply(status=429, Retry_After="x" * 999), ["try again later"]),
        (reply(status=429, Retry_After="\xb2"), ["try again later"]),
        (reply(status=500), ["answers 500; try again later"]),
        (reply(status=503), ["answers 503"]),
        (reply(b"<html>log in</html>", Content_Type="text/html"), ["the answer is not JSON"]),
        (reply(b""), ["the answer is not JSON"]),
        (reply(b"[" * 100_000), ["the answer is not JSON"]),
        (reply(b"\xff{}"), ["the answer is not JSON"]),
        (reply(b"[1]"), ["the answer is not JSON"]),
        (reply(status=302, Location=API), ["redirects without end"]),
        (reply(status=302, Location="http://127.0.0.2:1/x"), ["an address without https"]),
        (reply(status=302, Location="file:///etc/passwd"), ["answers 302"]),
        (reply(status=302), ["answers 302"]),
        (reply(b"{}", length=10**9), ["sends more than 16777216 bytes"]),
        (reply(b" " * (2**24 + 1)), ["sends more than 16777216 bytes"]),
        (reply(b"{}", length=9), ["cannot be downloaded (ConnectionError)"]),
        (lambda handler: handler.wfile.write(b"220 smtp\r\n"), ["cannot be downloaded (BadStatus"]),
        (lambda handler: None, ["cannot be downloaded (RemoteDisconnected"]),
    ],
)
def test_an_answer_that_is_none(server, tmp_path, answer, words):
    server.plays[API] = answer
    line = failure()
    assert all(word in line for word in words), line
    assert files_in(tmp_path) == [] and outside(tmp_path) == []
    # nor is there anything in the way
    del server.plays[API]
    assert folder_of(REPO)


def test_nobody_listens(tmp_path, monkeypatch):
    go(monkeypatch, "http://127.0.0.1:9", tmp_path)
    for name in ("someone/tiny@v2", "someone/tiny@main", "gpt2@main", "distilgpt2"):
        line = failure(name)
        assert f"'{name}' is not on this machine and cannot be downloaded (Connection" in line
    for url in (
        "",
        "ftp://127.0.0.1",
        "127.0.0.1",
        "http://[::1",
        "http://user:secret@127.0.0.1:9",
    ):
        go(monkeypatch, url, tmp_path)
        assert "secret" not in failure()


def changed(server, name="model.safetensors", **fields):
    """The API's true answer, but for fields of one file; None removes a field."""
    files = server.files(REPO, "main")
    entries = {n: sibling(n, data) for n, data in files.items()}
    for field, value in fields.items():
        place = entries[name]["lfs"] if field in ("sha256", "lfs_size") else entries[name]
        place[field.removeprefix("lfs_")] = value
    return {"sha": SHA, "siblings": [*entries.values()]}


LIES = [
    ({"rfilename": "../evil"}, "states a wrong file name: '../evil'"),
    ({"rfilename": "/tmp/evil"}, "states a wrong file name: '/tmp/evil'"),
    ({"rfilename": "a/../../evil"}, "wrong file name"),
    ({"rfilename": "a//b"}, "wrong file name"),
    ({"rfilename": "a\nb"}, "wrong file name"),
    ({"rfilename": "a\0b"}, "wrong file name"),
    ({"rfilename": ""}, "wrong file name"),
    ({"rfilename": 5}, "wrong file name"),
    ({"rfilename": "config.json"}, "wrong file name"),
    ({"rfilename": "x" * 1000}, "neither model.safetensors nor pytorch_model.bin"),
    ({"sha256": "../../evil"}, "states no hash of model.safetensors"),
    ({"sha256": "A" * 64}, "no hash"),
    ({"sha256": "a" * 40}, "no hash"),
    ({"sha256": None}, "no hash"),
    ({"sha256": "0" * 64}, "model.safetensors is not as 127.0.0.1"),
    ({"size": None}, "no size"),
    ({"size": -1}, "no size"),
    ({"size": True}, "no size"),
    ({"size": "9"}, "no size"),
    ({"size": 9}, "no size"),
    ({"size": 9, "lfs_size": 9}, "sends more than 9 bytes"),
    ({"size": 10**6, "lfs_size": 10**6}, "other bytes"),
    ({"size": 2**60, "lfs_size": 2**60}, "bytes; 274,877,906,944 are allowed"),
    ({"size": 2**38 - 1, "lfs_size": 2**38 - 1}, "cannot be kept on disk: 274.9 GB are needed"),
    ({"lfs": ["x"], "blobId": "0" * 40}, "other bytes"),
    ({"lfs": None, "blobId": None}, "no hash"),
    ({"name": "config.json", "size": 2**26}, "config.json has 67,108,864 bytes; 33,554,432 are"),
    ({"name": "config.json", "blobId": "../evil"}, "states no hash of config.json"),
    ({"name": "config.json", "blobId": "0" * 40}, "states it: other bytes"),
]


@pytest.mark.parametrize(("fields", "said"), LIES)
def test_a_lie_about_a_file(server, tmp_path, tiny, fields, said):
    server.repos[REPO][SHA] = tiny
    server.repos[REPO]["main"] = tiny
    server.plays[API] = reply(json.dumps(changed(server, **fields)).encode())
    line = failure()
    assert line.startswith("'someone/tiny'") and said in line, line
    assert outside(tmp_path) == []
    kept = files_in(tmp_path)
    assert not any("model.safetensors" in p or "incomplete" in p or "refs" in p for p in kept), kept


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sha": ""}, "states no commit"),
        ({"sha": None}, "states no commit"),
        ({"sha": "../../evil"}, "states no commit"),
        ({"sha": SHA.upper()}, "states no commit"),
        ({"sha": SHA[:7]}, "states no commit"),
        ({"siblings": None}, "states no files"),
        ({"siblings": {"rfilename": "config.json"}}, "states no files"),
        ({"siblings": []}, "has no config.json: it does not hold a GPT-2"),
        ({"siblings": ["config.json"]}, "wrong file name"),
    ],
)
def test_a_lie_about_the_repository(server, tmp_path, fields, said):
    server.plays[API] = reply(json.dumps(changed(server) | fields).encode())
    assert said in failure() and files_in(tmp_path) == []


def test_another_commit_than_asked_for(server):
    server.plays[f"/api/models/{REPO}/revision/{SHA[::-1]}"] = reply(
        json.dumps(changed(server)).encode()
    )
    assert f"states another commit, {SHA}" in failure(f"{REPO}@{SHA[::-1]}")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b'{"model_type": "bert"}'}, "model_type must be 'gpt2', not 'bert'"),
        ({"config.json": b'{"add_cross_attention": true}'}, "add_cross_attention must be False"),
        ({"config.json": b"<html>"}, "config.json' is no JSON"),
        ({"config.json": b"[]"}, "config.json' is no JSON object"),
        ({"config.json": b'{"n_embd": -1}'}, "n_embd"),
        ({"model.safetensors": None}, "neither model.safetensors nor pytorch_model.bin"),
        ({"config.json": None}, "has no config.json"),
    ],
)
def test_another_model_is_refused_before_its_weights_come(server, tmp_path, tiny, files, said):
    changes = {name: data for name, data in (tiny | files).items() if data is not None}
    server.put(changes | {"pytorch_model.msgpack": b"x"})
    line = failure()
    assert line.startswith("'someone/tiny'") and said in line and str(tmp_path) not in line
    assert not any("model.safetensors" in path or "vocab" in path for path in server.paths())


@pytest.mark.parametrize(
    "index",
    [
        *(b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b'{"weight_map": 5}'),
        *(b'{"weight_map": {"a": 5}}', b'{"weight_map": {"a": ["x.bin"]}}'),
        b'{"weight_map": {"a": "../evil.safetensors"}}',
        b'{"weight_map": {"a": "config.json"}}',
        *(b'{"weight_map": {"a": "/evil.safetensors"}}', b'{"weight_map": {"a": ""}}'),
        *(
            b'{"weight_map": {"a": "pytorch_model.bin"}}',
            b'{"weight_map": {"a": "no.safetensors"}}',
        ),
        *(b'{"weight_map": {"a": "sub/x.safetensors"}}', b'{"weight_map": {"a": ".safetensors"}}'),
        b'{"weight_map": {"a": "x.safetensors", "b": null}}',
    ],
)
def test_an_index_of_other_files(server, tmp_path, tiny, index):
    more = {"sub/x.safetensors": b"x", ".safetensors": b"x", "x.safetensors": b"x"}
    server.put(without_weights(tiny) | NEVER | more | {"model.safetensors.index.json": index})
    line = failure()
    assert "which is not a file of the repository" in line or "has no weight_map" in line
    assert not any("safetensors'" in p or p.endswith(".bin") for p in server.paths())
    assert outside(tmp_path) == []


def test_a_full_disk(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = failure()
    assert "cannot be kept on disk: 0.0 GB are needed, 0.0 GB are free" in line
    assert not any("model.safetensors" in path for path in server.paths())
    monkeypatch.undo()
    go(monkeypatch, server.url, tmp_path)
    (tmp_path / "hf/hub/models--someone--tiny/refs").write_text("a file in the way")
    assert "cannot be kept on disk: " in failure()


def test_a_disk_that_fills_up_is_not_tried_again(server):
    class Full(io.BytesIO):
        def write(self, data):
            super().write(data[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = of_weights(server)
    with pytest.raises(OSError, match="No space left"):
        download.download(server.url + path, Full(), 10**6)
    # a server's error after nine bytes would be worth more tries
    assert len(server.paths()) == 1


# ---- broken downloads


def of_weights(server):
    return f"/{REPO}/resolve/{repository_commit(server)}/model.safetensors"


def ranges(server, path):
    return [headers.get("Range") for asked, headers in server.requests if asked == path]


def break_off(server, path, count):
    """Let the server send `count` bytes of a file and close, each time it is asked."""
    data = server.files(REPO, "main")["model.safetensors"]
    server.plays[path] = lambda handler: server.reply(handler, data[:count], length=len(data))


def partials(tmp_path):
    return [*(tmp_path / "hf/hub/models--someone--tiny/blobs").glob("*.incomplete")]


def test_a_broken_download_goes_on_in_the_next_process(server, tmp_path, tiny):
    path = of_weights(server)
    break_off(server, path, 4000)
    assert "cannot be downloaded (ConnectionError)" in failure()
    (partial,) = partials(tmp_path)
    assert partial.read_bytes() == tiny["model.safetensors"][:4000]
    assert not (partial.parent.parent / "refs").exists()
    server.plays.clear()
    server.requests.clear()
    assert weights(folder_of(REPO)) == tiny["model.safetensors"]
    assert ranges(server, path) == ["bytes=4000-"] and partials(tmp_path) == []


@pytest.mark.parametrize(
    ("kept", "play"),
    [
        # a server that sends the whole again, refuses, or sends another part
        (4000, lambda data: lambda h: HubServer.reply(h, data)),
        (
            4000,
            lambda data: (
                lambda h: (
                    HubServer.reply(h, b"", 416) if h.headers["Range"] else HubServer.reply(h, data)
                )
            ),
        ),
        (
            4000,
            lambda data: (
                lambda h: (
                    HubServer.reply(h, b"x", 206, Content_Range="bytes 7-7/8")
                    if h.headers["Range"]
                    else HubServer.reply(h, data)
                )
            ),
        ),
        # other bytes than the file's, as many as it has or more
        (b"x" * 4000, None),
        (10**6, None),
        ("whole", None),
    ],
)
def test_what_was_kept_of_no_use(server, tmp_path, tiny, kept, play):
    path, data = of_weights(server), tiny["model.safetensors"]
    break_off(server, path, 4000)
    failure()
    (partial,) = partials(tmp_path)
    if kept == "whole":
        partial.write_bytes(bytes(len(data)))
    elif kept != 4000:
        partial.write_bytes(kept if isinstance(kept, bytes) else bytes(kept))
    server.plays.clear()
    if play is not None:
        server.plays[path] = play(data)
    assert weights(folder_of(REPO)) == data and partials(tmp_path) == []


def test_a_partial_that_is_a_link_is_not_written_through(server, tmp_path, tiny):
    break_off(server, of_weights(server), 4000)
    failure()
    (partial,) = partials(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    partial.unlink()
    partial.symlink_to(victim)
    server.plays.clear()
    assert weights(folder_of(REPO)) == tiny["model.safetensors"] and victim.read_text() == "mine"


def test_a_changed_file_is_refused(server, tmp_path, monkeypatch):
    folder = folder_of(REPO)
    data = weights(folder)
    (folder / "model.safetensors").resolve().write_bytes(b"x" + data[1:])
    go(monkeypatch, server.url, tmp_path)
    with pytest.raises(ValueError, match="is damaged: delete it"):
        find_files(REPO)


def test_a_file_system_without_links(server, tmp_path, monkeypatch, tiny):
    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = folder_of(REPO)
    go(monkeypatch, server.url, tmp_path)
    server.paths()
    assert folder_of(REPO) == folder and len(server.paths()) == 1
    assert all((folder / name).read_bytes() == data for name, data in tiny.items())


# ---- several processes

FETCH = "import sys; from nanogpt2 import hub, repository\n" + (
    "print(repository.fetch_repository(sys.argv[1], 'main', lambda folder: None))"
)


def start(server, tmp_path, *argv, **environment):
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    } | environment
    return subprocess.Popen(
        [sys.executable, "-W", "error", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def slowly(server, path, hold):
    """Let the server stop in the middle of a file until `hold` returns."""

    def send(handler):
        data = server.files(REPO, "main")["model.safetensors"]
        first = int((handler.headers["Range"] or "bytes=0-")[6:-1])
        span = {"Content_Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
        status, half = (206 if first else 200), max(first, 5000)
        server.reply(handler, data[first:half], status, length=len(data) - first, **span)
        hold()
        handler.wfile.write(data[half:])

    server.plays[path] = send


def until(condition):
    deadline = time.monotonic() + HUNG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_download_once(server, tmp_path, tiny):
    path, started = of_weights(server), []
    waits = "waiting for another process to download the model"

    def hold():
        # the second process says that it waits for the first
        until(lambda: len(started) == 2)
        lines = [process.stderr.readline() for process in started[1:]]
        assert lines == [f"{waits}\n"]

    slowly(server, path, hold)
    started.append(start(server, tmp_path, "-c", FETCH, REPO))
    until(lambda: len(ranges(server, path)) == 1)
    started.append(start(server, tmp_path, "-c", FETCH, REPO))
    outs = [process.communicate(timeout=HUNG) for process in started]
    assert [process.returncode for process in started] == [0, 0], outs
    assert ranges(server, path) == [None]
    folders = {Path(out.strip()) for out, _ in outs}
    assert len(folders) == 1 and weights(folders.pop()) == tiny["model.safetensors"]
    assert partials(tmp_path) == []


def test_a_kill_leaves_no_half_file(server, tmp_path, tiny):
    path = of_weights(server)
    slowly(server, path, lambda: until(lambda: process.returncode is not None))
    process = start(server, tmp_path, "-c", FETCH, REPO)
    until(lambda: partials(tmp_path) and partials(tmp_path)[0].stat().st_size >= 5000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not any(path.endswith("snapshots/model.safetensors") for path in files_in(tmp_path))
    (partial,) = partials(tmp_path)
    assert partial.stat().st_size < len(tiny["model.safetensors"])
    assert not partial.with_name(partial.name.partition(".")[0]).exists()
    server.plays.clear()
    server.requests.clear()
    process = start(server, tmp_path, "-c", FETCH, REPO)
    out, err = process.communicate(timeout=HUNG)
    assert weights(Path(out.strip())) == tiny["model.safetensors"], err
    assert ranges(server, path) == [f"bytes={5000}-"] and partials(tmp_path) == []


# ---- the token


@pytest.fixture
def https(server, monkeypatch):
    """Let https lead to the server, whatever the host, and note who gets which token."""

    def connect(connection):
        connection.sock = socket.create_connection(("127.0.0.1", server.server.server_port))

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", connect)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def sent():
        found = {}
        for _, headers in server.requests:
            found.setdefault(headers["Host"], set()).add(headers.get("Authorization"))
        return found

    return sent


def redirect(server, path, target):
    play = server.plays.get(path, server.answer)
    host = target.partition("//")[2].partition("/")[0]

    def get(handler):
        if handler.headers["Host"] == host:
            handler.path = target.partition(host)[2] or handler.path
            play(handler)
        else:
            server.reply(handler, b"", 302, Location=target)

    server.plays[path] = get


def test_the_token_goes_to_the_endpoint_alone(server, https, monkeypatch, tmp_path, tiny):
    go(monkeypatch, "https://hub.test", tmp_path)
    path = of_weights(server)
    redirect(server, path, f"https://cdn.test{path}")
    redirect(server, API, f"https://mirror.test{API}")
    assert weights(folder_of(REPO)) == tiny["model.safetensors"]
    assert https() == {
        "hub.test": {"Bearer hf_secret"},
        "mirror.test": {None},
        "cdn.test": {None},
    }


def test_the_token_goes_with_a_redirect_within_the_endpoint(server, https, monkeypatch, tmp_path):
    go(monkeypatch, "https://hub.test", tmp_path)
    server.plays["/api/models/old/name/revision/main"] = reply(status=307, Location=API)
    server.plays[API] = reply(status=401)
    assert "private, gated or missing" in failure("old/name")
    assert len(server.requests) == 2 and https() == {"hub.test": {"Bearer hf_secret"}}


@pytest.mark.parametrize(
    "target",
    [
        "http://hub.test/x",
        "http://127.0.0.1:9/x",
        "https://hub.test:444/x",
        "https://hub.test.evil.test/x",
        "https://hub.test@evil.test/x",
        "//evil.test/x",
    ],
)
def test_the_token_goes_to_no_other_server(server, https, monkeypatch, tmp_path, target):
    go(monkeypatch, "https://hub.test", tmp_path)
    server.plays[API] = reply(status=302, Location=target)
    failure()
    with_token = [path for path, headers in server.requests if "hf_secret" in str(headers)]
    assert with_token == [f"{API}?blobs=true"]


def test_no_token_over_http_nor_where_the_user_forbids_it(server, https, monkeypatch, tmp_path):
    assert folder_of(REPO) and "hf_secret" not in str(server.requests)
    server.requests.clear()
    go(monkeypatch, "https://hub.test", tmp_path / "other")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert folder_of(REPO) and "hf_secret" not in str(server.requests)


def test_a_token_that_no_header_can_carry_is_not_shown(server, https, monkeypatch, tmp_path):
    go(monkeypatch, "https://hub.test", tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_sëcret")
    assert "HF_TOKEN must be plain characters" in failure() and "cret" not in failure()
    assert server.requests == []


def test_a_redirect_with_an_endless_body(server, tmp_path):
    """The body of a redirect is not read."""
    path = of_weights(server)
    sent = []

    def get(handler):
        handler.send_response(302)
        handler.send_header("Location", f"{path}?moved")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while len(sent) < 10_000:
                handler.wfile.write(bytes(2**16))
                sent.append(1)

    data = server.files(REPO, "main")["model.safetensors"]

    def play(handler):
        server.reply(handler, data) if handler.path.endswith("?moved") else get(handler)

    server.plays[path] = play
    assert weights(folder_of(REPO)) == data and len(sent) < 10_000


# ---- every command


def commands(model):
    return [
        ["-m", "nanogpt2", "sample", "A", "--model", model, "--max_new_tokens", "3"],
        ["-m", "nanogpt2", "sample", "A", "--model", model, "--tokens"],
        ["-m", "nanogpt2", "sample", "A", "--compare", model, "--model", model],
        ["-m", "nanogpt2", "evaluate", "book.txt", "--model", model, "--limit", "9"],
        ["-m", "nanogpt2", "quantize", model, "--text", "book.txt", "--limit", "9"],
        ["-m", "nanogpt2", "tune", model, "--passes", "1"],
        ["-m", "nanogpt2", "train", "book.txt", "--init", model, "--steps", "1", "--dry_run"],
    ]


def run(server, tmp_path, argv):
    process = start(server, tmp_path, *argv, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=HUNG)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("config", "argv"),
    [
        (SampleConfig, ["A", "--compare", "NAME", "--model", "NAME"]),
        (SampleConfig, ["A", "--classify", "--model", "NAME"]),
        (TrainConfig, ["pydocs", "--init", "NAME"]),
        (EvaluateConfig, [__file__, "--model", "NAME"]),
        (QuantizeConfig, ["NAME", "--out", "absent"]),
        (TuneConfig, ["NAME"]),
        (ServeConfig, ["--model", "NAME", "--compare_model", "NAME@v1"]),
    ],
)
def test_every_command_line_takes_a_name(config, argv, capsys):
    parse(config, [word.replace("NAME", REPO) for word in argv])
    with pytest.raises(SystemExit):
        parse(config, [word.replace("NAME", "./someone/tiny") for word in argv])
    assert "is not a file, a folder or a known model" in capsys.readouterr().err


def test_an_adapter_names_its_base_and_the_revision(tmp_path):
    model = load_model("demo")
    add_lora(model, 2, 4.0)
    for name, revision in ((f"{REPO}@v1", "v1"), (REPO, "main")):
        save_adapter(model, tmp_path / "adapter", name)
        stated = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert (stated["base_model_name_or_path"], stated["revision"]) == (REPO, revision)
    load_adapter(load_model("demo"), tmp_path / "adapter")


@pytest.mark.slow
def test_a_run_is_not_resumed_with_a_moved_branch(server, tmp_path, tiny, model_files):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A\nB\n")
    argv = ["-m", "nanogpt2", "sample", "--prompts", str(prompts), "--model", REPO]
    argv += ["--output", str(tmp_path / "out.jsonl"), "--max_new_tokens", "3"]
    assert run(server, tmp_path, argv)[0] == 0
    code, _, err = run(server, tmp_path, [*argv, "--resume"])
    assert code == 0, err
    server.put(tiny | {"model.safetensors": model_files[1]["model.safetensors"]})
    code, _, err = run(server, tmp_path, [*argv, "--resume"])
    assert code == 2 and "its files have changed" in err


@pytest.mark.slow
def test_every_command_takes_a_name(server, tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_text("A sheep jumped over the fence. " * 60)
    for argv in commands(REPO):
        argv = [str(tmp_path / word) if word == "book.txt" else word for word in argv]
        code, out, err = run(server, tmp_path, argv)
        assert code == 0 and out, err
        code, out, err = run(server, tmp_path, [w.replace(REPO, "no/model") for w in argv])
        assert code == 2 and out == "" and err.count("\n") == 1, err
        assert err.startswith("error: ") and len(err) <= 201 and "no repository of that name" in err
