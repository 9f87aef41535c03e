"""The inside of a model: each function beside transformers, tokenizers or arithmetic of its own."""

import json
import random
import string
from itertools import product

import pytest
import torch
from reference import TINY, prompts, twins
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F

from nanogpt2.checkpoints.load import load_generator, load_model
from nanogpt2.checkpoints.save import save_model
from nanogpt2.config import GPTConfig
from nanogpt2.cpu.prepacked import SCALE
from nanogpt2.inspect import (
    attention_by_layer,
    attention_maps,
    logit_lens,
    merges,
    residual_norms,
    token_neighbours,
)
from nanogpt2.model import GPT
from nanogpt2.tokenizer import END_OF_TEXT, byte_tokenizer, gpt2_tokenizer
from nanogpt2.training.lora import add_lora, lora_layers, merged

T = 13
IDS = prompts(1, T)[0]  # (T,)
L, H, V = TINY.n_layer, TINY.n_head, TINY.vocab_size
NEAR = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("twins")


@pytest.fixture(scope="module")
def pair(folder):
    return twins(folder)


@pytest.fixture(scope="module")
def theirs(pair):
    """transformers' maps, streams (the last one too before ln_f) and logits of IDS."""
    model, last = pair[1], []
    model.set_attn_implementation("eager")
    hook = model.transformer.ln_f.register_forward_pre_hook(lambda _, x: last.append(x[0][0]))
    with torch.no_grad():
        found = model(IDS[None], output_attentions=True, output_hidden_states=True)
    hook.remove()
    streams = torch.stack([*(x[0] for x in found.hidden_states[:-1]), last[0]])
    return torch.cat(found.attentions), streams, found.logits[0]


def lora_model(folder):
    model = load_model(folder)
    add_lora(model, rank=2, alpha=8.0)
    for layer in lora_layers(model).values():
        layer.lora_b.data.normal_(std=0.1)
    return model


# every model that computes what transformers computes
SAME = {
    "load_model": load_model,
    "load_generator": load_generator,
    "reference": lambda folder: load_model(folder, kernels="reference"),
    "dropout": lambda folder: load_model(folder, dropout=0.5).train(),
}
# and those that compute their own
OWN = {
    "lora": lora_model,
    "fp16": lambda folder: load_model(folder, quantize="fp16"),
    "int8": lambda folder: load_generator(folder, quantize="int8"),
    "bfloat16": lambda folder: load_model(folder, dtype="bfloat16"),
}


@pytest.fixture(params=SAME)
def same(request, pair, folder):
    return SAME[request.param](folder)


@pytest.fixture(params=OWN)
def own(request, pair, folder):
    return OWN[request.param](folder)


def test_attention_is_that_of_transformers(same, theirs):
    found = attention_maps(same, IDS)
    assert found.shape == (L, H, T, T) and found.dtype == torch.float32
    torch.testing.assert_close(found, theirs[0], **NEAR)
    assert torch.equal(found, torch.stack([*attention_by_layer(same, IDS.tolist())]))


def test_norms_are_those_of_transformers_streams(same, theirs):
    found = residual_norms(same, IDS)
    assert found.shape == (L + 1, T)
    torch.testing.assert_close(found, theirs[1].norm(dim=2), rtol=1e-6, atol=1e-5)


def test_each_layers_guesses_are_those_of_transformers_stream(same, pair, theirs):
    model = pair[1]
    with torch.no_grad():
        expected = model.lm_head(model.transformer.ln_f(theirs[1])).softmax(2)
    torch.testing.assert_close(expected[-1], theirs[2].softmax(1), **NEAR)
    every, few = logit_lens(same, IDS, k=V), logit_lens(same, IDS, k=3)
    assert every.ids.shape == every.probabilities.shape == (L + 1, T, V)
    torch.testing.assert_close(every.probabilities, expected.gather(2, every.ids), **NEAR)
    assert torch.equal(every.ids.sort(dim=2).values, torch.arange(V).expand(L + 1, T, V))
    assert (every.probabilities.diff(dim=2) <= 0).all()
    assert torch.equal(few.ids, every.ids[..., :3])


def test_the_last_guess_is_the_models_own(own):
    found = logit_lens(own, IDS, k=V)
    with torch.no_grad():
        expected = own(IDS[None])[0].float().softmax(1)
    torch.testing.assert_close(found.probabilities[-1], expected.gather(1, found.ids[-1]), **NEAR)


