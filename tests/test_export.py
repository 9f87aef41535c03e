"""nanogpt2 export: each target's file read by its own program, or by hand in the layout stated."""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import HUNG, ROOT, hf_model, run_module
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from nanogpt2 import load_model, load_tokenizer, save_model
from nanogpt2.checkpoints.names import TRANSPOSED
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig, parse
from nanogpt2.cpu.inference_model import pack
from nanogpt2.export import gguf_file, llmc_file, nanogpt_file
from nanogpt2.export.counterpart import CheckError, agreement
from nanogpt2.export.options import ExportConfig
from nanogpt2.export.prompts import PROMPTS, continuation
from nanogpt2.export.run import export
from nanogpt2.export.targets import TARGETS
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

# rows of 32 and heads of 32, for Q8_0 and llama.cpp; 3 layers, so that their order shows
SHAPE = GPTConfig(
    vocab_size=257,
    block_size=64,
    n_layer=3,
    n_head=2,
    n_embd=64,
    bos_token_id=256,
    eos_token_id=256,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`wide`: a model whose every tensor is random, with the byte-level vocabulary."""
    folder = tmp_path_factory.mktemp("export")
    hf_model(SHAPE).save_pretrained(folder / "theirs")
    save_model(load_model(folder / "theirs"), folder / "wide", byte_tokenizer())
    return folder


@pytest.fixture
def model(folder):
    return load_model(folder / "wide")


def exported(capsys, out, to, *flags, model):
    """The figures of an export by the command line's flags."""
    capsys.readouterr()
    export(parse(ExportConfig, [str(model), "--to", to, "--out", str(out), "--json", *flags]))
    return json.loads(capsys.readouterr().out)


# ---- transformers


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TARGETS["hf"].dtypes)
def test_transformers_reads_the_folder(folder, model, tmp_path, capsys, dtype):
    found = exported(capsys, tmp_path / "o", "hf", "--dtype", dtype, model=folder / "wide")
    assert found["tensors_equal"] == len(model.state_dict())
    assert found["prompts_equal"] == found["prompts"] == 10
    assert 0 < found["logits_difference"] < 1e-4
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "o")
    assert theirs.dtype == getattr(torch, dtype)
    narrow = model.to(getattr(torch, dtype))
    for name, tensor in narrow.state_dict().items():
        their = theirs.transformer.get_parameter(name)
        assert torch.equal(their.t() if name.endswith(TRANSPOSED) else their, tensor), name


def test_a_tensor_that_came_out_wrong_is_seen(folder, tmp_path, monkeypatch, capsys):
    from nanogpt2.export import hf_folder

    def write(source, target):
        save_model(source.model, target, source.tokenizer)
        source.model.h[1].mlp.c_fc.bias.data[3] += 1

    monkeypatch.setattr(hf_folder, "write", write)
    with pytest.raises(SystemExit, match="1"):
        exported(capsys, tmp_path / "o", "hf", model=folder / "wide")
    assert "h.1.mlp.c_fc.bias is another after it was read again" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_ctranslate2_reads_the_folder(folder, model, tmp_path, capsys):
    exported(capsys, tmp_path / "hf", "hf", model=folder / "wide")
    prompts = [byte_tokenizer().encode(text)[:32] for text in PROMPTS]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    code = """
import json, sys, ctranslate2
from ctranslate2.converters import TransformersConverter
TransformersConverter("hf").convert("ct2")
words = json.load(open("ct2/vocabulary.json"))
generator = ctranslate2.Generator("ct2", compute_type="float32")
for ids in json.load(open("prompts.json")):
    (found,) = generator.generate_batch([[words[i] for i in ids]], beam_size=1, min_length=32,
        max_length=32, include_prompt_in_result=False)
    print(json.dumps(found.sequences_ids[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=HUNG
    )
    assert done.returncode == 0, done.stderr.decode()
    ours = [continuation(model, prompt, 32) for prompt in prompts]
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    # the end of a text is banned there
    assert not any(256 in mine.tokens for mine in ours)
    assert agreement(ours, theirs, "CTranslate2", 1e-5)["prompts_equal"] == 10


# ---- GGUF


def read_gguf(path):
    """A file's fields by name, and its tensors as the gguf package widens them."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type))
        for t in reader.tensors
    }
    return fields, tensors


