"""Every layout of GPT-2's files in, transformers' folder out, and what must be refused."""

import contextlib
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from reference import (
    PRESETS,
    TINY,
    hf_model,
    official_tensors,
    rewrite,
    twins,
    write_official_file,
)
from safetensors.torch import load_file, save_file
from saved_files import flip, rewrite_bytes
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline

from nanogpt2 import GPTClassifier, hub, open_checkpoint
from nanogpt2.checkpoints import folder as model_folder
from nanogpt2.checkpoints import header
from nanogpt2.checkpoints.load import load_model, load_tokenizer
from nanogpt2.checkpoints.save import save_model
from nanogpt2.config import GPTConfig
from nanogpt2.data.chat import segments
from nanogpt2.data.encode import encode_chat
from nanogpt2.data.records import Record
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer, gpt2_tokenizer
from nanogpt2.training import checkpoint

IDS = torch.randint(TINY.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as today's transformers writes it, and the logits it stands for."""
    folder = tmp_path_factory.mktemp("saved")
    theirs = hf_model()
    theirs.save_pretrained(folder)
    with torch.no_grad():
        return folder, theirs(IDS).logits


def check_logits(model, expected, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, **tolerance)


def without_prefix(tensors):
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_masks(tensors):
    mask = torch.ones(1, 1, TINY.block_size, TINY.block_size).tril()
    masks = {f"transformer.h.{i}.attn.bias": mask.clone() for i in range(TINY.n_layer)}
    bias = {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(TINY.n_layer)}
    return tensors | masks | bias


def with_head(tensors):
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


@pytest.mark.parametrize(
    "change", [dict, without_prefix, with_masks, with_head, lambda t: without_prefix(with_masks(t))]
)
def test_every_naming_loads(saved, tmp_path, change):
    rewrite(saved[0], tmp_path / "model", change)
    check_logits(load_model(tmp_path / "model"), saved[1], atol=1e-4, rtol=1e-4)
    # the file alone, its config.json beside it
    check_logits(load_model(tmp_path / "model/model.safetensors"), saved[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.05), (torch.bfloat16, 0.5)])
