"""The command line of train.py: the data, where to start from, how long and how to train.

None stands for a value that suits the model and the device, which train.py fills in. This file
opens no file.
"""

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from nanogpt2.config.model import DEVICES, MOST_LAYERS, check_model
from nanogpt2.flags import MAX_SEED, check, flag, show, wrong_use

DATA_NAMES = ("pydocs", "shakespeare")


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