@pytest.mark.parametrize("dtype", TARGETS["gguf"].dtypes)
def test_a_gguf_file(folder, model, tmp_path, capsys, dtype):
    found = exported(capsys, tmp_path / "o", "gguf", "--dtype", dtype, model=folder / "wide")
    fields, tensors = read_gguf(tmp_path / "o/model.gguf")
    expected = {
        "general.architecture": "gpt2",
        "general.name": "wide",
        "gpt2.block_count": 3,
        "gpt2.context_length": 64,
        "gpt2.embedding_length": 64,
        "gpt2.feed_forward_length": 256,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.token_type": [1] * 256 + [3],
    }
    assert {name: fields[name] for name in expected} == expected
    assert fields["tokenizer.ggml.tokens"] == [*byte_tokenizer().vocabulary]
    assert len(tensors) == len(model.state_dict()) == found["tensors_equal"]
    block = model.h[2]
    for name, tensor in {
        "token_embd.weight": model.wte.weight,
        "blk.2.attn_qkv.weight": block.attn.c_attn.weight,
        "blk.2.attn_output.weight": block.attn.c_proj.weight,
        "blk.2.ffn_up.weight": block.mlp.c_fc.weight,
        "blk.2.ffn_down.weight": block.mlp.c_proj.weight,
    }.items():
        kind, widened = tensors[name]
        assert kind == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(dtype, "Q8_0")
        error = np.abs(widened - tensor.detach().numpy()).max()
        assert error <= {"float32": 0, "q8_0": 1e-2}.get(dtype, 6e-3)
    for name, tensor in {
        "position_embd.weight": model.wpe.weight,
        "blk.2.attn_norm.weight": block.ln_1.weight,
        "blk.2.ffn_norm.bias": block.ln_2.bias,
        "blk.2.ffn_up.bias": block.mlp.c_fc.bias,
        "output_norm.bias": model.ln_f.bias,
    }.items():
        kind, widened = tensors[name]
        assert kind == "F32" and np.array_equal(widened, tensor.detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
def test_llama_cpp_continues_ten_prompts_alike(tmp_path, capsys, dtype):
    """The demo model, whose likeliest tokens are seldom close; 32 tokens each."""
    found = exported(capsys, tmp_path / "o", "gguf", "--dtype", dtype, model="demo")
    assert found["llama.cpp"].startswith("xllamacpp 20")
    assert found["prompts"] == 10
    # in F32 all of them; else one may part where two tokens are nearly equal
    assert found["prompts_equal"] >= (10 if dtype == "float32" else 8)
    assert found["largest_margin"] < 0.05


def test_llama_cpp_sees_exchanged_tensors(folder, tmp_path, monkeypatch, capsys):
    """Reading the file again by the same names would not."""
    norms = {"ln_1": "ffn_norm", "ln_2": "attn_norm"}
    monkeypatch.setattr(gguf_file, "NAMES", gguf_file.NAMES | norms)
    with pytest.raises(SystemExit, match="1"):
        exported(capsys, tmp_path / "o", "gguf", model=folder / "wide")
    assert "greedy tokens by llama.cpp differ" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_vocabulary_of_bytes_in_llama_cpp(folder, tmp_path, capsys):
    """llama.cpp wants a merge; the one it gets must never apply."""
    found = exported(capsys, tmp_path / "o", "gguf", model=folder / "wide")
    assert found["prompts_equal"] == 10
    fields, _ = read_gguf(tmp_path / "o/model.gguf")
    assert fields["tokenizer.ggml.merges"] == ["<|endoftext|> <|endoftext|>"]


def test_rows_without_a_token_are_unused(folder, tmp_path):
    """A vocabulary padded to a rounder size."""
    import gguf

    from nanogpt2.export.source import Source

    padded = GPT(replace(SHAPE, vocab_size=264)).eval()
    source = Source("padded", padded, byte_tokenizer(), False, "float32")
    gguf_file.write(source, tmp_path)
    gguf_file.compare(source, tmp_path / "model.gguf")
    fields, _ = read_gguf(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.tokens"][257:] == [f"[PAD{i}]" for i in range(257, 264)]
    assert fields["tokenizer.ggml.token_type"][256:] == [3, *[gguf.TokenType.UNUSED] * 7]


# ---- ONNX


@pytest.mark.slow
def test_onnxruntime_runs_padded_batches_with_a_cache(folder, model, tmp_path, capsys):
    import onnxruntime

    found = exported(capsys, tmp_path / "o", "onnx", model=folder / "wide")
    assert found["prompts_equal"] == found["prompts"] == 10 and found["cached_steps"] == 80
    assert found["logits_difference"] < 1e-4
    assert {path.name for path in (tmp_path / "o").iterdir()} >= {
        "model.onnx",
        "model.onnx_data",
        "config.json",
        "tokenizer.json",
    }
    session = onnxruntime.InferenceSession(str(tmp_path / "o/model.onnx"))
    names = [i.name for i in session.get_inputs()]
    assert names[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert names[3:5] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [o.name for o in session.get_outputs()][:2] == ["logits", "present.0.key"]
    # two rows of 7 and 4 tokens, the second padded on the left; then two more tokens each
    rows = [torch.randint(257, (9,)), torch.randint(257, (6,))]
    cache = {name: np.zeros((2, 2, 0, 32), np.float32) for name in names[3:]}
    for start, end in ((0, 7), (7, 8), (8, 9)):
        padded = [F.pad(row, (9 - len(row), 0))[start:end] for row in rows]
        positions = [torch.arange(start - 9 + len(r), end - 9 + len(r)).clamp(0) for r in rows]
        mask = torch.ones(2, end, dtype=torch.int64)
        mask[1, :3] = 0
        inputs = {
            "input_ids": torch.stack(padded).numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": torch.stack(positions).numpy(),
        }
        logits, *grown = session.run(None, inputs | cache)
        cache = dict(zip(cache, grown, strict=True))
        for row, scores in zip(rows, logits, strict=True):
            with torch.no_grad():
                expected = model(row[None, : end - 9 + len(row)])[0, -1]
            torch.testing.assert_close(torch.from_numpy(scores[-1]), expected, atol=1e-4, rtol=0)


# ---- nanoGPT, by its layout restated


class Attention(nn.Module):
    def __init__(self, n_head, n_embd):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head = n_head

    def forward(self, x):
        parts = [p.unflatten(2, (self.n_head, -1)) for p in self.c_attn(x).chunk(3, dim=2)]
        q, k, v = (p.transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, n_head, n_embd, gelu):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_head, n_embd)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(n_embd, 4 * n_embd), "c_proj": nn.Linear(4 * n_embd, n_embd)}
        )
        self.gelu = gelu

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](self.gelu(self.mlp["c_fc"](self.ln_2(x))))


