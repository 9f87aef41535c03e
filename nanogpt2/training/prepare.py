"""Everything before the first step: join the processes, load the model, read the data, check.

Each `usage_error` below turns a wrong flag into one line of error and exit code 2. Nothing but the
lock is written to the run's folder here. This file does not know the loop.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt2 import ops, terminal
from nanogpt2.checkpoints import load as weights
from nanogpt2.checkpoints.folder import model_digest
from nanogpt2.classifier import GPTClassifier, Model
from nanogpt2.config import TrainConfig, check_data, fail, read_mix, usage_error
from nanogpt2.data.corpus import Columns, Corpus, load_corpus
from nanogpt2.data.examples import Examples
from nanogpt2.data.loader import (
    Batches,
    MixedBatches,
    MixedValidation,
    ValidationBatches,
    check_order,
    make_batches,
    validation_batches,
)
from nanogpt2.data.mix import MixedCorpus, load_mix
from nanogpt2.data.preview import preview
from nanogpt2.memory import is_out_of_memory, out_of_memory_line
from nanogpt2.tokenizer import Tokenizer, byte_tokenizer, gpt2_tokenizer
from nanogpt2.training import checkpoint as store
from nanogpt2.training import distributed, plan
from nanogpt2.training.distributed import World
from nanogpt2.training.run_folder import RunFolder
from nanogpt2.training.snapshot import Snapshot
from nanogpt2.training.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """Everything that a run works with."""

    config: TrainConfig  # every automatic value filled in
    folder: RunFolder
    trainer: Trainer
    tokenizer: Tokenizer
    batches: Batches
    validation: ValidationBatches | MixedValidation
    prompt: list[int]  # the samples continue this prompt
    state: dict[str, Any]  # state.json of the checkpoint to resume; empty for a new run
    tensors: dict[str, Tensor]  # the trainer's tensors in that checkpoint

    def restore(self) -> None:
        """Restore the trainer from the checkpoint, if any."""
        if self.state:
            self.trainer.restore(self.tensors, self.state["micro_batch"])
        self.trainer.world.limit_waits(self.config.timeout)


@contextmanager
def joined(config: TrainConfig) -> Iterator[tuple[RunFolder, World]]:
    """Join the processes of the run; at the end, unlock the folder and leave them.

    An error that stops the run in between becomes one line on stderr and exit code 1.
    """
    folder = RunFolder(Path(config.out))
    with usage_error("--device"):
        world = distributed.join(config.device, config.fsdp, config.threads)
    folder.writes = world.is_first
    terminal.enable_output(world.is_first)
    try:
        yield folder, world
    except (FloatingPointError, OSError) as error:
        fail(str(error), code=1)
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            fail(out_of_memory_line(error), code=1)
        if not world.is_loss(error):
            raise
        wait = f"{config.timeout} s (--timeout)"
        fail(f"another process ended, or did not answer within {wait}: --resume goes on", code=1)
    finally:
        folder.close()
        world.leave()


def prepare(config: TrainConfig, folder: RunFolder, world: World) -> Run | None:
    """Load everything that the run needs. Return None when the run to resume is finished.

    Wrong use exits with code 2 and writes nothing. With records for DATA, prints a preview of the
    next batch.
    """
    config = claim(config, folder)
    checkpoint, tensors, state = read_checkpoint(config, folder)
    if state.get("finished"):
        record = folder.record()
        former = (record["config"]["steps"], *record.get("steps", ()))
        if state["step"] in former and state["step"] < (config.steps or 0):
            # --steps has extended the run
            state["finished"] = False
        elif "after" in record:
            terminal.note(
                f"the run in {folder.path} is finished: nothing to resume; to train its model "
                f"further: --init {folder.path} --out MORE"
            )
            return None
    with usage_error():
        ops.choose_kernels(config.kernels, world.device)
    with usage_error("--init"):
        model, tokenizer = make_model(config, checkpoint, world.device)
        model.use_kernels(config.kernels, world.device)
    if config.validation is not None:
        with usage_error("--validation"):
            check_data(config.validation)
    with usage_error("--mix" if config.mix else "DATA"), world.first_before_others():
        corpus = read_data(config, model, tokenizer)
    with usage_error("--resume"):
        moved = config.resume and folder.record()["config"].get("init") != config.init
        # a checkpoint has all weights, but for LoRA's initial ones
        needed = checkpoint is None or config.lora_rank or moved
        init = {"init": model_digest(config.init)} if needed and config.init != "scratch" else {}
        folder.hold_to(config, data=corpus.sha256, **init)
    if config.task == "classify" and not isinstance(model, GPTClassifier):
        model = GPTClassifier(model, corpus.labels)
    with usage_error():
        block_size = plan.block_size(config, model.config, world, corpus.max_block_sizes)
        batches = make_batches(corpus.train, block_size, config.seed)
        config = plan.fill_in(config, model.config, world, block_size, batches.sequences)
        plan.check_memory(config, model.config, world)
    terminal.note(corpus.describe(block_size))
    if isinstance(batches, MixedBatches):
        terminal.note(batches.describe(config.steps * config.batch_size * config.grad_accum))
    folder.read = [asdict(reading) for reading in corpus.readings]
    validation = validation_batches(corpus.validation, config.batch_size, block_size)
    trainer = Trainer(config, model, world)
    if checkpoint:
        with usage_error("--resume"):
            store.check_state(checkpoint, state, config)
            check_order(batches, state.get("order"))
            trainer.check(tensors, state["step"])
    prompt = tokenizer.encode(config.prompt) or corpus.prompt(tokenizer)
    if isinstance(corpus.train, Examples):
        first = state.get("step", 0) * config.batch_size * config.grad_accum
        x, y = batches.rows(first, min(2, config.batch_size))
        terminal.note(preview(x, y, tokenizer, corpus.labels))
    return Run(config, folder, trainer, tokenizer, batches, validation, prompt, state, tensors)


def claim(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """Lock the folder, then check it again: a run may have finished there since the first check."""
    if config.dry_run:
        return config
    with usage_error("--out"):
        try:
            folder.lock()
        except OSError:
            # a finished run on a read-only disk: nothing will be written
            if not config.resume or os.access(folder.path, os.W_OK):
                raise
        return folder.check(config)


def read_checkpoint(
    config: TrainConfig, folder: RunFolder
) -> tuple[Path | None, dict[str, Tensor], dict[str, Any]]:
    """Find and read the checkpoint to resume: its path, the trainer's tensors and state.json."""
    with usage_error("--resume"):
        if not config.resume:
            return None, {}, {}
        checkpoint = store.latest_checkpoint(folder.checkpoints, folder.run_id)
        if checkpoint is None:
            folder.check_unsaved()
            return None, {}, {}
        tensors, state = store.read_checkpoint(checkpoint)
        # before training: the end of the run would report a damaged one
        Snapshot.from_record(folder.record()["before"])
        folder.hold_to_checkpoint(config, state.get("settings", {}))
    return checkpoint, tensors, state


