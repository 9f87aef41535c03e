"""The 25 lines of plain.py against generate() and transformers: the tests' first reference."""

import pytest
import torch
from reference import TINY, prompts, their_output, twins

from nanogpt2.config import GPTConfig
from nanogpt2.generation import generate
from nanogpt2.generation.decoder import ModelDecoder
from nanogpt2.generation.plain import plain_generate

NEW = 12
# temperature, top_k
WAYS = [(0, None), (1.0, None), (1.0, 5), (0.7, 50), (1.6, 1), (0.3, 61), (1.0, 99)]
# neither an end nor a pad: plain.py knows none
ENDLESS = {"max_new_tokens": NEW, "eos_token_id": None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))


def options(temperature, top_k):
    """The same way to choose, as transformers names it."""
    if temperature == 0:
        return ENDLESS | {"do_sample": False}
    return ENDLESS | {"do_sample": True, "temperature": temperature, "top_k": top_k or 0}


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize(("temperature", "top_k"), WAYS)
def test_tokens_are_those_of_generate_and_transformers(models, B, temperature, top_k):
    ours, theirs = models
    for seed in range(4):
        ids = prompts(B, 5, seed)
        torch.manual_seed(seed)
        found = plain_generate(ours, ids, NEW, temperature, top_k)
        own = torch.Generator().manual_seed(seed)
        state = torch.get_rng_state()
        assert torch.equal(plain_generate(ours, ids, NEW, temperature, top_k, own), found)
        assert torch.equal(torch.get_rng_state(), state), "a generator moved the global one"

        asked = options(temperature, top_k)
        assert torch.equal(generate(ours, ids, seed=seed, **asked).sequences, found)
        mask = torch.ones_like(ids)
        theirs.generation_config.eos_token_id = None
        assert torch.equal(their_output(theirs, ids, mask, seed, **asked).sequences, found)
        assert found.shape == (B, 5 + NEW) and torch.equal(found[:, :5], ids)


def test_at_the_vocabulary_of_gpt2(tmp_path):
    ours, theirs = twins(tmp_path, GPTConfig(n_layer=2, n_head=3, n_embd=48, block_size=64))
    theirs.generation_config.eos_token_id = None
    ids = torch.randint(50257, (2, 9))
    for way in ((0, None), (0.7, 50), (1.0, None)):
        torch.manual_seed(3)
        found = plain_generate(ours, ids, NEW, *way)
        assert torch.equal(generate(ours, ids, seed=3, **options(*way)).sequences, found)
        their = their_output(theirs, ids, torch.ones_like(ids), 3, **options(*way))
        assert torch.equal(their.sequences, found)


@pytest.mark.parametrize("way", [(0, None), (1.0, 5)], ids=str)
def test_generate_by_model_py_itself(models, monkeypatch, way):
    """generate() with the decoder that runs model.py as well, as on a GPU."""
    monkeypatch.setattr("nanogpt2.cpu.decoder.can_run", lambda model: False)
    made = []
    start = ModelDecoder.__init__
    monkeypatch.setattr(
        ModelDecoder, "__init__", lambda self, *a: (made.append(self), start(self, *a))[1]
    )
    ids = prompts(2, 4)
    expected = generate(models[0], ids, seed=1, **options(*way)).sequences
    found = plain_generate(models[0], ids, NEW, *way, torch.Generator().manual_seed(1))
    assert torch.equal(found, expected) and len(made) == 1


@pytest.mark.parametrize("way", [(0, None), (1.0, 5)], ids=str)
def test_the_cache_changes_no_token(models, way):
    """The definition: read the whole text for every token."""
    model, ids = models[0], prompts(2, 4)
    generator = torch.Generator().manual_seed(0)
    expected = ids
    for _ in range(NEW):
        expected = plain_generate(model, expected, 1, *way, generator)
    generator.manual_seed(0)
    assert torch.equal(plain_generate(model, ids, NEW, *way, generator), expected)


def test_no_more_than_the_context(models):
    """The last token is never read, so a text may be a token longer than the context."""
    model, ids = models[0], prompts(1, TINY.block_size)
    assert plain_generate(model, ids, 1).size(1) == TINY.block_size + 1
    with pytest.raises(ValueError, match=f"the context is at most {TINY.block_size}"):
        plain_generate(model, ids, 2)


def test_it_reads_each_token_once(models, monkeypatch):
    model, read = models[0], []
    hidden_states = type(model).hidden_states

    def counted(self, idx, **options):
        read.append(idx.size(1))
        return hidden_states(self, idx, **options)

    monkeypatch.setattr(type(model), "hidden_states", counted)
    plain_generate(model, prompts(2, 5), 4)
    assert read == [5, 1, 1, 1]


def test_the_lesson_is_short():
    """What remains without the docstrings, imports and blank lines."""
    import ast
    from pathlib import Path

    from nanogpt2.generation import plain

    (function,) = (
        node
        for node in ast.parse(Path(plain.__file__).read_text()).body
        if isinstance(node, ast.FunctionDef)
    )
    lines = [line for statement in function.body[1:] for line in ast.unparse(statement).split("\n")]
    assert len(lines) <= 25
