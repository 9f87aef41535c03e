"""generate(): from a prompt to its continuations, with transformers' options and results.

Start with plain.py: greedy decoding and sampling in 25 lines. This package adds the options:

- request.py checks the prompt and the options.
- engine.py scores the next token; decoder.py runs the model for it.
- processors.py changes the scores.
- sampling.py or beam.py chooses tokens, with random numbers from noise.py.
- stopping.py ends a text.
- replay.py does all of this in one CUDA graph a token, where there is a GPU.

lookup.py reads several tokens at once. search/contrastive.py replaces sampling.py; diverse.py,
constrained.py and stochastic.py in search/ replace beam.py. No file here knows training.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from nanogpt2.config import GenerationConfig
from nanogpt2.devices import as_usual
from nanogpt2.generation import replay
from nanogpt2.generation.beam import Beams, beam_search, best
from nanogpt2.generation.engine import check_memory
from nanogpt2.generation.request import (
    PrefixAllowedTokens,
    Processor,
    Request,
    StoppingCriterion,
    encode_prompts,
    prepare,
)
from nanogpt2.generation.sampling import Step, decode
from nanogpt2.generation.search.constrained import constrained_search
from nanogpt2.generation.search.contrastive import contrastive_search
from nanogpt2.generation.search.diverse import diverse_search
from nanogpt2.generation.search.stochastic import stochastic_search
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


class Streamer(Protocol):
    """Receives tokens while they are chosen, as transformers' streamers do."""

    def put(self, value: Tensor) -> object:
        """Take the prompts, int64 (N, T), then each step's tokens, int64 (N,), on the CPU."""

    def end(self) -> object:
        """Take note that the last token was put."""