class NanoGPT(nn.Module):
    """nanoGPT's names, its head tied to its embedding."""

    def __init__(self, gelu, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):
        super().__init__()
        assert bias and dropout == 0.0
        layers = nn.ModuleList([Layer(n_head, n_embd, gelu) for _ in range(n_layer)])
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": layers,
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.size(1)))
        for layer in self.transformer["h"]:
            x = layer(x)
        return self.lm_head(self.transformer["ln_f"](x))


def test_nanogpt_resumes(folder, model, tmp_path, capsys):
    found = exported(capsys, tmp_path / "o", "nanogpt", model=folder / "wide")
    assert found["tensors_equal"] == len(model.state_dict()) + 1
    content = torch.load(tmp_path / "o/ckpt.pt", weights_only=True)
    ids = torch.randint(257, (2, 7))
    differences = []
    for gelu in (partial(F.gelu, approximate="tanh"), F.gelu):
        theirs = NanoGPT(gelu, **content["model_args"])
        theirs.load_state_dict(content["model"])
        with torch.no_grad():
            differences.append(float((theirs(ids) - model(ids)).abs().max()))
    # with GPT-2's GELU equal, with nanoGPT's own close
    assert differences[0] < 1e-4 < differences[1] < 0.1
    # train.py's optimizer
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors}], lr=1.0)
    optimizer.load_state_dict(content["optimizer"])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    theirs(ids).sum().backward()
    optimizer.step()
    assert (content["iter_num"], content["config"]) == (0, {})
    assert content["best_val_loss"] > 1e6


def test_the_note_on_nanogpts_gelu(folder, tmp_path, capsys):
    argv = [str(folder / "wide"), "--to", "nanogpt", "--out", str(tmp_path / "o")]
    export(parse(ExportConfig, argv))
    shown = capsys.readouterr()
    assert shown.err.startswith("note: nanoGPT's GELU is exact") and shown.err.count("\n") == 1
    assert "tensors_equal" in shown.out


# ---- llm.c, read by hand


