"""The blocks in C: compiled, opened with care, equal to model.py and to transformers' tokens."""

import os
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from reference import TINY, prompts, twins
from torch import nn

from nanogpt2 import generate
from nanogpt2.cpu import native, prepared
from nanogpt2.cpu.decoder import CPUDecoder
from nanogpt2.cpu.inference_model import pack
from nanogpt2.cpu.prepacked import Int7Linear, Int8Linear
from nanogpt2.model import GPT


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library, compiled once."""
    home = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        return native.compile_library()


@pytest.fixture
def library(compiled, monkeypatch):
    opened, knows = native.library, native.knows_the_stream
    monkeypatch.setattr(native, "library_path", lambda: compiled)
    opened.cache_clear()
    knows.cache_clear()
    yield opened()
    opened.cache_clear()
    knows.cache_clear()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Lay out with the first steps: tiny texts end before the layout pays."""
    monkeypatch.setattr(prepared, "PAYS_AFTER", 1)


@pytest.fixture
def pair(tmp_path):
    return twins(tmp_path)


def uses_blocks(model):
    return prepared.prepared_for(model).blocks is not None


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("n_embd", "n_head"), [(24, 3), (20, 1), (35, 5)])
@torch.inference_mode()
def test_each_token_is_model_pys(library, n_embd, n_head, threads):
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_embd=n_embd, n_head=n_head, n_layer=3)).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    ids = prompts(1, TINY.block_size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = CPUDecoder(model, 1, 1, TINY.block_size)
        decoder.read(ids[:, :3], None, None)
        for t in range(3, ids.size(1)):
            found = decoder.read(ids[:, t : t + 1], None, None)
            torch.testing.assert_close(
                found[0, 0], model.hidden_states(ids[:, : t + 1])[0, -1], rtol=1e-4, atol=1e-4
            )
        assert uses_blocks(model)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [Int8Linear, Int7Linear])
@torch.inference_mode()
def test_int8_is_the_products_of_prepacked_py(library, kind, monkeypatch):
    """The same rounding of the input, so almost the same numbers."""
    monkeypatch.setattr("nanogpt2.cpu.prepacked.onednn_sums_exactly", lambda: kind is Int8Linear)
    # the usual layout may be inexact here: tiles are exact everywhere
    monkeypatch.setattr(kind, "usual", "tiles_64")
    torch.manual_seed(0)
    model = GPT(TINY).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    packed = pack(model, "int8")
    assert type(packed.h[0].mlp.c_fc) is kind
    plain, ids = deepcopy(packed), prompts(1, 20)
    found, expected = [], []
    for model, hidden in ((packed, found), (plain, expected)):
        decoder = CPUDecoder(model, 1, 1, TINY.block_size)
        for t in range(ids.size(1)):
            hidden.append(decoder.read(ids[:, t : t + 1], None, None))
        monkeypatch.setattr(native, "library", lambda: None)
    difference = torch.cat(found) - torch.cat(expected)
    # a sum's last bit may move an input over the border of two steps of 8 bits
    assert difference.norm() < 2e-2 * torch.cat(expected).norm()
    assert (difference[:6].abs() < 1e-4).float().mean() > 0.9


# a number of rows, and of outputs: beyond a tile by each rest, and by threads without any
SIZES = [*zip([*range(1, 10), 21], (4, 5, 37, 38, 39, 40, 67, 9, 37, 38), strict=True)]


def product_of(x, weight, *more, middle=0):
    tensors = [weight, None, *more]
    places = [t if t is None else t.data_ptr() for t in tensors]
    return native.linear(x, native.Matrix(*places), len(weight), weight.dtype, middle)


