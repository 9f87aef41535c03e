"""Files that end, and file systems that lack a service: symlinks, locks, folders' fsync, a home."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import save

from nanogpt2 import filesystem, hub, terminal
from nanogpt2.checkpoints.load import load_model
from nanogpt2.checkpoints.tokenizer_files import CHAT_TEMPLATE, is_chat
from nanogpt2.cli.prompts import read_prompt, read_prompts
from nanogpt2.data.files import find_files
from nanogpt2.data.shards import open_shard, write_shard
from nanogpt2.training import checkpoint as store
from nanogpt2.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def notes_start_anew():
    terminal.note_once.cache_clear()


def lacking(number):
    def call(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return call


# ---- services that are not there


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM])
def test_without_symlinks_the_best_is_a_copy(tmp_path, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", lacking(number))
        patch.setattr(os, "link", lacking(number))
        for step in (1, 2):
            store.mark_best(save(tmp_path, step, seed=step))
            wanted = load_model(tmp_path / f"step-{step}").wte.weight
            assert torch.equal(load_model(tmp_path / "best").wte.weight, wanted)
    assert capsys.readouterr().err.count("checkpoints/best is a copy") == 1
    store.prune(tmp_path / "step-2", keep=1)
    # copied to a file system that has them: it stays a copy, and follows the best
    store.mark_best(save(tmp_path, 3, seed=3))
    wanted = load_model(tmp_path / "step-3").wte.weight
    assert torch.equal(load_model(tmp_path / "best").wte.weight, wanted)


def test_a_full_disk_is_no_missing_service(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    monkeypatch.setattr(os, "symlink", lacking(errno.ENOSPC))
    with pytest.raises(OSError, match="space"):
        store.mark_best(path)
    monkeypatch.setattr(os, "fsync", lacking(errno.EIO))
    with pytest.raises(OSError, match="error"):
        filesystem.sync(tmp_path)


@pytest.mark.parametrize("without", ["flock", "fcntl"])
def test_without_locks_a_run_goes_on(tmp_path, monkeypatch, capsys, without):
    if without == "fcntl":
        monkeypatch.setattr(filesystem, "fcntl", None)
    else:
        monkeypatch.setattr(filesystem.fcntl, "flock", lacking(errno.ENOSYS))
    for _ in range(2):
        folder = RunFolder(tmp_path / "out")
        folder.lock()
        folder.close()
    assert capsys.readouterr().err.count("no file locks here") == 1


def test_without_fsync_of_folders_a_run_goes_on(tmp_path, monkeypatch, capsys):
    real = os.fsync

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 1)
    write_shard(tmp_path / "a.tokens", [[1, 2]])
    assert capsys.readouterr().err.count("no fsync of folders here") == 1


def test_without_a_home_caches_are_temporary(monkeypatch, capsys):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    registered = []
    monkeypatch.setattr(hub.atexit, "register", lambda *call, **options: registered.append(call))
    first, second = hub.expanded(hub.CACHE), hub.expanded(hub.CACHE)
    assert first == second and first.is_absolute() and "~" not in str(first)
    assert capsys.readouterr().err.count("HOME is not set") == 1
    ((remove, home),) = registered
    remove(home)
    assert not Path(home).exists()
    monkeypatch.setenv("HOME", "/")


# ---- files that do not end


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_prompt("", str(path)),
        lambda path: read_prompts(str(path), skip_bad=False),
        lambda path: find_files(str(path)),
        lambda path: open_shard(path),
        lambda path: filesystem.lock(path),
        lambda path: load_model(path),
    ],
    ids=["prompt_file", "prompts", "data", "shard", "lock", "model"],
)
def test_a_pipe_and_a_device_are_refused(pipe, read):
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"is no.* file|is not a"):
            read(path)


@pytest.mark.parametrize("name", ["run.json", ".lock"])
def test_a_pipe_in_a_runs_folder_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"damaged|no regular file"):
        (folder.record if name == "run.json" else folder.lock)()


def test_a_pipe_among_the_data_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    os.mkfifo(tmp_path / "train.bin")
    # with a writer and some bytes, a reader would not wait here for ever
    pipe = os.open(tmp_path / "train.bin", os.O_RDWR | os.O_NONBLOCK)
    os.write(pipe, b"some ids")
    assert [file.name for file in find_files(str(tmp_path))] == [str(tmp_path / "a.txt")]
    assert os.read(pipe, 99) == b"some ids"
    os.close(pipe)


def test_a_pipe_as_a_template_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "chat_template.jinja")
    pipe = os.open(tmp_path / "chat_template.jinja", os.O_RDWR | os.O_NONBLOCK)
    os.write(pipe, CHAT_TEMPLATE.encode())
    assert not is_chat(tmp_path)
    os.close(pipe)


def test_a_pipe_in_a_checkpoint_damages_it(tmp_path):
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    assert not store.is_whole(path)


def test_a_pipe_that_the_shell_gave_is_read():
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(b"one\ntwo\n")
    prompts, _ = read_prompts(f"/dev/fd/{reader}", skip_bad=False)
    assert {number: prompt.text for number, prompt in prompts.items()} == {1: "one", 2: "two"}
    os.close(reader)


def test_input_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "LARGEST_INPUT", 2**21)
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        for read in (lambda: read_prompt("-", None), lambda: find_files("-")):
            with pytest.raises(ValueError, match=r"standard input must be 2,097,152 bytes at most"):
                read()
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"sparse.* at most"):
        read_prompt("", str(tmp_path / "sparse"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 2**21)))
    assert len(read_prompt("-", None)) == 2**21


def test_a_path_with_nul_is_refused():
    with pytest.raises(ValueError, match=r"'a\\x00b' is no path"):
        filesystem.open_regular(Path("a\0b"))
