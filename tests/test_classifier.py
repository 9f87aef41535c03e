"""The classifier: its loss and its probabilities against transformers' and against one by one."""

import pytest
import torch
from reference import TINY, prompts, twins
from torch.nn import functional as F
from transformers import GPT2ForSequenceClassification

from nanogpt2.classifier import GPTClassifier
from nanogpt2.model import GPT

LABELS = ("ham", "spam", "other")
LENGTHS = (11, 1, 4, 7, 2)
TEXTS = [row[:T].tolist() for row, T in zip(prompts(5, 11), LENGTHS, strict=True)]
PAD = TINY.vocab_size - 1  # prompts() never draws it


def random_classifier():
    """One whose labels are far from equally likely."""
    model = GPTClassifier(GPT(TINY), LABELS)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def batch(texts, numbers):
    """Right-padded ids and targets, as a loader makes them."""
    idx = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    targets = torch.full_like(idx, -100)
    for row, text in enumerate(texts):
        idx[row, : len(text)] = torch.tensor(text)
        targets[row, len(text) - 1] = numbers[row]
    return idx, targets


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours and transformers', with the same weights."""
    folder = tmp_path_factory.mktemp("base")
    gpt, _ = twins(folder)
    ours = GPTClassifier(gpt, LABELS).eval()
    theirs = GPT2ForSequenceClassification.from_pretrained(
        folder, num_labels=len(LABELS), pad_token_id=PAD
    ).eval()
    with torch.no_grad():
        torch.nn.init.normal_(ours.score.weight, std=0.3)
        theirs.score.weight.copy_(ours.score.weight)
    return ours, theirs


def test_loss_and_gradients_are_transformers(models):
    ours, theirs = models
    numbers = [0, 2, 1, 1, 0]
    idx, targets = batch(TEXTS, numbers)
    padded = idx.clone()
    for row, text in enumerate(TEXTS):
        padded[row, len(text) :] = PAD
    loss = ours(idx, targets)
    expected = theirs(padded, labels=torch.tensor(numbers)).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    pairs = [
        (ours.score.weight, theirs.score.weight),
        (ours.transformer.ln_f.bias, theirs.transformer.ln_f.bias),
        (ours.transformer.h[0].mlp.c_fc.bias, theirs.transformer.h[0].mlp.c_fc.bias),
    ]
    for a, b in pairs:
        (ours_grad,) = torch.autograd.grad(loss, a, retain_graph=True)
        (their_grad,) = torch.autograd.grad(expected, b, retain_graph=True)
        torch.testing.assert_close(ours_grad, their_grad, atol=1e-5, rtol=1e-4)


def test_logits_stand_at_every_token(models):
    ours, _ = models
    idx, targets = batch(TEXTS, [0, 2, 1, 1, 0])
    logits = ours(idx)
    assert logits.shape == (5, 11, 3)
    torch.testing.assert_close(
        ours(idx, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    )


def test_probabilities_are_transformers(models):
    ours, theirs = models
    found = ours.classify(TEXTS)
    assert found.shape == (5, 3) and found.dtype == torch.float32
    for row, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([text])).logits.softmax(-1)[0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_alone_or_together_is_the_same():
    model = random_classifier()
    together = model.classify(TEXTS)
    alone = torch.cat([model.classify([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert (together.max(dim=1).values - together.min(dim=1).values).min() > 0.1


def test_dropout_is_off_while_classifying_and_on_after():
    model = random_classifier()
    expected = model.classify(TEXTS)
    for block in model.transformer.h:
        block.attn.dropout = block.mlp.dropout = 0.5
    model.train()
    assert torch.equal(model.classify(TEXTS), expected)
    assert model.training and model.transformer.h[0].mlp.training
    model.eval().classify(TEXTS)
    assert not model.training


def test_a_long_text_is_judged_by_its_start():
    model = random_classifier()
    (long,) = prompts(1, TINY.block_size + 9).tolist()
    found = model.classify([long, long[: TINY.block_size], [1]])
    assert torch.equal(found[0], found[1])


def test_a_text_without_a_token_is_refused():
    with pytest.raises(ValueError, match="must have a token"):
        random_classifier().classify([[1, 2], []])


@pytest.mark.parametrize("labels", [(), ("one",), ("a", "b", "a")])
def test_labels_must_differ(labels):
    with pytest.raises(ValueError, match="labels must be two different ones or more"):
        GPTClassifier(GPT(TINY), labels)


def test_the_head_is_small_and_like_the_model():
    model = GPTClassifier(GPT(TINY).to(torch.bfloat16), tuple(map(str, range(400))))
    assert model.score.weight.dtype == torch.bfloat16 and model.score.bias is None
    assert model.score.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert model.labels[7] == "7" and model.config is model.transformer.config


def test_the_transformer_is_taken_as_it_is():
    gpt = GPT(TINY)
    state = {name: tensor.clone() for name, tensor in gpt.state_dict().items()}
    model = GPTClassifier(gpt, LABELS)
    assert model.transformer is gpt
    assert all(torch.equal(gpt.state_dict()[name], tensor) for name, tensor in state.items())