@pytest.mark.parametrize("middle", [64, 128])
@pytest.mark.parametrize(("rows", "outputs"), SIZES)
def test_products_of_bytes_are_exact(library, rows, outputs, middle):
    """Inputs of whole steps are narrowed without a rest, so the sums are whole numbers."""
    torch.manual_seed(0)
    most = 255 if middle == 128 else 127
    q = torch.randint(-127, 128, (outputs, 771), dtype=torch.int8)
    u = torch.randint(0, most + 1, (rows, 771))
    u[:, 0], u[:, 1] = 0, most
    scale, x = torch.rand(outputs), u.float() * (255 / most)
    if middle == 64:
        # in the middle of the two steps of 8 bits that become one of 7
        x = (2 * u + u.sign()).clamp(max=255).float()
        u = x.long() >> 1
    found = product_of(x, q, scale, q.sum(dim=1) * scale, middle=middle)
    # the middle of two steps lies half a step of 8 bits above the lower one
    inputs = u.double() if middle == 128 else 2 * u.double() + 0.5
    expected = inputs @ q.double().t() * scale
    assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "outputs"), SIZES)
def test_products_of_few_rows(library, rows, outputs, threads, dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, 771).to(dtype), torch.randn(771, rows).t()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = product_of(x, weight)
    finally:
        torch.set_num_threads(before)
    expected = x.double() @ weight.double().t()
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_each_half_is_widened_exactly(library):
    """All 65,536: by the processor's instructions, and beyond the last 16 numbers without."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for place in (0, 16):
        column = torch.zeros(2**16, 17, dtype=torch.float16)
        column[:, place] = halves
        x = torch.zeros(1, 17)
        x[0, place] = 1
        found, expected = product_of(x, column)[0], halves.float()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# draws before, numbers in all, places
DRAWS = {
    "a new stream": (0, 700, [0, 1, 311, 312, 313, 623, 624, 699]),
    "at a block's end": (312, 312, [0, 311]),
    "before it": (311, 2000, [0, 1, 2, 1000, 1999]),
    "one": (5, 1, [0]),
    "none of many": (5, 100_000, []),
    "every one": (77, 999, [*range(999)]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_numbers_of_the_stream(library, name):
    assert native.knows_the_stream()
    before, total, places = DRAWS[name]
    ours, theirs = (torch.Generator().manual_seed(9) for _ in range(2))
    for generator in (ours, theirs):
        torch.rand(before, dtype=torch.float64, generator=generator)
    places = torch.tensor(places, dtype=torch.int64)
    for _ in range(3):
        found = native.uniforms(ours, total, places)
        expected = torch.rand(total, dtype=torch.float64, generator=theirs)[places]
        assert torch.equal(found, expected)
        assert torch.equal(ours.get_state(), theirs.get_state())
    # torch goes on from there, with its own normal numbers as well
    assert torch.equal(torch.randn(9, generator=ours), torch.randn(9, generator=theirs))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_seed_draws_the_same_tokens(library, pair, batch, monkeypatch):
    """Through `uniforms` as through torch.rand."""
    asked, run = [], native.uniforms
    monkeypatch.setattr(native, "uniforms", lambda *given: (asked.append(1), run(*given))[1])
    options = {"max_new_tokens": 20, "seed": 4, "eos_token_id": None}
    for more in ({"do_sample": True, "top_k": 5}, OPTIONS["the mission"] | {"top_k": 5}):
        found = generate(pair[0], prompts(batch, 5), **options, **more).sequences
        assert len(asked) >= 15
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "knows_the_stream", lambda: False)
            expected = generate(pair[0], prompts(batch, 5), **options, **more).sequences
        assert not asked and torch.equal(found, expected)


def test_a_generator_with_another_state_is_not_read(library, monkeypatch):
    monkeypatch.setattr(native, "STATE", slice(32, 32 + 8 * native.WORDS))
    assert not native.knows_the_stream()
    monkeypatch.setattr(native, "STATE", slice(24, 24 + 8 * native.WORDS))
    native.knows_the_stream.cache_clear()
    assert native.knows_the_stream()


@pytest.mark.parametrize("scheme", [None, "fp16", "int8"])
@pytest.mark.parametrize(("prompts_", "rows"), [(1, 5), (2, 3), (3, 1), (1, 8), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
@torch.inference_mode()
def test_rows_that_share_a_prompt(library, scheme, prompts_, rows, padded):
    """Each row of each step is that of the same decoder without C, reordered as beams are."""
    torch.manual_seed(1)
    # tied heads and three layers; a prompt of 6 tokens, then 9 steps of other tokens in each row
    model = GPT(replace(TINY, n_layer=3)).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    model = pack(model, scheme)
    N, T = prompts_ * rows, 6
    ids = prompts(prompts_, T)
    mask = torch.ones(prompts_, 1, T + 9, T + 9, dtype=torch.bool).tril()
    if padded:
        mask[0, ..., :2] = False
    steps = torch.randint(TINY.vocab_size, (9, N, 1))
    orders = [
        torch.cat([torch.randint(rows, (rows,)) + rows * b for b in range(prompts_)]) for _ in steps
    ]

    def run():
        decoder, found = CPUDecoder(model, prompts_, rows, TINY.block_size), []
        # a text before this one prepares the blocks
        other = CPUDecoder(model, 1, 1, TINY.block_size)
        for _ in range(6):
            other.read(prompts(1, 1), None, None)
        decoder.read(ids, None, mask[..., :T, :T] if padded else None)
        decoder.fork()
        for t, (tokens, order) in enumerate(zip(steps, orders, strict=True)):
            end = T + t + 1
            rows_mask = mask[:, :, end - 1 : end, :end].repeat_interleave(rows, dim=0)
            found.append(decoder.read(tokens, None, rows_mask if padded else None))
            if rows > 1:
                decoder.reorder(order)
        return torch.cat(found), prepared.prepared_for(model).blocks

    found, blocks = run()
    assert blocks is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        prepared.forget(model)
        expected, blocks = run()
    assert blocks is None
    if scheme == "int8":
        # as for one row: a sum's last bit may move an input over the border of two steps
        assert (found - expected).norm() < 2e-2 * expected.norm()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_many_rows_and_a_narrow_model_run_without_c(library, pair):
    model, _ = pair
    generate(model, prompts(9, 5), max_new_tokens=20, eos_token_id=None)
    assert not uses_blocks(model)
    narrow = GPT(replace(TINY, n_embd=2, n_head=1)).eval()
    generate(narrow, prompts(1, 5), max_new_tokens=20, eos_token_id=None)
    assert not uses_blocks(narrow)


OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "the mission": {
        "num_beams": 5,
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 50,
        "no_repeat_ngram_size": 2,
    },
}


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_transformers(library, pair, batch, padding):
    """One model writes all texts in turn: up to 8 rows by the blocks, more without."""
    model, theirs = pair
    ids = prompts(batch, 5)
    for options in (*OPTIONS.values(), {}):
        more = {"max_new_tokens": 20, "eos_token_id": None, **options}
        torch.manual_seed(3)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        more |= {"attention_mask": mask, "pad_token_id": 0}
        expected = theirs.generate(ids, **more)
        torch.manual_seed(3)
        assert torch.equal(generate(model, ids, **more).sequences, expected)
        assert uses_blocks(model) == (batch * options.get("num_beams", 1) <= 8)


def test_a_text_longer_than_the_context(library, pair, monkeypatch):
    model, _ = pair
    calls, run = [], native.Blocks.__call__
    monkeypatch.setattr(
        native.Blocks,
        "__call__",
        lambda self, *given, **more: (calls.append(1), run(self, *given, **more))[1],
    )
    options = {"max_new_tokens": 3 * TINY.block_size, "eos_token_id": None}
    found = generate(model, prompts(1, 5), **options).sequences
    # a slide reads many tokens at once; the tokens after it go through the blocks again
    assert len(calls) > 2 * TINY.block_size
    plain = deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        assert torch.equal(generate(plain, prompts(1, 5), **options).sequences, found)


@pytest.mark.parametrize("name", ["ln_1", "mlp.c_proj", "attn.c_attn"])
def test_a_changed_weight_is_noticed(library, pair, name):
    """A prompt of one token does not prepare the blocks anew by itself."""
    model, _ = pair
    ids = prompts(1, 1)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    generate(model, ids, **options)
    assert uses_blocks(model)
    weight = model.h[1].get_submodule(name).weight
    weight.data = torch.randn_like(weight)
    expected = generate(deepcopy(model), ids, **options).sequences
    assert torch.equal(generate(model, ids, **options).sequences, expected)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_replaced_layer_norm_of_a_packed_model_is_noticed(library, pair, scheme):
    model, ids = pack(pair[0], scheme), prompts(1, 1)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    before = generate(model, ids, **options).sequences
    assert uses_blocks(model)
    model.h[1].ln_2.weight = nn.Parameter(torch.randn(TINY.n_embd), requires_grad=False)
    expected = generate(deepcopy(model), ids, **options).sequences
    assert not torch.equal(expected, before)
    assert torch.equal(generate(model, ids, **options).sequences, expected)


def test_a_call_within_another_disturbs_nothing(library, pair, monkeypatch):
    """As two threads that write texts by one model: each call has its own shape and room."""
    blocks = a_text(pair[0])
    caches = [
        [torch.empty(2, 1, TINY.n_head, length, 8) for _ in range(TINY.n_layer)]
        for length in (7, 30)
    ]
    scratches, rest = [], [caches[1]]

    class Library:
        def room(self, *given):
            return 9

        def blocks(self, x, layers, shape, cache, scratch, *given):
            scratches.append(scratch)
            if rest:
                blocks(torch.empty(1, 1, TINY.n_embd), rest.pop(), 0)
                assert cache._obj.capacity == 7

    monkeypatch.setattr(native, "library", Library)
    blocks(torch.empty(1, 1, TINY.n_embd), caches[0], 0)
    assert len({*scratches}) == 2


@torch.inference_mode()
def test_blocks_that_another_thread_prepared_read_no_prompt(library, pair, monkeypatch):
    model, _ = pair
    a_text(model)
    monkeypatch.setattr(prepared.Prepared, "count", lambda self, rows, tokens: None)
    ids = prompts(1, 9)
    decoder = CPUDecoder(model, 1, 1, TINY.block_size)
    found = decoder.read(ids, None, None)
    assert uses_blocks(model)
    torch.testing.assert_close(found, model.hidden_states(ids), rtol=1e-4, atol=1e-4)


def a_text(model):
    """Write one; return the model's blocks."""
    generate(model, prompts(1, 5), max_new_tokens=20, eos_token_id=None)
    blocks = prepared.prepared_for(model).blocks
    assert blocks is not None
    return blocks


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_scores_that_are_not_finite(library, pair, scheme):
    model = pack(pair[0], scheme)
    model.h[1].ln_2.weight[3] = torch.nan
    decoder = CPUDecoder(model, 1, 1, TINY.block_size)
    for _ in range(6):
        hidden = decoder.read(prompts(1, 1), None, None)
        assert not hidden.isfinite().all()
    assert uses_blocks(model)