def test_half_precision_files_load(saved, tmp_path, dtype, tolerance):
    def change(tensors):
        return with_head({name: tensor.to(dtype) for name, tensor in tensors.items()})

    rewrite(saved[0], tmp_path / "model", change)
    model = load_model(tmp_path / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_logits(model, saved[1], atol=tolerance, rtol=tolerance)
    narrow = load_model(tmp_path / "model", dtype=str(dtype).removeprefix("torch."))
    assert {p.dtype for p in narrow.parameters()} == {dtype}


def test_sharded_files_load(saved, tmp_path):
    hf_model().save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_logits(load_model(tmp_path), saved[1], atol=1e-4, rtol=1e-4)
    index = tmp_path / "model.safetensors.index.json"
    shard = next(tmp_path.glob("model-00002*"))
    for text in (
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x"}}',
        "[",
        "[]",
        '{"weight_map": 1}',
    ):
        whole = index.read_text()
        index.write_text(text)
        with pytest.raises(ValueError, match="index"):
            load_model(tmp_path)
        index.write_text(whole)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        load_model(tmp_path)


@pytest.mark.parametrize("residue", range(8))
def test_data_at_any_alignment(tmp_path, residue):
    tensors = official_tensors(TINY)
    path = tmp_path / "model.safetensors"
    write_official_file(path, tensors, header_length=4000 + residue)
    hf_model().config.save_pretrained(tmp_path)
    theirs = hf_model()
    with torch.no_grad():
        expected = theirs(IDS).logits
    model = load_model(path)
    check_logits(model, expected, atol=1e-4, rtol=1e-4)
    assert all(p.data_ptr() % 16 == 0 for p in model.parameters())


@pytest.mark.slow
def test_the_official_layout_to_the_byte(tmp_path, monkeypatch):
    """Random numbers in the file of the 124M: 160 tensors, header 14,283, data at 3 mod 8."""
    tensors = official_tensors(PRESETS["gpt2"])
    path = tmp_path / "model.safetensors"
    write_official_file(path, tensors, header_length=14_283)
    assert len(tensors) == 160
    assert path.stat().st_size == hub.RELEASES["gpt2"].size
    ids = torch.randint(50257, (1, 12))
    with torch.no_grad():
        expected = hf_model(PRESETS["gpt2"])(ids).logits
        # by its path, told by its shapes; and by its name, as if it had been downloaded
        torch.testing.assert_close(load_model(path)(ids), expected, atol=1e-4, rtol=1e-4)
        monkeypatch.setattr(hub, "fetch_weights", lambda name: path)
        torch.testing.assert_close(load_model("gpt2")(ids), expected, atol=1e-4, rtol=1e-4)
    assert load_tokenizer("gpt2").vocab_size == 50257


@pytest.mark.slow
def test_loading_and_saving_take_twice_the_models_memory(tmp_path):
    write_official_file(tmp_path / "model.safetensors", official_tensors(PRESETS["gpt2"]), 14_283)
    code = (
        "import re, sys, torch; from nanogpt2 import load_model, save_model\n"
        "from nanogpt2.tokenizer import gpt2_tokenizer; gpt2_tokenizer()\n"
        # getrusage's peak would be that of the process which started this one
        "status = lambda: open('/proc/self/status').read()\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) * 1024\n"
        "start = peak(); model = load_model(sys.argv[1]); loaded = peak() - start\n"
        "save_model(model, sys.argv[2]); print(loaded, peak() - start)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "model.safetensors"), str(tmp_path / "out")]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    loaded, converted = (int(figure) / (124_439_808 * 4) for figure in out.split())
    assert 0.9 < loaded < 1.5, loaded
    assert 0.9 < converted < 1.5, converted


# ---- out


def test_what_save_model_writes_is_what_transformers_reads(saved, tmp_path):
    model = load_model(saved[0])
    save_model(model, tmp_path)
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    original, written = (
        load_file(saved[0] / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, written[name]), name
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(IDS).logits, saved[1])
    assert (tmp_path / "model.safetensors").stat().st_mode == (
        tmp_path / "config.json"
    ).stat().st_mode
    assert load_model(tmp_path).config == model.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype):
    model = GPT(TINY).to(dtype)
    save_model(model, tmp_path)
    again = load_model(tmp_path, dtype=str(dtype).removeprefix("torch."))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b), name


def test_ten_thousand_equal_choices_after_a_round_trip(tmp_path):
    ours, theirs = twins(tmp_path / "a")
    save_model(ours, tmp_path / "b")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "b").eval()
    ids = torch.randint(TINY.vocab_size, (280, 36))
    with torch.no_grad():
        assert torch.equal(ours(ids).argmax(-1), back(ids).logits.argmax(-1))
        assert torch.equal(theirs(ids).logits, back(ids).logits)


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), byte_tokenizer()], ids=lambda t: t.name)
def test_auto_tokenizer_loads_what_is_saved(tmp_path, tokenizer):
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        block_size=16,
        n_layer=1,
        n_head=1,
        n_embd=4,
        bos_token_id=tokenizer.end_of_text,
        eos_token_id=tokenizer.end_of_text,
    )
    save_model(GPT(config), tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, wörld! 🙂\n\n  <|endoftext|>"
    ids = tokenizer.encode(text, allow_special=True)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.end_of_text and len(theirs) == tokenizer.vocab_size
    assert load_tokenizer(tmp_path) is tokenizer
    assert load_tokenizer(tmp_path / "model.safetensors") is tokenizer


def test_gpt2s_tokenizer_needs_no_asking(tmp_path):
    save_model(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=4)), tmp_path)
    assert (tmp_path / "merges.txt").read_text() == gpt2_tokenizer().merges
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello world")["input_ids"] == [15496, 995]