@dataclass(frozen=True, repr=False)
class GenerationOutput:
    """The result of generate(). N = B * num_return_sequences, the texts of a prompt side by side.

    sequences: int64 (N, T), prompts included, on the prompts' device; rows that ended earlier are
    padded on the right. sequences_scores: float32 (N,) for beams, else None. scores: with
    output_scores, the processed scores of every step, each float32 (rows, V). beam_indices: with
    output_scores and beams, int32 (N, new), the row that got each new token, -1 past the end.
    texts: where the prompts were texts, the N texts, prompts included, without the end token.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    texts: tuple[str, ...] | None = None

    @override
    def __repr__(self) -> str:
        rows, length = self.sequences.shape
        shown = "" if self.texts is None else f": {', '.join(map(repr, self.texts))}"
        return f"GenerationOutput({rows} of {length} tokens{shown})"

    def _repr_html_(self) -> str:
        """Show the texts, or the ids, in a notebook."""
        rows = self.texts or [" ".join(map(str, row)) for row in self.sequences.tolist()]
        style = "white-space: pre-wrap; border-left: 3px solid; padding-left: 0.6em"
        return "".join(f'<p style="{style}">{escape(row)}</p>' for row in rows)


def generate(
    model: GPT,
    input_ids: Tensor | str | Sequence[str],
    attention_mask: Tensor | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    logits_processor: Sequence[Processor] | None = None,
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] | None = None,
    streamer: Streamer | None = None,
    generation_config: Any = None,
    **options: Any,
) -> GenerationOutput:
    """Continue prompts, token for token as transformers' `generate` does.

    input_ids: whole numbers (B, T), left-padded where lengths differ; T = 0 starts from the model's
    bos_token_id. With `tokenizer`, a text or several texts; the result then has texts too.
    attention_mask: (B, T), 0 at padding; None infers it as transformers does.
    tokenizer: needed by texts and stop_strings. logits_processor: your functions of (ids, scores).
    prefix_allowed_tokens_fn: (the prompt's number, ids so far) -> the ids allowed next.
    stopping_criteria: functions of (ids, scores of the steps with output_scores, else None); a row
    ends where one returns True. streamer: not with beams. options: the fields of GenerationConfig;
    they win over generation_config, ours or any dict or object with these fields, which wins over
    the model's generation_config.json.

    The model runs in eval mode, in its own dtype and on its own device, whatever autocast, default
    dtype and default device the caller has set; all of these stay as they were. Draws come from
    torch's global generator, or from a generator seeded with `seed`. Both give transformers' tokens
    for the same seed.
    Raises ValueError for an unusable prompt or value, TypeError for an unknown option,
    FloatingPointError for a model whose scores are not finite.
    """
    device = model.wte.weight.device
    criteria = (stopping_criteria,) if callable(stopping_criteria) else stopping_criteria
    with as_usual(device):
        if isinstance(input_ids, Tensor):
            ids, mask = input_ids, attention_mask
        else:
            ids, mask = encode_prompts(input_ids, attention_mask, tokenizer)
        request = prepare(
            model.config,
            device,
            GenerationConfig.of(model.generation_options, generation_config, options),
            ids,
            mask,
            tokenizer,
            tuple(logits_processor or ()),
            prefix_allowed_tokens_fn,
            tuple(criteria or ()),
        )
        check_memory(model, request)
        if request.config.num_beams == 1:
            output = _run_rows(model, request, ids.device, streamer)
        elif streamer is not None:
            raise ValueError("streamer must be left out with num_beams > 1")
        else:
            output = _run_beams(model, request, ids.device)
    if isinstance(input_ids, Tensor):
        return output
    return replace(output, texts=_texts(request, ids.size(1), output.sequences))


def _texts(request: Request, length: int, sequences: Tensor) -> tuple[str, ...]:
    """Decode rows, int64 (N, T), without padding and without the token that ended each.

    length: of the prompts in tokens; 0 where the model's bos_token_id stands for them.
    """
    assert request.tokenizer is not None
    rows_each = len(sequences) // len(request.mask)
    ends = {*request.eos.tolist(), request.pad}
    found = []
    for i, row in enumerate(sequences.tolist()):
        mask = request.mask[i // rows_each, :length].tolist()
        prompt = [token for token, is_read in zip(row, mask, strict=False) if is_read]
        new = row[request.prompt_length :]
        cut = next((n for n, token in enumerate(new) if token in ends), len(new))
        found.append(request.tokenizer.decode(prompt + new[:cut]))
    return tuple(found)


def steps(model: GPT, request: Request) -> Iterator[Step]:
    """Decode row by row: contrastive search, greedy decoding or sampling."""
    if replay.left_out(model, request) == []:
        return replay.decode(model, request)
    contrastive = request.config.penalty_alpha is not None
    return contrastive_search(model, request) if contrastive else decode(model, request)


def search(model: GPT, request: Request, every: int = replay.EVERY) -> Iterator[Beams]:
    """Decode with beams, by the search that the request names.

    every: at most so many tokens from one state to the next; only CUDA graphs take several.
    """
    config = request.config
    if replay.left_out(model, request) == []:
        return replay.beam_search(model, request, every)
    if config.num_beam_groups > 1:
        return diverse_search(model, request)
    if config.force_words_ids is not None:
        return constrained_search(model, request)
    if config.stochastic_beams:
        return stochastic_search(model, request)
    return beam_search(model, request)


def _run_rows(
    model: GPT, request: Request, device: torch.device, streamer: Streamer | None
) -> GenerationOutput:
    put: Callable[[Tensor], object] = streamer.put if streamer is not None else lambda _: None
    columns = [request.ids.repeat_interleave(request.rows, dim=0).cpu()]
    scores = []
    put(columns[0])
    for step in steps(model, request):
        tokens = step.tokens.cpu()
        put(tokens)
        columns.append(tokens[:, None])
        if request.config.output_scores:
            scores.append(step.scores)
    if streamer is not None:
        streamer.end()
    sequences = torch.cat(columns, dim=1).to(device)
    return GenerationOutput(sequences, scores=tuple(scores) or None)


def _run_beams(model: GPT, request: Request, device: torch.device) -> GenerationOutput:
    *_, beams = search(model, request)
    texts = best(request, beams)
    asked = request.config.output_scores
    return GenerationOutput(
        sequences=texts.ids.flatten(0, 1).to(device),
        sequences_scores=texts.scores.flatten().to(device),
        scores=tuple(beams.scores) if asked else None,
        beam_indices=texts.beams.flatten(0, 1).to(device) if asked else None,
    )
