"""generate() with texts in place of ids, and what its result shows."""

import pytest
import torch

from nanogpt2 import generate, load_model, load_tokenizer


@pytest.fixture(scope="module")
def demo():
    return load_model("demo"), load_tokenizer("demo")


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "num_return_sequences": 2, "seed": 3}, {"num_beams": 3, "seed": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_a_text_is_continued_as_its_ids_are(demo, options):
    model, tokenizer = demo
    ids = torch.tensor([tokenizer.encode("My fellow")])
    expected = generate(model, ids, max_new_tokens=7, **options)
    found = generate(model, "My fellow", tokenizer=tokenizer, max_new_tokens=7, **options)
    assert torch.equal(found.sequences, expected.sequences) and expected.texts is None
    assert found.texts == tuple(tokenizer.decode(row) for row in expected.sequences.tolist())


def test_texts_of_unlike_lengths_are_each_continued_as_alone(demo):
    model, tokenizer = demo
    texts = ["My", "The state of the Union is"]
    found = generate(model, texts, tokenizer=tokenizer, max_new_tokens=6)
    alone = [generate(model, text, tokenizer=tokenizer, max_new_tokens=6) for text in texts]
    assert found.texts == tuple(each.texts[0] for each in alone)


def test_the_end_token_is_not_in_the_text(demo):
    model, tokenizer = demo
    whole = generate(model, "My fellow", tokenizer=tokenizer, max_new_tokens=6)
    end = whole.sequences[0, -2].item()
    found = generate(model, "My fellow", tokenizer=tokenizer, max_new_tokens=6, eos_token_id=end)
    assert found.sequences[0, -1] == end
    assert found.texts == (tokenizer.decode(found.sequences[0, :-1].tolist()),)


def test_an_empty_text_shows_no_beginning(demo):
    model, tokenizer = demo
    found = generate(model, "", tokenizer=tokenizer, max_new_tokens=4)
    assert found.sequences[0, 0] == model.config.bos_token_id
    assert found.texts == (tokenizer.decode(found.sequences[0, 1:].tolist()),)


def test_a_result_is_readable(demo):
    model, tokenizer = demo
    found = generate(model, "<b>My", tokenizer=tokenizer, max_new_tokens=2)
    length = found.sequences.size(1)
    assert repr(found) == f"GenerationOutput(1 of {length} tokens: {found.texts[0]!r})"
    assert found._repr_html_().count("<p ") == 1 and "&lt;b&gt;My" in found._repr_html_()
    plain = generate(model, torch.tensor([[5, 6]]), max_new_tokens=2)
    assert repr(plain) == "GenerationOutput(1 of 4 tokens)"
    assert ">5 6 " in plain._repr_html_()


@pytest.mark.parametrize(
    ("prompt", "options", "error", "said"),
    [
        ("a", {"tokenizer": None}, ValueError, "must come with tokenizer="),
        (["a", 1], {}, TypeError, "a tensor, a text or texts"),
        ([], {}, TypeError, "a tensor, a text or texts"),
        ([[1, 2]], {}, TypeError, "a tensor, a text or texts"),
        (["a", ""], {}, ValueError, "must not mix empty texts"),
        ("a", {"attention_mask": torch.ones(1, 1)}, ValueError, "must be left out with texts"),
    ],
)
def test_what_is_no_text_is_refused(demo, prompt, options, error, said):
    model, tokenizer = demo
    with pytest.raises(error, match=said):
        generate(model, prompt, **{"tokenizer": tokenizer} | options)
