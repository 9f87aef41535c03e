"""The decoders against model.py: each token's hidden states, then each layer's."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, left_padded, prompts, twins

from nanogpt2.cpu.decoder import INITIAL_CAPACITY, CPUDecoder
from nanogpt2.cpu.inference_model import pack
from nanogpt2.cpu.prepacked import FloatLinear
from nanogpt2.generation import generate
from nanogpt2.generation.decoder import ModelDecoder, decoder_for
from nanogpt2.model import GPT
from nanogpt2.training.lora import add_lora

B, ROWS, LENGTH = 2, 3, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return twins(tmp_path_factory.mktemp("twins"))[0]


def known_by_the_model(model, ids):
    """model.py over whole rows, without a cache: (N, C) at the last token."""
    with torch.no_grad():
        return model.hidden_states(ids)[:, -1]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def follow(decoder, model, prompt, all_parents, seed=0):
    """Decode random tokens along these reorderings; hold every step to model.py."""
    torch.manual_seed(seed)
    close(decoder.read(prompt, None, None)[:, -1], known_by_the_model(model, prompt))
    decoder.fork()
    ids = prompt.repeat_interleave(ROWS, dim=0)
    for parents in all_parents:
        ids = torch.cat([ids, torch.randint(TINY.vocab_size, (len(ids), 1))], dim=1)
        close(decoder.read(ids[:, -1:], None, None)[:, -1], known_by_the_model(model, ids))
        # of the same prompt
        parents = (torch.arange(B)[:, None] * ROWS + parents).flatten()
        decoder.reorder(parents)
        ids = ids[parents]
    return ids


@pytest.mark.parametrize("kind", [ModelDecoder, CPUDecoder])
@settings(max_examples=40)
@given(data=st.data())
def test_any_reordering(model, kind, data):
    row = st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS)
    steps = data.draw(st.lists(st.lists(row, min_size=B, max_size=B), max_size=12))
    decoder = kind(model, B, ROWS, LENGTH)
    follow(decoder, model, prompts(B, 5), [torch.tensor(step) for step in steps])
    assert decoder.length == 5 + len(steps)


def test_what_is_the_same_in_all_rows_is_kept_once(model):
    decoder = CPUDecoder(model, B, ROWS, LENGTH)
    apart = torch.tensor([[0, 1, 2]] * B)
    follow(decoder, model, prompts(B, 5), [apart] * 4)
    assert (decoder._shared_length, decoder._own_length) == (5, 4)
    # in one prompt alone it is not enough
    decoder.reorder(torch.tensor([1, 1, 1, 3, 4, 5]))
    assert (decoder._shared_length, decoder._own_length) == (5, 4)
    decoder.reorder(torch.tensor([0, 1, 2, 5, 5, 5]))
    assert (decoder._shared_length, decoder._own_length) == (9, 0)


def test_rows_far_apart_get_more_capacity(model):
    decoder = CPUDecoder(model, B, ROWS, LENGTH)
    before = decoder._own[0].size(3)
    follow(decoder, model, prompts(B, 2), [torch.tensor([[0, 1, 2]] * B)] * 17)
    assert all(own.size(3) >= 17 > before == INITIAL_CAPACITY for own in decoder._own)


class Layers:
    """Records what enters and leaves every layer norm of a model.

    A layer norm's input is the residual stream: after the embedding, after each of the two
    additions of each block, and after the last block. Both decoders call the model's layer norms.
    """

    def __init__(self, model):
        self.seen = []
        norms = [
            (f"{n}.{part}", getattr(block, part))
            for n, block in enumerate(model.h)
            for part in ("ln_1", "ln_2")
        ]
        norms.append(("ln_f", model.ln_f))
        self.names = [name for name, _ in norms]
        self._hooks = [norm.register_forward_hook(self._keep(name)) for name, norm in norms]

    def _keep(self, name):
        def keep(norm, inputs, output):
            self.seen.append((name, inputs[0].clone(), output.clone()))

        return keep

    def remove(self):
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def walk(decoder):
    """Read padded prompts, fork, then read tokens and reorder in turn."""
    ids, mask = left_padded(B, 6, 3, vocab_size=TINY.vocab_size)
    seen = mask.bool()
    square = torch.ones(6, 6, dtype=torch.bool).tril()
    first = square & (seen[:, None, None, :] | torch.eye(6, dtype=torch.bool))
    decoder.logits(decoder.read(ids, (seen.cumsum(1) - 1).clamp(min=0), first))
    decoder.fork()
    seen = seen.repeat_interleave(ROWS, dim=0)
    for step in range(5):
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
        new = torch.arange(B * ROWS)[:, None] + step
        decoder.read(new, seen.sum(1, keepdim=True) - 1, seen[:, None, None, :])
        if step in (1, 3):
            decoder.reorder(torch.tensor([1, 1, 1, 3, 5, 5] if step == 1 else [2, 2, 2, 4, 4, 4]))


@torch.no_grad()
def walk_one_row(decoder):
    """Read a prompt, one token, several tokens, without padding."""
    for part in prompts(1, 9).split([4, 1, 3, 1], dim=1):
        decoder.read(part, None, None)


@pytest.mark.parametrize(("follow", "rows"), [(walk, ROWS), (walk_one_row, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_every_layer_is_model_pys(model, follow, rows, packed):
    """The residual stream after every addition of every layer, at every reading."""
    if packed:
        model = pack(deepcopy(model))
    seen = []
    for kind in (ModelDecoder, CPUDecoder):
        layers = Layers(model)
        follow(kind(model, B if rows > 1 else 1, rows, LENGTH))
        layers.remove()
        seen.append(layers.seen)
    theirs, ours = seen
    assert [name for name, *_ in ours] == [name for name, *_ in theirs]
    assert len(ours) == len(layers.names) * (6 if rows > 1 else 4)
    for (name, *expected), (_, *found) in zip(theirs, ours, strict=True):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(
                x, y, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@torch.no_grad()
def test_prompts_of_other_lengths(model):
    """A mask reaches the prompt alone: what comes after it is seen by all."""
    ids, mask = left_padded(B, 6, 3, vocab_size=TINY.vocab_size)
    mask = mask.bool()
    square = torch.ones(6, 6, dtype=torch.bool).tril()
    first = square & (mask[:, None, None, :] | torch.eye(6, dtype=torch.bool))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    read = []
    for kind in (ModelDecoder, CPUDecoder):
        decoder = kind(model, B, ROWS, LENGTH)
        found = [decoder.read(ids, positions, first)[:, -1]]
        decoder.fork()
        seen = mask.repeat_interleave(ROWS, dim=0)
        for step in range(4):
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            new = torch.arange(B * ROWS)[:, None] + step
            place = seen.sum(1, keepdim=True) - 1
            found.append(decoder.read(new, place, seen[:, None, None, :])[:, -1])
            decoder.reorder(torch.tensor([0, 0, 2, 3, 5, 5]))
        read.append(torch.cat(found))
    close(*read)


@torch.no_grad()
def test_several_tokens_after_others(model):
    ids = prompts(B, 9)
    for kind in (ModelDecoder, CPUDecoder):
        decoder = kind(model, B, 1, LENGTH)
        parts = [decoder.read(part, None, None) for part in ids.split([4, 1, 3, 1], dim=1)]
        close(torch.cat(parts, dim=1), model.hidden_states(ids))


@torch.no_grad()
def test_beginning_anew_with_all_rows(model):
    """As where a text outgrows the context: the rows are read apart from the start."""
    ids = torch.cat([prompts(B * ROWS, 4), prompts(B * ROWS, 4).flip(0)], dim=1)
    decoder = CPUDecoder(model, B, ROWS, LENGTH)
    decoder.read(prompts(B, 3), None, None)
    decoder.fork()
    decoder.read(prompts(B * ROWS, 1), None, None)
    decoder.forget()
    close(decoder.read(ids, None, None)[:, -1], known_by_the_model(model, ids))
    decoder.reorder(torch.tensor([2, 2, 2, 3, 3, 3]))
    assert decoder._own_length == 0
    new = torch.cat([ids[[2, 2, 2, 3, 3, 3]], prompts(6, 1)], dim=1)
    close(decoder.read(new[:, -1:], None, None)[:, -1], known_by_the_model(model, new))


@torch.no_grad()
def test_no_more_than_the_context(model):
    decoder = CPUDecoder(model, 1, 1, TINY.block_size)
    decoder.read(prompts(1, TINY.block_size), None, None)
    with pytest.raises(ValueError, match="the context is at most"):
        decoder.read(prompts(1, 1), None, None)


def test_which_runs_what(model):
    kind = lambda model: type(decoder_for(model, 1, 1, 4))  # noqa: E731
    assert kind(model) is kind(pack(GPT(TINY))) is CPUDecoder
    assert kind(pack(GPT(TINY), "int8")) is CPUDecoder
    assert kind(GPT(TINY).bfloat16()) is ModelDecoder
    # its matrices are not all there is to it
    add_lora(adapted := GPT(TINY), 2, 4.0)
    assert kind(adapted) is ModelDecoder


def test_generation_goes_through_it(model, monkeypatch):
    rows = []
    product = FloatLinear.forward
    monkeypatch.setattr(
        FloatLinear, "forward", lambda self, x: (rows.append(x.size(0)), product(self, x))[1]
    )
    generate(model, prompts(1, 4), max_new_tokens=3, num_beams=5, eos_token_id=None)
    # the prompt is read once, not once a beam; the head is a product too
    assert rows == [1] * (TINY.n_layer + 1) + [5] * 2 * (TINY.n_layer + 1)
