"""There and back: what export writes is read here again; each target with shapes of every kind."""

import json
from dataclasses import replace

import pytest
import torch
from reference import hf_model

from nanogpt2 import generate, load_model, load_tokenizer, save_model
from nanogpt2.config import GPTConfig, parse
from nanogpt2.export.options import ExportConfig
from nanogpt2.export.run import export
from nanogpt2.tokenizer import byte_tokenizer

# for Q8_0 and llama.cpp rows and heads of 32
SHAPE = GPTConfig(
    vocab_size=257,
    block_size=64,
    n_layer=2,
    n_head=2,
    n_embd=64,
    bos_token_id=256,
    eos_token_id=256,
)
SHAPES = {
    "width": {"n_inner": 96},
    "erf": {"activation_function": "gelu"},
    "scaled": {"scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
}
HOLDS = {
    "gguf": {"width", "untied"},
    "onnx": {*SHAPES},
    "hf": {*SHAPES},
    "nanogpt": {"erf"},
    "llmc": set(),
}


def saved(folder, tokenizer=None, **shape):
    """A model whose every tensor is random, written as a folder."""
    config = replace(SHAPE, **shape)
    if tokenizer is not None:
        config = replace(config, vocab_size=tokenizer.vocab_size)
    # the fields have transformers' names
    model = hf_model(config, **shape)
    model.save_pretrained(folder / "theirs")
    save_model(load_model(folder / "theirs"), folder / "model", tokenizer or byte_tokenizer())
    return folder / "model"


def exported(capsys, model, out, to, *flags):
    capsys.readouterr()
    export(parse(ExportConfig, [str(model), "--to", to, "--out", str(out), "--json", *flags]))
    return json.loads(capsys.readouterr().out)


def ids():
    torch.manual_seed(3)
    return torch.randint(250, (2, 9))


@pytest.mark.parametrize("to", ["nanogpt", "llmc"])
def test_what_export_writes_is_read_here(tmp_path, capsys, to):
    folder = saved(tmp_path)
    exported(capsys, folder, tmp_path / "out", to)
    if to == "nanogpt":
        # nanoGPT's own GELU is exact; a config.json beside the file says otherwise
        stated = json.loads((folder / "config.json").read_text())
        assert load_model(tmp_path / "out/ckpt.pt").config.activation_function == "gelu"
        (tmp_path / "out/config.json").write_text(json.dumps(stated))
        path = tmp_path / "out/ckpt.pt"
    else:
        (path,) = (tmp_path / "out").glob("gpt2_[0-9]*.bin")
    before, after = load_model(folder), load_model(path)
    assert after.config.vocab_size == 257
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    options = {"max_new_tokens": 20, "num_beams": 3, "eos_token_id": None}
    found, expected = (generate(model, ids(), **options).sequences for model in (after, before))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("to", ["nanogpt", "llmc", "gguf"])
def test_shapes_that_a_target_cannot_hold_are_one_line(tmp_path, capsys, to, name):
    if name in HOLDS[to]:
        assert exported(capsys, saved(tmp_path, **SHAPES[name]), tmp_path / "out", to)
        return
    with pytest.raises(SystemExit, match="2"):
        exported(capsys, saved(tmp_path, **SHAPES[name]), tmp_path / "out", to)
    (field,) = SHAPES[name]
    said = capsys.readouterr().err
    assert said.startswith(f"error: MODEL has {field} ") and f"--to {to} cannot hold" in said
    assert not (tmp_path / "out").exists()


HELD = [(to, name) for to in ("hf", "onnx", "gguf") for name in SHAPES if name in HOLDS[to]]


@pytest.mark.slow
@pytest.mark.parametrize(("to", "name"), HELD)
def test_the_other_program_agrees_on_every_shape(tmp_path, capsys, to, name):
    found = exported(capsys, saved(tmp_path, **SHAPES[name]), tmp_path / "out", to)
    assert_agree(found, to)


def assert_agree(found, to):
    """llama.cpp's GELU has 16 bits: where two tokens are nearly equal it may take the other one."""
    assert found["prompts"] == 10
    assert found["prompts_equal"] == 10 or (to == "gguf" and found["prompts_equal"] >= 7)


def test_several_ends_and_flags_of_added_tokens_in_gguf(tmp_path, capsys):
    import gguf

    grown = byte_tokenizer().with_added(["<user>"])
    grown._take([*grown.added[:1], replace(grown.added[1], rstrip=True)])
    folder = saved(tmp_path, grown)
    for path in (folder / "config.json", folder / "generation_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [65, 66, 67]}))
    capsys.readouterr()
    export(parse(ExportConfig, [str(folder), "--to", "gguf", "--out", str(tmp_path / "out")]))
    said = capsys.readouterr().err
    assert "llama.cpp holds two ends of a text: [67, 256] will not end one" in said
    assert "no lstrip, rstrip or single_word" in said
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    ends = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")]
    assert ends == [65, 66]


def test_options_of_generation_go_along(tmp_path, capsys):
    folder = saved(tmp_path)
    stated = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))
    model = load_model(folder)
    save_model(model, tmp_path / "again", byte_tokenizer())
    again = load_model(tmp_path / "again")
    assert again.generation_options == model.generation_options == stated
    found, expected = (generate(m, ids(), max_new_tokens=20).sequences for m in (again, model))
    assert torch.equal(found, expected)


def test_a_vocabulary_without_white_space(tmp_path, capsys):
    """WordPiece gives no id for a blank text, and its template adds some."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]", "[E]"])
    library.train_from_iterator(["once upon a time there was a fox"] * 5, trainer)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [E]", special_tokens=[("[E]", 1)]
    )
    size = library.get_vocab_size()
    hf_model(replace(SHAPE, vocab_size=size, eos_token_id=1)).save_pretrained(tmp_path / "model")
    library.save(str(tmp_path / "model/tokenizer.json"))
    found = exported(capsys, tmp_path / "model", tmp_path / "out", "hf")
    assert found["prompts_equal"] == found["prompts"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "onnx", "gguf"])
def test_added_tokens_go_along(tmp_path, capsys, to):
    grown = byte_tokenizer().with_added(["<user>", "<bot>"])
    folder = saved(tmp_path, grown)
    assert load_tokenizer(folder) == grown
    found = exported(capsys, folder, tmp_path / "out", to)
    assert_agree(found, to)
    if to != "gguf":
        stated = json.loads((tmp_path / "out/tokenizer.json").read_text(encoding="utf-8"))
        assert {t["content"]: t["id"] for t in stated["added_tokens"]}["<bot>"] == 258
