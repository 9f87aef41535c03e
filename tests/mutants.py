"""Does the suite see mistakes? Make some, one at a time, and name the test that fails.

    python tests/mutants.py [LOG.md] [--only WORD] [--jobs N]

A mutant is an exact-string patch to one shipped file. It is applied to a temporary copy of the
repository, never in place, and the tests that ought to see it are run there until one fails. Exits
with 1 where a mutant survives, or where a patch no longer applies: then the mutant is to be
rewritten, or the suite strengthened. A patch that changes no result is no mutant.

Not collected by pytest: it takes minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("nanogpt2", "kernels", "tests", "benchmarks", "pyproject.toml", "train.py", "sample.py")
SECONDS = 300
PROCESSORS, GENERATION = "test_processors.py", "test_generation.py"
KERNELS = "test_kernels_in_use.py"
PARITY, STOPPING, NOISE = "test_parity.py", "test_stopping.py", "test_noise.py"
DECODER, PACKED, MAPPED = "test_decoder.py", "test_prepacked.py", "test_load_generator.py"
KILLS = "test_kills.py::test_the_store_loses_nothing"
DISK = "test_checkpoint.py::test_what_must_be_on_the_disk_before_what"
ORDER = "test_checkpoint.py::test_the_order_of_a_commit"
RESUMED = "test_trainer.py::test_twenty_stops_change_no_bit"
AVERAGED = "test_trainer.py::test_stops_change_no_bit_of_what_else_there_is"
UNDONE = "test_kills.py::test_what_the_last_commit_left_undone_is_done_on_resuming"


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in the file, becomes `new`; these tests must see it.

    tests: files, or single tests where one was written for just this mistake.
    """

    what: str
    old: str
    new: str
    tests: tuple[str, ...] = (PARITY,)


