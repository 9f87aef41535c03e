"""What a run is told: the model's shape, how to decode, how to train.

Frozen dataclasses whose fields are at once the Python options and the command-line flags: a field's
type, default, range and help text stand in one place. A value out of range raises ValueError from
the constructor. This file does not know what a tensor is.
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from nanogpt2.flags import check, fail, flag, parse, show, value_of, wrong_use
from nanogpt2.presets import TASKS

__all__ = ["parse", "fail", "value_of", "wrong_use"]

FROM_CHECKPOINT = -1  # an eos_token_id left out: the checkpoint's own
TokenIds = int | tuple[int, ...] | None
MAX_SEED = 2**63 - 1
MOST_LAYERS = 1000
MOST_PARAMETERS = 2**40  # whose bytes can still be counted and asked for


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. Every default is the 124M model's."""

    vocab_size: int = flag(50257, "tokens in the vocabulary, V", low=1)
    block_size: int = flag(1024, "longest context, in tokens", low=1)
    n_layer: int = flag(12, "number of blocks", low=1, high=MOST_LAYERS)
    n_head: int = flag(12, "attention heads, H", low=1)
    n_embd: int = flag(768, "width, C; a multiple of n_head", low=1)
    dropout: float = flag(0.0, "on embeddings, attention and residuals", low=0, below=1)
    layer_norm_epsilon: float = flag(1e-5, "added to the variance", above=0)
    bos_token_id: int | None = flag(50256, "starts an empty prompt", low=0)
    eos_token_id: TokenIds = flag(50256, "ends a text", low=0)
    pad_token_id: int | None = flag(None, "fills rows that ended", low=0)

    def __post_init__(self) -> None:
        check(self)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, not {self.n_embd} / {self.n_head}"
            )
        if self.n_parameters > MOST_PARAMETERS:
            raise ValueError(
                f"n_embd {self.n_embd}, n_layer {self.n_layer}, vocab_size {self.vocab_size} and "
                f"block_size {self.block_size} make {self.n_parameters:,} parameters; "
                f"{MOST_PARAMETERS:,} are allowed"
            )

    @property
    def n_parameters(self) -> int:
        """Numbers in the model: two embeddings, the blocks, the last layer norm."""
        C = self.n_embd
        block = 12 * C * C + 13 * C
        return (self.vocab_size + self.block_size) * C + self.n_layer * block + 2 * C


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