@torch.inference_mode()
@pytest.mark.parametrize("change", ["fewer blocks", "more blocks", "strided norms", "epsilon"])
def test_a_model_that_its_user_changed(library, change):
    """As model.py computes it; one epsilon of a norm is enough to leave it to PyTorch."""
    torch.manual_seed(0)
    model = GPT(replace(TINY, n_layer=3)).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    if change == "fewer blocks":
        model.h = model.h[:2]
    elif change == "more blocks":
        model.h = nn.ModuleList([*model.h, *deepcopy(model.h)])
    elif change == "strided norms":
        for block in model.h:
            block.ln_1.weight = nn.Parameter(torch.randn(2 * TINY.n_embd)[::2])
            block.ln_2.bias = nn.Parameter(torch.randn(2 * TINY.n_embd)[::2])
    else:
        a_text(model)
        model.h[1].ln_2.eps = 0.5
    ids = prompts(1, TINY.block_size)
    decoder = CPUDecoder(model, 1, 1, TINY.block_size)
    for t in range(ids.size(1)):
        found = decoder.read(ids[:, t : t + 1], None, None)
        if change not in ("fewer blocks", "more blocks"):
            expected = model.hidden_states(ids[:, : t + 1])[0, -1]
            torch.testing.assert_close(found[0, 0], expected, rtol=1e-4, atol=1e-4)
    assert uses_blocks(model) == (change != "epsilon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        prepared.forget(model)
        again = CPUDecoder(model, 1, 1, TINY.block_size)
        expected = again.read(ids, None, None)[0, -1]
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [None, "fp16", "int8"])
def test_the_first_text_is_as_the_next_ones(library, pair, scheme, monkeypatch):
    """int8 is prepared at once: a change from PyTorch's rounding to C's may change a word."""
    monkeypatch.setattr(prepared, "PAYS_AFTER", 16)
    for seed in range(6):
        model = pack(deepcopy(pair[0]), scheme)
        options = {"max_new_tokens": 25, "do_sample": True, "seed": seed, "eos_token_id": None}
        first, second = (generate(model, prompts(1, 5), **options).sequences for _ in range(2))
        assert torch.equal(first, second)


