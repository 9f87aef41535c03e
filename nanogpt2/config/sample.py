"""The command line of sample.py: the prompt's source, the decoding, the output.

This file refuses flags that have no effect beside others. generation.py holds each value's range.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from nanogpt2.config.flags import MOST_THREADS, check, fail, flag, show, usage_error
from nanogpt2.config.generation import SENSIBLE_SAMPLING, GenerationConfig
from nanogpt2.config.model import (
    DEVICES,
    DTYPES,
    KERNELS,
    SCHEMES,
    check_model,
    official_name,
)
from nanogpt2.config.presets import TASKS
from nanogpt2.config.train import is_encoding

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
# flags that choose how to search; without one of these, sample.py samples
SEARCH_FLAGS = (
    "do_sample",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "num_beam_groups",
    "diversity_penalty",
    "force_words_ids",
    "stochastic_beams",
    "penalty_alpha",
)
# how --classify reads --prompts
READING_FLAGS = ("text_column", "label_column", "encoding")
# flags that switch from sample.py's own sampling to transformers' defaults
DECODING_FLAGS = (*SEARCH_FLAGS, *SAMPLING_FLAGS)
# the flags that have an effect with --classify
CLASSIFY_FLAGS = (
    "classify",
    "prompt",
    "prompt_file",
    "prompts",
    "batch_size",
    "skip_bad",
    *READING_FLAGS,
    "model",
    "device",
    "threads",
    "dtype",
    "kernels",
    "json",
    "list_presets",
)
HEAD = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}")  # LAYER.HEAD
# flags that show the inside of the model instead of a text
INSPECT_FLAGS = ("attention", "lens", "tokens")
# the flags that have an effect with one of them
BESIDE_INSPECT_FLAGS = (
    *INSPECT_FLAGS,
    "html",
    "prompt",
    "prompt_file",
    "literal_prompt",
    "preset",
    "list_presets",
    "model",
    "device",
    "dtype",
    "quantize",
    "kernels",
)


@dataclass(frozen=True)
class SampleConfig:
    """python sample.py [PROMPT] [flags]: continue a text with a GPT-2, or label it.

    It samples with temperature 0.8, top_k 50 and top_p 0.95. A sampling flag (temperature, top_k,
    top_p, ...) samples with transformers' defaults for the others. A flag that chooses the search
    (num_beams, do_sample, ...) switches to transformers' defaults, which do not sample.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        'python sample.py "Once upon a time"',
        'python sample.py "Once upon a time" --temperature 0.7 --top_k 50',
        "python sample.py --model out --interactive",
    )
    GROUPS: ClassVar[dict[str, str]] = {
        "prompt_file": "the prompt and the model",
        "prompts": "many prompts",
        "classify": "other modes",
        "attention": "the inside of the model, and no text",
    }
    ALIASES: ClassVar[dict[str, str]] = {
        "length": "max_new_tokens",  # gpt-2's and transformers' scripts
        "max_tokens": "max_new_tokens",  # OpenAI
        "n_predict": "max_new_tokens",  # llama.cpp
        "num_predict": "max_new_tokens",  # ollama
        "nsamples": "num_return_sequences",  # gpt-2-simple
        "num_samples": "num_return_sequences",  # nanoGPT
        "stop": "stop_strings",
        "temp": "temperature",
        "max_completion_tokens": "max_new_tokens",  # OpenAI
        "stop_token": "stop_strings",  # transformers' script
        "k": "top_k",
        "file": "prompt_file",  # llama.cpp
        "destination_path": "output",  # gpt-2-simple
        "torch_dtype": "dtype",
        "model_name": "model",
        "model_name_or_path": "model",
    }
    HINTS: ClassVar[dict[str, str]] = {
        "n": "a number of texts is --num_return_sequences, of tokens --max_new_tokens",
        "m": "the model is --model",
        "p": "the prompt stands by itself: sample.py 'Once upon a time'",
        "f": "use --prompt_file FILE",
        "start": "the prompt stands by itself: sample.py 'Once upon a time'",
        "text": "the prompt stands by itself: sample.py 'Once upon a time'",
        "prefix": "the prompt stands by itself: sample.py 'Once upon a time'",
        "out_dir": "the model is --model FOLDER",
        "init_from": "the model is --model gpt2-xl, or --model FOLDER",
        "model_type": "the model is --model gpt2, gpt2-medium, gpt2-large or gpt2-xl",
        "model_dir": "the model is --model FOLDER",
        "model_path": "the model is --model FOLDER",
        "checkpoint_dir": "the model is --model FOLDER",
        "checkpoint": "the model is --model FOLDER",
        "run_name": "the model is --model FOLDER",
        "repeat_penalty": "use --repetition_penalty, which counts the whole text",
        "frequency_penalty": "use --repetition_penalty, which divides a repeated token's score",
        "presence_penalty": "use --repetition_penalty, which divides a repeated token's score",
        "repeat_last_n": "use --no_repeat_ngram_size 3, or --repetition_penalty 1.2",
        "logit_bias": "use --sequence_bias '[[[TOKEN], 1.5]]'",
        "ignore_eos": "use --eos_token_id none",
        "truncate": "use --stop_strings TEXT",
        "include_prefix": "the text includes the prompt; --json has the completion alone",
        "format": "use --json",
        "ctx_size": "the context is the model's; the oldest tokens are dropped",
        "n_ctx": "the context is the model's; the oldest tokens are dropped",
        "num_ctx": "the context is the model's; the oldest tokens are dropped",
        "c": "the context is the model's; the oldest tokens are dropped",
        "n_gpu_layers": "use --device cuda: all layers go there",
        "gpu_layers": "use --device cuda: all layers go there",
        "ngl": "use --device cuda: all layers go there",
        "num_thread": "use --threads",
        "no_cuda": "use --device cpu",
        "use_cpu": "use --device cpu",
        "conversation": "use --interactive --preset dialogue",
        "cnv": "use --interactive --preset dialogue",
        "instruct": "use --interactive --preset dialogue",
        "system": "GPT-2 has no system prompt: write it into PROMPT",
        "compile": "text is faster on a CPU with --quantize int8",
        "load_in_4bit": "use --quantize int8",
        "best_of": "use --num_return_sequences, or --num_beams for the likeliest text",
        "greedy": "use --do_sample false",
        "stream": "text is streamed already, without --json",
        "logprobs": "use --explain, or --explain --json",
        "output_attentions": "use --attention",  # transformers
        "output_hidden_states": "use --lens",  # transformers
        "tokenize": "use --tokens",
        "fp16": "use --dtype float16, or --quantize fp16 on a CPU",
        "bf16": "use --dtype bfloat16",
        "load_in_8bit": "use --quantize int8",
        "int8": "use --quantize int8",
        "gpu": "use --device cuda",
        "cpu": "use --device cpu",
        "t": "the temperature is --temperature",
        "s": "the seed is --seed",
        "i": "use --interactive",
        "chat": "use --interactive",
    }
    SECOND: ClassVar[str] = "is it in quotes? The model is --model NAME"
    prompt: str = flag("", "the text to continue, or - for standard input", positional=True)
    prompt_file: str | None = flag(None, "a file that holds the prompt")
    model: str = flag(
        "gpt2",
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, USER/NAME of the hub, or a path: a folder, "
        "or a file of safetensors, PyTorch (.bin, .pt) or llm.c",
    )
    device: str = flag("auto", "where to run", choices=DEVICES)
    threads: int | None = flag(
        None, "threads on a CPU (default: all, or one, by time)", low=1, high=MOST_THREADS
    )
    dtype: str = flag("float32", "the weights' type", choices=DTYPES)
    quantize: str | None = flag(None, "narrow the weights, on a CPU", choices=SCHEMES)
    kernels: str = flag(
        "auto",
        "the implementation; auto: triton on a GPU; reference: ops.py's formulas",
        choices=KERNELS,
    )
    preset: str | None = flag(None, "a task: its template and decoding", choices=(*TASKS,))
    list_presets: bool = flag(False, "describe the presets")
    literal_prompt: bool = flag(False, "read <|endoftext|> in a prompt as characters, not a token")
    # many prompts
    prompts: str | None = flag(
        None, "prompts: a line each, or JSON (.jsonl, .ndjson, .json); - is standard input"
    )
    batch_size: int = flag(8, "with --prompts: prompts side by side", low=1)
    unique: bool = flag(False, "with --prompts: no repeated text for a prompt")
    skip_bad: bool = flag(False, "with --prompts: skip broken lines")
    text_column: str | None = flag(
        None, "with --classify --prompts: of a .jsonl, .csv, ... (default: as trained, or text)"
    )
    label_column: str | None = flag(
        None, "with --classify --prompts: the right labels (default: as trained, or label)"
    )
    encoding: str = flag("utf-8", "with --classify --prompts: of files without a byte-order mark")
    in_order: bool = flag(False, "with --prompts: in the file's order, not as they are done")
    output: str | None = flag(None, "with --prompts: a new file for the texts")
    resume: bool = flag(False, "with --output: continue the file of a run that was ended")
    # other modes
    classify: bool = flag(False, "label the text with a trained classifier")
    interactive: bool = flag(False, "write together with the model; :help lists the commands")
    compare: str | None = flag(
        None, "another model: run both on the same prompt and random numbers"
    )
    explain: bool = flag(False, "for each token, show each option's effect on it and its rivals")
    color: str | None = flag(None, "colour the tokens", choices=("prob", "entropy", "rank"))
    tree: bool = flag(False, "draw the beams: where they split, were pruned, ended")
    json: bool = flag(False, "print JSON: one object for each text")
    verbose: bool = flag(False, "say at the end which products and how many threads ran")
    # the inside of the model
    attention: str | None = flag(
        None,
        "show which tokens every head looks at; --attention 3.0: layer 3, head 0 in detail",
        alone="all",
    )
    lens: bool = flag(False, "show the token that each layer would predict")
    tokens: bool = flag(False, "show how the prompt becomes tokens, merge by merge")
    html: str | None = flag(
        None, "with --attention, --lens or --tokens: a file for them, as a page for a browser"
    )
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        check(self)
        if not is_encoding(self.encoding):
            raise ValueError(f"encoding must be a text encoding, not {show(self.encoding)}")
        ways = ("prompts", "interactive", "compare", "explain", "color", "tree")
        chosen = [name for name in ways if getattr(self, name)]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[1]} must be left out where --{chosen[0]} is given")
        if self.json and chosen and chosen[0] in ("interactive", "color", "tree"):
            raise ValueError(f"json must be left out where --{chosen[0]} is given")
        if self.attention not in (None, "all") and not HEAD.fullmatch(self.attention):
            raise ValueError(
                f"attention must be all or LAYER.HEAD, such as 3.0, not {show(self.attention)}"
            )
        if self.quantize and self.dtype != "float32":
            raise ValueError(f"quantize must come with dtype float32, not {self.dtype}")
        if self.tree and self.generation.num_beams == 1:
            raise ValueError("tree must come with --num_beams above 1")
        if self.unique and not self.generation.samples:
            raise ValueError("unique must come with sampling: other texts are the same each time")
        if self.interactive and self.generation.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences must be 1 with --interactive (:retry writes another text), "
                f"not {self.generation.num_return_sequences}"
            )

    @property
    def inspects(self) -> bool:
        """True where the inside of the model is asked for, and no text."""
        return self.reads or self.tokens

    @property
    def reads(self) -> bool:
        """True where the model must read the prompt for that; the tokens need no model."""
        return self.attention is not None or self.lens

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "SampleConfig":
        """Build the configuration from the given flags; fill in the values that they imply."""
        if given.get("classify"):
            _check_classify(given)
        _check_inspect(given)
        for name in ("unique", "skip_bad", "batch_size", "in_order", "output", "resume"):
            if name in given and "prompts" not in given:
                fail(f"--{name} must come with --prompts")
        for name in READING_FLAGS:
            if name in given and not (given.get("classify") and "prompts" in given):
                fail(f"--{name} must come with --classify --prompts")
        if given.get("resume") and not given.get("output"):
            fail("--resume must come with --output, the file to continue")
        if sum(name in given for name in ("prompt", "prompt_file", "prompts")) > 1:
            one = "prompts" if "prompts" in given else "prompt_file"
            fail(f"--{one} must be left out where another prompt is given")
        for name in ("model", "compare"):
            with usage_error(f"--{name}"):
                check_model("gpt2" if given.get(name) is None else given[name])
        names = {f.name for f in fields(GenerationConfig)}
        own = {name: value for name, value in given.items() if name not in names}
        decoding = {name: value for name, value in given.items() if name in names}
        return cls(generation=decoding_options(decoding, given.get("preset")), **own)


