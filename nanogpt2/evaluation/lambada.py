"""LAMBADA: predict the last word of a passage that needs the whole passage to be understood.

The file is OpenAI's variant ("lambada_openai"): one {"text": ...} a line, with GPT-2's natural
spelling and line breaks kept rather than LAMBADA's tokenised lower case. The context is everything
before the last space; the target is the space and the last word.

    accuracy             fraction of passages in which every token of the word is the model's
                         likeliest; the evaluation harness's acc
    accuracy_filtered    the same, with stop words (those of STOP_WORDS that are one token) excluded
                         at the first token. Nearer to the GPT-2 paper, which names such a filter
                         but never published its list, so the figures are not strictly comparable
    perplexity           exp of the mean over passages of -log p(word); the same as in the harness,
                         and taken to be the paper's definition
    token_perplexity     exp of the same nats divided by the number of the words' tokens; lower,
                         because many words have several tokens

Sources: Paperno et al. 2016; Radford et al. 2019, section 3.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanogpt2.data.records import Record, excerpt
from nanogpt2.evaluation.continuations import Continuation, score
from nanogpt2.evaluation.perplexity import ignore_progress
from nanogpt2.metrics import perplexity
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer

# frequent words that hardly ever end a passage
STOP_WORDS = (
    "a an the this that these those my your his her its our their and or but nor so yet as if than "
    "then of in on at by for from to with without into onto over under about up down out off not "
    "no very too just all some any each is am are was were be been being do does did has have had "
    "will would can could shall should may might must i you he she it we they me him us them who "
    "which what when where how why there here one"
)


@dataclass(frozen=True)
class Lambada:
    """Results on the last words, defined in the file's docstring."""

    examples: int
    accuracy: float
    accuracy_filtered: float
    perplexity: float
    token_perplexity: float


def read_lambada(records: Sequence[Record], tokenizer: Tokenizer) -> list[Continuation]:
    """Split each passage before its last word. Raises ValueError for fewer than two words."""
    found = []
    for record in records:
        text = record.text("text").rstrip()
        context, space, word = text.rpartition(" ")
        if not context.strip():
            raise ValueError(f"{record.where} must hold two words or more, not {excerpt(text)}")
        found.append(Continuation(tokenizer.encode(context), tokenizer.encode(space + word)))
    return found


def measure_lambada(
    model: GPT,
    tokenizer: Tokenizer,
    passages: list[Continuation],
    batch_size: int,
    block_size: int,
    advance: Callable[[int], object] = ignore_progress,
) -> Lambada:
    """Score the last words."""
    stops = [tokenizer.encode(" " + word) for word in STOP_WORDS.split()]
    banned = [ids[0] for ids in stops if len(ids) == 1]
    scores = score(model, passages, batch_size, block_size, banned, advance)
    count, nats = len(scores), -sum(s.log_probability for s in scores)
    return Lambada(
        examples=count,
        accuracy=sum(s.greedy for s in scores) / count,
        accuracy_filtered=sum(s.greedy_allowed for s in scores) / count,
        perplexity=perplexity(nats / count),
        token_perplexity=perplexity(nats / sum(len(p.target) for p in passages)),
    )
