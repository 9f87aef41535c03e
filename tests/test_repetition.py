"""Repetition measured by the way of decoding: the figures, the draws, the errors."""

import re

import pytest
import torch
from reference import ROOT, twins
from test_evaluate import refused, run, run_json, write_lines

from nanogpt2.config import GPTConfig
from nanogpt2.evaluation.repetition import LOOP, WAYS, ends_in_a_loop, measure_repetition
from nanogpt2.metrics import distinct_n, repetition
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

CONFIG = GPTConfig(257, 48, 2, 3, 24, bos_token_id=256, eos_token_id=256)
TOKENIZER = byte_tokenizer()
PROMPTS = ["It was", "a", "once upon"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return *twins(folder, CONFIG), str(folder)


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([*range(20), *[1, 2, 3, 4] * 3], True),
        # two rounds and a half
        ([*range(20), *[1, 2, 3, 4] * 2, 1, 2], False),
        ([*range(20), *[5, 6, 7, 8, 9] * 2, 5, 6], False),
        # said twice, as the whole text
        ([*range(13)] * 2, False),
        # a loop that was left again
        ([*[1, 2, 3] * 8, 9], False),
        # six rounds and a half of two
        ([2, *[1, 2] * 6], True),
        (list(range(50)), False),
        ([], False),
    ],
)
def test_a_loop_is_a_piece_said_three_times_at_the_end(ids, loops):
    assert ends_in_a_loop(ids) is loops


def test_greedy_and_beams_are_transformers(models):
    """The figures of the two are those of the texts that transformers writes."""
    ours, theirs, _ = models
    found = measure_repetition(ours, TOKENIZER, PROMPTS, 20, batch_size=2)["ways"]
    for way in ("greedy", "num_beams 5", "repetition_penalty 1.2"):
        texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([TOKENIZER.encode(prompt)])
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=20,
                min_new_tokens=20,
                pad_token_id=0,
                **WAYS[way],
            )
            texts.append(out[0, ids.size(1) :].tolist())
        assert all(len(text) == 20 for text in texts)
        mean = dict.fromkeys(found[way], 0.0)
        for ids in texts:
            mean["distinct_1"] += distinct_n(ids, 1) / 3
            mean["distinct_2"] += distinct_n(ids, 2) / 3
            mean["repeated_4"] += repetition(ids, 4) / 3
            mean["loops"] += ends_in_a_loop(ids) / 3
        assert found[way] == pytest.approx(mean), way


def test_the_draws_depend_on_the_seed_and_not_on_the_batch(models):
    ours, _, _ = models
    one, three, other = (
        measure_repetition(ours, TOKENIZER, PROMPTS, 20, seed, batch_size)["ways"]
        for seed, batch_size in ((0, 1), (0, 3), (1, 3))
    )
    assert one == three
    assert one["sampling"] != other["sampling"] and one["greedy"] == other["greedy"]
    # a random model's samples hardly repeat; its greedy texts do
    assert one["sampling"]["distinct_2"] > one["greedy"]["distinct_2"]
    assert one["no_repeat_ngram_size 3"]["repeated_4"] == 0


def test_a_text_that_ends_at_once_counts_at_full_length(models):
    """The end token is held back: else its model would seem never to repeat itself."""
    model = GPT(CONFIG)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[256])
        model.wte.weight[256] *= 9
    found = measure_repetition(model.eval(), TOKENIZER, ["a"], 15)["ways"]["greedy"]
    assert found["loops"] == 1 and found["distinct_1"] == pytest.approx(1 / 15)


def test_the_command(capsys, models, tmp_path):
    folder = models[2]
    path = write_lines(tmp_path / "p.jsonl", *({"text": text} for text in PROMPTS))
    argv = [path, "--model", folder, "--task", "repetition", "--max_new_tokens", "12"]
    found = run_json(capsys, *argv, "--limit", "2")
    assert (found["examples"], found["max_new_tokens"], list(found["ways"])) == (2, 12, [*WAYS])
    shown = run(capsys, *argv)
    assert re.search(r"^decoding +distinct_1 +distinct_2 +repeated_4 +loops$", shown, re.M)
    assert re.search(r"^num_beams 5( +[01]\.\d{4}){3}", shown, re.M)


def test_as_many_tokens_as_fit(capsys, models, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"text": "a" * 30})
    found = run_json(capsys, path, "--model", models[2], "--task", "repetition")
    assert found["max_new_tokens"] == CONFIG.block_size - 30


def test_wrong_use_is_one_line(capsys, models, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"text": "a" * 30})
    long = write_lines(tmp_path / "long.jsonl", {"text": "a" * 37})
    bad = write_lines(tmp_path / "bad.jsonl", {"prompt": "a"})
    task = ["--model", models[2], "--task", "repetition"]
    for argv, message in [
        ([path, *task, "--max_new_tokens", "19"], "--max_new_tokens must be <= 18, the room after"),
        ([path, *task, "--max_new_tokens", "11"], "--max_new_tokens must be a whole number >= 12"),
        ([path, *task, "--block_size", "20"], "must fit the block size, 20"),
        ([path, *task, "--seed", "-1"], "--seed must be a whole number >= 0"),
        ([long, *task], "has a prompt of 37 tokens; with 12 new ones"),
        ([bad, *task], "bad.jsonl' line 1 has no column 'text'; columns found: 'prompt'"),
        ([path, "--model", models[2], "--seed", "3"], "--seed must come with --task repetition"),
        (["", *task], "'' is not a file"),
    ]:
        assert message in refused(capsys, *argv)
    assert LOOP == 12


@pytest.mark.slow
def test_the_model_cards_table_is_the_commands(capsys):
    shown = run(capsys, "--task", "repetition", "--model", "demo")
    table = shown[shown.index("decoding") :].strip()
    assert table in (ROOT / "docs/model_card.md").read_text(encoding="utf-8")