def test_loading_draws_no_random_number(saved):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(saved[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_outlives_its_file(saved, tmp_path):
    rewrite(saved[0], tmp_path / "model", dict)
    model = load_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"x")
    check_logits(model, saved[1], atol=1e-4, rtol=1e-4)


# ---- an open checkpoint


@pytest.fixture
def opened_files(monkeypatch):
    """The names of the headers parsed and JSON files read until now."""
    found = []
    parse, read = header.Header.__init__, model_folder._read_json

    def parsing(self, path, file):
        found.append(path.name)
        parse(self, path, file)

    def reading(path, manifest=None):
        found.append(path.name)
        return read(path, manifest)

    monkeypatch.setattr(header.Header, "__init__", parsing)
    monkeypatch.setattr(model_folder, "_read_json", reading)
    return found


def test_a_checkpoint_is_opened_once(tmp_path, opened_files):
    model = GPT(GPTConfig(257, 8, 1, 1, 4, eos_token_id=256))
    save_model(model, tmp_path, byte_tokenizer())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tokenizer is byte_tokenizer() and checkpoint.labels == ()
        assert checkpoint.config.n_embd == 4
        assert checkpoint.tensors.keys() == model.state_dict().keys()
        ids = torch.tensor([[1, 2, 3]])
        models = [checkpoint.model(), checkpoint.generator(), checkpoint.model(quantize="int8")]
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert opened_files.count(name) == 1, opened_files
    assert torch.equal(models[0](ids), load_model(tmp_path)(ids))
    torch.testing.assert_close(models[1](ids), models[0](ids))
    assert models[2].scheme == "int8"


def test_a_classifiers_config_is_read_once(tmp_path, opened_files):
    save_model(GPTClassifier(GPT(TINY), ("bad", "good")), tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.labels == checkpoint.classifier().labels == ("bad", "good")
        with pytest.raises(ValueError, match="is a classifier, which writes no texts"):
            checkpoint.model()
    assert opened_files.count("config.json") == opened_files.count("model.safetensors") == 1


def test_a_checkpoint_that_is_dropped_closes_its_files(saved):
    checkpoint = open_checkpoint(saved[0])
    model, file = checkpoint.generator(), checkpoint._opened[0]._file
    assert not file.closed
    # nor does the model keep the checkpoint; an unclosed file would be a warning, an error here
    del checkpoint
    assert file.closed
    check_logits(model, saved[1], atol=1e-4, rtol=1e-4)


def test_opening_checks_every_header(saved, tmp_path):
    rewrite(saved[0], tmp_path / "model", WRONG["adapter' is no part"])
    with pytest.raises(ValueError, match="adapter' is no part"):
        open_checkpoint(tmp_path / "model")


# ---- what config.json says


@pytest.mark.parametrize(
    ("stated", "eos"),
    [
        ({"eos_token_id": 50256}, None),
        ({"eos_token_id": [3, 50256]}, 3),
        ({"eos_token_id": [3, 4]}, (3, 4)),
        ({"eos_token_id": None}, None),
        ({"eos_token_id": -1}, None),
    ],
)
def test_an_id_outside_the_vocabulary_is_ignored(saved, tmp_path, stated, eos):
    rewrite(saved[0], tmp_path / "model", dict)
    (tmp_path / "model/generation_config.json").unlink()
    config = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | stated))
    assert load_model(tmp_path / "model").config.eos_token_id == eos


@pytest.mark.parametrize(
    "stated",
    [
        {"model_type": "llama"},
        {"activation_function": "relu"},
        {"n_inner": 5},
        {"n_head": 5},
        {"n_layer": "2"},
        {"n_positions": -1},
    ],
    ids=str,
)
def test_another_architecture_is_refused(saved, tmp_path, stated):
    rewrite(saved[0], tmp_path / "model", dict)
    config = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | stated))
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path / "model")


# ---- what must be refused


def dropped(name):
    return lambda tensors: {n: t for n, t in tensors.items() if n != f"transformer.{name}"}


