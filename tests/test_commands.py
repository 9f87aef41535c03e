"""The command `nanogpt2`: from any folder, installed or not."""

import os
import shutil
import subprocess
import sys

import pytest
from reference import ROOT

from nanogpt2 import __main__ as commands
from nanogpt2 import __version__


def run(*words, cwd, path=ROOT, program=("-m", "nanogpt2")):
    return subprocess.run(
        [sys.executable, *program, *words],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_each_command_answers_from_another_folder(tmp_path, name):
    done = run(name, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Flags (hyphens are accepted for underscores)" in done.stdout


def test_a_command_reads_the_words_after_its_name(tmp_path):
    done = run("train", "no-such-book.txt", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: DATA 'no-such-book.txt'") and not done.stdout
    done = run("sample", "--temprature", "1", cwd=tmp_path)
    assert done.stderr == "error: --temprature is not a flag; did you mean --temperature?\n"


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"], ["sample", "--version"]])
def test_the_version(tmp_path, words):
    done = run(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"nanogpt2 {__version__}\n")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_it_lists_them(capsys, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["nanogpt2", *words])
    commands.main()
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in commands.COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


def test_an_unknown_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nanogpt2", "sampel"])
    with pytest.raises(SystemExit, match="2"):
        commands.main()
    assert capsys.readouterr().err == (
        "error: 'sampel' is not a command; the commands are sample, train, evaluate, quantize, "
        "export, tune, serve\n"
    )


def test_the_scripts_in_the_package_are_those_at_the_top():
    for name in ("train.py", "sample.py"):
        assert (ROOT / "nanogpt2" / name).resolve() == ROOT / name


@pytest.mark.slow
def test_every_command_after_an_install(tmp_path):
    # pip builds in the source's folder
    source, site = tmp_path / "source", tmp_path / "site"
    left_out = shutil.ignore_patterns(".*", "build", "out", "*venv*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    done = run(cwd=tmp_path, program=pip)
    assert done.returncode == 0, done.stderr
    (tmp_path / "book.txt").write_text("".join(f"{i} sheep jumped. " for i in range(200)))
    own = {"cwd": tmp_path, "path": site, "program": [str(site / "bin/nanogpt2")]}
    tiny = "--init scratch --tokenizer bytes --n_layer 1 --n_head 2 --n_embd 8 --steps 2"
    for words in (
        ["train", "book.txt", *tiny.split(), "--block_size", "16", "--out", "o"],
        ["sample", "7 sheep", "--model", "o", "--max_new_tokens", "3"],
        ["evaluate", "book.txt", "--model", "o"],
        ["quantize", "o", "--out", "o16", "--quantize", "fp16"],
    ):
        done = run(*words, **own)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("name", ["evaluate", "quantize", "tune"])
def test_a_command_by_its_path(name, tmp_path):
    """nanogpt2/ has an inspect.py, which must not hide Python's own."""
    argv = [sys.executable, str(ROOT / f"nanogpt2/{name}.py"), "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Flags (hyphens are accepted for underscores)" in done.stdout
