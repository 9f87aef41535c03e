"""Decoding: the options of generate(), with transformers' names, meanings and defaults.

This file does not know the command line; sample.py checks combinations of flags.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Any, ClassVar, Self, get_args

from nanogpt2.config.flags import MAX_SEED, check, flag, show
from nanogpt2.config.model import TokenIds

DEEPEST = 8  # levels of lists in an option's value; force_words_ids has 3
FROM_CHECKPOINT = -1  # the default eos_token_id: take the checkpoint's
# transformers' options that change a text and do not exist here
FOREIGN = (
    "constraints",
    "dola_layers",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "guidance_scale",
    "token_healing",
    "watermarking_config",
)
# transformers' options that change no text
WITHOUT_EFFECT = (
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
)


@dataclass(frozen=True)
class GenerationConfig:
    """The options of decoding: transformers' names, meanings and defaults."""

    GROUPS: ClassVar[dict[str, str]] = {
        "max_new_tokens": "length",
        "do_sample": "search",
        "temperature": "the distribution to draw from",
        "repetition_penalty": "preferred and banned tokens",
        "seed": "random numbers",
    }
    # length
    max_new_tokens: int | None = flag(None, "tokens to add; wins over max_length", low=1)
    max_length: int | None = flag(None, "tokens in all, the prompt included", low=1)
    min_length: int = flag(0, "no end before this many tokens, the prompt included", low=0)
    min_new_tokens: int | None = flag(None, "no end before this many new tokens", low=0)
    max_time: float | None = flag(None, "seconds after which to begin no new token", above=0)
    stop_strings: str | list[str] | None = flag(
        None, "texts that end a text; [ begins a list", json="a text, or a list of texts"
    )
    eos_token_id: TokenIds = flag(
        FROM_CHECKPOINT, "ids that end a text, as 1,2; none: never stop; -1: the model's", low=-1
    )
    pad_token_id: int | None = flag(None, "fills rows that ended", low=0)
    # search
    do_sample: bool = flag(False, "draw tokens at random instead of taking the likeliest")
    num_beams: int = flag(1, "texts to follow side by side; 1 is no beam search", low=1)
    early_stopping: bool | str = flag(
        False,
        "true: end with num_beams texts; never: only when none can improve",
        choices=("true", "false", "never"),
    )
    length_penalty: float = flag(
        1.0, "power of the length that divides a beam's score", low=-50, high=50
    )
    num_return_sequences: int = flag(1, "texts for each prompt", low=1)
    num_beam_groups: int = flag(
        1, "groups of beams; later groups avoid earlier groups' tokens", low=1
    )
    diversity_penalty: float = flag(
        0.0, "subtract from a token's score for each beam of an earlier group that chose it", low=0
    )
    force_words_ids: Any = flag(
        None,
        "tokens that the beams must write",
        json="a list of lists of token ids (all of them) or of lists of those (one of each)",
    )
    stochastic_beams: bool = flag(
        False, "draw num_beams different texts, likely ones first, instead of searching"
    )
    prompt_lookup_num_tokens: int | None = flag(
        None,
        "guess this many tokens from the text so far: the same single text, faster",
        low=1,
    )
    penalty_alpha: float | None = flag(
        None, "contrastive search: weight of the difference from the text so far", low=0, high=1
    )
    # the distribution to draw from
    temperature: float = flag(1.0, "flattens (> 1) or sharpens (< 1) the draw; 0 is greedy", low=0)
    top_h: float | None = flag(None, "keep this share of the entropy", above=0, high=1)
    top_k: int | None = flag(50, "draw among the k likeliest tokens; 0 is all", low=0)
    top_p: float = flag(
        1.0, "draw among the likeliest tokens of this total probability", low=0, high=1
    )
    min_p: float | None = flag(
        None, "draw tokens with at least this share of the best's probability", low=0, high=1
    )
    typical_p: float = flag(
        1.0, "draw among the most typical tokens of this total probability", above=0, high=1
    )
    epsilon_cutoff: float = flag(0.0, "never draw a token of lower probability", low=0, below=1)
    eta_cutoff: float = flag(
        0.0, "the same, but lower in an uncertain distribution", low=0, below=1
    )
    # preferred and banned tokens
    repetition_penalty: float = flag(
        1.0, "divides the score of a token already in the text", above=0
    )
    no_repeat_ngram_size: int = flag(0, "never repeat a run of this many tokens; 0 is off", low=0)
    sequence_bias: Any = flag(
        None, "add to the scores of tokens", json="a list of [token ids, bias]"
    )
    bad_words_ids: Any = flag(None, "never write these", json="a list of lists of token ids")
    suppress_tokens: Any = flag(None, "never write these", json="a list of token ids")
    begin_suppress_tokens: Any = flag(None, "never write these first", json="a list of token ids")
    forced_bos_token_id: int | None = flag(None, "the token after a lone first one", low=0)
    forced_eos_token_id: TokenIds = flag(None, "the last token at max_length", low=0)
    exponential_decay_length_penalty: Any = flag(
        None, "raise the end token's score after START new tokens", json="[START, FACTOR]"
    )
    renormalize_logits: bool = flag(False, "make the processed scores log-probabilities again")
    # random numbers
    seed: int | None = flag(None, "makes the draws repeatable", low=0, high=MAX_SEED)
    noise: str = flag(
        "hf",
        "hf: torch's stream, as transformers draws; counter: each draw by itself",
        choices=("hf", "counter"),
    )
    first_sample: int = flag(0, "with noise counter: the number of the first text", low=0)
    output_scores: bool = False  # for generate() only, not a flag

    def __post_init__(self) -> None:
        for f in fields(self):
            try:
                value = _plain(f.type, f.default, getattr(self, f.name))
            except RecursionError:
                raise ValueError(f"{f.name} must have fewer levels of lists") from None
            object.__setattr__(self, f.name, value)
        check(self)
        if isinstance(self.eos_token_id, tuple) and FROM_CHECKPOINT in self.eos_token_id:
            raise ValueError(
                f"eos_token_id must be {FROM_CHECKPOINT} alone (the model's) or ids >= 0, not "
                f"{self.eos_token_id}"
            )
        texts = self.num_return_sequences
        if self.num_beams > 1 and texts > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be <= num_beams ({self.num_beams}), not {texts}"
            )
        if texts > 1 and self.num_beams == 1 and not self.samples:
            raise ValueError(
                "num_return_sequences must be 1 without sampling (greedy rows are all the same), "
                f"not {texts}; add do_sample"
            )
        if self.noise == "counter" and self.seed is None:
            raise ValueError("noise must be hf without a seed, not 'counter'")
        if self.num_beam_groups > 1 or self.diversity_penalty > 0:
            self._check_diverse()
        if self.prompt_lookup_num_tokens is not None:
            name = "prompt_lookup_num_tokens"
            self._refuse(name, "num_return_sequences", "num_beams", "penalty_alpha")
        if self.penalty_alpha is not None:
            self._check_contrastive()
        if self.force_words_ids is not None:
            self._check_constrained()
        if self.stochastic_beams:
            self._check_stochastic()

    @classmethod
    def of(cls, *sources: Any) -> Self:
        """Merge options; later sources win.

        A source is a configuration of this class, a dict, any object with fields of these names,
        or None. In an object, and in a dict but the last, None is an unset value.
        Raises ValueError for an option of transformers that does not exist here, TypeError for any
        other unknown name in a dict.
        """
        options: dict[str, Any] = {}
        names = {f.name for f in fields(cls)}
        for number, source in enumerate(sources, 1):
            if isinstance(source, Mapping):
                given = dict(source)
            else:
                given = {name: getattr(source, name, None) for name in (*names, *FOREIGN)}
                if not (source is None or any(hasattr(source, name) for name in names)):
                    raise TypeError(f"generation_config must have options, not {show(source)}")
            for name, value in given.items():
                # 0, 1 and False are neutral values
                if name in FOREIGN and value is not None and value not in (0, 1):
                    raise ValueError(f"{name} must be left out: nanogpt2 does not have it")
                is_set = value is not None or isinstance(source, cls) or number == len(sources)
                if name in names and is_set:
                    options[name] = value
                elif value is not None and name not in (*names, *FOREIGN, *WITHOUT_EFFECT):
                    raise TypeError(f"{name!r} is not an option of generate()")
        return cls(**options)

    def _check_diverse(self) -> None:
        if self.num_beams % self.num_beam_groups:
            raise ValueError(
                f"num_beam_groups must divide num_beams ({self.num_beams}), "
                f"not {self.num_beam_groups}"
            )
        if self.num_beam_groups == 1:
            raise ValueError(
                f"diversity_penalty must come with num_beam_groups > 1, not "
                f"{self.diversity_penalty} alone"
            )
        if self.diversity_penalty == 0:
            raise ValueError(
                "diversity_penalty must be > 0 with num_beam_groups (the groups would be all the "
                "same), not 0"
            )
        self._refuse("num_beam_groups", "do_sample", "force_words_ids", "stochastic_beams")

    def _check_contrastive(self) -> None:
        if self.top_k is None or self.top_k < 2:
            raise ValueError(f"top_k must be > 1 with penalty_alpha, not {self.top_k}")
        self._refuse("penalty_alpha", "do_sample", "num_beams")

    def _check_constrained(self) -> None:
        if self.num_beams == 1:
            raise ValueError("num_beams must be > 1 with force_words_ids, not 1")
        self._refuse("force_words_ids", "do_sample", "stop_strings", "stochastic_beams")

    def _check_stochastic(self) -> None:
        if self.num_beams == 1:
            raise ValueError("num_beams must be > 1 with stochastic_beams, not 1")
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature must be > 0 with stochastic_beams, not 0")
        self._refuse("stochastic_beams", "length_penalty", "early_stopping")

    def _refuse(self, option: str, *others: str) -> None:
        """Raise ValueError for the first of `others` with a value other than its default."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in others and value != f.default:
                raise ValueError(f"{f.name} must be left out with {option}, not {show(value)}")

    @property
    def samples(self) -> bool:
        """True if tokens are drawn; temperature 0 means greedy."""
        return self.do_sample and self.temperature > 0


def _plain(kind: Any, default: Any, value: Any, levels: int = DEEPEST) -> Any:
    """Return a value as plain Python: numpy's and torch's numbers, lists of ids, None for unset.

    Raises RecursionError for more than `levels` levels of lists and tables.
    """
    if levels < 0:
        raise RecursionError
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        several = [_plain(Any, None, each, levels - 1) for each in value]
        return tuple(several) if kind == TokenIds or isinstance(value, tuple) else several
    if isinstance(value, dict):
        return {_plain(Any, None, k): _plain(Any, None, v, levels - 1) for k, v in value.items()}
    takes_none = kind is Any or NoneType in get_args(kind)
    return default if value is None and not takes_none and default is not MISSING else value


# the scripts' default without a decoding flag: greedy decoding, generate()'s default, soon loops
SENSIBLE_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
}
