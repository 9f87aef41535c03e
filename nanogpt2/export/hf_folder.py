"""--to hf: the folder of transformers, with config.json and tokenizer.json.

The check reads every tensor again and compares its bits. Where transformers is installed, its
logits after ten prompts must equal ours within 1e-4, its greedy tokens ours, and its tokenizer must
give our ids. vLLM and CTranslate2's converter read the same folder.
"""

from pathlib import Path
from typing import Any

import torch

from nanogpt2.checkpoints import tensors as tensor_file
from nanogpt2.checkpoints.folder import WEIGHTS
from nanogpt2.checkpoints.load import load_model
from nanogpt2.checkpoints.names import HEAD, PREFIX, TRANSPOSED
from nanogpt2.checkpoints.save import save_model
from nanogpt2.export.counterpart import (
    TOLERANCE,
    CheckError,
    agreement,
    answers,
    is_installed,
    largest_difference,
)
from nanogpt2.export.prompts import NEW, PROMPTS, continuation, greedy_logits, prompts_for
from nanogpt2.export.source import Source


def write(source: Source, folder: Path) -> None:
    """Write what `save_model` writes."""
    save_model(source.model, folder, source.tokenizer, source.is_chat)


def check(source: Source, folder: Path) -> dict[str, Any]:
    """Read the folder again, here and by transformers. Raises CheckError where it differs."""
    figures: dict[str, Any] = {"tensors_equal": compare(source, folder / WEIGHTS)}
    if not is_installed("transformers"):
        return figures | {"transformers": None}
    del source.model
    model = load_model(folder)
    prompts = prompts_for(model, source.tokenizer, NEW)
    ours = [continuation(model, prompt, NEW) for prompt in prompts]
    logits = torch.stack([next(greedy_logits(model, prompt, 1)) for prompt in prompts])
    del model
    new = min(len(mine.tokens) for mine in ours)
    job = {"prompts": prompts, "new": new, "texts": PROMPTS if source.tokenizer else ()}
    found = answers("with_transformers", folder, job | {"ids": [source.encode(t) for t in PROMPTS]})
    if not found["encodes"]:
        raise CheckError("transformers' tokenizer gives other ids")
    figures["transformers"] = str(found["version"])
    figures["logits_difference"] = largest_difference(
        logits.numpy(), found["logits"], "transformers"
    )
    return figures | agreement(ours, found["tokens"].tolist(), "transformers", 2 * TOLERANCE)


def compare(source: Source, file: Path) -> int:
    """Return the number of tensors, all of them equal. Raises CheckError for the first other."""
    expected = {
        name if name.startswith(HEAD) else PREFIX + name: tensor
        for name, tensor in source.tensors()
    }
    names = set(expected)
    with tensor_file.opened(file) as opened:
        for name, tensor in opened.read(names, passing=names):
            ours = expected.pop(name)
            ours = ours.t() if name.endswith(TRANSPOSED) else ours
            if ours.dtype != tensor.dtype or not torch.equal(ours, tensor):
                raise CheckError(f"tensor {name} is another after it was read again")
    if expected:
        raise CheckError(f"tensor {next(iter(expected))} is missing in what was written")
    return len(names)