def make_model(
    config: TrainConfig, checkpoint: Path | None, device: str
) -> tuple[Model, Tokenizer]:
    """Load the model to start from, or draw a new one, and load its tokenizer."""
    torch.manual_seed(config.seed)
    # FSDP shards the weights from the CPU
    device = "cpu" if config.fsdp else device
    if config.init == "scratch" and checkpoint is None:
        tokenizer = gpt2_tokenizer() if config.tokenizer == "gpt2" else byte_tokenizer()
        tokenizer = with_added(tokenizer, config)
        shape = config.shape(tokenizer.vocab_size, tokenizer.end_of_text)
        return weights.new_model(shape, device), tokenizer
    # LoRA keeps the initial weights; the checkpoint's A and B are restored later
    source = config.init if checkpoint is None or config.lora_rank else checkpoint
    has_head = config.task == "classify" and weights.is_classifier(source)
    load = weights.load_classifier if has_head else weights.load_model
    model, tokenizer = load(source, device, dropout=config.dropout), weights.load_tokenizer(source)
    if checkpoint is None and config.added:
        tokenizer = with_added(tokenizer, config)
        add_rows(model, tokenizer.vocab_size)
    if config.task != "classify":
        # the id between texts: a ValueError where there is none
        _ = tokenizer.end_of_text
    return model, tokenizer


def with_added(tokenizer: Tokenizer, config: TrainConfig) -> Tokenizer:
    """Return the tokenizer with the tokens of --add_tokens."""
    with usage_error("--add_tokens"):
        return tokenizer.with_added(config.added) if config.added else tokenizer


def add_rows(model: Model, vocab_size: int) -> None:
    """Append rows to the token embedding, each the mean of the old ones, up to `vocab_size`.

    A head of its own gets rows in the same way. Raises ValueError for a model whose rows are more
    than its tokens already.
    """
    gpt = model.transformer if isinstance(model, GPTClassifier) else model
    rows = gpt.config.vocab_size
    if (new := vocab_size - rows) < 0:
        raise ValueError(f"the model has {rows} rows, more than its tokenizer has tokens")
    tables: list[Any] = [gpt.wte] if gpt.config.tie_word_embeddings else [gpt.wte, gpt.lm_head]
    for table in tables:
        old = table.weight.detach()  # (V, C)
        mean = old.float().mean(0, keepdim=True).to(old.dtype)  # (1, C)
        table.weight = torch.nn.Parameter(torch.cat([old, mean.expand(new, -1)]))
    gpt.wte.num_embeddings = vocab_size
    model.config = gpt.config = replace(gpt.config, vocab_size=vocab_size)


def read_data(config: TrainConfig, model: Model, tokenizer: Tokenizer) -> Corpus | MixedCorpus:
    """Read the task's data. A model with labels accepts its own labels only."""
    how: dict[str, Any] = {
        "validation": config.validation,
        "columns": Columns(config.text_column, config.label_column),
        "vocab_size": model.config.vocab_size,
        "labels": getattr(model, "labels", None),
        "encoding": config.encoding,
        "skip_bad": config.skip_bad,
        "out": config.out,
        "processes": config.threads,
    }
    if config.mix:
        return load_mix(read_mix(config.mix), tokenizer, config.task, **how)
    return load_corpus(config.data, tokenizer, config.task, **how)
