"""generate() called as transformers' is: its arguments, and the caller's torch settings."""

import types
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers
from reference import hf_model, prompts, their_output, twins
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from nanogpt2.checkpoints.load import load_classifier, load_generator, load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GenerationConfig, GPTConfig
from nanogpt2.generation import generate
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

SAMPLED = {"do_sample": True, "seed": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
WAYS = {
    "greedy": {"sequence_bias": [[[3], 2.0], [[4, 5], 1.0]]},
    "sampled": SAMPLED | {"typical_p": 0.9, "eta_cutoff": 0.01, "top_p": 0.9, "top_h": 0.9},
    "counter": SAMPLED | {"noise": "counter", "num_return_sequences": 2},
    "beams": {"num_beams": 3, "exponential_decay_length_penalty": [2, 1.1]},
    "sampled beams": {"num_beams": 3, "do_sample": True, "seed": 1},
    "diverse": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained": {"num_beams": 3, "force_words_ids": [[4, 5]]},
    "stochastic": {"num_beams": 3, "stochastic_beams": True, "seed": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
}
IDS = torch.tensor([[1, 2, 3, 4, 2, 3]])
BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}


def state():
    """The settings of torch that a caller may have changed."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("load", [load_model, load_generator])
@pytest.mark.parametrize("way", WAYS)
def test_the_callers_settings_change_no_token_and_stay(folder, way, load):
    options = {"max_new_tokens": 12, "output_scores": True} | WAYS[way]
    expected = generate(load(folder), IDS, **options)
    for setting in SETTINGS.values():
        model = load(folder)
        with setting():
            before = state()
            found = generate(model, IDS, **options)
            assert state() == before
        assert torch.equal(found.sequences, expected.sequences)
        assert found.scores[0].dtype == torch.float32
        # nothing that the model keeps was spoilt
        assert torch.equal(generate(model, IDS, **options).sequences, expected.sequences)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_change_no_model_and_no_text(tmp_path, setting):
    torch.manual_seed(2)
    shape = GPTConfig(257, 16, 1, 2, 8, bos_token_id=256, eos_token_id=256)
    save_model(GPTClassifier(GPT(shape), ("a", "b")), tmp_path / "classifier", BYTES)
    save_model(GPT(shape), tmp_path / "0", BYTES)

    def results(number):
        model = load_model(tmp_path / str(number))
        classifier = load_classifier(tmp_path / "classifier")
        save_model(model, tmp_path / str(number + 1), BYTES)
        narrow = load_generator(tmp_path / "0", quantize="int8")
        return (
            classifier.classify([[1, 2], [3]]),
            generate(model, ["ab", "c"], tokenizer=BYTES, max_new_tokens=4).sequences,
            generate(narrow, "ab", tokenizer=BYTES, max_new_tokens=4).sequences,
            *model.state_dict().values(),
        )

    expected = results(0)
    with SETTINGS[setting]():
        found = results(1)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == right.dtype and torch.equal(ours, right)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_settings_stay_after_an_error(models, setting):
    def broken(ids, scores):
        raise KeyError("mine")

    with SETTINGS[setting]():
        before = state()
        with pytest.raises(KeyError, match="mine"):
            generate(models[0], IDS, max_new_tokens=4, logits_processor=[broken])
        assert state() == before


# ---- arguments


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": (7, 9)}),
        ({"eos_token_id": np.int64(7)}, {"eos_token_id": 7}),
        ({"eos_token_id": torch.tensor([7, 9])}, {"eos_token_id": (7, 9)}),
        ({"forced_eos_token_id": [13]}, {"forced_eos_token_id": 13}),
        (
            {"pad_token_id": np.int32(5), "eos_token_id": [7]},
            {"pad_token_id": 5, "eos_token_id": 7},
        ),
        ({"do_sample": np.bool_(True), "top_k": np.int16(5)}, {"do_sample": True, "top_k": 5}),
        (
            {"do_sample": True, "temperature": np.float64(0.5)},
            {"do_sample": True, "temperature": 0.5},
        ),
        ({"suppress_tokens": np.array([3, 4])}, {"suppress_tokens": [3, 4]}),
        ({"sequence_bias": {(np.int64(3),): np.float64(9)}}, {"sequence_bias": [[[3], 9.0]]}),
        (
            {"num_beams": None, "temperature": None, "do_sample": None, "early_stopping": None},
            {},
        ),
        ({"top_p": None, "repetition_penalty": None, "length_penalty": None, "seed": None}, {}),
        ({"logits_processor": None, "stopping_criteria": None, "guidance_scale": None}, {}),
        ({"use_cache": True, "return_dict_in_generate": True, "output_attentions": False}, {}),
        ({"attention_mask": [[1] * 6]}, {"attention_mask": torch.ones(1, 6)}),
        ({"attention_mask": np.ones((1, 6))}, {"attention_mask": torch.ones(1, 6)}),
    ],
    ids=str,
)
def test_values_as_transformers_takes_them(models, given, meant):
    torch.manual_seed(5)
    found = generate(models[0], IDS, max_new_tokens=9, **given).sequences
    torch.manual_seed(5)
    assert torch.equal(found, generate(models[0], IDS, max_new_tokens=9, **meant).sequences)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_ids_are_ids(models, dtype):
    found = generate(models[0], IDS.to(dtype), max_new_tokens=5).sequences
    assert found.dtype == torch.int64
    assert torch.equal(found, generate(models[0], IDS, max_new_tokens=5).sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_what_is_no_id_is_refused(models, dtype):
    with pytest.raises(ValueError, match="input_ids must be whole numbers"):
        generate(models[0], IDS.to(dtype), max_new_tokens=5)


class Heard(BaseStreamer):
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value.clone())

    def end(self):
        self.values.append("end")


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "num_return_sequences": 2}, {"eos_token_id": [7, 9, 11, 30]}],
    ids=str,
)
def test_a_streamer_hears_what_theirs_hears(models, options):
    ids, o = prompts(2, 4), {"max_new_tokens": 8} | options
    heard = [Heard(), Heard()]
    their_output(models[1], ids, torch.ones_like(ids), 2, streamer=heard[0], **o)
    torch.manual_seed(2)
    generate(models[0], ids, streamer=heard[1], **o)
    theirs, ours = (each.values for each in heard)
    assert theirs.pop() == ours.pop() == "end"
    assert len(theirs) == len(ours) == 9
    assert all(map(torch.equal, theirs, ours))


def test_a_streamer_is_refused_with_beams(models):
    with pytest.raises(ValueError, match="streamer must be left out"):
        generate(models[0], IDS, num_beams=2, max_new_tokens=3, streamer=Heard())


def long_or_odd(ids, scores, **kwargs):
    return torch.full((len(ids),), ids.size(1) > 9) | (ids[:, -1] % 5 == 1)


def by_scores(ids, scores, **kwargs):
    assert isinstance(scores, tuple)
    return len(scores) > 4


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(
    "criteria", [[long_or_odd], [by_scores, long_or_odd], StoppingCriteriaList([long_or_odd])]
)
def test_stopping_criteria_end_where_theirs_end(models, criteria, sample, beams):
    ids = prompts(3, 5)
    options = {"max_new_tokens": 12, "num_beams": beams, "do_sample": sample}
    theirs = their_output(
        models[1],
        ids,
        torch.ones_like(ids),
        2,
        stopping_criteria=StoppingCriteriaList(criteria),
        **options,
    )
    torch.manual_seed(2)
    found = generate(models[0], ids, stopping_criteria=criteria, output_scores=True, **options)
    assert torch.equal(found.sequences, theirs.sequences)


@pytest.mark.parametrize("way", WAYS)
def test_a_bool_ends_all_rows_of_every_search(models, way):
    options = {"eos_token_id": None, "max_new_tokens": 20} | WAYS[way]
    options["force_words_ids"] = [[4]] if way == "constrained" else None
    found = generate(
        models[0], IDS, stopping_criteria=lambda ids, scores: ids.size(1) >= 10, **options
    ).sequences
    assert found.size(1) <= (26 if way == "constrained" else 10)


def test_stopping_criteria_are_checked(models):
    with pytest.raises(ValueError, match="stopping_criteria must be functions"):
        generate(models[0], IDS, stopping_criteria=[3], max_new_tokens=3)
    with pytest.raises(ValueError, match="stopping_criteria must return"):
        generate(
            models[0],
            IDS,
            stopping_criteria=lambda i, s: torch.ones(5, dtype=bool),
            max_new_tokens=3,
        )


# ---- configurations


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: GenerationConfig(**o),
        lambda **o: o,
        lambda **o: types.SimpleNamespace(**o),
        lambda **o: transformers.GenerationConfig(**o),
        lambda **o: transformers.GenerationConfig(**o).to_dict(),
    ],
    ids=["ours", "dict", "object", "theirs", "their dict"],
)
def test_a_configuration_holds_and_keywords_win(models, make):
    config = make(max_new_tokens=7, num_beams=3, length_penalty=0.5, eos_token_id=[7, 9])
    expected = generate(
        models[0], IDS, max_new_tokens=7, num_beams=2, length_penalty=0.5, eos_token_id=(7, 9)
    )
    found = generate(models[0], IDS, generation_config=config, num_beams=2)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)


def test_a_configuration_of_what_does_not_exist_here_is_refused(models):
    theirs = transformers.GenerationConfig(guidance_scale=1.5, max_new_tokens=3)
    with pytest.raises(ValueError, match="guidance_scale must be left out"):
        generate(models[0], IDS, generation_config=theirs)
    with pytest.raises(TypeError, match="max_new_token"):
        generate(models[0], IDS, generation_config={"max_new_token": 3})
    with pytest.raises(ValueError, match="guidance_scale must be left out"):
        generate(models[0], IDS, guidance_scale=1.5)
    for other in (5, "greedy", [("max_new_tokens", 3)]):
        with pytest.raises(TypeError, match="generation_config must have options"):
            generate(models[0], IDS, generation_config=other)


def test_padding_on_the_right_is_said(models):
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.warns(UserWarning, match="pad on the left") as found:
        generate(models[0], ids, mask, max_new_tokens=3)
    assert len(found) == 1 and "\n" not in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(models[0], ids.flip(1), mask.flip(1), max_new_tokens=3)


def test_generation_config_json_is_honoured(tmp_path):
    theirs = hf_model()
    theirs.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.6, top_k=7, max_new_tokens=9, eos_token_id=[7, 9]
    )
    theirs.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    for load in (load_model, load_generator):
        ours = load(tmp_path)
        for options in ({}, {"temperature": 1.5}, {"do_sample": False, "num_beams": 2}):
            expected = their_output(theirs, IDS, torch.ones_like(IDS), 4, **options).sequences
            torch.manual_seed(4)
            assert torch.equal(generate(ours, IDS, **options).sequences, expected)