MUTANTS: dict[str, list[Mutant]] = {
    "generation/processors.py": [
        Mutant(
            "order: the first preference is applied last",
            "    return chain\n\n\ndef _warpers",
            "    return chain[1:] + chain[:1]\n\n\ndef _warpers",
            ("test_processors.py::test_the_order_is_transformers",),
        ),
        Mutant(
            "order: temperature after top_k and top_p",
            "    return chain\n\n\n# ---- preferences",
            '    return sorted(chain, key=lambda item: item[0] == "temperature")'
            "\n\n\n# ---- preferences",
            ("test_processors.py::test_the_order_is_transformers",),
        ),
        Mutant(
            "order: the user's processors before all others",
            '    chain += [("logits_processor", processor) for',
            '    chain[:0] = [("logits_processor", processor) for',
            ("test_processors.py::test_the_order_is_transformers",),
        ),
        Mutant(
            "penalty: left pads count",
            "    ids = ids.where(seen, ids[:, -1:])\n",
            "",
            ("test_parity.py::test_the_penalty_of_padded_prompts",),
        ),
        Mutant(
            "penalty: once per occurrence",
            "    return scores.scatter(1, ids, "
            "torch.where(score < 0, score * penalty, score / penalty))",
            "    factor = torch.ones_like(scores)\n"
            "    factor = factor.scatter_reduce(1, ids, torch.full_like(score, penalty), 'prod')\n"
            "    return torch.where(scores < 0, scores * factor, scores / factor)",
            ("test_processors.py::test_repetition_penalty",),
        ),
        Mutant(
            "penalty: negative scores divided too",
            "torch.where(score < 0, score * penalty, score / penalty)",
            "score / penalty",
            ("test_processors.py::test_repetition_penalty",),
        ),
        Mutant(
            "n-gram ban: one token too late",
            "    if ids.size(1) < n:",
            "    if ids.size(1) <= n:",
            ("test_processors.py::test_no_ngram_is_banned_before_there_is_one",),
        ),
        Mutant(
            "n-gram ban: the first token of the n-gram",
            "scores.index_put((row, ngrams[row, start, -1])",
            "scores.index_put((row, ngrams[row, start, 0])",
            ("test_processors.py::test_no_repeated_ngrams",),
        ),
        Mutant(
            "n-gram ban: the last n-gram is not counted",
            "start = (ngrams[:, :, :-1] == prefix).all(dim=2).nonzero(as_tuple=True)",
            "start = (ngrams[:, :-1, :-1] == prefix).all(dim=2).nonzero(as_tuple=True)",
            ("test_processors.py::test_no_repeated_ngrams",),
        ),
        Mutant(
            "min_new_tokens: counts the prompt",
            "length=T + c.min_new_tokens",
            "length=c.min_new_tokens",
            ("test_parity.py::test_least_new_tokens",),
        ),
        Mutant(
            "min_length: leaves the prompt out",
            "length=c.min_length, tokens=eos",
            "length=T + c.min_length, tokens=eos",
            ("test_parity.py::test_least_new_tokens",),
        ),
        Mutant(
            "min_length: wins over min_new_tokens",
            "    if c.min_new_tokens is not None:",
            "    if c.min_new_tokens is not None and c.min_length == 0:",
            ("test_processors.py::test_min_new_tokens_counts_from_the_prompts_end",),
        ),
        Mutant(
            "forced_eos: one step late",
            "length=request.max_length - 1",
            "length=request.max_length",
            ("test_parity.py::test_forced_tokens",),
        ),
        Mutant(
            "forced_bos: after any prompt",
            "partial(force_at, length=1, tokens=bos)",
            "partial(force_at, length=T, tokens=bos)",
        ),
        Mutant(
            "decay: off by one",
            "(factor**past - 1 if",
            "(factor ** (past - 1) - 1 if",
            ("test_parity.py::test_the_end_grows_likelier",),
        ),
        Mutant(
            "decay: starts within the prompt",
            "start=T + start",
            "start=start",
            ("test_parity.py::test_the_end_grows_likelier",),
        ),
        Mutant(
            "begin_suppress: a forced first token is the beginning",
            "begin = T + 1 if T == 1 and c.forced_bos_token_id is not None else T",
            "begin = T",
            ("test_processors.py::test_where_a_text_begins",),
        ),
        Mutant(
            "bad words: an end token is banned",
            "biases = {tuple(word): -INF for word in words if word not in ends}",
            "biases = {tuple(word): -INF for word in words}",
            ("test_processors.py::test_bad_words",),
        ),
        Mutant(
            "sequence bias: a prefix anywhere in the row",
            "matches = (ids[:, None, -length:] == prefixes).all(dim=2)",
            "matches = (ids.unfold(1, length, 1)[:, :, None] == prefixes).all(dim=3).any(dim=1)",
            ("test_processors.py::test_sequence_bias",),
        ),
        Mutant(
            "prefix_allowed_tokens_fn: sampled rows numbered by themselves",
            "fn=request.prefix_allowed_tokens, rows=rows",
            "fn=request.prefix_allowed_tokens, rows=rows if c.num_beams > 1 else 1",
        ),
        Mutant(
            "top_k: ties dropped",
            "    kth = scores.topk(min(k, scores.size(1)), dim=1).values[:, -1:]  # (N, 1)\n"
            "    return scores.masked_fill(scores < kth, -INF)",
            "    best = scores.topk(min(k, scores.size(1)), dim=1)\n"
            "    return torch.full_like(scores, -INF).scatter(1, best.indices, best.values)",
            (PROCESSORS,),
        ),
        Mutant(
            "top_p: one token too few",
            "banned = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - p",
            "p_up = ascending.softmax(dim=1)\n    banned = p_up.cumsum(dim=1) - p_up <= 1 - p",
            ("test_processors.py",),
        ),
        Mutant(
            "top_p: one too many where the mass is exact",
            "cumsum(dim=1) <= 1 - p",
            "cumsum(dim=1) < 1 - p",
            (PROCESSORS,),
        ),
        Mutant(
            "top_p: beams keep one token only",
            "    banned[:, -keep:] = False",
            "    banned[:, -1:] = False",
            ("test_processors.py::test_beams_keep_a_token_beside_the_ends",),
        ),
        Mutant(
            "top_k: beams keep k tokens only",
            "k=max(c.top_k, keep)",
            "k=c.top_k",
            ("test_processors.py::test_beams_keep_a_token_beside_the_ends",),
        ),
        Mutant(
            "beams keep one token where nothing ends a text",
            "max(1, len(request.eos)) + 1 if",
            "len(request.eos) + 1 if",
            ("test_processors.py::test_beams_keep_a_token_beside_the_ends",),
        ),
        Mutant(
            "min_p: absolute, not relative to the best",
            "probabilities < p * probabilities.amax(dim=1, keepdim=True)",
            "probabilities < p",
            ("test_processors.py",),
        ),
        Mutant(
            "typical_p: the most surprising tokens",
            "distance, order = (-logp - entropy).abs().sort(dim=1)",
            "distance, order = (-logp).sort(dim=1)",
            ("test_processors.py",),
        ),
        Mutant(
            "typical_p: the token that reaches the mass is dropped",
            "banned = distance > distance.gather(1, last)",
            "banned = distance >= distance.gather(1, last)",
            ("test_processors.py",),
        ),
        Mutant(
            "eta: the larger bound",
            "torch.minimum(most, most.sqrt()",
            "torch.maximum(most, most.sqrt()",
            ("test_processors.py",),
        ),
        Mutant(
            "top_h: entropy of 50 tokens",
            "scores.topk(min(100, scores.size(1)), dim=1)",
            "scores.topk(min(50, scores.size(1)), dim=1)",
            ("test_processors.py",),
        ),
        Mutant(
            "renormalisation left out",
            "    if request.config.renormalize_logits:",
            "    if False:",
        ),
        Mutant(
            "top_p at once: two that are alike are not looked for",
            "    if (best.values.gather(1, last) == best.values.gather(1, last - 1)).any():\n"
            "        return None\n",
            "",
            (PROCESSORS,),
        ),
        Mutant(
            "top_p at once: `keep` forgotten",
            "(tails > 1 - p).sum(dim=1, keepdim=True).clamp(min=keep)",
            "(tails > 1 - p).sum(dim=1, keepdim=True).clamp(min=1)",
            (PROCESSORS,),
        ),
        Mutant(
            "top_p at once: what lies outside is not counted",
            "rest + masses.flip(1)",
            "masses.flip(1)",
            (PROCESSORS,),
        ),
    ],
    "generation/beam.py": [
        Mutant(
            "beam sampling: candidates in draw order",
            "        places = drawn.gather(1, order)\n",
            "        places = drawn\n",
        ),
        Mutant(
            "equal scores: whichever text comes first",
            "if (values[:, 1:] < values[:, :-1]).all():",
            "if True:",
            ("test_generation.py::test_the_largest_are_those_of_topk",),
        ),
        Mutant(
            "equal scores: the one left out may equal the last",
            "more = min(N + 1, V)",
            "more = min(N, V)",
            ("test_generation.py::test_the_largest_are_those_of_topk",),
        ),
        Mutant(
            "K candidates",
            "return max(2, 1 + len(request.eos)) * running.scores.size(1)",
            "return running.scores.size(1)",
            ("test_parity.py::test_end_tokens_crowd_the_top",),
        ),
        Mutant(
            "2 K candidates for any number of ends",
            "max(2, 1 + len(request.eos))",
            "2",
            ("test_parity.py::test_end_tokens_crowd_the_top",),
        ),
        Mutant(
            "all N candidates may finish",
            "    now[:, K:] = False\n",
            "",
            ("test_parity.py::test_an_end_outside_the_first_candidates_is_dropped",),
        ),
        Mutant(
            "early_stopping: False takes True's place at the finished places",
            "& (config.early_stopping is True)",
            "& (config.early_stopping is False)",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "early_stopping: True does not end the search",
            "full = config.early_stopping is True and",
            "full = config.early_stopping is None and",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "early_stopping: False and never swapped",
            'config.early_stopping == "never" and',
            "config.early_stopping is False and",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "early_stopping: never hopes for length where length costs",
            " and config.length_penalty > 0:",
            ":",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "length penalty: the prompt counts",
            "    length = candidates.ids.size(2) - request.prompt_length\n    now",
            "    length = candidates.ids.size(2)\n    now",
            ("test_parity.py::test_the_length_penalty_leaves_the_prompt_out",),
        ),
        Mutant(
            "length penalty: the end token does not count",
            "    length = candidates.ids.size(2) - request.prompt_length\n    now",
            "    length = max(1, candidates.ids.size(2) - request.prompt_length - 1)\n    now",
            ("test_parity.py::test_a_score_is_the_sum_divided_by_the_length",),
        ),
        Mutant(
            "length penalty: multiplies",
            "candidates.scores / length**config.length_penalty",
            "candidates.scores * length**config.length_penalty",
            ("test_parity.py::test_a_score_is_the_sum_divided_by_the_length",),
        ),
        Mutant(
            "hope: the prompt counts",
            "    length = candidates.ids.size(2) - request.prompt_length\n    if",
            "    length = candidates.ids.size(2)\n    if",
            ("test_parity.py::test_the_length_penalty_leaves_the_prompt_out",),
        ),
        Mutant(
            "hope: not latched",
            "beams.improvable = beams.improvable & (best_possible",
            "beams.improvable = (best_possible",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "hope: lost items still finish",
            "for barred in (full, ~beams.improvable, ~now):",
            "for barred in (full, ~now):",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "hope: the best finished text is the bar",
            "beams.finished.scores.amin(dim=1, keepdim=True)",
            "beams.finished.scores.amax(dim=1, keepdim=True)",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "hope: one lost item ends all",
            "not beams.improvable.any()",
            "not beams.improvable.all()",
            ("test_parity.py::test_early_stopping",),
        ),
        Mutant(
            "filler: a pad of 0 stays",
            "request.pad or int(request.eos[0])",
            "request.pad if request.pad is not None else int(request.eos[0])",
            ("test_parity.py::test_fillers",),
        ),
        Mutant(
            "filler: 0 where nothing ends", "        return -1", "        return 0", (STOPPING,)
        ),
        Mutant(
            "cache not reordered",
            "                engine.reorder(parents)",
            "                pass",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "cache reordered within the first prompt only",
            "    rows = torch.arange(beams.running.scores.numel(), device=request.ids.device)"
            ".view(-1, K)\n",
            "    rows = torch.arange(K, device=request.ids.device).expand(len(request.ids), K)\n",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "scores accumulated without processing",
            "            for process in chain:\n                scores = process(ids, scores)\n",
            "            raw = scores\n"
            "            for process in chain:\n"
            "                scores = raw.masked_fill(process(ids, scores).isneginf(), -1e30)\n",
        ),
        Mutant(
            "logits, not log-probabilities",
            ".next_scores(ids).log_softmax(dim=1)",
            ".next_scores(ids)",
        ),
        Mutant(
            "renormalised after the processors",
            "            if config.output_scores:",
            "            scores = scores.log_softmax(dim=1)\n            if config.output_scores:",
        ),
        Mutant(
            "drawn candidates sorted by score",
            "        places = noise.draw(total.softmax(dim=1), N, step)  # (B, N)\n",
            "        places = noise.draw(total.softmax(dim=1), N, step)  # (B, N)\n"
            "        order = total.gather(1, places).argsort(dim=1, descending=True)\n"
            "        places = places.gather(1, order)\n",
        ),
        Mutant(
            "all beams start alike",
            "first[:, 0] = 0.0",
            "first[:] = 0.0",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "ended texts run on",
            "scores = candidates.scores + ended * OUT",
            "scores = candidates.scores + 0.0",
        ),
        Mutant(
            "the counter's step counts the prompt",
            "step = running.ids.size(2) - request.prompt_length",
            "step = running.ids.size(2)",
            (NOISE,),
        ),
    ],
    "generation/sampling.py": [
        Mutant(
            "rows that ended do not draw",
            "            tokens, scores = choose(ids, engine.next_scores(ids), step)",
            "            scores = engine.next_scores(ids)\n"
            "            drawn, kept = choose(ids[running], scores[running], step)\n"
            "            tokens = filler.repeat(len(ids))\n"
            "            tokens[running], scores[running] = drawn, kept",
            ("test_parity.py::test_rows_that_ended_go_on_drawing",),
        ),
        Mutant(
            "rows that ended write on",
            "            tokens = tokens.where(running, filler)\n",
            "",
            ("test_parity.py::test_fillers",),
        ),
        Mutant(
            "filler: a pad of 0 becomes the end token",
            "    if request.pad is not None:",
            "    if request.pad:",
            ("test_parity.py::test_fillers",),
        ),
        Mutant(
            "temperature applied twice",
            "noise.draw(scores.softmax(dim=1), 1, step)",
            "noise.draw((scores / config.temperature).softmax(dim=1), 1, step)",
        ),
        Mutant(
            "counter: a sample's noise depends on its place in the batch",
            "samples.repeat(len(request.ids))",
            "torch.arange(len(request.ids) * len(samples)) + config.first_sample",
            (NOISE,),
        ),
        Mutant(
            "counter: first_sample ignored",
            "config.first_sample, config.first_sample + request.rows",
            "0, request.rows",
            (NOISE,),
        ),
        Mutant(
            "counter: the step counts the prompt",
            "step = ids.size(1) - request.prompt_length",
            "step = ids.size(1)",
            (NOISE,),
        ),
        Mutant(
            "kernels: the draw is not fused",
            'model.kernels == "triton" and',
            "False and",
            (f"{KERNELS}::test_generate",),
        ),
        Mutant(
            "kernels: a chain is fused that does more",
            "{name for name, _ in chain} <= FUSED",
            "bool(FUSED)",
            (f"{KERNELS}::test_generate",),
        ),
        Mutant(
            "kernels: a token is made up where none is possible",
            "if (tokens < 0).any():",
            "if False:",
            (f"{KERNELS}::test_nothing_left_to_draw",),
        ),
        *(
            Mutant(
                f"kernels: the fused draw without {name}",
                f"{name}=config.{name}",
                f"{name}={off}",
                (f"{KERNELS}::test_generate",),
            )
            for name, off in (
                ("no_repeat_ngram_size", "0"),
                ("temperature", "1.0 or config.temperature"),
                ("top_k", "0 and config.top_k"),
            )
        ),
    ],
    "ops.py": [
        *(
            Mutant(
                f"kernels: PyTorch takes over: {room}",
                f'if kernels == "triton":\n        from nanogpt2.kernels import {room} as room',
                f"if not kernels:\n        from nanogpt2.kernels import {room} as room",
                (KERNELS,),
            )
            for room in ("layer_norm", "gelu", "softmax", "cross_entropy")
        ),
        Mutant(
            "kernels: PyTorch takes over: attention in training",
            'if kernels == "triton" and not isinstance(mask, Tensor):\n'
            "        from nanogpt2.kernels import attention as room\n\n        # in place",
            "if not kernels:\n"
            "        from nanogpt2.kernels import attention as room\n\n        # in place",
            (f"{KERNELS}::test_training",),
        ),
        Mutant(
            "kernels: no dropout in attention",
            '"dropout": dropout,\n        "deterministic"',
            '"dropout": 0.0,\n        "deterministic"',
            (f"{KERNELS}::test_dropout",),
        ),
        Mutant(
            "kernels: padding in training is seen",
            "start = None if mask is None else mask.start",
            "start = None",
            (f"{KERNELS}::test_left_padding",),
        ),
        Mutant(
            "kernels: padding of a prompt is seen",
            "room.attention(q, k, v, causal, start=seen.start, ",
            "room.attention(q, k, v, causal, ",
            (f"{KERNELS}::test_generate",),
        ),
        Mutant(
            "kernels: padding in the cache is seen",
            "start=start, ancestors=ancestors, trusted",
            "ancestors=ancestors, trusted",
            (f"{KERNELS}::test_generate",),
        ),
        Mutant(
            "kernels: beams forget whose keys are theirs",
            "start=start, ancestors=ancestors, trusted",
            "start=start, trusted",
            (f"{KERNELS}::test_generate",),
        ),
        Mutant(
            "kernels: many new tokens see what comes after them",
            "filled = lengths - (T - first - some.size(2))",
            "filled = lengths",
            (f"{KERNELS}::test_more_new_tokens_than_the_kernel_takes_at_once",),
        ),
        Mutant(
            "kernels: auto takes any heads",
            'if n_embd // n_head in HEAD_SIZES and n_embd <= MAX_COLUMNS:\n        return "triton"',
            'if asked == "auto" or n_embd // n_head in HEAD_SIZES:\n        return "triton"',
            (f"{KERNELS}::test_auto_goes_by_the_device_the_package_and_the_heads",),
        ),
        Mutant(
            "kernels: triton on a CPU without its interpreter",
            'if not (kind == "cuda" or (INTERPRETED and kind == "cpu")):',
            'if kind not in ("cuda", "cpu"):',
            (f"{KERNELS}::test_triton_without_a_gpu_is_wrong_use",),
        ),
    ],
    "model.py": [
        Mutant(
            "kernels: some parts are not told",
            "LayerNorm | CausalSelfAttention | MLP",
            "LayerNorm | CausalSelfAttention",
            (f"{KERNELS}::test_training",),
        ),
    ],
    "generation/decoder.py": [
        Mutant(
            "kernels: a mask with holes is taken for padding",
            "masked=not left_padded",
            "masked=False",
            (f"{KERNELS}::test_a_mask_with_holes_is_pytorchs",),
        ),
        Mutant(
            "kernels: rows start where they did before they slid",
            "if self.length == 0:\n                # the last token",
            "if self._cache.start is None:\n                # the last token",
            (f"{KERNELS}::test_a_long_text_slides",),
        ),
        Mutant(
            "cache reordered from the wrong position",
            "start=self._shared_length)",
            "start=self._shared_length + 1)",
            (DECODER,),
        ),
    ],
    "cpu/decoder.py": [
        Mutant(
            "the two parts of attention weigh the wrong way round",
            "(shared_lse - lse)",
            "(lse - shared_lse)",
            (DECODER,),
        ),
        Mutant(
            "keys where values belong",
            "qkv[0], qkv[1:]",
            "qkv[0], qkv[1:].flip(0)",
            (DECODER,),
        ),
        Mutant(
            "what rows have of their own is not reordered",
            "own[..., count:W, :].index_select(1, parents)",
            "own[..., count:W, :].clone()",
            (DECODER,),
        ),
        Mutant(
            "what becomes shared is always the first row's",
            "first = parents[:: self._rows]",
            "first = torch.arange(0, len(parents), self._rows)",
            (DECODER,),
        ),
        Mutant(
            "what is the same in one prompt is shared in all",
            ".all(dim=1).all(dim=0)",
            ".all(dim=1).any(dim=0)",
            (DECODER,),
        ),
        Mutant("nothing is ever shared again", "count = int((", "count = 0 * int((", (DECODER,)),
        Mutant(
            "descent is not followed",
            "        self._origin = self._origin[parents]\n",
            "",
            (DECODER,),
        ),
        Mutant(
            "more capacity, and nothing in it",
            "                self._own[n][..., :W, :] = own[..., :W, :]\n",
            "",
            (DECODER,),
        ),
        Mutant(
            "a prompt's padding is seen by what follows it",
            "shared_mask = None if mask is None else mask[:: self._rows, :, :, :S]",
            "shared_mask = None",
            (DECODER,),
        ),
        Mutant(
            "anew, with what was before",
            "        self._shared_length = self._own_length = 0\n"
            "        self._origin = self._origin[:, :0]\n",
            "        self._shared_length = 0\n",
            (DECODER,),
        ),
        Mutant(
            "adapters are not seen",
            ' and parameters == {"weight", "bias"}',
            "",
            (DECODER,),
        ),
        Mutant(
            "the MLP's output takes the place of the residual stream",
            "layer.mlp_c_proj.plus(layer.c_fc.gelu(layer.ln_2(x)), x)",
            "layer.mlp_c_proj(layer.c_fc.gelu(layer.ln_2(x)))",
            (f"{DECODER}::test_every_layer_is_model_pys",),
        ),
        Mutant(
            "several tokens see what comes after them",
            "dtype=torch.bool).tril(self.length)",
            "dtype=torch.bool)",
            (DECODER,),
        ),
    ],
    "generation/noise.py": [
        Mutant(
            "counter: every step draws alike",
            "_mix_int(self.seed)) + step)",
            "_mix_int(self.seed)))",
            (NOISE,),
        ),
        Mutant(
            "counter: every sample draws alike",
            "_mix(self.samples + ",
            "_mix(self.samples * 0 + ",
            (NOISE,),
        ),
        Mutant(
            "counter: uniform, not exponential", "return -uniform.log()", "return uniform", (NOISE,)
        ),
        Mutant(
            "few: noise of the wrong columns",
            "return few.best(lambda rows, columns: _exponential(uniform[rows, columns]), count)",
            "return few.best(lambda rows, columns: _exponential(uniform[rows, rows]), count)",
            (NOISE,),
        ),
        Mutant(
            "few: a row with too few draws what is impossible",
            " or int(counts.min()) < count",
            "",
            (NOISE,),
        ),
        Mutant(
            "few: what is no probability is drawn from",
            '    if not (low >= 0 and high < float("inf")):\n        return None\n',
            "",
            (NOISE,),
        ),
        Mutant(
            "few: float32's uniform variables, of another stream",
            "                probabilities.shape, dtype=torch.float64, generator",
            "                probabilities.shape, dtype=torch.float32, generator",
            (NOISE,),
        ),
        Mutant(
            "the stream's own seed ignored",
            "torch.multinomial(probabilities, count, generator=self._generator)",
            "torch.multinomial(probabilities, count)",
            (GENERATION,),
        ),
        Mutant(
            "the stream draws with replacement",
            "torch.multinomial(probabilities, count, generator",
            "torch.multinomial(probabilities, count, True, generator",
        ),
    ],
    "cpu/malloc.py": [
        Mutant(
            "what malloc holds free is kept",
            '    _call("malloc_trim", 0)\n',
            "",
            (MAPPED,),
        ),
        Mutant(
            "what is loaded is put among what is soon freed",
            '    _call("mallopt", M_MMAP_THRESHOLD, 2**17)\n',
            "",
            (MAPPED,),
        ),
    ],
    "cpu/inference_model.py": [
        Mutant(
            "the head left wide",
            "self.head = prepacked_linear_for(table, scale, None, self.scheme, after, release)",
            "self.head = prepacked_linear_for(table.float(), None, None, None, 0, None)",
            (PACKED,),
        ),
        Mutant(
            "rows of the embedding without their scale",
            "x = q * scale[:, None]",
            "x = q.float()",
            (PACKED,),
        ),
        Mutant(
            "rows of the embedding that are not narrowed",
            "x = to_fp16(rows).float()",
            "x = rows.float()",
            (MAPPED,),
        ),
        Mutant(
            "a head in a file that is not laid out",
            "after = PAYS_AFTER if release is not None and table.dtype == torch.float32 else 0",
            "after = 0",
            (MAPPED,),
        ),
        Mutant(
            "a head in memory that is laid out",
            "if release is not None and table.dtype == torch.float32 else 0",
            "if table.dtype == torch.float32 else 0",
            (MAPPED,),
        ),
        Mutant(
            "a loss that counts all", "(targets != -100).sum()", "targets.numel() / 2", (PACKED,)
        ),
    ],
    "cpu/prepacked.py": [
        Mutant(
            "int8: the middle left out",
            "low.add(d, alpha=self.middle)",
            "low",
            (PACKED,),
        ),
        Mutant(
            "int8: one range for all rows",
            "x.amin(dim=-1, keepdim=True)",
            "x.amin().expand(*x.shape[:-1], 1)",
            (PACKED,),
        ),
        Mutant(
            "int8: what is no number is forgotten",
            "return rows[..., :-8], d, x.amin(dim=-1, keepdim=True)",
            "return rows[..., :-8], d, rows[..., -4:].contiguous().view(torch.float32)",
            (PACKED,),
        ),
        Mutant(
            "int8: 7 bits cut, not rounded",
            "low + d / 2",
            "low",
            (PACKED,),
        ),
        Mutant(
            "int8: one scale for all outputs",
            "(largest / 127)",
            "(largest.amax().expand(len(largest)) / 127)",
            (PACKED,),
        ),
        Mutant(
            "int8: cut, not rounded",
            ".round_())\n    return q, scale",
            ")\n    return q, scale",
            (PACKED,),
        ),
        Mutant("the other GELU", 'approximate="tanh"', 'approximate="none"', (PACKED,)),
        Mutant(
            "laid out for a prompt as well",
            "if self._left > 0 and rows <= FEW_ROWS:",
            "if self._left > 0:",
            (PACKED,),
        ),
        Mutant(
            "never laid out",
            "            if self._left <= 0:\n",
            "            if False:\n",
            (PACKED,),
        ),
        Mutant(
            "fp16: the head's inputs filled up",
            'scheme == "fp16" and bias is None and',
            'scheme == "fp16" and False and',
            (PACKED,),
        ),
        Mutant(
            "fp16: the halves of the head's outputs change places",
            "[F.pad(last, (0, REST)), F.pad(last, (REST, 0))]",
            "[F.pad(last, (REST, 0)), F.pad(last, (0, REST))]",
            (PACKED,),
        ),
    ],
    "checkpoints/header.py": [
        Mutant(
            "ahead: whatever the file is by now",
            "return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns",
            "return state.st_dev, state.st_size",
            ("test_tensors.py",),
        ),
        Mutant(
            "ahead: whatever digest is asked for",
            "    _AHEAD[*_state(file), head] =",
            "    _AHEAD[*_state(file), b''] =",
            ("test_tensors.py",),
        ),
        Mutant(
            "ahead: once for all",
            "_AHEAD.pop((*_state(file), head), None)",
            "_AHEAD.get((*_state(file), head))",
            ("test_tensors.py",),
        ),
    ],
    "checkpoints/tensors.py": [
        Mutant(
            "mapped: from the data's start, not the file's",
            "start, size = len(head) + entry.start, entry.end - entry.start",
            "start, size = entry.start, entry.end - entry.start",
            ("test_tensors.py",),
        ),
        Mutant(
            "mapped: pages are not let go",
            "                self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)",
            "                pass",
            ("test_tensors.py",),
        ),
        Mutant(
            "mapped: damage is not found",
            "if digest is not None and digest.result() != sha256:",
            "if False:",
            (MAPPED,),
        ),
    ],
    "checkpoints/load.py": [
        Mutant(
            "what only generates is copied",
            "state = map_state(self._source, self._opened, self.tensors)",
            "state = read_state(self._source, self._opened, self.tensors, device, wanted)",
            (MAPPED,),
        ),
        Mutant(
            "what is trained is mapped",
            "generates and runs_prepacked(",
            "runs_prepacked(",
            ("test_weights.py",),
        ),
    ],
    "generation/engine.py": [
        Mutant(
            "positions count pads",
            "(keys.cumsum(1) - 1).clamp(min=0)",
            "(torch.ones_like(keys).cumsum(1) - 1)",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "mask without causality",
            "square.tril(S - T) & (keys[:, None, None, :] | itself)",
            "square & (keys[:, None, None, :] | itself)",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "mask without padding",
            "square.tril(S - T) & (keys[:, None, None, :] | itself)",
            "square.tril(S - T).expand(len(keys), 1, T, S)",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "a context that slid goes on from what was read",
            "        self.decoder.forget()\n",
            "",
            (GENERATION,),
        ),
        Mutant(
            "a context slides without making room",
            "length - block_size + min(max_length - length, block_size // 2)",
            "length - block_size",
            (GENERATION,),
        ),
        Mutant("eval mode not forced", "    model.eval()\n", "", (GENERATION,)),
        Mutant(
            "mode not restored",
            "            module.training = True",
            "            pass",
            (GENERATION,),
        ),
    ],
    "kv_cache.py": [
        Mutant(
            "only keys reordered",
            "for buffer in (self.k, self.v):",
            "for buffer in (self.k,):",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "prompts interleaved",
            "new[..., : self.length, :] = old[:, :, None, :, : self.length]\n"
            "            setattr(self, name, new.view(L, B * repeats, H, S, D))",
            "new[..., : self.length, :] = old[:, :, None, :, : self.length]\n"
            "            new = new.transpose(1, 2).contiguous()\n"
            "            setattr(self, name, new.view(L, B * repeats, H, S, D))",
            ("test_parity.py::test_a_long_search_with_padding_keeps_its_caches_apart",),
        ),
        Mutant(
            "kernels: a table outlives the texts it is of",
            "            self.ancestors = self._own_rows()\n            return",
            "            return",
            ("test_kv_cache.py",),
        ),
        Mutant(
            "kernels: the table is not reordered",
            "shared.copy_(shared[parents])",
            "shared.copy_(shared)",
            ("test_kv_cache.py",),
        ),
        Mutant(
            "kernels: rows forget where they start",
            "self.start = self.start.repeat_interleave(repeats)",
            "self.start = self.start.repeat(repeats)",
            ("test_kv_cache.py",),
        ),
    ],
    "generation/stopping.py": [
        Mutant(
            "stop strings at token ends only",
            "text.find(each, max(0, len(text) - last - len(each) + 1)) for each",
            "text.find(each, len(text) - len(each)) for each",
            (STOPPING,),
        ),
        Mutant(
            "stop strings in the prompt count",
            "max(0, len(text) - last - len(each) + 1)",
            "0",
            (STOPPING,),
        ),
        Mutant(
            "stop strings seen one byte late",
            "len(text) - last - len(each) + 1)",
            "len(text) - last - len(each) + 2)",
            (STOPPING,),
        ),
        Mutant(
            "stop strings looked for in too few tokens",
            "-self._longest - 1 :",
            "-self._longest + 1 :",
            (STOPPING,),
        ),
        Mutant(
            "stop strings may end with their first byte only",
            "last_bytes = {string[-1] for",
            "last_bytes = {string[0] for",
            (STOPPING,),
        ),
        Mutant(
            "only the first end token",
            "torch.isin(ids[:, -1], self._eos)",
            "torch.isin(ids[:, -1], self._eos[:1])",
            ("test_stopping.py::test_several_end_tokens",),
        ),
        Mutant(
            "one token too many",
            "length >= self._max_length",
            "length > self._max_length",
            ("test_stopping.py::test_each_condition_alone",),
        ),
        Mutant(
            "time: the limit itself is past",
            "time.monotonic() > self._deadline",
            "time.monotonic() >= self._deadline",
            (STOPPING,),
        ),
    ],
    "generation/request.py": [
        Mutant(
            "max_length leaves the prompt out",
            "    return config.max_length\n",
            "    return length + config.max_length\n",
            ("test_parity.py::test_max_length_counts_the_prompt",),
        ),
        Mutant(
            "a pad that ends texts marks padding",
            "if pad is not None and pad not in eos:",
            "if pad is not None:",
            (GENERATION,),
        ),
    ],
    "training/checkpoint.py": [
        Mutant(
            "rename first: committed before its files are on the disk",
            "    for file in partial.iterdir():\n        sync(file)\n    sync(partial)\n",
            "",
            (DISK,),
        ),
        Mutant(
            "no temporary folder: files written where readers look",
            'partial = final.with_suffix(".tmp")',
            "partial = final",
            (KILLS,),
        ),
        Mutant(
            "manifest first",
            "    entries = {file.name: _digest(file) for file in sorted(partial.iterdir())}\n",
            "    (partial / MANIFEST).touch()\n"
            "    entries = {file.name: _digest(file) for file in sorted(partial.iterdir())}\n",
            ("test_checkpoint.py::test_the_newest_whole_checkpoint_is_found",),
        ),
        Mutant(
            "a reader trusts any manifest",
            "all(_digest(path / name) == entry for name, entry in entries.items())",
            "True",
            ("test_checkpoint.py::test_damage_is_found_and_the_one_before_is_used",),
        ),
        Mutant(
            "published in place",
            "        sync(partial)\n        partial.replace(out / file.name)\n",
            "        sync(partial)\n        shutil.copyfile(partial, out / file.name)\n",
            (KILLS,),
        ),
        Mutant(
            "published over a name of an older checkpoint's file",
            "        partial.unlink(missing_ok=True)\n        # the weights are large",
            "        # the weights are large",
            (KILLS,),
        ),
        Mutant(
            "prune first",
            '    save_checkpoint(out / "checkpoints", model, tokenizer, tensors, state)\n',
            '    older = checkpoints(out / "checkpoints")\n'
            "    prune(older[-1], keep - 1) if older and keep > 1 else None\n"
            '    save_checkpoint(out / "checkpoints", model, tokenizer, tensors, state)\n',
            (KILLS,),
        ),
        Mutant(
            "prune before the best is marked",
            '    if state["is_best"]:\n        mark_best(saved)\n    publish(saved, out)\n'
            "    prune(saved, keep)\n",
            '    prune(saved, keep)\n    if state["is_best"]:\n        mark_best(saved)\n'
            "    publish(saved, out)\n",
            (KILLS,),
        ),
        Mutant(
            "the best link is away for a moment",
            '    partial.replace(path.parent / "best")\n',
            '    (path.parent / "best").unlink(missing_ok=True)\n'
            '    partial.replace(path.parent / "best")\n',
            (KILLS,),
        ),
        Mutant(
            "the best one is pruned",
            "        if path.resolve() != best:\n            shutil.rmtree(path)\n",
            "        shutil.rmtree(path)\n",
            ("test_checkpoint.py::test_pruning_keeps_the_newest_and_the_best",),
        ),
        Mutant(
            "damaged checkpoints count among the newest",
            "found[: found.index(saved) + 1][:-keep]",
            "found[:-keep]",
            ("test_checkpoint.py::test_damaged_checkpoints_after_the_saved_one_do_not_count",),
        ),
        Mutant(
            "killed saves are left",
            '    for path in folder.glob("step-*.tmp"):\n        shutil.rmtree(path)\n',
            "",
            ("test_checkpoint.py::test_pruning_keeps_the_newest_and_the_best",),
        ),
        Mutant("no fsync: the files", "        sync(file)\n", "        pass\n", (DISK,)),
        Mutant(
            "no fsync: the checkpoint's folder", "    sync(partial)\n    # a", "    # a", (DISK,)
        ),
        Mutant("no fsync: the rename", "    sync(folder)\n", "", (DISK, ORDER)),
        Mutant("no fsync: the best link", "    sync(path.parent)\n", "", (DISK, ORDER)),
        Mutant(
            "no fsync: the published manifest",
            "    sync(partial)\n    partial.replace(out / MANIFEST)",
            "    partial.replace(out / MANIFEST)",
            (DISK,),
        ),
        Mutant(
            "no fsync: the published files",
            "        sync(partial)\n        p",
            "        p",
            (DISK,),
        ),
        Mutant("no fsync: the run's folder", "    sync(out)\n", "", (DISK, ORDER)),
    ],
    "training/run_folder.py": [
        Mutant(
            "no lock",
            "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "pass",
            ("test_kills.py::test_a_lock_keeps_two_trainers_out_and_dies_with_its_holder",),
        ),
        Mutant(
            "a shared lock",
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            ("test_kills.py::test_a_lock_keeps_two_trainers_out_and_dies_with_its_holder",),
        ),
        Mutant(
            "no fsync: metrics.jsonl",
            "            os.fsync(self._metrics.fileno())\n",
            "",
            (DISK,),
        ),
        Mutant(
            "no fsync: metrics.jsonl's folder",
            "            sync(self.path)\n",
            "",
            (DISK,),
        ),
        Mutant("no fsync: replaced files", "        sync(partial)\n", "", (DISK,)),
        Mutant(
            "no fsync: the folder of replaced files",
            "        partial.replace(self.path / name)\n        sync(self.path)\n",
            "        partial.replace(self.path / name)\n",
            (DISK,),
        ),
        Mutant(
            "no fsync: the folder's own name",
            "        sync(self.path.absolute().parent)\n",
            "",
            (DISK,),
        ),
        Mutant(
            "metrics after the checkpoint are kept",
            ".splitlines()[:step]",
            ".splitlines()",
            ("test_run_folder.py::test_metrics_are_cut_to_the_step",),
        ),
        Mutant(
            "a resumed run may have other settings",
            "for name in set(config.given) - FREE_ON_RESUME:",
            "for name in ():",
            ("test_run_folder.py::test_resuming_takes_what_the_run_was_told",),
        ),
    ],
    "training/trainer.py": [
        Mutant(
            "resume: the optimizers start anew",
            "            optimizer.load_state_dict(described)\n",
            "",
            (RESUMED,),
        ),
        Mutant(
            "resume: the generator starts anew",
            '            torch.set_rng_state(states[f"cpu.{self.world.rank}"])\n',
            "            pass\n",
            (RESUMED,),
        ),
        Mutant(
            "resume: the average stands for the weights",
            "            module.load_state_dict(_under(prefix, tensors), strict=False)\n",
            "            pass\n",
            (AVERAGED,),
        ),
        Mutant(
            "resume: the average begins anew",
            "            self.average.n_averaged.fill_(1)\n",
            "",
            (AVERAGED,),
        ),
        Mutant(
            "gradients add up over the steps",
            "        self.drop_gradients()\n        if self.average is not None and apply",
            "        if self.average is not None and apply",
            ("test_train.py",),
        ),
    ],
    "train.py": [
        Mutant(
            "resume: the first sequences again",
            "    first = ((step - 1) * trainer.world.size + trainer.world.rank) * share\n",
            '    take_step.taken = taken = getattr(take_step, "taken", 0) + 1\n'
            "    first = ((taken - 1) * trainer.world.size + trainer.world.rank) * share\n",
            (RESUMED,),
        ),
        Mutant(
            "resume: the schedule begins anew",
            "    lr = learning_rate(step, config",
            '    take_step.taken = getattr(take_step, "taken", 0) + 1\n'
            "    lr = learning_rate(take_step.taken, config",
            (RESUMED,),
        ),
        Mutant(
            "resume: the best so far is forgotten",
            '        before = Snapshot(**folder.record()["before"])\n',
            '        before = Snapshot(**folder.record()["before"])\n'
            '        state["best"] = math.inf\n',
            ("test_trainer.py::test_the_best_is_remembered_over_a_stop",),
        ),
        Mutant(
            "resume: what the commit left undone stays so",
            "            store.settle(folder.path, state, config.keep)\n",
            "            pass\n",
            (UNDONE,),
        ),
        Mutant(
            "resume: the last commit ends a run, its report unwritten",
            ' and "after" in folder.record()',
            "",
            (UNDONE,),
        ),
        Mutant(
            "metrics.jsonl is not synced",
            "        run.folder.sync_metrics()\n",
            "",
            ("test_train.py::test_metrics_are_on_the_disk_before_the_checkpoint",),
        ),
    ],
}


