"""Out of memory, and requests that no memory could hold: one line each."""

import errno
import resource
from dataclasses import replace

import pytest
import torch
from reference import TINY

from nanogpt2 import devices, memory, terminal
from nanogpt2.checkpoints import header, tensors
from nanogpt2.checkpoints.load import load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.config import GenerationConfig, TrainConfig, usage_error
from nanogpt2.generation import engine, generate
from nanogpt2.model import GPT
from nanogpt2.training import plan
from nanogpt2.training.distributed import World

OUT = [
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
    RuntimeError("can't start new thread"),
    ImportError("libtorch.so: failed to map segment from shared object"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
]
OTHER = [RuntimeError("size mismatch"), OSError(errno.ENOENT, "x"), ValueError("out of memory")]


@pytest.mark.parametrize("error", OUT, ids=lambda error: str(error)[:20])
def test_out_of_memory_anywhere_is_one_line(capsys, error):
    assert memory.is_out_of_memory(error)
    terminal._show_uncaught(type(error), error, None)
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory: ") and err.count("\n") == 1


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_keep_their_traceback(capsys, error):
    assert not memory.is_out_of_memory(error)
    terminal._show_uncaught(type(error), error, None)
    assert type(error).__name__ in capsys.readouterr().err


def test_out_of_memory_is_no_wrong_use(capsys):
    with pytest.raises(SystemExit) as stopped, usage_error("--model"):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: --model ")


def test_the_memory_is_that_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10**9, 10**9))
    assert devices.memory_of("cpu") == 10**9
    (tmp_path / "max").write_text("500000000\n")
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "max")
    assert memory.total_memory() == 5 * 10**8
    (tmp_path / "max").write_text("max\n")
    # Windows
    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.delattr("os.sysconf")
    assert memory.total_memory() > 2**40


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 2**31 - 1}, "max_new_tokens"),
        ({"max_length": 2**31 - 1}, "max_length"),
        ({"num_beams": 2**31 - 1, "max_new_tokens": 3}, "num_beams"),
        ({"num_beams": 2**31 - 1, "max_new_tokens": 2**31 - 1}, "max_new_tokens"),
        ({"num_return_sequences": 2**31 - 1, "do_sample": True}, "num_return_sequences"),
    ],
    ids=str,
)
def test_a_text_that_no_memory_holds_is_refused(monkeypatch, options, named):
    monkeypatch.setattr(engine, "memory_of", lambda device: 10**9)
    with pytest.raises(ValueError, match=rf"^{named} must be <= [1-9]"):
        generate(GPT(TINY).eval(), torch.tensor([[1]]), **options)
    GenerationConfig(**options)


FEWER = "batch_size must be <= [1-9]"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 2**31 - 1}, FEWER),
        (
            {"batch_size": 2**31 - 1, "activation_checkpointing": True},
            FEWER,
        ),
        ({"batch_size": 1, "grad_accum": 2**31 - 1}, "grad_accum 2147483647"),
        ({"batch_size": 1, "block_size": 2**31 - 1}, "block_size 2147483647"),
    ],
    ids=str,
)
def test_a_step_that_no_memory_holds_is_refused(monkeypatch, options, named):
    monkeypatch.setattr(plan, "memory_of", lambda device: 10**9)
    config = replace(TrainConfig("x"), **{"block_size": 8, "dtype": "float32"} | options)
    with pytest.raises(ValueError, match=f"^{named}"):
        plan.check_memory(config, TINY, World("cpu"))
    plan.check_memory(replace(config, batch_size=8, block_size=8, grad_accum=1), TINY, World("cpu"))


def test_a_mask_above_its_size_is_refused_unread(tmp_path):
    save_model(GPT(TINY), tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    with tensors.opened(path) as file:
        stored = dict(file.read([entry.name for entry in file.entries]))
    size = TINY.block_size
    for side, fits in ((size, True), (size + 1, False)):
        stored["transformer.h.0.attn.bias"] = torch.ones(1, 1, side, side, dtype=torch.bool)
        tensors.write(path, stored)
        (tmp_path / "m/manifest.json").unlink(missing_ok=True)
        if fits:
            load_model(tmp_path / "m")
        else:
            with pytest.raises(ValueError, match=r"attn\.bias' must have .* at most"):
                load_model(tmp_path / "m")


def test_a_huge_header_is_refused_unread(tmp_path):
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write((header.LONGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(2**40)
    with (tmp_path / "a.safetensors").open("rb") as file, pytest.raises(ValueError, match="above"):
        header.Header(tmp_path / "a.safetensors", file)
