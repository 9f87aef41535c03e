"""A model's prepared layers: the same tokens in every layout, and every change of a weight seen."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from reference import TINY, assert_parity, force_layout, left_padded, prompts, twins
from torch import nn

from nanogpt2 import GPT, generate, load_generator
from nanogpt2.cpu import prepared as prepared_module
from nanogpt2.cpu.decoder import CPUDecoder
from nanogpt2.cpu.inference_model import pack
from nanogpt2.cpu.layouts import FLOAT as ALL
from nanogpt2.cpu.prepacked import Int7Linear, Int8Linear, onednn_sums_exactly
from nanogpt2.cpu.prepared import prepared_for
from nanogpt2.cpu.tuning import ROWS, Timing
from nanogpt2.training.lora import add_lora, lora_layers

# without the layout of the step in C, which nobody has compiled here: see test_native.py
FLOAT = {name: layout for name, layout in ALL.items() if name != "rows"}

COPIES = ["onednn_1", "tiles_96"]
INT8 = Int8Linear if onednn_sums_exactly() else Int7Linear
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 5, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_k": 9, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(prepared_module, "table_for", prepared_module.table_for)


@pytest.fixture(params=FLOAT)
def forced(request):
    force_layout(request.param)
    return request.param


@pytest.fixture(params=COPIES)
def copied(request):
    force_layout(request.param)
    return request.param


@pytest.fixture
def models(tmp_path):
    return twins(tmp_path / "twins")


@pytest.fixture
def model(models):
    return models[0]


def layouts_of(model):
    """The layouts that are in use; nothing is prepared anew."""
    return {*prepared_module._prepared[model].layouts().values()}


def assert_follows(model, rows=2, **options):
    """Every score is model.py's own, without a cache or prepared layers."""
    ids = prompts(rows, 5)
    options = {"max_new_tokens": 4, "eos_token_id": None, "output_scores": True} | options
    found = generate(model, ids, **options)
    for n, scores in enumerate(found.scores):
        with torch.no_grad():
            expected = model(found.sequences[:, : 5 + n])[:, -1]
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    return found


# ---- the same tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loader", ["load_model", "load_generator"])
def test_tokens_are_transformers(models, tmp_path, forced, loader, way):
    """Alone, in a batch with padding, and where the text outgrows many steps."""
    ours, theirs = models
    if loader == "load_generator":
        ours = load_generator(tmp_path / "twins")
    if way == "groups":
        # transformers' groups live outside its package: the plain decoder is the oracle
        ids = prompts(2, 6)
        options = WAYS[way] | {"max_new_tokens": 12, "eos_token_id": None}
        found = generate(ours, ids, **options).sequences
        assert torch.equal(found, expected_by_model_py(models[0], ids, options))
    else:
        options = WAYS[way] | {"max_new_tokens": 12}
        assert_parity((ours, theirs), prompts(1, 20), seed=3, **options)
        assert_parity((ours, theirs), *left_padded(3, 9, 1), seed=4, **options)
    assert layouts_of(ours) == {forced}


def expected_by_model_py(model, ids, options):
    model.use_kernels("reference", "cpu")
    try:
        return generate(model, ids, **options).sequences
    finally:
        model.use_kernels("torch", "cpu")


@pytest.mark.parametrize("way", WAYS)
def test_both_loaders_write_the_same_to_the_bit(model, tmp_path, forced, way):
    """They multiply by the same layouts: their scores are equal too.

    But for MKL, which adds in another order where the weight lies in another order.
    """
    options = WAYS[way] | {"max_new_tokens": 12, "eos_token_id": None, "seed": 5}
    found, expected = (
        generate(m, prompts(2, 6), output_scores=True, **options)
        for m in (model, load_generator(tmp_path / "twins"))
    )
    assert torch.equal(found.sequences, expected.sequences)
    if forced == "linear":
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    else:
        assert all(map(torch.equal, found.scores, expected.scores))


@pytest.mark.parametrize("way", WAYS)
def test_int8_writes_the_same_to_the_bit_in_every_layout(model, way):
    texts = []
    usual, *others = pack(copy.deepcopy(model), "int8").h[0].mlp.c_fc.layouts
    assert usual == INT8.usual and len(others) == 2
    for name in (usual, *others):
        force_layout(name)
        packed = pack(copy.deepcopy(model), "int8")
        options = WAYS[way] | {"max_new_tokens": 12, "eos_token_id": None, "seed": 5}
        texts.append(generate(packed, prompts(2, 6), output_scores=True, **options))
        assert layouts_of(packed) == {name}
    for text in texts[1:]:
        assert torch.equal(text.sequences, texts[0].sequences)
        assert all(map(torch.equal, text.scores, texts[0].scores))