MODEL_NAMES = (*PRESETS, "demo")
DATA_NAMES = ("pydocs", "shakespeare")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode: transformers' names, meanings and defaults."""

    # how far
    max_new_tokens: int | None = flag(None, "tokens to add; wins over max_length", low=1)
    max_length: int | None = flag(None, "tokens in all, the prompt included", low=1)
    min_length: int = flag(0, "no end before this many tokens, the prompt included", low=0)
    min_new_tokens: int | None = flag(None, "no end before this many new tokens", low=0)
    max_time: float | None = flag(None, "seconds after which no new token is begun", above=0)
    stop_strings: str | list[str] | None = flag(
        None, "texts that end a text; [ begins a list", json="a text, or a list of texts"
    )
    eos_token_id: TokenIds = flag(
        FROM_CHECKPOINT, "ids that end a text, as 1,2; none: never stop; -1: the model's", low=-1
    )
    pad_token_id: int | None = flag(None, "fills rows that ended", low=0)
    # which way
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
    num_beam_groups: int = flag(1, "groups of beams that avoid each other's tokens", low=1)
    diversity_penalty: float = flag(
        0.0, "taken off the score of a token for each beam of an earlier group that has it", low=0
    )
    force_words_ids: Any = flag(
        None,
        "what the beams must write",
        json="a list of lists of token ids (all of them) or of lists of those (one of each)",
    )
    stochastic_beams: bool = flag(
        False, "draw num_beams different texts, likely ones first, instead of searching"
    )
    penalty_alpha: float | None = flag(
        None, "contrastive search: the weight of being unlike the text so far", low=0, high=1
    )
    # what the draw is from
    temperature: float = flag(1.0, "flattens (> 1) or sharpens (< 1) the draw; 0 is greedy", low=0)
    top_h: float | None = flag(None, "keep this share of the entropy", above=0, high=1)
    top_k: int | None = flag(50, "draw among the k likeliest tokens; 0 is all", low=0)
    top_p: float = flag(1.0, "draw among the likeliest tokens that hold this mass", low=0, high=1)
    min_p: float | None = flag(None, "draw what has this share of the best's mass", low=0, high=1)
    typical_p: float = flag(1.0, "draw among the most typical tokens of this mass", above=0, high=1)
    epsilon_cutoff: float = flag(0.0, "never draw what is less probable", low=0, below=1)
    eta_cutoff: float = flag(0.0, "the same, lower where all is uncertain", low=0, below=1)
    # what is preferred or banned
    repetition_penalty: float = flag(1.0, "divides the score of a token already seen", above=0)
    no_repeat_ngram_size: int = flag(0, "never repeat a run of this many tokens; 0 is off", low=0)
    sequence_bias: Any = flag(None, "added to scores", json="a list of [token ids, bias]")
    bad_words_ids: Any = flag(None, "never written", json="a list of lists of token ids")
    suppress_tokens: Any = flag(None, "never written", json="a list of token ids")
    begin_suppress_tokens: Any = flag(None, "never written first", json="a list of token ids")
    forced_bos_token_id: int | None = flag(None, "the token after a lone first one", low=0)
    forced_eos_token_id: TokenIds = flag(None, "the last token, where max_length is reached", low=0)
    exponential_decay_length_penalty: Any = flag(
        None, "raises the end's score after START new tokens", json="[START, FACTOR]"
    )
    renormalize_logits: bool = flag(False, "make the processed scores log-probabilities again")
    # where chance comes from
    seed: int | None = flag(None, "makes the draws repeatable", low=0, high=MAX_SEED)
    noise: str = flag(
        "hf",
        "hf: torch's stream, as transformers draws; counter: each draw by itself",
        choices=("hf", "counter"),
    )
    first_sample: int = flag(0, "with noise counter: the number of the first text", low=0)
    output_scores: bool = False  # no flag: for generate() only

    def __post_init__(self) -> None:
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
        if self.penalty_alpha is not None:
            self._check_contrastive()
        if self.force_words_ids is not None:
            self._check_constrained()
        if self.stochastic_beams:
            self._check_stochastic()

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
        """Raise ValueError for the first of `others` that does not have its default."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in others and value != f.default:
                raise ValueError(f"{f.name} must be left out with {option}, not {show(value)}")

    @property
    def samples(self) -> bool:
        """True where tokens are drawn; temperature 0 means greedy."""
        return self.do_sample and self.temperature > 0


SAMPLING_FLAGS = (
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
# flags that leave the sensible sampling on
NEUTRAL_FLAGS = (
    "max_new_tokens",
    "seed",
    "num_return_sequences",
    "stop_strings",
    "max_time",
    "noise",
    "first_sample",
    "output_scores",
)
DECODING_FLAGS = tuple(f.name for f in fields(GenerationConfig) if f.name not in NEUTRAL_FLAGS)
# used when no decoding flag is given: greedy decoding, the default of generate(), soon loops
SENSIBLE_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 0.95,
}
# what means something to a classifier
CLASSIFY_FLAGS = (
    "classify",
    "prompt",
    "prompt_file",
    "prompts",
    "batch_size",
    "skip_bad",
    "model",
    "device",
    "dtype",
    "json",
    "list_presets",
)
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SampleConfig:
    """python sample.py [PROMPT] [flags]: continue a text with a GPT-2, or label it.

    With no decoding flag it samples with temperature 0.8, top_k 50 and top_p 0.95. A decoding flag
    switches to transformers' meanings and defaults.
    """

    prompt: str = flag("", "the text to continue, or - for standard input", positional=True)
    prompt_file: str | None = flag(None, "a file that holds the prompt")
    model: str = flag("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo or a path")
    device: str = flag("auto", "where to run", choices=DEVICES)
    dtype: str = flag("float32", "the weights' type", choices=DTYPES)
    preset: str | None = flag(None, "a task: its template and decoding", choices=(*TASKS,))
    list_presets: bool = flag(False, "describe the presets")
    # many prompts
    prompts: str | None = flag(
        None, "prompts: a line each, or JSONL (.jsonl, .json); - is standard input"
    )
    batch_size: int = flag(8, "with --prompts: prompts side by side", low=1)
    unique: bool = flag(False, "with --prompts: no text twice for a prompt")
    skip_bad: bool = flag(False, "with --prompts: go on without broken lines")
    # another look
    classify: bool = flag(False, "label the text, by a model that was trained to classify")
    interactive: bool = flag(False, "write together with the model; :help lists the commands")
    compare: str | None = flag(None, "another model: the same prompt and chance through both")
    explain: bool = flag(False, "for each token, what each option did to it and its rivals")
    color: str | None = flag(None, "colour the tokens", choices=("prob", "entropy", "rank"))
    tree: bool = flag(False, "draw the beams: where they split, were pruned, ended")
    json: bool = flag(False, "print JSON: one object for each text")
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        check(self)
        ways = ("prompts", "interactive", "compare", "explain", "color", "tree")
        chosen = [name for name in ways if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[1]} must be left out where --{chosen[0]} is given")
        if self.json and chosen and chosen[0] in ("interactive", "color", "tree"):
            raise ValueError(f"json must be left out where --{chosen[0]} is given")
        if self.tree and self.generation.num_beams == 1:
            raise ValueError("tree must come with --num_beams above 1")
        if self.unique and not self.generation.samples:
            raise ValueError("unique must come with sampling: other texts are the same each time")
        if self.interactive and self.generation.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences must be 1 with --interactive (:retry writes another text), "
                f"not {self.generation.num_return_sequences}"
            )

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "SampleConfig":
        """Build the configuration from the flags that were given, filling in what they imply."""
        if given.get("classify"):
            _check_classify(given)
        for name in ("unique", "skip_bad", "batch_size"):
            if name in given and "prompts" not in given:
                fail(f"--{name} must come with --prompts")
        if sum(name in given for name in ("prompt", "prompt_file", "prompts")) > 1:
            one = "prompts" if "prompts" in given else "prompt_file"
            fail(f"--{one} must be left out where another prompt is given")
        for name in ("model", "compare"):
            with wrong_use(f"--{name}"):
                check_model("gpt2" if given.get(name) is None else given[name])
        names = {f.name for f in fields(GenerationConfig)}
        own = {name: value for name, value in given.items() if name not in names}
        return cls(generation=cls._decoding(given, names), **own)

    @staticmethod
    def _decoding(given: dict[str, Any], names: set[str]) -> GenerationConfig:
        options = {name: value for name, value in given.items() if name in names}
        if given.get("preset") in TASKS:
            options = TASKS[given["preset"]].options | options
        elif not any(name in given for name in DECODING_FLAGS):
            options = SENSIBLE_SAMPLING | options
        if "max_length" not in given:
            options = {"max_new_tokens": 100} | options
        elif "max_new_tokens" not in given:
            options.pop("max_new_tokens", None)
        refuse_ignored(given, options)
        try:
            return GenerationConfig(**options)
        except ValueError as error:
            name = str(error).partition(" ")[0]
            if name in given or given.get("preset") is None:
                raise
            raise ValueError(f"{error} (--preset {given['preset']} sets it)") from None


def _check_classify(given: dict[str, Any]) -> None:
    """Raise ValueError for a flag that would change nothing, and for what is no classifier."""
    for name in given:
        if name not in CLASSIFY_FLAGS:
            raise ValueError(f"{name} must be left out where --classify is given")
    if not any(given.get(name) for name in ("prompt", "prompt_file", "prompts")):
        fail("PROMPT is missing: --classify needs a text, --prompt_file or --prompts")
    if given.get("model", "gpt2") in MODEL_NAMES:
        raise ValueError(
            "model must be the path of a classifier with --classify (train.py makes one)"
        )


def refuse_ignored(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise ValueError for a flag that would change nothing beside the others."""
    if not options.get("do_sample"):
        for name in SAMPLING_FLAGS:
            # contrastive search has candidates too
            if name in given and (name, "penalty_alpha" in given) != ("top_k", True):
                raise ValueError(f"{name} must come with do_sample, not {given[name]!r} alone")
    for name in ("length_penalty", "early_stopping"):
        if name in given and options.get("num_beams", 1) == 1:
            raise ValueError(f"{name} must come with num_beams above 1")
    if "first_sample" in given and options.get("noise") != "counter":
        raise ValueError("first_sample must come with noise counter")
    for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        bound, value = options.get(most), given.get(least)
        if bound is not None and value is not None and value > bound:
            raise ValueError(f"{least} must be <= {most} ({bound}), not {value}")
    for name, winner in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if name in given and winner in given:
            raise ValueError(f"{name} must be left out where --{winner} is given")