@pytest.mark.parametrize(("dtype", "version"), [("float32", 3), ("bfloat16", 5)])
def test_llm_c_reads_it(folder, model, tmp_path, capsys, dtype, version):
    found = exported(capsys, tmp_path / "o", "llmc", "--dtype", dtype, model=folder / "wide")
    assert found["tensors_equal"] == len(model.state_dict()) + 1
    data = (tmp_path / "o/gpt2_0M.bin").read_bytes()
    header = struct.unpack("<256i", data[:1024])
    L, V, Vp, C, T = 3, 257, 384, 64, 64
    assert header == (20240326, version, T, V, L, 2, C, Vp, *[0] * 248)
    numbers = torch.frombuffer(bytearray(data[1024:]), dtype=getattr(torch, dtype))

    def take(*shape):
        nonlocal numbers
        size = int(np.prod(shape))
        taken, numbers = numbers[:size].view(shape), numbers[size:]
        return taken

    narrow = model.to(getattr(torch, dtype))
    wte = take(Vp, C)
    assert torch.equal(wte[:V], narrow.wte.weight) and not wte[V:].any()
    assert torch.equal(take(T, C), narrow.wpe.weight)
    for name, *shape in (
        ("ln_1.weight", C),
        ("ln_1.bias", C),
        ("attn.c_attn.weight", 3 * C, C),
        ("attn.c_attn.bias", 3 * C),
        ("attn.c_proj.weight", C, C),
        ("attn.c_proj.bias", C),
        ("ln_2.weight", C),
        ("ln_2.bias", C),
        ("mlp.c_fc.weight", 4 * C, C),
        ("mlp.c_fc.bias", 4 * C),
        ("mlp.c_proj.weight", C, 4 * C),
        ("mlp.c_proj.bias", C),
    ):
        layers = take(L, *shape)
        for layer, block in zip(layers, narrow.h, strict=True):
            assert torch.equal(layer, block.get_parameter(name)), name
    assert torch.equal(take(C), narrow.ln_f.weight) and torch.equal(take(C), narrow.ln_f.bias)
    assert not len(numbers)
    tokens = (tmp_path / "o/gpt2_tokenizer.bin").read_bytes()
    assert struct.unpack("<256i", tokens[:1024])[:4] == (20240328, 2, 257, 256)
    assert tokens[1024 : 1024 + 512] == bytes(x for i in range(256) for x in (1, i))
    assert tokens[1024 + 512 :] == b"\x0d<|endoftext|>"


def test_llm_c_names_files_by_size():
    from nanogpt2.export.source import Source

    with torch.device("meta"):
        model = GPT(GPTConfig())
    source = Source("gpt2", model, None, False, "float32")
    assert llmc_file._file(source, Path()).name == "gpt2_124M.bin"


# ---- what all have in common


def test_every_target_is_shown_by_the_command(folder):
    """In a process of its own, warnings as errors."""
    done = run_module("nanogpt2", "export", "wide", "--to", "llmc", "--out", "as-typed", cwd=folder)
    assert (done.returncode, done.stderr) == (0, b"")
    lines = dict(line.split() for line in done.stdout.decode().splitlines())
    assert lines["to"] == "llmc" and lines["tensors_equal"] == "41"
    assert int(lines["bytes"].replace(",", "")) == sum(
        path.stat().st_size for path in (folder / "as-typed").iterdir()
    )


def test_a_model_without_a_known_vocabulary(tmp_path, capsys):
    save_model(GPT(replace(SHAPE, vocab_size=61, eos_token_id=60)), tmp_path / "m")
    found = exported(capsys, tmp_path / "o", "llmc", model=tmp_path / "m")
    assert found["tensors_equal"] == 41
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["gpt2_0M.bin"]
    with pytest.raises(SystemExit, match="2"):
        exported(capsys, tmp_path / "g", "gguf", model=tmp_path / "m")
    assert capsys.readouterr().err.startswith("error: MODEL no tokenizer here has a vocabulary")


def test_spellings_of_a_type(folder):
    argv = [str(folder / "wide"), "--to", "gguf", "--out", "nowhere", "--outtype"]
    for spelled, dtype in {"F16": "float16", "Q8_0": "q8_0", "bf16": "bfloat16"}.items():
        assert parse(ExportConfig, [*argv, spelled]).dtype == dtype


