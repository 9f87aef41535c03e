"""Explanations of tokens: the same probabilities as while decoding."""

import json
import math

import pytest
import torch
from reference import TINY, twins

from nanogpt2.cli.explain import draw, shade
from nanogpt2.config import GenerationConfig
from nanogpt2.generation import generate
from nanogpt2.generation.explain import explain
from nanogpt2.generation.request import prepare
from nanogpt2.generation.search import diverse
from nanogpt2.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))[0]


def explained(model, ids, **options):
    config = GenerationConfig(**{"max_new_tokens": 8, "seed": 5, "eos_token_id": None} | options)
    request = prepare(model.config, torch.device("cpu"), config, ids)
    found = generate(model, ids, **{**vars(config), "output_scores": True})
    new = found.sequences[0, ids.size(1) :].tolist()
    return list(explain(model, request, new, byte_tokenizer(), alternatives=3)), found, new


IDS = torch.tensor([[5, 9, 5, 9, 30, 7]])
FULL = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 9,
    "top_p": 0.9,
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
}


def test_the_last_stage_is_the_distribution_sampled_from(model):
    why, found, new = explained(model, IDS, **FULL)
    assert [w.chosen.token for w in why] == new
    for w, scores in zip(why, found.scores, strict=True):
        p = scores[0].softmax(0)
        best = next(int(i) for i in p.topk(4).indices if i != w.chosen.token)
        assert best in [c.token for c in w.runners_up] or p[best] == 0
        assert len(w.runners_up) == 3
        for candidate in (w.chosen, *w.runners_up):
            assert candidate.probabilities[-1] == pytest.approx(p[candidate.token].item(), abs=1e-5)


def test_the_first_stage_is_the_models_distribution(model):
    why, _, new = explained(model, IDS, **FULL)
    ids = IDS
    for w in why:
        with torch.no_grad():
            p = model(ids)[0, -1].double().softmax(0)
        assert w.chosen.probabilities[0] == pytest.approx(p[w.chosen.token].item(), abs=1e-5)
        assert w.entropy == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
        assert w.chosen.rank == 1 + int((p > p[w.chosen.token]).sum())
        ids = torch.cat([ids, torch.tensor([[w.chosen.token]])], dim=1)
    assert len(why) == len(new)


def test_every_option_is_a_stage_in_order(model):
    why, _, _ = explained(model, IDS, **{**FULL, "top_k": 2})
    names = ("repetition_penalty", "no_repeat_ngram_size", "temperature", "top_k", "top_p")
    assert why[0].stages == ("raw", *names)
    assert all(len(c.probabilities) == 6 for w in why for c in (w.chosen, *w.runners_up))
    drawn = draw(why[0])
    assert "repetition penalty" in drawn and drawn.count("\n") == 5
    banned = [c for w in why for c in w.runners_up if 0 in c.probabilities]
    assert banned and "-" in drawn


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, **FULL}, {}])
def test_any_algorithm_is_explained(model, options):
    why, _, new = explained(model, IDS, **options)
    assert [w.chosen.token for w in why] == new
    if not options:
        assert all(w.chosen.rank == 1 for w in why)
    json.dumps([w.as_json() for w in why])


def test_stochastic_beams_are_penalised_on_logits(model):
    why, found, new = explained(
        model, IDS, num_beams=2, stochastic_beams=True, repetition_penalty=1.5, max_new_tokens=4
    )
    total = sum(torch.tensor(w.chosen.probabilities[-1]).log().item() for w in why)
    assert total == pytest.approx(found.sequences_scores[0].item(), abs=1e-3) and len(new) == 4


@pytest.mark.parametrize("extra", [{}, {"sequence_bias": [[[30], 3.0]], "repetition_penalty": 1.5}])
def test_groups_that_avoid_each_other(model, extra):
    """Compare with the penalties that the search subtracted, text by text and step by step."""
    taken = []

    class Recorded(diverse.Diversity):
        def __call__(self, ids, scores):
            result = super().__call__(ids, scores)
            taken.append(scores - result)  # (S, V), group after group
            return result

    options = {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.5, "seed": 5}
    options |= {"max_new_tokens": 7, "eos_token_id": (7, 30), "output_scores": True} | extra
    request = prepare(model.config, torch.device("cpu"), GenerationConfig(**options), IDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diverse, "Diversity", Recorded)
        *_, beams = diverse.diverse_search(model, request)
    penalised, lengths = 0, set()
    for tokens, rows in zip(beams.finished.ids[0], beams.finished.beams[0], strict=True):
        new = tokens[IDS.size(1) :][rows >= 0].tolist()
        avoided = diverse.avoided(request, beams, rows)
        why = [*explain(model, request, new, byte_tokenizer(), avoided)]
        lengths.add(len(new))
        assert [w.chosen.token for w in why] == new
        for step, (w, row) in enumerate(zip(why, rows.tolist(), strict=False)):
            stage = w.stages.index("diversity_penalty")
            assert stage == (2 if extra else 1)
            penalty = taken[3 * step + row // 2][row % 2]
            scores = beams.scores[step][row]
            # log-probabilities up to a constant, which cancels against the first candidate
            shown = [[c.token, *c.probabilities] for c in (w.chosen, *w.runners_up)]
            first = shown[0]
            for token, *p in shown:
                before = math.log(p[stage - 1] / first[stage])
                after = math.log(p[stage] / first[1 + stage])
                expected = float(penalty[first[0]] - penalty[token])
                assert after - before == pytest.approx(expected, abs=1e-3)
                assert p[-1] == pytest.approx(float(scores.softmax(0)[token]), abs=1e-5)
                penalised += expected != 0
    assert penalised > 10 and len(lengths) > 1


def test_colours_follow_their_figure(model):
    why, _, _ = explained(model, IDS, do_sample=True, top_k=0)
    for by in ("prob", "entropy", "rank"):
        shades = {shade(w, by, TINY.vocab_size) for w in why}
        assert all(0 <= level <= 1 for level in shades) and len(shades) > 1


def test_past_the_context(model):
    why, _, new = explained(model, IDS, max_new_tokens=60)
    assert [w.chosen.token for w in why] == new and all(w.chosen.rank == 1 for w in why)