@dataclass(frozen=True)
class TrainConfig:
    """python train.py DATA [flags]: train or fine-tune a GPT-2 on text.

    DATA is a UTF-8 text file, a folder of .txt files, or a name: pydocs (the language reference
    that every Python carries) or shakespeare (downloaded once). --out becomes a folder that
    `sample.py --model` and transformers load.
    """

    data: str = flag(MISSING, "a text file, a folder, pydocs or shakespeare", positional=True)
    init: str = flag("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, scratch or a path")
    out: str = flag("out", "folder that receives the model")
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    overwrite: bool = flag(False, "replace the run that --out holds")
    epochs: float = flag(3.0, "passes over the training text, unless --steps is given", above=0)
    steps: int | None = flag(None, "optimizer steps", low=1)
    batch_size: int = flag(8, "sequences in a micro-batch", low=1)
    grad_accum: int = flag(1, "micro-batches in a step", low=1)
    block_size: int | None = flag(
        None, "tokens in a sequence (default: 256 on a CPU, else 1024, at most the model's)", low=8
    )
    lr: float | None = flag(None, "peak learning rate (default: by the model's width)", low=0)
    warmup: int | None = flag(None, "steps of linear warm-up (default: 5 %, at most 100)", low=0)
    weight_decay: float = flag(0.1, "on matrices only", low=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 is no clipping", low=0)
    dropout: float = flag(0.0, "share of activations dropped while training", low=0, below=1)
    n_layer: int = flag(4, "blocks, with --init scratch", low=1, high=MOST_LAYERS)
    n_head: int = flag(4, "attention heads, with --init scratch", low=1)
    n_embd: int = flag(128, "width, with --init scratch", low=1)
    tokenizer: str = flag("gpt2", "with --init scratch", choices=("gpt2", "bytes"))
    seed: int = flag(1337, "of the weights, the data's order and dropout", low=0, high=MAX_SEED)
    device: str = flag("auto", "where to run", choices=DEVICES)
    dtype: str = flag("auto", "of the matrix products", choices=("auto", "float32", "bfloat16"))
    eval_every: int | None = flag(None, "steps between evaluations (default: ten in a run)", low=1)
    save_every: int | None = flag(None, "steps between checkpoints (default: as eval_every)", low=1)
    keep: int = flag(2, "checkpoints to keep beside the best", low=1)
    prompt: str = flag("", "of the samples before and after (default: the validation text's start)")
    given: tuple[str, ...] = field(
        default=(), compare=False
    )  # names of the flags on the command line

    def __post_init__(self) -> None:
        check(self)
        if self.resume and self.overwrite:
            raise ValueError(
                "overwrite must be left out where resume is given: one keeps the run, one drops it"
            )
        if self.steps is not None and (self.warmup or 0) > self.steps:
            raise ValueError(f"warmup must be <= steps ({self.steps}), not {self.warmup}")
        if self.init == "scratch" and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head ({self.n_head}), not {self.n_embd}"
            )

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "TrainConfig":
        """Build the configuration from the flags that were given; those that clash are refused."""
        if given.get("steps") is not None and "epochs" in given:
            raise ValueError(
                f"epochs must be left out where steps is given, not {given['epochs']!r}"
            )
        if given.get("init") != "scratch":
            for name in ("n_layer", "n_head", "n_embd", "tokenizer"):
                if name in given:
                    raise ValueError(
                        f"{name} must come with --init scratch, not {given[name]!r} alone"
                    )
        with wrong_use("DATA"):
            check_data(given["data"])
        if given.get("init") != "scratch":
            with wrong_use("--init"):
                check_model(given.get("init", "gpt2"))
        return cls(**given, given=tuple(given))


def check_model(name: str | Path) -> None:
    """Raise ValueError where `name` cannot be a model; opens no file."""
    path = Path(name)
    if name in MODEL_NAMES or (name and path.is_dir()):
        return
    if not name or not path.exists():
        known = ", ".join(MODEL_NAMES)
        raise ValueError(f"{show(str(name))} is no file, no folder and no known model ({known})")
    if path.suffix in PICKLES:
        raise ValueError(
            f"{show(str(name))} is a pickle, which can run code; only .safetensors are loaded"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{show(str(name))} is no .safetensors file")


def check_data(source: str) -> None:
    """Raise ValueError where `source` cannot be a text to train on; reads no text."""
    path = Path(source)
    if source in DATA_NAMES or path.is_file():
        return
    if not source or not path.exists():
        known = ", ".join(DATA_NAMES)
        raise ValueError(f"{show(source)} is no file, no folder and no known text ({known})")
    if not any(path.rglob("*.txt")):
        raise ValueError(f"{show(source)} has no .txt file")