def replaced(name, tensor):
    return lambda tensors: tensors | {f"transformer.{name}": tensor}


WRONG = {
    "h.1.mlp.c_fc.weight is missing": dropped("h.1.mlp.c_fc.weight"),
    "ln_f.bias is missing": dropped("ln_f.bias"),
    r"h.0.attn.c_attn.weight' must be \(24, 72\), not \(72, 24\)": replaced(
        "h.0.attn.c_attn.weight", torch.zeros(72, 24)
    ),
    r"config.json': n_positions is 37, but 38 by the tensors of model.safetensors": replaced(
        "wpe.weight", torch.zeros(38, 24)
    ),
    "wpe.weight must be a matrix": replaced("wpe.weight", torch.zeros(37 * 24)),
    "config.json': n_layer is 2, but 3 by": replaced("h.2.ln_1.weight", torch.zeros(24)),
    "h.1.ln_3.weight' is no part": replaced("h.1.ln_3.weight", torch.zeros(24)),
    "adapter' is no part": replaced("adapter", torch.zeros(1)),
    "ln_f.bias' must be F32, F16, BF16, not I64": replaced(
        "ln_f.bias", torch.zeros(24, dtype=torch.int64)
    ),
    "must equal wte.weight": lambda tensors: (
        tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}
    ),
    r"lm_head.weight' must be \(61, 24\)": lambda t: t | {"lm_head.weight": torch.zeros(3)},
    "must be F32, F16, BF16, not F64": lambda tensors: {
        name: tensor.double() for name, tensor in tensors.items()
    },
    "is there twice": lambda tensors: tensors | {"ln_f.bias": torch.zeros(24)},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_tensor_is_named(saved, tmp_path, message):
    rewrite(saved[0], tmp_path / "model", WRONG[message])
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path / "model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(saved, tmp_path, size):
    rewrite(saved[0], tmp_path / "model", dict)
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "ckpt.pth", "last.ckpt"])
def test_pickles_are_never_opened(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match="pickle"):
            load_model(source)


def test_foreign_and_missing_files(saved, tmp_path):
    for name, tensors in {"other": {"a": torch.zeros(3)}, "empty": {}}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"wte\.weight is missing"):
            load_model(tmp_path / f"{name}.safetensors")
    tensors = without_prefix(load_file(saved[0] / "model.safetensors"))
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no config\.json beside it"):
        load_model(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="or a known model"):
        load_model("gpt2-huge")
    with pytest.raises(ValueError, match=r"not a \.safetensors"):
        load_model(__file__)


def test_a_vocabulary_without_a_tokenizer(saved):
    with pytest.raises(ValueError, match="vocabulary of 61"):
        load_tokenizer(saved[0])


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_vocabulary_of_the_same_size_is_refused(tmp_path, name):
    """Its ids would be read as other words."""
    save_model(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=4)), tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    path = tmp_path / name
    (tmp_path / "vocab.json").unlink() if name == "tokenizer.json" else None
    assert load_tokenizer(tmp_path) is gpt2_tokenizer()
    text = path.read_text()
    assert "Hello" in text
    path.write_text(text.replace('"Hello"', '"Hallo"'))
    with pytest.raises(ValueError, match=f"{name}.* another vocabulary"):
        load_tokenizer(tmp_path)


# ---- mutated files

SMALL = GPTConfig(3, 4, 1, 1, 2, bos_token_id=0, eos_token_id=0)