def test_attention_and_norms_are_those_of_the_models_own_modules(own):
    """Of what its modules returned while the model itself ran; the softmax in float64."""
    maps, norms = attention_maps(own, IDS), residual_norms(own, IDS)
    qkv, streams, seen = [], [], torch.ones(T, T, dtype=torch.bool).tril()
    for block in own.h:
        block.register_forward_pre_hook(lambda _, given: streams.append(given[0][0]))
        block.attn.c_attn.register_forward_hook(lambda *given: qkv.append(given[2][0].double()))
    own.ln_f.register_forward_pre_hook(lambda _, given: streams.append(given[0][0]))
    with torch.no_grad():
        own(IDS[None])
    assert len(qkv) == L and len(streams) == L + 1
    for layer, head in product(range(L), range(H)):
        q, k, _ = qkv[layer].view(T, 3, H, -1)[:, :, head].unbind(1)
        powers = (q @ k.T / q.size(1) ** 0.5).exp() * seen
        expected = powers / powers.sum(1, keepdim=True)
        torch.testing.assert_close(maps[layer, head].double(), expected, **NEAR)
    expected = torch.stack([x.double().norm(dim=1) for x in streams])
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=1e-5)


def test_an_adapters_insides_are_those_of_its_merged_model(pair, folder):
    model = lora_model(folder)
    plain = merged(model)
    for look in (attention_maps, residual_norms):
        torch.testing.assert_close(look(model, IDS), look(plain, IDS), rtol=1e-5, atol=1e-5)
        assert (look(model, IDS) - look(load_model(folder), IDS)).abs().max() > 0.01


@pytest.mark.interpreted
def test_tritons_kernels_show_the_same(tmp_path):
    save_model(GPT(GPTConfig(61, 37, 2, 2, 32)), tmp_path)
    model, other = (load_model(tmp_path, kernels=kernels) for kernels in ("triton", "torch"))
    for look in (attention_maps, residual_norms, lambda *given: logit_lens(*given)[1]):
        torch.testing.assert_close(look(model, IDS), look(other, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["load_model", "load_generator", "fp16", "int8"])
def test_neighbours_are_the_rows_of_the_largest_cosine(pair, folder, kind):
    model = (SAME | OWN)[kind](folder)
    state = dict(model.stored()) if kind != "load_model" else model.state_dict()
    table = state["wte.weight"].double()
    if kind == "int8":
        table *= state["wte.weight" + SCALE].double()[:, None]
    for token in (0, 17, V - 1):
        found = token_neighbours(model, token, k=V - 1)
        ids = [neighbour.token for neighbour in found]
        assert sorted([token, *ids]) == [*range(V)]
        cosines = F.cosine_similarity(table[ids], table[token][None])
        torch.testing.assert_close(
            torch.tensor([n.similarity for n in found]), cosines.float(), **NEAR
        )
        assert (cosines.diff() < 1e-6).all()
        assert token_neighbours(model, token, 4) == found[:4]


def everything(model):
    """A model's state: tensors to the bit, modes, hooks, the names of its attributes."""
    tensors = dict(model.stored() if hasattr(model, "stored") else model.state_dict())
    modules = [
        (name, m.training, sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    return {name: tensor.clone() for name, tensor in tensors.items()}, modules


@pytest.mark.parametrize("kind", [*SAME, *OWN])
def test_a_look_changes_nothing(pair, folder, kind):
    model = (SAME | OWN)[kind](folder)
    tensors, modules = everything(model)
    random_state = torch.get_rng_state()
    found = [attention_maps(model, IDS), *logit_lens(model, IDS), residual_norms(model, IDS)]
    token_neighbours(model, 3)
    again, same = everything(model)
    assert same == modules and tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(tensor.requires_grad for tensor in found)
    assert all(p.grad is None for p in model.parameters())


def test_one_token_sees_itself_and_the_longest_text_fits(pair):
    model = pair[0]
    assert torch.equal(attention_maps(model, [7]), torch.ones(L, H, 1, 1))
    longest = prompts(1, TINY.block_size)
    assert attention_maps(model, longest).shape == (L, H, *[TINY.block_size] * 2)
    torch.testing.assert_close(
        logit_lens(model, longest, k=1).probabilities[-1, :, 0],
        model(longest)[0].softmax(1).amax(1),
        **NEAR,
    )


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "1 to 37 tokens of one text"),
        ([1] * 38, "1 to 37 tokens of one text, (T,) or (1, T), not (38,)"),
        (torch.zeros(2, 3, dtype=torch.int64), "not (2, 3)"),
        ([1, 61], "0 to 60, not 61"),
        ([-1, 5], "0 to 60, not -1"),
        ([1.0, 2.0], "whole numbers, not torch.float32"),
        ([True], "whole numbers, not torch.bool"),
    ],
    ids=["none", "long", "batch", "high", "negative", "float", "bool"],
)
def test_wrong_ids_are_named(pair, ids, said):
    for look in (attention_maps, logit_lens, residual_norms):
        with pytest.raises(ValueError, match="ids must be") as error:
            look(pair[0], ids)
        assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("k", [0, V + 1])