def test_the_first_layout_of_int8_is_chosen_before_the_first_product(model, monkeypatch):
    """By the prompt and the new tokens, so that no matrix is laid out twice."""
    force_layout("tiles_64")
    laid_out, asked = [], []
    lay_out, begin = INT8.lay_out, prepared_module.Plan.begin
    monkeypatch.setattr(
        INT8, "lay_out", lambda self, name: (laid_out.append(name), lay_out(self, name))[1]
    )
    monkeypatch.setattr(
        prepared_module.Plan, "begin", lambda *given: (asked.append(given[1:]), begin(*given))[1]
    )
    packed = pack(model, "int8")
    generate(packed, prompts(2, 6), max_new_tokens=4, num_beams=3, eos_token_id=None)
    assert laid_out == ["tiles_64"] * (4 * TINY.n_layer + 1)
    # the matrices of the blocks, then the head, which scores the last token of a prompt alone
    (rows, prompt, new), of_head = asked
    assert (rows, prompt) == (6, 12) and 0 < new <= 4
    assert of_head == (6, 1, new)


def test_layouts_that_change_within_a_text(model, monkeypatch):
    """A row, then beams, then a row: each text is right while matrices are laid out anew."""

    def table(products):
        least = {1: "tiles_96", 5: "onednn_5", 64: "linear"}
        return {
            p.shape: {
                n: Timing({rows: 1.0 if n == least[rows] else 2.0 for rows in ROWS}, 1.5)
                for n in p.layouts
            }
            for p in products
        }

    monkeypatch.setattr(prepared_module, "table_for", table)
    seen = set()
    for beams in (1, 5, 1, 5):
        assert_follows_beams(model, beams)
        seen |= layouts_of(model)
    assert {"tiles_96", "onednn_5"} <= {part for name in seen for part in name.split("+")}


