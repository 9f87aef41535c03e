"""The command line of train.py: the data, the initial model, the settings of training.

None means automatic: training/plan.py fills in a value for the model and the device. This file
opens no file.
"""

import codecs
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

from nanogpt2.config.flags import MAX_SEED, MOST_THREADS, check, fail, flag, show, usage_error
from nanogpt2.config.mix import read_mix
from nanogpt2.config.model import DEVICES, DTYPES, KERNELS, MOST_LAYERS, GPTConfig, check_model
from nanogpt2.config.sources import check_data

# a larger scale drowns the model's own weights
MOST_ALPHA = 10**6
MOST_ADDED = 1000


@dataclass(frozen=True)
class TrainConfig:
    """python train.py DATA [flags]: train or fine-tune a GPT-2 on text.

    DATA is a file (text, or records as .jsonl, .json, .csv, .tsv, .parquet or .arrow; also .gz and
    .zst), a folder or a glob of such files, a data set saved by `datasets`, token ids (nanoGPT's
    train.bin, llm.c's shards, .npy, .tokens), - for standard input, or a name: pydocs (the language
    reference that every Python carries) or shakespeare (downloaded once). --out becomes a folder
    that `sample.py --model` and transformers load. Several devices: torchrun --nproc_per_node=N
    train.py DATA. With --resume, DATA is the run's.
    """

    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "python train.py book.txt --init demo --steps 300",
        "python train.py chat.jsonl --task chat",
        "python train.py --resume",
    )
    GROUPS: ClassVar[dict[str, str]] = {
        "task": "the data and the model",
        "out": "the run's folder",
        "epochs": "length",
        "optimizer": "optimization",
        "n_layer": "a new model, with --init scratch",
        "seed": "where and how",
        "eval_every": "evaluation and output",
    }
    ALIASES: ClassVar[dict[str, str]] = {
        # transformers
        "gradient_accumulation_steps": "grad_accum",
        "learning_rate": "lr",
        "max_grad_norm": "grad_clip",
        "max_steps": "steps",
        "num_train_epochs": "epochs",
        "output_dir": "out",
        "warmup_steps": "warmup",
        "save_steps": "save_every",
        "eval_steps": "eval_every",
        "gradient_checkpointing": "activation_checkpointing",
        "model_name_or_path": "init",
        "max_seq_length": "block_size",
        "max_length": "block_size",
        "max_seq_len": "block_size",
        "num_epochs": "epochs",
        "max_train_steps": "steps",
        "num_train_steps": "steps",
        "text_column_name": "text_column",
        "label_column_name": "label_column",
        "torch_compile": "compile",
        "torch_dtype": "dtype",
        "lr_scheduler_type": "schedule",
        "early_stopping_patience": "patience",
        # nanoGPT
        "eval_interval": "eval_every",
        "max_iters": "steps",
        "out_dir": "out",
        "warmup_iters": "warmup",
        "gradient_accumulation": "grad_accum",
        # llama.cpp
        "ctx_size": "block_size",
        "n_ctx": "block_size",
        # peft, gpt-2-simple
        "accumulate_gradients": "grad_accum",
        "use_memory_saving_gradients": "activation_checkpointing",
        "lora_r": "lora_rank",
        "save_total_limit": "keep",
    }
    HINTS: ClassVar[dict[str, str]] = {
        "per_device_train_batch_size": "--batch_size counts all devices' sequences",
        "per_device_batch_size": "--batch_size counts all devices' sequences",
        "decay_lr": "--schedule constant turns the decay off",
        "min_lr": "every --schedule but constant falls to 0",
        "lr_decay_iters": "the --schedule falls over all --steps",
        "warmup_ratio": "--warmup counts steps",
        "init_from": "use --init gpt2, scratch or a path",
        "model": "the model to start from is --init",
        "model_name": "the model to start from is --init",
        "base_model": "the model to start from is --init",
        "run_name": "the run's folder is --out",
        "checkpoint_dir": "the run's folder is --out",
        "restore_from": "use --resume, or --init FOLDER for a new run",
        "resume_from_checkpoint": "use --resume: it goes on in --out",
        "overwrite_output_dir": "use --overwrite, which deletes the run in --out",
        "fp16": "use --dtype float16",
        "bf16": "use --dtype bfloat16",
        "load_in_8bit": "training keeps whole weights; --lora_rank 8 needs less memory",
        "load_in_4bit": "training keeps whole weights; --lora_rank 8 needs less memory",
        "train_data_file": "DATA stands by itself: train.py book.txt",
        "train_data": "DATA stands by itself: train.py book.txt",
        "file": "DATA stands by itself: train.py book.txt",
        "dataset_name": "DATA stands by itself: train.py book.txt",
        "dataset_path": "DATA stands by itself: train.py book.txt",
        "train_file": "DATA stands by itself: train.py book.txt",
        "dataset": "DATA stands by itself: train.py book.txt",
        "data": "DATA stands by itself: train.py book.txt",
        "data_path": "DATA stands by itself: train.py book.txt",
        "validation_file": "use --validation FILE",
        "eval_data_file": "use --validation FILE",
        "val_dataset": "use --validation FILE",
        "validation_split_percentage": "a tenth is held out, or use --validation FILE",
        "per_device_eval_batch_size": "evaluations use --batch_size",
        "eval_batch_size": "evaluations use --batch_size",
        "eval_strategy": "use --eval_every, counted in steps",
        "evaluation_strategy": "use --eval_every, counted in steps",
        "save_strategy": "use --save_every, counted in steps",
        "load_best_model_at_end": "the best model is OUT/checkpoints/best",
        "push_to_hub": "the folder --out loads in transformers, whose push_to_hub uploads it",
        "eval_iters": "every evaluation reads all validation data",
        "eval_only": "use nanogpt2 evaluate",
        "do_train": "train.py always trains; nanogpt2 evaluate measures",
        "do_eval": "--eval_every evaluates; nanogpt2 evaluate measures",
        "report_to": "use --tensorboard",
        "wandb_log": "use --tensorboard",
        "logging_steps": "every step is logged in metrics.jsonl",
        "log_interval": "every step is logged in metrics.jsonl",
        "always_save_checkpoint": "use --save_every",
        "bias": "GPT-2 always has biases",
        "optim": "use --optimizer adamw or muon",
        "adam_beta1": "AdamW's betas are fixed: training/optim.py",
        "beta1": "AdamW's betas are fixed: training/optim.py",
        "beta2": "AdamW's betas are fixed: training/optim.py",
        "use_lora": "use --lora_rank 8",
        "use_peft": "use --lora_rank 8",
        "lora_dropout": "use --dropout",
        "deepspeed": "use torchrun --nproc_per_node=N train.py DATA --fsdp",
        "multi_gpu": "use torchrun --nproc_per_node=N train.py DATA",
        "no_cuda": "use --device cpu",
        "use_cpu": "use --device cpu",
        "cpu": "use --device cpu",
        "special_tokens": "use --add_tokens '<user>,<bot>'",
        "additional_special_tokens": "use --add_tokens '<user>,<bot>'",
        "tokenizer_name": "the tokenizer is the model's; with --init scratch use --tokenizer",
        "model_size": "use --init gpt2, gpt2-medium, gpt2-large or gpt2-xl",
        "temperature": "texts are sample.py's: sample.py --model out --temperature 0.7",
        "gpu": "use --device cuda",
        "m": "the model to start from is --init",
        "o": "the folder to write is --out",
        "n": "the number of steps is --steps, of epochs --epochs",
    }
    SECOND: ClassVar[str] = "several files: a folder, or a glob in quotes: 'texts/*.txt'"
    data: str = flag("", "a file, a folder, a glob, -, pydocs or shakespeare", positional=True)
    task: str = flag("lm", "what to learn from DATA", choices=("lm", "chat", "classify"))
    mix: str = flag("", "sources by weight, in DATA's place: a.jsonl=3,b.txt=1")
    validation: str | None = flag(None, "texts to validate on (default: a tenth of DATA)")
    text_column: str = flag("text", "of a .jsonl, .json, .csv, .tsv, .parquet or .arrow file")
    label_column: str = flag("label", "with --task classify")
    encoding: str = flag("utf-8", "of DATA's files without a byte-order mark")
    skip_bad: bool = flag(False, "skip and count the records that cannot be used")
    init: str = flag(
        "gpt2",
        "gpt2, gpt2-medium, gpt2-large, gpt2-xl, demo, scratch, USER/NAME of the hub, or a path: "
        "a folder, or a file of safetensors, PyTorch (.bin, .pt) or llm.c",
    )
    add_tokens: str = flag("", "new tokens, with commas between: '<user>,<bot>'")
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
    threads: int | None = flag(
        None, "threads on a CPU (default: all it may use)", low=1, high=MOST_THREADS
    )
    dtype: str = flag("auto", "precision of the matrix products", choices=("auto", *DTYPES))
    kernels: str = flag(
        "auto",
        "the implementation; auto: triton on a GPU; reference: ops.py's formulas",
        choices=KERNELS,
    )
    compile: bool = flag(False, "use torch.compile: minutes to start, faster steps")
    activation_checkpointing: bool = flag(False, "recompute activations instead of keeping them")
    fsdp: bool = flag(False, "with torchrun: shard the weights too, for gpt2-xl")
    timeout: int = flag(300, "with torchrun: seconds to wait for a process that stopped", low=1)
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
        if not is_encoding(self.encoding):
            raise ValueError(f"encoding must be a text encoding, not {show(self.encoding)}")
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
        self._check_added()
        if self.fsdp:
            self._check_fsdp()

    @property
    def added(self) -> list[str]:
        """The tokens of add_tokens."""
        return self.add_tokens.split(",") if self.add_tokens else []

    def _check_added(self) -> None:
        added = self.added
        if self.lora_rank and added:
            raise ValueError(
                "add_tokens must be left out with --lora_rank, which trains no embedding: add them "
                "in a run without it, then --init its folder"
            )
        if len(added) > MOST_ADDED:
            raise ValueError(f"add_tokens must be at most {MOST_ADDED} tokens, not {len(added)}")
        for token in added:
            if not token or token != token.strip():
                raise ValueError(
                    f"add_tokens must be tokens with commas between and no spaces around them, "
                    f"not {show(self.add_tokens)}"
                )
            if added.count(token) > 1:
                raise ValueError(f"add_tokens must be different tokens, not {show(token)} twice")

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
        if given.get("add_tokens") == "":
            raise ValueError("add_tokens must name at least one token, not ''")
        for name in ("prompt", "sample_every"):
            if name in given and given.get("task") == "classify":
                raise ValueError(
                    f"{name} must be left out with --task classify, which writes nothing"
                )
        if "text_column" in given and given.get("task") == "chat":
            raise ValueError("text_column must be left out with --task chat, whose columns are set")
        if "mix" in given:
            cls._check_mix(given)
        elif "data" in given:
            with usage_error("DATA"):
                check_data(given["data"], given.get("out", "out"))
        elif not given.get("resume"):
            fail("DATA is missing: a file, a folder, a glob, -, pydocs or shakespeare")
        if given.get("validation") is not None:
            with usage_error("--validation"):
                check_data(given["validation"], given.get("out", "out"))
        if given.get("init") != "scratch":
            with usage_error("--init"):
                check_model(given.get("init", "gpt2"))
        return cls(**given, given=tuple(given))

    @staticmethod
    def _check_mix(given: dict[str, Any]) -> None:
        """Raise ValueError for a wrong --mix; exit where a source of it cannot be data."""
        if "data" in given:
            raise ValueError(f"mix must be left out where DATA is given, not {show(given['mix'])}")
        if given.get("task") == "classify":
            raise ValueError("mix must come with --task lm or chat, not classify")
        for source in read_mix(given["mix"]):
            with usage_error("--mix"):
                check_data(source, given.get("out", "out"))


def is_encoding(name: str) -> bool:
    """Tell whether Python knows a text encoding of this name."""
    try:
        codecs.lookup(name)
        # no empty text: its encoding is not looked up
        " ".encode(name)
    except (LookupError, ValueError):
        return False
    return True