def copy_repository(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, target / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, target / name)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run until the first failure: pytest's exit status and the test that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", *(f"tests/{name}" for name in tests)]
    # no bytecode: a patched file may be as old and as long as the one before it
    alone = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | alone, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no end within {SECONDS} s"
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout.strip()[-300:]


def verdict(file: str, mutant: Mutant) -> str:
    """The test that killed a mutant; SURVIVED, or why it says nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        path = folder / file if file == "train.py" else folder / "nanogpt2" / file
        source = path.read_text()
        if source.count(mutant.old) != 1:
            return f"DOES NOT APPLY: the text stands {source.count(mutant.old)} times in the file"
        path.write_text(source.replace(mutant.old, mutant.new))
        status, test = run_tests(folder, mutant.tests)
    if status == 0:
        return "SURVIVED"
    return f"`{test}`" if status == 1 else f"DOES NOT RUN: {test}"


def unmutated(tests: set[str]) -> None:
    """Exit where the tests fail without any mutation: then nothing below would mean a thing."""
    with tempfile.TemporaryDirectory() as name:
        copy_repository(Path(name))
        status, test = run_tests(Path(name), tuple(sorted(tests)))
    if status:
        sys.exit(f"error: the suite fails without a mutation: {test}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", nargs="?", type=Path, help="a Markdown file; default: stdout")
    parser.add_argument("--only", default="", help="the mutants whose file or text has this word")
    parser.add_argument("--jobs", type=int, default=2, help="mutants tested side by side")
    arguments = parser.parse_args()

    chosen = [
        (file, mutant)
        for file, mutants in MUTANTS.items()
        for mutant in mutants
        if arguments.only in f"{file} {mutant.what}"
    ]
    if not chosen:
        parser.exit(2, f"error: --only {arguments.only!r}: no mutant has this word\n")
    unmutated({test for _, mutant in chosen for test in mutant.tests})
    verdicts = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (file, mutant), found in zip(
            chosen, pool.map(lambda pair: verdict(*pair), chosen), strict=True
        ):
            verdicts.append(found)
            print(f"{file}: {mutant.what}: {found}", file=sys.stderr, flush=True)

    alive = [found for found in verdicts if not found.startswith("`")]
    lines = [
        "# Mutants",
        "",
        "Mistakes put into the shipped source on purpose, one at a time, and the first test that",
        "fails because of each. Written by `python tests/mutants.py benchmarks/mutants.md`.",
        "",
        f"{len(chosen)} mutants, {len(chosen) - len(alive)} killed.",
        "",
        "| file | mutation | killed by |",
        "|---|---|---|",
    ]
    for (file, mutant), found in zip(chosen, verdicts, strict=True):
        lines.append(f"| {file} | {mutant.what} | {found} |")
    text = "\n".join(lines) + "\n"
    if arguments.log:
        arguments.log.write_text(text)
    else:
        print(text, end="")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
