"""The classifier: its loss and its probabilities against transformers' and against one by one."""

import json

import pytest
import torch
from reference import TINY, hf_model, prompts, twins
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2ForSequenceClassification

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.load import is_classifier, load_classifier, load_model, load_tokenizer
from nanogpt2.checkpoints.save import save_model
from nanogpt2.classifier import GPTClassifier
from nanogpt2.config import GPTConfig
from nanogpt2.model import GPT
from nanogpt2.tokenizer import byte_tokenizer

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


# ---- folders

WORDS = GPTConfig(257, 37, 2, 3, 24, bos_token_id=256, eos_token_id=256)


def byte_classifier():
    model = GPTClassifier(GPT(WORDS), LABELS)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_transformers_loads_what_is_saved(tmp_path):
    """Its tokenizer pads, and its model finds each text's last token, as users do it."""
    ours = byte_classifier()
    save_model(ours, tmp_path / "model", byte_tokenizer())
    theirs, report = GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.values())
    assert theirs.config.architectures == ["GPT2ForSequenceClassification"]
    assert theirs.config.id2label == dict(enumerate(LABELS))
    assert theirs.config.label2id == {label: i for i, label in enumerate(LABELS)}
    texts = ["a", "some longer text", "text!", "the end<|endof"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "model")(
        texts, padding=True, return_tensors="pt"
    )
    assert len({*batch["attention_mask"].sum(1).tolist()}) == 4
    with torch.no_grad():
        logits = theirs.eval()(**batch).logits
    for row, text in zip(logits, texts, strict=True):
        found = ours(torch.tensor([byte_tokenizer().encode(text)]))[0, -1]
        torch.testing.assert_close(found, row, atol=1e-4, rtol=1e-4)
    found = ours.classify([byte_tokenizer().encode(text) for text in texts])
    torch.testing.assert_close(found, logits.softmax(-1), atol=1e-5, rtol=1e-5)


def test_what_transformers_saves_is_loaded_and_saved_again(models, tmp_path):
    _, theirs = models
    theirs.config.id2label = dict(enumerate(LABELS))
    theirs.config.label2id = {label: i for i, label in enumerate(LABELS)}
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_classifier(tmp_path / "theirs", dropout=0.1)
    assert ours.labels == LABELS and ours.config.dropout == 0.1 and not ours.training
    with torch.no_grad():
        idx = prompts(3, 9)
        torch.testing.assert_close(ours(idx)[:, -1], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    save_model(ours, tmp_path / "ours")
    again = GPT2ForSequenceClassification.from_pretrained(tmp_path / "ours")
    same_tensors(theirs, again)
    same_tensors(ours, load_classifier(tmp_path / "ours"))


def test_labels_that_transformers_leaves_out(tmp_path):
    config = hf_model().config
    config.pad_token_id = PAD
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "two")
    assert load_classifier(tmp_path / "two").labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_bits(tmp_path, dtype):
    ours = byte_classifier().to(getattr(torch, dtype))
    save_model(ours, tmp_path / "model")
    again = load_classifier(tmp_path / "model", dtype=dtype)
    same_tensors(ours, again)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path / "model")
    assert theirs.dtype == getattr(torch, dtype)


def test_a_classifier_and_a_model_are_not_confused(tmp_path):
    save_model(byte_classifier(), tmp_path / "classifier", byte_tokenizer())
    save_model(GPT(WORDS), tmp_path / "gpt", byte_tokenizer())
    assert is_classifier(tmp_path / "classifier") and not is_classifier(tmp_path / "gpt")
    with pytest.raises(ValueError, match="classifier' is a classifier, which writes no texts"):
        load_model(tmp_path / "classifier")
    with pytest.raises(ValueError, match="gpt' is no classifier: it has no tensor score"):
        load_classifier(tmp_path / "gpt")
    assert load_tokenizer(tmp_path / "classifier") is byte_tokenizer()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label must name the 3 labels"),
        ({"id2label": None}, "id2label must name the 3 labels"),
        ({"id2label": ["a", "b", "c"]}, "id2label must name the 3 labels"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label must name the 3 labels"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label must name the 3 labels"),
        ({"id2label": {"0": "a", "1": "b", "2": [3]}}, "id2label must name the 3 labels"),
        ({"problem_type": "regression"}, "gives each text one of its labels"),
        ({"problem_type": "multi_label_classification"}, "gives each text one of its labels"),
    ],
)
def test_labels_that_cannot_be(tmp_path, changes, message):
    save_model(byte_classifier(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        load_classifier(tmp_path / "model")
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (1, 24), (3, 23), (3, 24, 1), (0, 24), (2**62, 0)])
def test_a_head_that_cannot_be(tmp_path, shape):
    save_model(byte_classifier(), tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    # the library maps the file that is replaced
    file.rename(tmp_path / "old.safetensors")
    tensors = load_file(tmp_path / "old.safetensors") | {"score.weight": torch.zeros(shape)}
    tensor_file.write(file, tensors)
    with pytest.raises(ValueError, match=r"one of its labels|id2label|score.weight") as caught:
        load_classifier(tmp_path / "model")
    assert "\n" not in str(caught.value)
