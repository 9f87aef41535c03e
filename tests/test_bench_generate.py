"""bench_generate's own arithmetic, and the arms that are always there, on a tiny model."""

import argparse
import os
import re
from dataclasses import replace

import pytest

from benchmarks import bench_generate, generate_peers
from benchmarks.bench_generate import (
    ARMS,
    EXACT,
    MEASURES,
    ROWS,
    SCALE,
    TOGETHER,
    Bench,
    agreement,
    gate,
    leading,
    page,
    plot,
)
from benchmarks.generate_alone import tensor_bytes
from benchmarks.generate_peers import (
    Apart,
    DiedError,
    MissingError,
    Ours,
    Transformers,
    WithoutCache,
)
from nanogpt2 import GPT
from nanogpt2.config import GPTConfig

# the peers' vocabulary is GPT-2's
SHAPE = GPTConfig(block_size=128, n_layer=3, n_head=2, n_embd=64)


def not_installed(folder):
    raise MissingError("not installed")


def in_this_process(factory, folder):
    return factory(folder)


def dies(folder):
    os._exit(1)


class Wrong(Ours):
    """Says something else at the fourth token of a text."""

    def generate(self, prompt, new, seed=0, **options):
        tokens = super().generate(prompt, new, seed, **options)
        return [token ^ (n == 3) for n, token in enumerate(tokens)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The arms that need no peer, and one whose library is not there."""
    there = {name: ARMS["cpu"][name] for name in (*EXACT, "ours, counter noise", "transformers")}
    monkeypatch.setitem(ARMS, "cpu", {**there, "CTranslate2": not_installed})
    args = argparse.Namespace(device="cpu", rounds=2, quick=True, seeds=3)
    return Bench(tmp_path / "model", SHAPE, args, make=in_this_process)


def test_the_gate():
    texts = {"transformers": [1, 2, 3], "ours": [1, 2, 3], "ours, int8": [1, 7, 3]}
    texts["ours, counter noise"] = [9, 9, 9]
    assert gate(texts, EXACT) == {
        "transformers": "all of 3",
        "ours": "all of 3",
        "ours, int8": "first 1 of 3",
        "ours, counter noise": "other noise",
    }
    with pytest.raises(AssertionError, match="ours: token 2 is 4, not 3"):
        gate({**texts, "ours": [1, 2, 4]}, EXACT)
    # another number of tokens is no faster
    with pytest.raises(ValueError, match=r"longer|shorter"):
        gate({**texts, "ours, int8": [1, 2]}, EXACT)
    assert [leading(t, [1, 2, 3]) for t in ([1, 2, 3], [1, 5, 3], [0, 2, 3])] == [3, 1, 0]


@pytest.mark.parametrize("name", ["greedy", "sampled", "beams", "mission"])
def test_a_row_of_tokens(bench, name):
    (measured,) = bench_generate.measure_tokens(bench, name).values()
    there = [arm for arm in ROWS[name].arms if arm in ARMS["cpu"] and arm != "CTranslate2"]
    there = [arm for arm in there if arm not in bench.missing]
    assert [*measured.numbers] == there and {"ours", "transformers"} <= {*there}
    assert all(len(numbers) == 2 for numbers in measured.numbers.values())
    assert {measured.said[arm] for arm in there if arm in EXACT} == {"all of 8"}
    assert ("3 of 3 seeds" in measured.notes) == (name == "mission")
    body = page(bench, {name: measured})
    assert f"## {ROWS[name].title}\n" in body and "| ours | 100% |" in body
    assert re.search(r"\| transformers \| \S+ \(\S+\) \| 1.00x \| all of 8 \|", body)
    assert ("- CTranslate2: not installed" in body) == ("CTranslate2" in ROWS[name].arms)


def test_a_long_prompt_and_the_picture(bench, tmp_path):
    rows = bench_generate.measure_long(bench, "first")
    assert [*rows] == ["first", "step"]
    there = ["ours", "ours, in C", "transformers"]
    assert all([*m.numbers] == there for m in rows.values())
    assert "## first token of a prompt of 90, 5 beams" in page(bench, rows)
    plot(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.slow
def test_memory(bench):
    (found,) = (bench_generate.measure_memory(bench, "memory")[name] for name in ["cache"])
    per_position = 2 * SHAPE.n_layer * SHAPE.n_embd * 4
    # the last token is read by nobody
    # one each round
    (theirs, _), (ours, _) = (found.numbers[arm] for arm in ("transformers", "ours"))
    assert theirs == 5 * (90 + ROWS["step"].new - 1) * per_position
    # the prompt once
    assert 90 * per_position < ours < theirs / 2


def test_a_wrong_arm_is_not_timed(bench, monkeypatch):
    monkeypatch.setitem(ARMS["cpu"], "ours", Wrong)
    # its single next tokens are right, its text is not
    with pytest.raises(AssertionError, match="ours: token 3 is"):
        bench_generate.measure_tokens(bench, "greedy")
    with pytest.raises(AssertionError, match="ours: token 3 is"):
        bench_generate.measure_long(bench, "first")


def test_an_arm_of_other_weights_is_not_timed(bench, tmp_path, monkeypatch):
    Bench(tmp_path / "other", replace(SHAPE, n_layer=2), bench.args, in_this_process)
    monkeypatch.setitem(ARMS["cpu"], "CTranslate2", lambda _: Ours(tmp_path / "other"))
    with pytest.raises(AssertionError, match=r"CTranslate2: only \d+% of next tokens"):
        bench_generate.measure_tokens(bench, "greedy")


@pytest.mark.parametrize("when", ["made", "asked"])
def test_a_peer_that_crashes_is_left_out_and_ours_is_not(bench, monkeypatch, when):
    class Crashes:
        def __init__(self, folder):
            if when == "made":
                raise DiedError

        def generate(self, *prompt):
            raise DiedError

    monkeypatch.setitem(ARMS["cpu"], "CTranslate2", Crashes)
    (measured,) = bench_generate.measure_tokens(bench, "greedy").values()
    assert "CTranslate2" not in measured.numbers
    assert bench.missing["CTranslate2"] == "its process crashed on this processor"
    monkeypatch.setitem(ARMS["cpu"], "ours", Crashes)
    bench.made.pop("ours")
    with pytest.raises(DiedError):
        bench_generate.measure_tokens(bench, "greedy")


@pytest.mark.slow
def test_an_arm_in_a_process_of_its_own(bench):
    apart, here = Apart(Ours, bench.folder), Ours(bench.folder)
    options = {"do_sample": True, "top_k": 9}
    assert apart.generate(bench.prompt, 12, 1, **options) == here.generate(
        bench.prompt, 12, 1, **options
    )
    with pytest.raises(MissingError, match="not installed"):
        Apart(not_installed, bench.folder)
    with pytest.raises(DiedError, match=r"process of .*dies.* has died"):
        Apart(dies, bench.folder)


def test_the_text_does_not_repeat_itself(bench):
    assert len(set(bench.text)) > len(bench.text) / 2
    assert agreement(bench.arm("ours"), bench.prompt, bench.text) == 1.0
    assert agreement(bench.arm("ours"), bench.prompt, [0] * 8) < 1.0


def test_every_row_has_its_arms_and_its_measure():
    assert {*MEASURES} <= {*ROWS} and {n for names in TOGETHER.values() for n in names} <= {*ROWS}
    for name, row in ROWS.items():
        assert row.unit in SCALE
        assert {*row.arms} <= {arm for arms in ARMS.values() for arm in arms}, name
        assert "transformers" in row.arms or name == "start"


def test_programs_until_their_first_output(bench):
    assert bench_generate.first_output(["-c", "print(1)"]) > 0
    for program in ("import nothing_such", "pass"):
        with pytest.raises(AssertionError, match="failed"):
            bench_generate.first_output(["-c", program])


@pytest.mark.slow
def test_the_programs_run(bench):
    programs = bench_generate.programs(bench)
    assert {"ours, sample.py", "ours, in Python", "transformers"} < {*programs}
    for program in programs.values():
        assert bench_generate.first_output(program) > 0


def test_what_is_not_installed_is_named():
    with pytest.raises(MissingError, match="not installed"):
        generate_peers.need("no_such_module")


def test_the_arms_options_are_the_same_draw(bench):
    arms = [kind(bench.folder) for kind in (Ours, Transformers, WithoutCache)]
    drawn = {
        tuple(arm.generate(bench.prompt, 12, seed, do_sample=True, temperature=2.0, top_k=9))
        for seed in (1, 2)
        for arm in arms
    }
    assert len(drawn) == 2


def test_bytes_of_a_cache():
    cache = GPT(GPTConfig(vocab_size=11, block_size=7, n_layer=2, n_head=1, n_embd=4)).new_cache(3)
    assert tensor_bytes(cache) == 2 * 2 * 3 * 7 * 4 * 4
    # views share a storage
    assert tensor_bytes([cache.k, cache.k[0], {"v": cache.v}]) == tensor_bytes(cache)
    assert tensor_bytes(None) == 0