# ---- the file


def test_a_library_of_someone_else_is_not_opened(compiled, tmp_path, monkeypatch):
    copied = tmp_path / "blocks.so"
    copied.write_bytes(compiled.read_bytes())
    link = tmp_path / "link.so"
    link.symlink_to(copied)
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(compiled.read_bytes()[:900])
    damaged.chmod(0o700)
    opened = []
    for path, mode in ((copied, 0o700), (copied, 0o770), (copied, 0o707), (link, 0o700)):
        copied.chmod(mode)
        monkeypatch.setattr(native, "library_path", lambda path=path: path)
        native.library.cache_clear()
        opened.append(native.library() is not None)
    assert opened == [True, False, False, False]
    copied.chmod(0o700)
    for path in (damaged, tmp_path / "missing.so"):
        monkeypatch.setattr(native, "library_path", lambda path=path: path)
        native.library.cache_clear()
        assert native.library() is None
    monkeypatch.setattr(native, "library_path", lambda: copied)
    monkeypatch.setattr(os, "getuid", lambda: copied.stat().st_uid + 1)
    native.library.cache_clear()
    assert native.library() is None
    native.library.cache_clear()


def test_torchs_openmp_among_files_of_any_name(tmp_path, monkeypatch):
    """Its own, even where another package's comes first and a model's folder is no UTF-8."""
    maps = tmp_path / "maps"
    monkeypatch.setattr(native, "MAPS", maps)
    monkeypatch.setattr(native.torch, "__file__", "/my venv/torch/__init__.py")
    line = b"7f00-7f01 r-xp 00001000 fe:01 1234                       "
    names = [b"/m\xe8re/model", b"/my venv/learn/libgomp-a.so", b"/my venv/torch/lib/libgomp.so.1"]
    maps.write_bytes(b"".join(line + name + b"\n" for name in [b"", *names]))
    assert native._openmp() == ("/my venv/torch/lib/libgomp.so.1",)
    maps.write_bytes(line + b"/m\xe8re/libgomp.so.1\n")
    assert native._openmp() == ("/m\udce8re/libgomp.so.1",)
    assert native.library_path().parent == native.cache_folder()


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no C compiler found"):
        native.compile_library()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: it is raining' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match="the C compiler failed: cc: it is raining"):
        native.compile_library()
    assert not list(native.cache_folder().glob("*"))


def test_nothing_is_compiled_unasked(pair):
    native.library.cache_clear()
    generate(pair[0], prompts(1, 5), max_new_tokens=20, eos_token_id=None)
    assert not uses_blocks(pair[0]) and not native.cache_folder().exists()