def assert_follows_beams(model, beams):
    if beams == 1:
        assert_follows(model, rows=1, max_new_tokens=20)
        return
    options = {"max_new_tokens": 20, "num_beams": beams, "eos_token_id": None}
    found = generate(model, prompts(1, 5), **options)
    fresh = GPT(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(found.sequences, expected_by_model_py(fresh, prompts(1, 5), options))


def test_a_model_that_somebody_built(forced):
    torch.manual_seed(3)
    model = GPT(TINY)
    assert model.training
    model.eval()
    assert_follows(model)
    assert layouts_of(model) == {forced}


# ---- changes


@torch.no_grad()
def copied_in(weight, layer, name, model):
    weight.copy_(torch.randn_like(weight))


@torch.inference_mode()
def copied_in_where_nothing_is_counted(weight, layer, name, model):
    weight.copy_(torch.randn_like(weight))


def by_an_optimizer(weight, layer, name, model):
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.grad = None


def added_by_data(weight, layer, name, model):
    weight.data.add_(0.5)


def replaced_by_data(weight, layer, name, model):
    weight.data = torch.randn_like(weight)


def one_number_by_data(weight, layer, name, model):
    weight.data[(0,) * weight.dim()] = weight[(0,) * weight.dim()].item() + 5


def last_number_by_data(weight, layer, name, model):
    weight.data[(-1,) * weight.dim()] += 5.0


def by_numpy(weight, layer, name, model):
    weight.detach().numpy()[...] *= 1.5


def loaded(weight, layer, name, model):
    model.load_state_dict(GPT(TINY).state_dict())


def assigned(weight, layer, name, model):
    model.load_state_dict(GPT(TINY).state_dict(), assign=True)


def another_parameter(weight, layer, name, model):
    setattr(layer, name, nn.Parameter(torch.randn_like(weight)))


def another_layer(weight, layer, name, model):
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        getattr(twin, name).copy_(torch.randn_like(weight))
    for parent in model.modules():
        for child, module in [*parent.named_children()]:
            if module is layer:
                setattr(parent, child, twin)


CHANGES = [
    copied_in,
    copied_in_where_nothing_is_counted,
    by_an_optimizer,
    added_by_data,
    replaced_by_data,
    one_number_by_data,
    last_number_by_data,
    by_numpy,
    loaded,
    assigned,
    another_parameter,
    another_layer,
]
PLACES = ["wte.weight", "h.1.mlp.c_fc.weight", "h.0.attn.c_attn.bias", "h.1.ln_2.weight"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_noticed(model, copied, change, place):
    """After the first text, and once more: the next text is that of the changed model."""
    before = assert_follows(model)
    for _ in range(2):
        layer, name = model.get_submodule(place.rpartition(".")[0]), place.rpartition(".")[2]
        change(getattr(layer, name), layer, name, model)
        after = assert_follows(model)
        assert layouts_of(model) == {copied}
        if change is not last_number_by_data:
            assert not torch.allclose(before.scores[0], after.scores[0], rtol=1e-3)
        before = after


def test_unchanged_weights_stay_laid_out(model, copied):
    assert_follows(model)
    first = prepared_for(model)
    layers = [p._layout for p in first.products()]
    for _ in range(3):
        assert_follows(model)
        model.eval()
        model.requires_grad_(True)
    assert prepared_for(model) is first
    assert all(p._layout is layout for p, layout in zip(first.products(), layers, strict=True))


def test_blocks_that_change_places(model, copied):
    before = assert_follows(model)
    model.h = nn.ModuleList([model.h[1], model.h[0]])
    after = assert_follows(model)
    assert not torch.allclose(before.scores[0], after.scores[0], rtol=1e-3)


def test_an_adapter_that_is_trained_and_merged(model, copied):
    """Merging makes new layers; the weights of the old ones have not changed."""
    before = assert_follows(model)
    add_lora(model, 2, 4.0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(0.3) if parameter.requires_grad else None
    model.eval()
    assert_follows(model)
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.merged())
    after = assert_follows(model)
    assert not torch.allclose(before.scores[0], after.scores[0], rtol=1e-3)


def test_a_bias_is_read_live(model, copied):
    """A layout copies no bias: a change by `.data` needs no new layout."""
    assert_follows(model)
    first = prepared_for(model)
    model.h[0].mlp.c_fc.bias.data.add_(0.5)
    assert_follows(model)
    assert prepared_for(model) is first


# ---- training


def gradients(model):
    model.train()
    ids = prompts(2, 9)
    loss = model(ids, ids)
    loss.backward()
    model.eval()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_a_step_of_training_is_the_same_to_the_bit(model, copied):
    other = copy.deepcopy(model)
    for _ in range(2):
        assert_follows(model)
        assert all(map(torch.equal, gradients(model), gradients(other)))
        for m in (model, other):
            torch.optim.AdamW(m.parameters(), lr=1e-2).step()
            m.zero_grad()
        assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert_follows(model)


def test_a_gradient_drops_the_layouts(model, copied):
    for _ in range(3):
        assert_follows(model)
        prepared = weakref.ref(prepared_module._prepared[model])
        layout = weakref.ref(prepared().layers[0].c_fc._layout)
        gradients(model)
        model.zero_grad()
        assert model not in prepared_module._prepared
        gc.collect()
        assert prepared() is None and layout() is None
    assert not model.wpe.weight._post_accumulate_grad_hooks


def test_a_text_without_gradients_leaves_no_hook_behind_twice(model, copied):
    """However many texts were written, and however often a weight changed."""
    for _ in range(3):
        assert_follows(model)
        with torch.no_grad():
            model.wte.weight.add_(0.1)
    assert len(model.wpe.weight._post_accumulate_grad_hooks) == 1


def test_layouts_leave_the_weights_alone(model, forced):
    before = {name: (t.clone(), t.data_ptr(), t._version) for name, t in model.named_parameters()}
    for options in ({}, {"num_beams": 5}):
        generate(model, prompts(1, 9), max_new_tokens=9, eos_token_id=None, **options)
    gradients(model)
    for name, t in model.named_parameters():
        value, place, version = before[name]
        assert torch.equal(t, value) and t.data_ptr() == place and t._version == version
        assert t.requires_grad and type(t) is nn.Parameter


# ---- copies, and the end


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_a_model_of_its_own(model, copied, again):
    size = len(pickle.dumps(model))
    expected = assert_follows(model)
    # no layout is written with it
    assert size == len(pickle.dumps(model))
    twin = again(model)
    assert twin not in prepared_module._prepared
    assert torch.equal(assert_follows(twin).sequences, expected.sequences)
    with torch.no_grad():
        twin.wte.weight.mul_(-1)
    assert_follows(twin)
    gradients(twin)
    # the other one keeps its layouts
    assert layouts_of(model) == {copied}
    assert torch.equal(assert_follows(model).sequences, expected.sequences)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_model_for_generating_dies_with_its_last_reference(model, copied, scheme):
    model = pack(copy.deepcopy(model), scheme)
    generate(model, prompts(1, 5), max_new_tokens=4, eos_token_id=None)
    dead = weakref.ref(model)
    weight = weakref.ref(prepared_module._prepared[model].layers[0].c_fc._layout)
    count = len(prepared_module._prepared)
    del model
    gc.collect()
    assert dead() is None and weight() is None
    assert len(prepared_module._prepared) < count


def test_a_trainable_model_dies_too(forced):
    model = GPT(TINY).eval()
    generate(model, prompts(1, 5), max_new_tokens=4, eos_token_id=None)
    dead, wte = weakref.ref(model), weakref.ref(model.wte.weight)
    layout = weakref.ref(prepared_module._prepared[model].layers[0].c_fc._layout)
    del model
    gc.collect()
    assert dead() is None and wte() is None and layout() is None


def test_a_decoder_in_use_keeps_its_layers(model, copied):
    """A gradient between two steps drops the table's entry, not what a text is reading."""
    decoder = CPUDecoder(model, 1, 1, 20)
    ids = prompts(1, 6)
    decoder.read(ids[:, :5], None, None)
    gradients(model)
    found = decoder.read(ids[:, 5:], None, None)[:, -1]
    torch.testing.assert_close(found, model.hidden_states(ids)[:, -1], rtol=1e-4, atol=1e-5)
