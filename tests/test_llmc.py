"""llm.c's checkpoints, and the files of other formats that are named."""

import struct
from pathlib import Path

import pytest
import torch
from reference import TINY, hf_model
from saved_files import config_json, llmc

from nanogpt2 import generate, load_model, open_checkpoint, save_model
from nanogpt2.checkpoints.load import load_generator, load_tokenizer
from nanogpt2.config import GPTConfig
from nanogpt2.tokenizer import gpt2_tokenizer

IDS = torch.randint(TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


def refusal(source):
    with pytest.raises(ValueError) as raised:
        load_model(source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("version", "padded"), [(1, 61), (3, 61), (3, 64), (5, 64), (5, 128)])
def test_a_checkpoint(tmp_path, version, padded):
    data, logits = llmc(version=version, padded=padded)
    path = tmp_path / "gpt2_124M.bin"
    path.write_bytes(data)
    # of bfloat16 the numbers themselves are compared below
    atol = 0.5 if version == 5 else 1e-4
    for load in (load_model, load_generator):
        model = load(path)
        assert model.config.vocab_size == TINY.vocab_size
        assert model.config.activation_function == "gelu_new"
        torch.testing.assert_close(model(IDS), logits(IDS), atol=atol, rtol=atol)
    state = hf_model().state_dict()
    for name, tensor in load_model(path).state_dict().items():
        theirs = state[f"transformer.{name}"]
        theirs = theirs.bfloat16().float() if version == 5 else theirs
        is_matrix = name.startswith("h.") and tensor.dim() > 1
        assert torch.equal(tensor, theirs.t() if is_matrix else theirs), name


def test_the_same_tokens_as_transformers(tmp_path):
    path = tmp_path / "gpt2.bin"
    path.write_bytes(llmc()[0])
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = hf_model().generate(IDS, **options)
    for load in (load_model, load_generator):
        assert torch.equal(generate(load(path), IDS, **options).sequences, expected)


def test_it_is_saved_as_transformers_reads_it(tmp_path):
    path = tmp_path / "gpt2.bin"
    path.write_bytes(llmc()[0])
    save_model(load_model(path), tmp_path / "out")
    torch.testing.assert_close(load_model(tmp_path / "out")(IDS), load_model(path)(IDS))


def test_its_vocabulary_is_gpt2s(tmp_path):
    config = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=4)
    for padded in (50304, 50432):
        path = tmp_path / "gpt2.bin"
        path.write_bytes(llmc(config, padded=padded)[0])
        assert load_tokenizer(path) is gpt2_tokenizer()
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config.vocab_size == 50257


def test_a_folder_names_its_files(tmp_path):
    for name in ("model_00000010.bin", "state_00000010_00000.bin"):
        (tmp_path / name).write_bytes(llmc()[0])
    assert "model_00000010.bin" in refusal(tmp_path)


def test_a_config_beside_it(tmp_path):
    path = tmp_path / "gpt2.bin"
    path.write_bytes(llmc()[0])
    (tmp_path / "config.json").write_text(config_json(layer_norm_epsilon=0.1))
    assert load_model(path).config.layer_norm_epsilon == 0.1
    (tmp_path / "config.json").write_text(config_json(n_head=4))
    assert "config.json': n_head is 4, but 3 by gpt2.bin" in refusal(path)


def header(**changes):
    """The first bytes, some numbers changed by their place."""
    numbers = [20240326, 3, 37, 61, 2, 3, 24, 64] + [0] * 248
    for place, number in changes.items():
        numbers[int(place[1:])] = number
    return struct.pack("<256i", *numbers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n0": 20240327}, "holds llm.c's state for debugging"),
        ({"n0": 20240328}, "holds llm.c's tokenizer"),
        ({"n0": 20240520}, "holds llm.c's tokens"),
        ({"n0": 20240801}, "holds tokens of Llama 3"),
        ({"n0": 20240803}, "holds an llm.c checkpoint of Llama 3"),
        ({"n0": 7}, "nor an llm.c checkpoint"),
        ({"n1": 2}, "version must be 3 (float32), 5 (bfloat16) or 1, not 2"),
        ({"n1": -1}, "version must be"),
        ({"n1": 5}, "by its header it has"),
        ({"n2": 0}, "its header"),
        ({"n2": 38}, "by its header it has"),
        ({"n3": -61}, "its header"),
        ({"n3": 65}, "its header"),
        ({"n4": 1001}, "its header"),
        ({"n4": 2**31 - 1}, "its header"),
        ({"n5": 5}, "gpt2.bin': n_embd must be a multiple of n_head"),
        ({"n5": 0}, "its header"),
        ({"n6": 2**31 - 1}, "by its header it has"),
        ({"n7": 63}, "by its header it has"),
        ({"n7": 2**31 - 1}, "by its header it has"),
    ],
    ids=str,
)
def test_a_header_that_cannot_be(tmp_path, changes, message):
    path = tmp_path / "gpt2.bin"
    path.write_bytes(header(**changes) + llmc()[0][1024:])
    line = refusal(path)
    assert message in line and "gpt2.bin" in line


@pytest.mark.parametrize("size", [0, 3, 31, 32, 1023, 1024, -1])
def test_a_file_that_was_cut(tmp_path, size):
    path = tmp_path / "gpt2.bin"
    path.write_bytes(llmc()[0][:size])
    assert "gpt2.bin" in refusal(path)


# ---- other formats


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.ckpt.index", "is of TensorFlow: OpenAI's models are gpt2, gpt2-medium"),
        ("model.ckpt.meta", "is of TensorFlow"),
        ("model.ckpt.data-00000-of-00001", "load_tf_weights_in_gpt2"),
        ("checkpoint", "is of TensorFlow"),
        ("tf_model.h5", "from_tf=True"),
        ("flax_model.msgpack", "from_flax=True"),
        ("gpt2.Q8_0.gguf", "gguf_file=NAME"),
        ("decoder_model.onnx", "the model that it was made from"),
    ],
)
def test_another_format_is_named(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"x")
    Path("hparams.json").write_text('{"n_vocab": 50257}')
    for source in (".", name):
        line = refusal(source)
        assert message in line and name in line and len(line) < 180


def test_tensorflows_prefix_is_named(tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(b"x")
    assert "is of TensorFlow" in refusal(tmp_path / "model.ckpt")


def test_a_lone_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert "only a LoRA adapter" in refusal(tmp_path)
