"""Models by name: the shape of a GPT-2, the released models, repositories of the hub, and paths.

    gpt2 (or openai-community/gpt2), gpt2-medium, gpt2-large, gpt2-xl     OpenAI's weights
    demo                                                                  the model in assets/
    USER/NAME, USER/NAME@REVISION, distilgpt2, gpt2@REVISION              a repository of the hub
    everything else                                                       a path

A path on this disk wins over a repository of the same name. This file opens no file, asks no server
and does not know tensors.
"""

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from nanogpt2.config.flags import check, flag, show

TokenIds = int | tuple[int, ...] | None
MOST_LAYERS = 1000
ACTIVATIONS = ("gelu_new", "gelu")
MOST_PARAMETERS = 2**40  # their bytes still fit the integers of an allocation


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
    n_inner: int | None = flag(None, "width of the MLP; none is 4C", low=1)
    activation_function: str = flag("gelu_new", "tanh GELU, or erf GELU", choices=ACTIVATIONS)
    scale_attn_weights: bool = flag(True, "divide the scores by sqrt(D)")
    scale_attn_by_inverse_layer_idx: bool = flag(False, "and by the layer's number, from 1")
    tie_word_embeddings: bool = flag(True, "the head is the embedding")

    def __post_init__(self) -> None:
        check(self)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, not {self.n_embd} / {self.n_head}"
            )
        if self.n_parameters > MOST_PARAMETERS:
            inner = "" if self.n_inner is None else f" and n_inner {self.n_inner}"
            raise ValueError(
                f"n_embd {self.n_embd}{inner} makes {self.n_parameters:,} parameters; "
                f"{MOST_PARAMETERS:,} are allowed"
            )

    @property
    def mlp_width(self) -> int:
        """Return n_inner, by default 4C."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def n_parameters(self) -> int:
        """Count the parameters: two embeddings, the blocks, the last layer norm, an untied head."""
        C, inner = self.n_embd, self.mlp_width
        block = 4 * C * C + 2 * C * inner + inner + 9 * C
        tables = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.block_size
        return tables * C + self.n_layer * block + 2 * C

    def query_scale(self, layer: int) -> float:
        """Return the factor of a layer's queries, beside 1 / sqrt(D): 1 in OpenAI's models."""
        scale = 1.0 if self.scale_attn_weights else math.sqrt(self.n_embd // self.n_head)
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


PRESETS: dict[str, GPTConfig] = {
    "gpt2": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
MODEL_NAMES = (*PRESETS, "demo")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # of torch.save; .bin: llm.c's too
# other formats, by a file's name or the end of it, and where to turn
TENSORFLOW = (
    "is of TensorFlow: OpenAI's models are gpt2, gpt2-medium, gpt2-large, gpt2-xl here; "
    "load_tf_weights_in_gpt2 of transformers 4 converts others"
)
OTHER_FORMATS = {
    ".index": TENSORFLOW,
    ".meta": TENSORFLOW,
    "-00000-of-00001": TENSORFLOW,
    "checkpoint": TENSORFLOW,
    ".h5": "is of Keras: transformers 4 loads it by from_tf=True; save_pretrained it",
    ".msgpack": "is of Flax: transformers 4 loads it by from_flax=True; save_pretrained it",
    ".gguf": "is of llama.cpp: transformers loads it by gguf_file=NAME; save_pretrained it",
    ".onnx": "is a graph without a model's names: give the model that it was made from",
}
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("auto", "torch", "triton", "reference")
IGNORE_INDEX = -100  # a target that does not count in the loss
SCHEMES = ("fp16", "int8")  # of narrow weights, on a CPU

MAIN = "main"  # the revision of a name without one
OPENAI = "openai-community"
# names without a user -> where the hub keeps them
SHORT = {"distilgpt2": "distilbert/distilgpt2"} | {name: f"{OPENAI}/{name}" for name in PRESETS}
# OpenAI's and other people's names of the sizes
ALSO = {"gpt2-small": "gpt2", "124m": "gpt2", "355m": "gpt2-medium", "1558m": "gpt2-xl"}
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"({_PART}/{_PART}|{'|'.join(SHORT)})(?:@(.+))?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)
LONGEST_REVISION = 100
_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+(?:/[\w.-]+)?).*")


def official_name(name: str | Path) -> str | None:
    """Return the name in PRESETS of OpenAI's weights; None for another model."""
    if name in PRESETS or not isinstance(name, str):
        return str(name) if name in PRESETS else None
    user, _, short = name.partition("/")
    return short if user == OPENAI and short in PRESETS and not Path(name).exists() else None


def repository_of(name: str | Path) -> tuple[str, str] | None:
    """Return (USER/NAME, revision) of a model that the hub may have; None for ours and a path."""
    found = _REPOSITORY.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        return None
    repo, revision = found[1], found[2] or MAIN
    # the hub's own rule, and the ends of mistyped files and of git's addresses
    no_name = any(mark in repo for mark in ("..", "--")) or repo.endswith(
        (".safetensors", ".json", ".git", *PICKLES)
    )
    no_revision = len(revision) > LONGEST_REVISION or not _REVISION.fullmatch(revision)
    if no_name or no_revision or official_name(str(name)) or Path(name).exists():
        return None
    return SHORT.get(repo, repo), revision


def other_format(name: str) -> str | None:
    """Return what to do with a model's file of another format; None for any other file."""
    for end, advice in OTHER_FORMATS.items():
        if name == end or (end != "checkpoint" and name.endswith(end)):
            return advice
    return None


def check_model(name: str | Path) -> None:
    """Raise ValueError if `name` cannot be a model. Opens no file, and does not ask the hub."""
    path = Path(name)
    if name in MODEL_NAMES or (name and path.is_dir()):
        return
    if not name or not path.exists():
        # TensorFlow's name of a checkpoint is the beginning of its files' names
        if name and len(path.name) < 200 and Path(f"{path}.index").exists():
            raise ValueError(f"{show(str(name))} {TENSORFLOW}")
        if official_name(name) is None and repository_of(name) is None:
            raise ValueError(
                f"{show(str(name))} is not a file, a folder or a known model{_advice(str(name))}"
            )
        return
    if (advice := other_format(path.name)) is not None:
        raise ValueError(f"{show(str(name))} {advice}")
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(
            f"{show(str(name))} is not a .safetensors file, nor one of {', '.join(PICKLES)}"
        )


def _advice(name: str) -> str:
    """Return what to write in place of a wrong name."""
    repo, at, revision = name.partition("@")
    if found := _URL.fullmatch(name):
        return f": write {found[1]}"
    if at and _REPOSITORY.fullmatch(repo):
        return f": the revision after @ must be a branch, a tag or a commit, not {show(revision)}"
    near = difflib.get_close_matches(name.lower(), [*MODEL_NAMES, *SHORT, *ALSO], n=1, cutoff=0.8)
    if near:
        return f": did you mean {ALSO.get(near[0], near[0])}?"
    return f" ({', '.join(MODEL_NAMES)}, USER/NAME of the hub)"