def edit_header(data, rng):
    """A header that is still JSON, with one thing in it that is not as it was."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    one, other = rng.sample(names, 2)
    number = rng.choice([0, 1, -1, 2, 10**6, 2**63, 10**30, 1.0, None, "4", True, [2]])
    text = None
    match rng.randrange(8):
        case 0:
            header[one]["dtype"] = rng.choice(["F32", "F16", "I32", "U8", "F64", "F9", None, 3, []])
        case 1:
            header[one]["shape"] = rng.choice([[number], header[one]["shape"][::-1], [[]], "22"])
        case 2:
            header[one]["data_offsets"][rng.randrange(2)] = number
        case 3:
            places = [header[name]["data_offsets"] for name in (one, other)]
            header[one]["data_offsets"], header[other]["data_offsets"] = places[::-1]
        case 4:
            header[rng.choice([one + "x", other, "lm_head.weight"])] = header.pop(one)
        case 5:
            header[one] = rng.choice([number, [], {}, {"dtype": "F32"}])
        case 6:
            header["__metadata__"] = rng.choice([number, {}, {"format": number}])
        case 7:
            text = json.dumps(header)[:-1] + f", {json.dumps(one)}: {json.dumps(header[other])}}}"
    raw = (text or json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def mutate(data, rng):
    """One to three mistakes of any kind."""
    start = 8 + int.from_bytes(data[:8], "little")
    for mistake in rng.choices(range(8), k=rng.choice([1, 1, 1, 2, 3])):
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
            # the mistake before it may have left no header to edit
            data = {
                0: lambda d: flip(d, rng, 8, start),
                1: lambda d: flip(d, rng, start, len(d)),
                2: lambda d: rewrite_bytes(d, rng, 0, start),
                3: lambda d: rewrite_bytes(d, rng, start, len(d)),
                4: lambda d: d[: rng.randrange(len(d))],
                5: lambda d: d + rng.randbytes(rng.randrange(1, 9)),
                6: lambda d: (
                    rng.choice(
                        [
                            rng.randrange(2 * start),
                            rng.getrandbits(64),
                            start - 8 + rng.choice([-1, 1]),
                        ]
                    ).to_bytes(8, "little")
                    + d[8:]
                ),
                7: lambda d: edit_header(d, rng),
            }[mistake](data)
    return data


def three_homes(tmp_path):
    """The same model: as OpenAI would write it, in a run's folder, and in a run's checkpoint."""
    torch.manual_seed(3)
    model = GPT(SMALL)
    tokenizer = byte_tokenizer()
    state = {"step": 1, "is_best": True}
    checkpoint.commit(tmp_path / "run", model, tokenizer, {}, state, keep=1)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tmp_path / "run/config.json", bare)
    write_official_file(bare / "model.safetensors", official_tensors(SMALL), header_length=1600)
    return bare, tmp_path / "run", tmp_path / "run/checkpoints/step-1"


def check_mutants(tmp_path, count):
    """Each loads as what it is, or says why not in one line; what has a digest is never altered."""
    counts = {"loaded": 0, "refused": 0}
    for home, folder in enumerate(three_homes(tmp_path)):
        path = folder / "model.safetensors"
        whole, expected = path.read_bytes(), load_model(folder).state_dict()
        rng = random.Random(home)
        for _ in range(count // 3):
            data = mutate(whole, rng)
            # not in place: the run's file and its checkpoint's are one
            path.unlink()
            path.write_bytes(data)
            try:
                state = load_model(folder).state_dict()
            except ValueError as error:
                assert "\n" not in str(error) and "model.safetensors" in str(error)
                counts["refused"] += 1
                continue
            counts["loaded"] += 1
            assert home < 2 or data == whole
            for name, tensor in expected.items():
                assert state[name].shape == tensor.shape
                assert home == 0 or torch.equal(state[name], tensor), name
    return counts


def test_a_mutated_file_loads_or_says_why(tmp_path):
    counts = check_mutants(tmp_path, 600)
    assert min(counts.values()) > 10, counts


@pytest.mark.marathon
def test_a_hundred_thousand_mutated_files(tmp_path):
    counts = check_mutants(tmp_path, 100_002)
    print(counts)
    assert sum(counts.values()) >= 100_000


# ---- wrapped models


def partly_compiled(model):
    blocks = model.transformer.h if isinstance(model, GPTClassifier) else model.h
    blocks[0] = torch.compile(blocks[0])
    return model


# torch's own import of its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("labels", [(), ("a", "b")])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda model: torch.compile(torch.nn.DataParallel(model)),
        partly_compiled,
    ],
)
def test_a_wrapped_model_is_saved_as_the_model(tmp_path, wrap, labels):
    model = GPTClassifier(GPT(TINY), labels) if labels else GPT(TINY)
    save_model(model, tmp_path / "plain")
    save_model(wrap(model), tmp_path / "wrapped")
    assert files_of(tmp_path / "wrapped") == files_of(tmp_path / "plain")
    assert b"_orig_mod" not in files_of(tmp_path / "plain")["model.safetensors"]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_no_gpt_is_refused(tmp_path):
    with pytest.raises(TypeError, match="expected a GPT or a GPTClassifier, not Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- exports: tokenizers, templates, pipelines


def small(tokenizer, **options):
    shape = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 4} | options
    return GPT(GPTConfig(tokenizer.vocab_size, eos_token_id=tokenizer.end_of_text, **shape))


TEXTS = [
    "Hello, w\u00f6rld! \U0001f642\n\n  don't",
    "  two  spaces \t",
    "a<|endoftext|>b",
    "\u0301 1234 \x00",
    "",
]


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), byte_tokenizer()], ids=lambda t: t.name)
def test_the_fast_tokenizer_reads_tokenizer_json(tmp_path, tokenizer):
    save_model(small(tokenizer), tmp_path, tokenizer)
    # it alone: the library, and transformers with the settings
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.is_fast and theirs.pad_token_id == tokenizer.end_of_text
    for text in TEXTS:
        ids = tokenizer.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == library.encode(text).ids == ids
        assert library.decode(ids, skip_special_tokens=False) == text
    assert load_tokenizer(tmp_path) is tokenizer


Q, A, S = "user", "assistant", "system"
CHATS = [
    [(Q, "Hi there"), (A, "Hello!")],
    [(S, " Be kind.\n"), (Q, "A?"), (A, "(B)"), (Q, "1"), (A, "2 ")],
    [(Q, "  two\n\nlines "), (A, "\u00e9 \U0001f642"), (Q, "x"), (Q, "y"), (A, "z")],
]


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), byte_tokenizer()], ids=lambda t: t.name)
@pytest.mark.parametrize("chat", CHATS)
def test_the_chat_template_gives_the_ids_of_training(tmp_path, tokenizer, chat):
    save_model(small(tokenizer), tmp_path, tokenizer, chat=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": role, "content": content} for role, content in chat]
    parts = segments(Record("here", {"messages": messages}))
    stream = encode_chat(parts, tokenizer)
    # an entry that is trained on is stored as its complement; the last one only marks the end
    ids = [int(i) if i >= 0 else ~int(i) for i in stream[:-1]]
    found = theirs.apply_chat_template(messages, return_dict=False)
    assert found == ids
    # as prompts: everything before the last answer
    asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert asked == ids[: len(asked)]
    assert asked == [i for text, _ in parts[:-1] for i in tokenizer.encode(text)]


def test_a_language_model_has_no_chat_template(tmp_path):
    save_model(small(byte_tokenizer()), tmp_path, byte_tokenizer())
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None


def test_a_pipeline_pads_a_batch(tmp_path):
    save_model(small(byte_tokenizer(), block_size=40), tmp_path, byte_tokenizer())
    write = pipeline("text-generation", str(tmp_path), device="cpu")
    texts = ["one", "a longer prompt"]
    options = {"max_new_tokens": 5, "do_sample": False, "max_length": None}
    alone = [write(text, **options) for text in texts]
    assert write(texts, batch_size=2, **options) == alone


# torch's own import of its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_export_takes_the_model_at_every_length():
    """`--to onnx` builds on it."""
    model = small(byte_tokenizer()).eval()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    any_size = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(model, (ids,), dynamic_shapes=any_size).module()
    for shape in ((2, 7), (3, 16)):
        ids = torch.randint(257, shape)
        torch.testing.assert_close(exported(ids), model(ids))
