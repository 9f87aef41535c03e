"""The command line of train.py: the data, the initial model, the settings of training.

None means automatic: training/plan.py fills in a value for the model and the device. This file
opens no file.
"""

import glob
import os
from dataclasses import MISSING, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanogpt2.config.flags import MAX_SEED, check, flag, show, usage_error
from nanogpt2.config.model import DEVICES, DTYPES, KERNELS, MOST_LAYERS, GPTConfig, check_model

# a larger scale drowns the model's own weights
MOST_ALPHA = 10**6
DATA_NAMES = ("pydocs", "shakespeare")
DATA_KINDS = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class TrainConfig:
    """python train.py DATA [flags]: train or fine-tune a GPT-2 on text.

    DATA is a file (text, or records as .jsonl, .csv, .tsv or .parquet; also .gz and .zst), a folder
    or a glob of such files, a .tokens file, - for standard input, or a name: pydocs (the language
    reference that every Python carries) or shakespeare (downloaded once). --out becomes a folder
    that `sample.py --model` and transformers load. Several devices: torchrun --nproc_per_node=N
    train.py DATA.
    """

    data: str = flag(MISSING, "a file, a folder, a glob, -, pydocs or shakespeare", positional=True)
    task: str = flag("lm", "what to learn from DATA", choices=("lm", "chat", "classify"))
    validation: str | None = flag(None, "texts to validate on (default: a tenth of DATA)")
    text_column: str = flag("text", "of a .jsonl, .csv, .tsv or .parquet file")
    label_column: str = flag("label", "with --task classify")
    init: str = flag("gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, scratch or a path")
    # the run's folder
    out: str = flag("out", "folder to write the model to")
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    overwrite: bool = flag(False, "delete the run in --out and start a new one")
    dry_run: bool = flag(False, "print the plan: tokens, steps, memory, time; write nothing")
    keep: int = flag(2, "checkpoints to keep beside the best", low=1)
    # length
    epochs: float = flag(3.0, "passes over the training text, unless --steps is given", above=0)
    steps: int | None = flag(None, "optimizer steps", low=1)
    batch_size: int | None = flag(
        None, "sequences in a micro-batch (default: 8, more on a GPU for long texts)", low=1
    )
    grad_accum: int = flag(1, "micro-batches in a step", low=1)
    block_size: int | None = flag(
        None, "tokens in a sequence (default: 256 on a CPU, else 1024, at most the model's)", low=8
    )
    patience: int | None = flag(
        None, "stop after this many evaluations without a better val_loss", low=1
    )
    # optimization
    optimizer: str = flag(
        "adamw", "muon: for the blocks' matrices, adamw for the rest", choices=("adamw", "muon")
    )
    lr: float | None = flag(None, "peak learning rate (default: by the model's width)", low=0)
    schedule: str = flag(
        "cosine",
        "learning rate after the warm-up; wsd: constant, then falls in the last fifth",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    warmup: int | None = flag(None, "steps of linear warm-up (default: 5 %, at most 100)", low=0)
    weight_decay: float = flag(0.1, "on matrices only", low=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", low=0)
    dropout: float = flag(0.0, "share of activations dropped while training", low=0, below=1)
    ema: float = flag(
        0.0,
        "decay of a moving average of the weights; the average becomes the model",
        low=0,
        below=1,
    )
    lora_rank: int = flag(0, "train only low-rank adapters of this rank; 0: all weights", low=0)
    lora_alpha: float | None = flag(
        None, "the adapters' scale is alpha / rank (default: 2 rank)", above=0, high=MOST_ALPHA
    )
    # a new model
    n_layer: int = flag(4, "blocks, with --init scratch", low=1, high=MOST_LAYERS)
    n_head: int = flag(4, "attention heads, with --init scratch", low=1)
    n_embd: int = flag(128, "width, with --init scratch", low=1)
    tokenizer: str = flag("gpt2", "with --init scratch", choices=("gpt2", "bytes"))
    # where
    seed: int = flag(1337, "for the weights, the data's order and dropout", low=0, high=MAX_SEED)
    device: str = flag("auto", "where to run", choices=DEVICES)
    dtype: str = flag("auto", "precision of the matrix products", choices=("auto", *DTYPES))
    kernels: str = flag(
        "auto",
        "the implementation; auto: triton on a GPU; reference: ops.py's formulas",
        choices=KERNELS,
    )
    compile: bool = flag(False, "use torch.compile: minutes to start, faster steps")
    activation_checkpointing: bool = flag(False, "recompute activations instead of keeping them")
    fsdp: bool = flag(False, "with torchrun: shard the weights too, for gpt2-xl")
    # evaluation and output
    eval_every: int | None = flag(None, "steps between evaluations (default: ten in a run)", low=1)
    save_every: int | None = flag(None, "steps between checkpoints (default: as eval_every)", low=1)
    sample_every: int | None = flag(None, "steps between samples (default: first and last)", low=1)
    tensorboard: bool = flag(False, "also write TensorBoard's event files to --out")
    prompt: str = flag("", "prompt of the samples (default: the start of the validation text)")
    # names of the flags on the command line
    given: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check(self)
        if self.resume and self.overwrite:
            raise ValueError(
                "overwrite must be left out where resume is given: one keeps the run, one drops it"
            )
        if self.steps is not None and (self.warmup or 0) > self.steps:
            raise ValueError(f"warmup must be <= steps ({self.steps}), not {self.warmup}")
        if self.steps is not None and self.eval_every is not None and self.patience is not None:
            evaluations = -(-self.steps // self.eval_every)
            if self.patience >= evaluations:
                raise ValueError(
                    f"patience must be < {evaluations}, the evaluations in {self.steps} steps with "
                    f"--eval_every {self.eval_every}, not {self.patience}"
                )
        if self.init == "scratch" and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head ({self.n_head}), not {self.n_embd}"
            )
        if self.lora_rank and self.init == "scratch":
            raise ValueError("lora_rank must be 0 with --init scratch: nothing to adapt")
        if self.fsdp:
            self._check_fsdp()

    def _check_fsdp(self) -> None:
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("fsdp must come with torchrun --nproc_per_node=N train.py, not python")
        for name, plain in (
            ("lora_rank", 0),
            ("ema", 0),
            ("optimizer", "adamw"),
        ):
            if getattr(self, name) != plain:
                raise ValueError(f"{name} must be {plain} with --fsdp, not {getattr(self, name)!r}")
        if self.dtype == "float16":
            raise ValueError("dtype must be float32 or bfloat16 with --fsdp, not 'float16'")

    def shape(self, vocab_size: int, end_of_text: int) -> GPTConfig:
        """Return the shape of a new model, given the vocabulary and its end-of-text id."""
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=self.block_size or 256,
            n_layer=self.n_layer,
            n_head=self.n_head,
            n_embd=self.n_embd,
            dropout=self.dropout,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> "TrainConfig":
        """Build the configuration from the given flags. Raises ValueError for clashing flags."""
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
        if given.get("tensorboard") and find_spec("tensorboard") is None:
            raise ValueError("tensorboard needs its package: pip install 'nanogpt2[tensorboard]'")
        if "lora_alpha" in given and not given.get("lora_rank"):
            raise ValueError("lora_alpha must come with lora_rank")
        if "label_column" in given and given.get("task") != "classify":
            raise ValueError("label_column must come with --task classify")
        for name in ("prompt", "sample_every"):
            if name in given and given.get("task") == "classify":
                raise ValueError(
                    f"{name} must be left out with --task classify, which writes nothing"
                )
        if "text_column" in given and given.get("task") == "chat":
            raise ValueError("text_column must be left out with --task chat, whose columns are set")
        with usage_error("DATA"):
            check_data(given["data"])
        if given.get("validation") is not None:
            with usage_error("--validation"):
                check_data(given["validation"])
        if given.get("init") != "scratch":
            with usage_error("--init"):
                check_model(given.get("init", "gpt2"))
        return cls(**given, given=tuple(given))


def check_data(source: str) -> None:
    """Raise ValueError if `source` cannot be training data. Reads no text."""
    if source not in (*DATA_NAMES, "-"):
        data_files(source)


def data_files(source: str) -> list[Path]:
    """List the files of a path or a glob, sorted by name; of a folder, the files of known kinds.

    Raises ValueError if no file matches.
    """
    path = Path(source)
    if not source or "\0" in source:
        found = []
    elif path.is_dir():
        found = [p for p in path.rglob("*") if data_kind(p) and p.is_file()]
        if not found:
            raise ValueError(
                f"{show(source)} has no file to read ({', '.join(DATA_KINDS)}; also .gz, .zst)"
            )
    elif path.is_file():
        found = [path]
    else:
        # Path.glob rejects absolute patterns
        names = glob.glob(source, recursive=True)  # noqa: PTH207
        found = [path for path in map(Path, names) if path.is_file()]
    if not found:
        known = ", ".join(DATA_NAMES)
        raise ValueError(f"{show(source)} is not a file, a folder or a known text ({known})")
    return sorted(found)


def data_kind(path: str | Path) -> str | None:
    """Return a file's kind by its suffix: one of DATA_KINDS, or None."""
    name = str(path).lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for kind in DATA_KINDS if name.endswith(kind)), None)
