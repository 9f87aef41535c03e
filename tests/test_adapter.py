"""Adapters: PEFT's format both ways, and what must be refused."""

import json

import pytest
import torch
from lora_reference import adapted, peft_config, quietly
from reference import TINY, prompts, twins
from safetensors.torch import load_file, save_file
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from nanogpt2.checkpoints.load import load_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.model import GPT
from nanogpt2.training.adapter import load_adapter, save_adapter
from nanogpt2.training.lora import add_lora, lora_layers

IDS = prompts(3, 7)
LABELS = ("a", "b", "c")


@pytest.fixture
def saved(tmp_path):
    """A model with LoRA and its adapter's folder."""
    twins(tmp_path / "base")
    model = adapted(load_model(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    return model, tmp_path / "adapter"


def test_ours_loads_into_peft(saved, tmp_path):
    from peft import PeftModel

    ours, folder = saved
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    theirs = quietly(PeftModel.from_pretrained, theirs, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    # it is that adapter that was loaded, whole
    assert not torch.equal(ours(IDS), load_model(tmp_path / "base")(IDS))
    quietly(theirs.save_pretrained, tmp_path / "again")
    name = "adapter_model.safetensors"
    first, again = load_file(folder / name), load_file(tmp_path / "again" / name)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_ours_loads_into_ours_bit_for_bit(saved, tmp_path):
    ours, folder = saved
    again = load_model(tmp_path / "base")
    load_adapter(again, folder)
    expected = ours.state_dict()
    assert expected.keys() == again.state_dict().keys()
    assert all(torch.equal(expected[name], x) for name, x in again.state_dict().items())
    learning = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in again.named_parameters() if p.requires_grad}


def test_pefts_loads_into_ours(tmp_path):
    from peft import get_peft_model

    ours, theirs = twins(tmp_path / "base")
    theirs = quietly(get_peft_model, theirs, peft_config(r=5, lora_dropout=0.1)).eval()
    quietly(theirs.save_pretrained, tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_classifiers_adapter_both_ways(tmp_path):
    from peft import PeftModel, get_peft_model

    gpt, _ = twins(tmp_path / "base")
    base = GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=0
    )
    theirs = quietly(get_peft_model, base, peft_config("SEQ_CLS")).eval()
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = GPTClassifier(gpt, LABELS).eval()
    load_adapter(ours, tmp_path / "theirs")
    idx = IDS.clamp(min=1)
    with torch.no_grad():
        expected = theirs(idx).logits
        torch.testing.assert_close(ours(idx)[:, -1], expected, atol=1e-4, rtol=1e-4)
    save_adapter(ours, tmp_path / "ours", "base")
    fresh = GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=0
    )
    again = quietly(PeftModel.from_pretrained, fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(idx).logits, expected, atol=1e-6, rtol=1e-6)


# ---- refused


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, message, model=None):
    """The error is one short line, and the model stays as it was."""
    model = GPT(TINY) if model is None else model
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["c_attn"]}, r"target_modules must be .*, not \['c_attn'\]"),
        ({"target_modules": "c_.*"}, "target_modules must be"),
        ({"target_modules": None}, "target_modules must be"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', not 'IA3'"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be"),
        ({"use_rslora": True}, "use_rslora is not supported: True"),
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"c_fc": 3}}, "alpha_pattern"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": "4"}, "r must be a whole number"),
        ({"r": 25}, "rank must be 0 to 24"),
        ({"r": 3}, "tensor .*lora_A.weight must be .*, not .*"),
        ({"lora_alpha": None}, "lora_alpha must be a number"),
        ({"lora_alpha": -1}, "alpha must be a finite number > 0"),
        ({"lora_alpha": 0}, "alpha must be a finite number > 0"),
        ({"lora_alpha": float("nan")}, "alpha must be a finite number > 0"),
        ({"lora_alpha": float("inf")}, "alpha must be a finite number > 0"),
        ({"lora_alpha": 1e30}, "alpha must be 1000000 at most, not 1e\\+30"),
        ({"lora_alpha": 10**400}, "alpha must be 1000000 at most, not 1000"),
    ],
)
def test_other_settings_are_refused(saved, changes, message):
    change_config(saved[1], **changes)
    refused(saved[1], message)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\udcff"])