def test_a_wrong_k_or_token_is_named(pair, k):
    with pytest.raises(ValueError, match=f"k must be 1 to 61, not {k}"):
        logit_lens(pair[0], IDS, k)
    with pytest.raises(ValueError, match=f"k must be 1 to 60, not {k}"):
        token_neighbours(pair[0], 0, k)
    with pytest.raises(ValueError, match="token must be 0 to 60, not 61"):
        token_neighbours(pair[0], V)


def test_numbers_that_are_not_finite_are_an_error(pair, folder):
    model = load_model(folder)
    model.h[0].mlp.c_proj.bias.data[3] = float("nan")
    for look in (attention_maps, logit_lens, residual_norms):
        with pytest.raises(FloatingPointError, match="not finite"):
            look(model, IDS)


# ---- merges

WORDS = (
    " unbelievable! naïve 🦜 aaaaaaa 12345 don't   \n\n\tdef f(x):  日本語 \x1c\x85\u3000 e\u0301"
)


def bpe_of(most):
    """tokenizers' BPE with GPT-2's first `most` merges."""
    tok = gpt2_tokenizer()
    pairs = [tuple(line.split(" ")) for line in tok.merges.splitlines()[1:]][:most]
    return BPE(vocab=tok.vocabulary, merges=pairs)


def test_pieces_and_every_merge_are_those_of_tokenizers():
    pieces = merges(gpt2_tokenizer(), WORDS)
    split = ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str(WORDS)
    assert [piece.letters for piece in pieces] == [letters for letters, _ in split]
    assert sum(len(piece.merges) for piece in pieces) > 40
    for piece in pieces:
        ranks = [merge.rank for merge in piece.merges]
        assert ranks == sorted(ranks)
        for rank in {*ranks}:
            # tokenizers' own parts once it knows the merges up to this one
            theirs = [token.value for token in bpe_of(rank + 1).tokenize(piece.letters)]
            assert piece.after(sum(r <= rank for r in ranks)) == theirs
        assert [*piece.tokens] == piece.after(len(ranks)) and piece.after(0) == [*piece.letters]
        assert [*piece.ids] == [token.id for token in bpe_of(50000).tokenize(piece.letters)]


def test_a_merge_names_its_parts():
    (piece,) = merges(gpt2_tokenizer(), " unbelievable")
    shown = [(m.rank, m.start, m.left, m.right) for m in piece.merges]
    # as docs/gpt2.md shows them
    assert shown[0] == (37, 11, "l", "e") and shown[-1] == (24223, 0, "Ġunbeliev", "able")
    assert piece.tokens == ("Ġunbelievable",) and piece.ids == (24479,)
    assert json.loads(json.dumps(piece._asdict()))["merges"][1] == [78, 0, "Ġ", "u"]


def random_text(rng):
    pools = [
        string.printable,
        "aab ",
        "'sdt re",
        "éß日本🦜\u0301\ud800\udc00\ud83d",
        "\x1c\x1f\x85",
    ]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(60)))


@pytest.mark.parametrize("tokenizer", [gpt2_tokenizer, byte_tokenizer], ids=["gpt2", "bytes"])
def test_the_ids_are_those_of_encode(tokenizer):
    tok, rng = tokenizer(), random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        pieces = merges(tok, text)
        assert [i for piece in pieces for i in piece.ids] == tok.encode(text)
        assert "".join(p.text for p in pieces).encode() == tok.decode_bytes(tok.encode(text))
    assert merges(tok, "") == []


def test_a_long_run_takes_no_squares():
    text = "aab" * 30_000
    (piece,) = merges(gpt2_tokenizer(), text)
    assert [*piece.ids] == gpt2_tokenizer().encode(text) and len(piece.merges) > 30_000


def test_the_end_of_a_text_is_a_piece_or_its_letters():
    text = f"a b{END_OF_TEXT}{END_OF_TEXT}c"
    tok = gpt2_tokenizer()
    for allow_special in (True, False):
        pieces = merges(tok, text, allow_special)
        assert [i for p in pieces for i in p.ids] == tok.encode(text, allow_special)
        assert [p.text for p in pieces].count(END_OF_TEXT) == 2 * allow_special


def test_results_become_json(pair):
    model = pair[0]
    guesses = logit_lens(model, IDS, 2)
    plain = {
        "attention": attention_maps(model, IDS).tolist(),
        "norms": residual_norms(model, IDS).tolist(),
        "lens": {name: x.tolist() for name, x in guesses._asdict().items()},
        "neighbours": token_neighbours(model, 5),
        "merges": merges(gpt2_tokenizer(), WORDS),
    }
    back = json.loads(json.dumps(plain, allow_nan=False))
    assert back["lens"]["ids"] == guesses.ids.tolist() and len(back["neighbours"]) == 10