def decoding_options(given: dict[str, Any], preset: str | None = None) -> GenerationConfig:
    """Fill in what decoding flags imply: the sampling of sample.py, 100 new tokens, a preset's.

    Raises ValueError, whose text starts with a flag's name, for values that do not go together.
    """
    options = given
    if preset in TASKS:
        options = TASKS[preset].options | options
    elif not any(name in given for name in DECODING_FLAGS):
        options = SENSIBLE_SAMPLING | options
    elif not any(name in given for name in SEARCH_FLAGS):
        options = {"do_sample": True} | options
    if "max_length" not in given:
        options = {"max_new_tokens": 100} | options
    elif "max_new_tokens" not in given:
        options = {name: value for name, value in options.items() if name != "max_new_tokens"}
    refuse_ignored(given, options)
    try:
        return GenerationConfig(**options)
    except ValueError as error:
        name = str(error).partition(" ")[0]
        if name in given or preset is None:
            raise
        raise ValueError(f"{error} (--preset {preset} sets it)") from None


def _check_classify(given: dict[str, Any]) -> None:
    """Raise ValueError for a flag without effect or a model that is not a classifier."""
    for name in given:
        if name not in CLASSIFY_FLAGS:
            raise ValueError(f"{name} must be left out where --classify is given")
    if not any(given.get(name) for name in ("prompt", "prompt_file", "prompts")):
        fail("PROMPT is missing: --classify needs a text, --prompt_file or --prompts")
    model = given.get("model", "gpt2")
    if model == "demo" or official_name(model):
        raise ValueError(
            "model must be the path of a classifier with --classify (train.py makes one), or "
            "USER/NAME of the hub"
        )


def _check_inspect(given: dict[str, Any]) -> None:
    """Raise ValueError for a flag without effect beside those that show the inside of the model."""
    asked = next((name for name in INSPECT_FLAGS if given.get(name)), None)
    if asked is None:
        if given.get("html") is not None:
            fail("--html must come with --attention, --lens or --tokens")
        return
    for name in given:
        if name not in BESIDE_INSPECT_FLAGS:
            raise ValueError(f"{name} must be left out where --{asked} is given")
    if not any(given.get(name) for name in ("prompt", "prompt_file")):
        fail(f"PROMPT is missing: --{asked} needs a text or --prompt_file")


def refuse_ignored(given: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise ValueError for a flag without effect beside the others."""
    if not options.get("do_sample"):
        contrastive = options.get("penalty_alpha") is not None
        for name in SAMPLING_FLAGS:
            # contrastive search uses top_k too
            if name in given and (name, contrastive) != ("top_k", True):
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