@pytest.fixture(scope="module")
def others(folder):
    """Models that not every target holds."""
    config = replace(SHAPE, n_embd=24)
    save_model(GPTClassifier(GPT(SHAPE), ("a", "b")), folder / "labels", byte_tokenizer())
    save_model(pack(load_model(folder / "wide"), "int8"), folder / "int8", byte_tokenizer())
    save_model(GPT(config), folder / "narrow", byte_tokenizer())
    save_model(GPT(replace(SHAPE, layer_norm_epsilon=1e-6)), folder / "eps", byte_tokenizer())
    save_model(GPT(replace(SHAPE, block_size=1)), folder / "one", byte_tokenizer())
    save_model(GPT(replace(SHAPE, n_inner=40)), folder / "inner", byte_tokenizer())
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--to hf --out x", "MODEL is missing"),
        ("wide --out x", "--to must be given: one of hf, gguf, onnx, nanogpt, llmc"),
        ("wide --to tflite --out x", "--to must be one of hf, gguf, onnx, nanogpt, llmc, not"),
        ("wide --to hf", "--out must be given"),
        ("wide --to hf --out wide", "--out must be a folder that is not there yet, not 'wide'"),
        ("wide --to hf --out dangling", "--out must be a folder that is not there yet"),
        ("wide --to hf --out a/b", "--out must be in a folder that is there, not in 'a'"),
        (f"wide --to hf --out {'n' * 300}", "--out "),
        ("wide --to hf --out x --dtype q8_0", "--dtype must be float32 or float16 or bfloat16"),
        ("wide --to onnx --out x --dtype float16", "--dtype must be float32 with --to onnx, not"),
        ("wide --to gguf --out x --dtype q4_0", "--dtype must be one of float32, float16"),
        ("wide --to gguf --out x --quantize int8", "--quantize is not a flag; use --to gguf"),
        ("nothing --to hf --out x", "MODEL 'nothing' is not a file"),
        ("labels --to hf --out x", "MODEL 'labels' is a classifier"),
        ("int8 --to gguf --out x", "MODEL 'int8' is int8: export the model"),
        ("narrow --to gguf --out x --dtype q8_0", "MODEL 'narrow' has n_embd 24, which"),
        ("inner --to gguf --out x --dtype q8_0", "MODEL 'inner' has n_inner 40, which"),
        ("one --to gguf --out x", "MODEL 'one' has n_positions 1; llama.cpp needs 2"),
        ("eps --to llmc --out x", "MODEL has layer_norm_epsilon 1e-06, which --to llmc cannot"),
        ("eps --to nanogpt --out x", "MODEL has layer_norm_epsilon 1e-06, which --to nanogpt"),
    ],
)
def test_wrong_use_is_one_line(others, capsys, monkeypatch, words, said):
    monkeypatch.chdir(others)
    if not os.path.lexists("dangling"):
        Path("dangling").symlink_to("nowhere")
    before = sorted(others.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        export(parse(ExportConfig, words.split()))
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith(f"error: {said}")
    assert shown.err.count("\n") == 1 and len(shown.err) <= 201
    assert sorted(others.rglob("*")) == before


@pytest.mark.parametrize("to", ["gguf", "llmc"])
def test_a_vocabulary_without_an_end_is_one_line(folder, tmp_path, capsys, to):
    model = shutil.copytree(folder / "wide", tmp_path / "m")
    (model / "tokenizer.json").unlink()
    words = json.loads((model / "vocab.json").read_text())
    words["last"] = words.pop("<|endoftext|>")
    (model / "vocab.json").write_text(json.dumps(words))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    for name in ("config.json", "generation_config.json"):
        stated = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(stated | {"eos_token_id": None}))
    with pytest.raises(SystemExit, match="2"):
        exported(capsys, tmp_path / "o", to, model=model)
    said = capsys.readouterr().err
    assert "the tokenizer has no eos_token, the id that ends a text" in said, said


def test_what_llama_cpp_and_onnx_hold(others, tmp_path, capsys):
    exported(capsys, tmp_path / "g", "gguf", model=others / "eps")
    fields, _ = read_gguf(tmp_path / "g/model.gguf")
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_the_type_cannot_hold(folder, tmp_path, capsys, value):
    broken = load_model(folder / "wide")
    broken.h[0].mlp.c_fc.weight.data[5, 7] = value
    save_model(broken, tmp_path / "m", byte_tokenizer())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="1"):
        exported(capsys, tmp_path / "o", "hf", "--dtype", "float16", model=tmp_path / "m")
    assert capsys.readouterr().err.startswith("error: the model's scores are not finite numbers")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_package_is_named(folder, tmp_path):
    code = (
        "import sys, importlib.util as u; f = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'gguf' else f(name, *a);"
        "sys.argv = ['export', 'wide', '--to', 'gguf', '--out', 'x'];"
        "from nanogpt2.export.__main__ import main; main()"
    )
    done = interpreted(code, folder)
    said = "error: --to gguf needs gguf: pip install 'nanogpt2[export]'\n"
    assert (done.returncode, done.stderr.decode()) == (2, said)