def test_a_broken_config_is_refused(saved, text):
    path = saved[1] / "adapter_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved[1], r"adapter_config.json' is not (a )?JSON")


def test_a_broken_file_is_refused(saved):
    path = saved[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(saved[1], "is no whole safetensors file")


def without_one(tensors):
    return dict(list(tensors.items())[1:])


def with_another(tensors):
    return tensors | {"base_model.model.transformer.h.2.attn.c_attn.lora_A.weight": torch.ones(4)}


@pytest.mark.parametrize(
    ("change", "message"), [(without_one, "is missing"), (with_another, "is unexpected")]
)
def test_an_adapter_of_another_depth_is_refused(saved, change, message):
    path = saved[1] / "adapter_model.safetensors"
    tensors = change(load_file(path))
    # the library maps the file that is replaced
    path.unlink()
    save_file(tensors, path)
    refused(saved[1], message)


def test_a_classifiers_adapter_is_not_a_models(saved, tmp_path):
    refused(saved[1], "score.weight is missing", GPTClassifier(GPT(TINY), LABELS))
    save_adapter(adapted(GPTClassifier(GPT(TINY), LABELS)), tmp_path / "classifier", "base")
    refused(tmp_path / "classifier", "score.weight is unexpected")
    other = GPTClassifier(GPT(TINY), ("yes", "no"))
    refused(tmp_path / "classifier", r"score.weight must be \(2, 24\), not \(3, 24\)", other)


def test_a_second_adapter_is_refused(saved):
    with pytest.raises(ValueError, match="has LoRA already"):
        load_adapter(saved[0], saved[1])


def test_a_plain_model_has_no_adapter(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers to save"):
        save_adapter(GPT(TINY), tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 1e30])
def test_an_alpha_out_of_range_is_refused_when_given(alpha):
    model = GPT(TINY)
    with pytest.raises(
        ValueError, match=r"alpha must be (a finite number > 0|1000000 at most), not "
    ):
        add_lora(model, 2, alpha)
    assert not lora_layers(model)


# ---- saved over another, and its base


def test_an_adapter_saved_over_another_is_one_of_the_two(saved, tmp_path, monkeypatch):
    """Killed after the first rename: the new tensors do not get the old alpha."""
    folder = saved[1]
    before = files_of(folder)
    again = load_model(tmp_path / "base")
    add_lora(again, 4, 60.0)
    save_adapter(again, folder, "gpt2")
    mixed = before | {"adapter_model.safetensors": files_of(folder)["adapter_model.safetensors"]}
    for name, data in mixed.items():
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    found = load_model(tmp_path / "base")
    load_adapter(found, folder)
    assert {layer.alpha for layer in lora_layers(found).values()} == {60.0}
    assert torch.equal(found(IDS), again(IDS))


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_base_is_named_so_that_peft_finds_it(tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    model = adapted(load_model("demo"))
    monkeypatch.chdir(tmp_path)
    twins(tmp_path / "base")

    def base_of(name):
        save_adapter(model, "adapter", name)
        return json.loads((tmp_path / "adapter/adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]

    assert base_of("gpt2") == "openai-community/gpt2"
    assert base_of("base") == base_of("base/model.safetensors") == str(tmp_path / "base")
    assert base_of("somebody/gpt2-tuned") == "somebody/gpt2-tuned"
    # from anywhere
    assert base_of("demo") != "demo"
    monkeypatch.chdir("/")
    theirs = quietly(AutoPeftModelForCausalLM.from_pretrained, tmp_path / "adapter")
    theirs = theirs.float().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