def interpreted(code, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=HUNG,
    )


def test_a_signal_leaves_nothing(folder, tmp_path):
    code = f"""
import os, signal, sys
from nanogpt2.export import nanogpt_file
from nanogpt2.export.__main__ import main
nanogpt_file.check = lambda source, folder: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["export", {str(folder / "wide")!r}, "--to", "nanogpt", "--out", "o"]
main()
"""
    done = interpreted(code, tmp_path)
    assert done.returncode == 130, done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("to", ["hf", "gguf", "nanogpt", "llmc"])
def test_a_full_disk_is_one_line(folder, tmp_path, to):
    code = f"""
import resource, signal, sys
from nanogpt2.export.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.argv = ["export", {str(folder / "wide")!r}, "--to", {to!r}, "--out", "o"]
main()
"""
    done = interpreted(code, tmp_path)
    lines = [x for x in done.stderr.decode().splitlines() if not x.startswith("note:")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: --out 'o' cannot be written: ")
    assert not [*tmp_path.iterdir()]


def test_agreement_counts_and_refuses(model):
    ours = [continuation(model, [1, 2, 3], 4)]
    (mine,) = ours
    assert agreement(ours, [mine.tokens], "x", 0.0)["prompts_equal"] == 1
    second = int(mine.ids[2, 1])
    other = [*mine.tokens[:2], second, 0]
    margin = float(mine.scores[2, 0] - mine.scores[2, 1])
    found = agreement(ours, [other], "x", 1.0)
    assert found["prompts_equal"] == 0 and found["largest_margin"] == pytest.approx(margin)
    with pytest.raises(CheckError, match="greedy tokens by x differ"):
        agreement(ours, [other], "x", 0.0)


# ---- memory

MEASURED = """
import json, resource, sys
from nanogpt2.export.__main__ import main
try:
    main()
finally:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print("peaks", *(resource.getrusage(kind).ru_maxrss for kind in kinds), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
@pytest.mark.parametrize(
    ("to", "dtype"),
    [
        ("hf", "float32"),
        ("gguf", "float32"),
        ("gguf", "q8_0"),
        ("onnx", "float32"),
        ("nanogpt", "float32"),
        ("llmc", "bfloat16"),
    ],
)
def test_an_export_takes_at_most_twice_the_model(tmp_path, to, dtype):
    """The process, and the other program's after it: above those of a tiny model."""
    sizes = {"tiny": (1, 2, 64), "large": (8, 8, 512)}
    peaks = {}
    for name, (layers, heads, width) in sizes.items():
        config = replace(SHAPE, n_layer=layers, n_head=heads, n_embd=width)
        save_model(GPT(config), tmp_path / name, byte_tokenizer())
        argv = ["export", name, "--to", to, "--out", f"{name}-out", "--dtype", dtype]
        done = interpreted(f"import sys; sys.argv = {argv!r}\n" + MEASURED, tmp_path)
        assert done.returncode == 0, done.stderr
        *_, own, child = done.stderr.split()
        peaks[name] = int(own) * 1024, int(child) * 1024
    bytes_ = config.n_parameters * 4
    for small, large in zip(peaks["tiny"], peaks["large"], strict=True):
        assert large - small <= 2 * bytes_, (to, small, large, bytes_)


def test_the_check_of_nanogpt_can_fail(folder, tmp_path):
    from nanogpt2.export.source import Source

    source = Source("x", load_model(folder / "wide"), None, False, "float32")
    nanogpt_file.write(source, tmp_path)
    source.model.ln_f.weight.data[0] += 1
    with pytest.raises(CheckError, match=r"transformer\.ln_f\.weight is another"):
        nanogpt_file.check(source, tmp_path)


def test_the_check_of_llm_c_can_fail(folder, tmp_path):
    from nanogpt2.export.source import Source

    source = Source("x", load_model(folder / "wide"), None, False, "float32")
    llmc_file.write(source, tmp_path)
    source.model.h[2].ln_2.bias.data[0] += 1
    with pytest.raises(CheckError, match=r"h\.2\.ln_2\.bias is another"):
        llmc_file.check(source, tmp_path)
    assert load_tokenizer(folder / "wide").vocab_size == 257
