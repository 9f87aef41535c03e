"""The files of a model beside its tensors: find them, read them, check them.

    model.safetensors, model.int8.safetensors, or shards named by model.safetensors.index.json;
    else pytorch_model.bin, or its shards; nanoGPT's ckpt.pt; minGPT's model.pt
    config.json, generation_config.json        the shape, and the options of decoding
    vocab.json or tokenizer.json, ...          the vocabulary
    manifest.json                              {file: {"size", "sha256"}}, in a run's folder

With a manifest.json, each file read from the folder must have the SHA-256 stated there. This file
reads no tensor and does not import torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from nanogpt2 import hub
from nanogpt2.checkpoints import header as tensor_header
from nanogpt2.config import (
    PICKLES,
    PRESETS,
    GenerationConfig,
    GPTConfig,
    check_model,
    official_name,
    other_format,
    repository_of,
)
from nanogpt2.config.flags import show
from nanogpt2.config.generation import FOREIGN
from nanogpt2.filesystem import open_regular
from nanogpt2.repository import fetch_repository

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
# not WEIGHTS: transformers would read the numbers without their scales
WEIGHTS_INT8 = "model.int8.safetensors"
PICKLED = "pytorch_model.bin"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LARGEST_JSON = 2**25  # bytes
# without these texts the weights mean something else
TIED = ("config.json", "generation_config.json")
# what config.json states where it is not OpenAI's
UNUSUAL = (
    "n_inner",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "tie_word_embeddings",
)
# by file: the SHA-256 of the text replaced and the new text, from a header
Replaces = Mapping[str, tuple[Any, Any]]
# heads by minGPT's names of models
MINGPT_HEADS = {
    "openai-gpt": 12,
    "gpt2": 12,
    "gpt2-medium": 16,
    "gpt2-large": 20,
    "gpt2-xl": 25,
    "gopher-44m": 16,
    "gpt-mini": 6,
    "gpt-micro": 4,
    "gpt-nano": 3,
}
# config.json's names that differ from ours
THEIR_NAMES = {"block_size": "n_positions", "mlp_width": "n_inner"}
# other names of tanh GELU and of erf GELU
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python": "gelu",
}
# architectures that are taken for GPT-2
OTHERS = {
    "openai-gpt": "the first GPT, with layer norms after the sums",
    "gpt_neo": "GPT-Neo, half of whose layers see 256 tokens",
    "gpt_neox": "GPT-NeoX, with rotary positions",
    "gptj": "GPT-J, with rotary positions",
    "gpt_bigcode": "GPTBigCode, whose heads share their keys and values",
    "imagegpt": "Image GPT, which writes pixels",
}


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model's tensors, its shape where stated, config.json and the manifest."""

    files: tuple[Path, ...]
    config: GPTConfig | None
    manifest: dict[str, dict[str, Any]] | None = field(default=None, repr=False)
    stated: dict[str, Any] = field(default_factory=dict, repr=False)  # config.json
    # generation_config.json's options, without the ids that are in `config`
    generation: dict[str, Any] = field(default_factory=dict, repr=False)
    is_settled: bool = True  # False where the folder's texts are of an earlier model
    stated_by: str = "config.json"  # the file that states the shape

    def sha256_of(self, file: Path) -> str | None:
        """Return the digest in the manifest; None without a manifest or an entry in it."""
        return (self.manifest or {}).get(file.name, {}).get("sha256")


def find_files(name: str | Path) -> ModelFiles:
    """Find a model's files by its name or path, downloading them if needed; read its config.json.

    Raises ValueError for a name or path without a checkpoint, OSError for a failed read or
    download.
    """
    check_model(name)
    if (official := official_name(name)) is not None:
        return ModelFiles((hub.fetch_weights(official),), PRESETS[official])
    found = repository_of(name)
    return _files_at(_path(name)) if found is None else _files_of(*found, str(name))


def _files_of(repo: str, revision: str, name: str) -> ModelFiles:
    """Find the files of a repository of the hub. Another model's weights are not downloaded."""

    def accept(folder: Path) -> None:
        with _short_path(folder):
            _read_configs(folder, None)

    folder = fetch_repository(repo, revision, accept, name)
    with _short_path(folder, f"{repo}/"):
        return _files_at(folder)


@contextmanager
def _short_path(folder: Path, name: str = "") -> Iterator[None]:
    """Write `name` in place of the folder's path, which would fill an error's line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(f"{folder}{os.sep}", name)) from None


def _files_at(path: Path) -> ModelFiles:
    folder = path if path.is_dir() else path.parent
    if folder.is_symlink():
        # a run's `best` may change its target between two reads
        target = folder.resolve()
        path, folder = (target if path == folder else target / path.name), target
    manifest = read_manifest(folder)
    found = (path,) if folder != path else _weights_in(folder, manifest)
    config, stated, generation = _read_configs(folder, manifest)
    names = {f.name for f in fields(GenerationConfig)} - {"eos_token_id", "pad_token_id"}
    options = {k: v for k, v in generation.items() if k in (*names, *FOREIGN)}
    return ModelFiles(found, config, manifest, stated, options)


def _read_configs(
    folder: Path, manifest: dict[str, Any] | None
) -> tuple[GPTConfig | None, dict[str, Any], dict[str, Any]]:
    """Return the shape and the contents of config.json and generation_config.json."""
    stated, generation = (_read_json(folder / name, manifest) for name in TIED)
    config = None
    if stated is not None and mingpt_heads(stated) is None:
        config = _config(folder / TIED[0], stated, generation or {})
    return config, stated or {}, generation or {}


def name_for_others(name: str | Path) -> str:
    """Return what transformers and PEFT find a model by: a repository or an absolute path.

    A name that is neither ours nor a path is theirs already.
    """
    if (official := official_name(name)) is not None:
        return hub.RELEASES[official].repo
    if (found := repository_of(name)) is not None:
        return found[0]
    path = _path(name)
    if not path.exists():
        return str(name)
    # they take a folder, not the file in it
    return str((path.parent if path.name in (WEIGHTS, PICKLED) else path).absolute())


def _path(name: str | Path) -> Path:
    return Path(str(files("nanogpt2").joinpath("assets/demo"))) if name == "demo" else Path(name)


def current(source: ModelFiles, replaces: Replaces) -> ModelFiles:
    """Return the files with the texts of these tensors, where a save was cut short: replace.py.

    replaces: from the tensors' header. Raises ValueError for an invalid text.
    """
    folder = source.files[0].parent
    taken = {name: current_text(folder / name, replaces) for name in TIED}
    texts = {n: _json_object(folder / n, t.encode()) for n, t in taken.items() if t is not None}
    if not texts:
        return source
    now = {name: texts.get(name) or _read_json(folder / name, source.manifest) for name in TIED}
    stated, generation = (now[name] or {} for name in TIED)
    config = _config(folder / TIED[0], stated, generation)
    return replace(source, config=config, stated=stated, is_settled=False)


def with_stated(source: ModelFiles, file: Path, stated: Mapping[str, Any]) -> ModelFiles:
    """Return the files with the shape that a file of tensors states; config.json beside it counts.

    Raises ValueError for another shape than GPT-2's, and where the two differ in n_head.
    """
    if not stated:
        return source
    if source.config is None:
        generation = _read_json(file.parent / "generation_config.json", source.manifest)
        config = _config(file, dict(stated), generation or {})
        return replace(source, config=config, stated=dict(stated), stated_by=file.name)
    if source.config.n_head != stated["n_head"]:
        raise ValueError(
            f"{str(file.parent / 'config.json')!r}: n_head is {source.config.n_head}, but "
            f"{stated['n_head']} by {file.name}"
        )
    return source


def current_text(path: Path, replaces: Replaces) -> str | None:
    """Return the text that a header states in place of this file; None where the file counts."""
    old, new = replaces.get(path.name, (None, None))
    return str(new) if new is not None and digest_of_text(path) == old else None


def digest_of_text(text: str | Path) -> str | None:
    """Return the SHA-256 of a text or of a file's bytes, in hexadecimal; None without the file."""
    if isinstance(text, Path):
        return hashlib.sha256(text.read_bytes()).hexdigest() if text.is_file() else None
    return hashlib.sha256(text.encode()).hexdigest()


def digest_ahead(name: str | Path) -> None:
    """Start to digest a model's files in the background, for a later `load_generator`.

    Errors in the files are left for `load_generator` to report.
    """
    # files of the hub were digested after their download
    if official_name(name) is None and repository_of(name) is None:
        with suppress(ValueError, OSError):
            source = find_files(name)
            for file in source.files:
                tensor_header.digest_ahead(file, source.sha256_of(file))


def _weights_in(folder: Path, manifest: dict[str, Any] | None) -> tuple[Path, ...]:
    ours, theirs = ((WEIGHTS, WEIGHTS_INT8), INDEXES[0]), ((PICKLED,), INDEXES[1])
    for names, index in (ours, theirs, (("ckpt.pt", "model.pt"), None)):
        for name in names:
            if (folder / name).exists():
                return (folder / name,)
        found = _read_json(folder / index, manifest) if index else None
        if index and found is not None:
            shards = found.get("weight_map")
            if not (isinstance(shards, dict) and shards and all(map(_is_name, shards.values()))):
                raise ValueError(
                    f"{str(folder / index)!r} has no weight_map of tensors to files beside it"
                )
            return tuple(folder / shard for shard in sorted(set(shards.values())))
    present = sorted(file.name for file in folder.iterdir())
    if "adapter_config.json" in present:
        raise ValueError(
            f"{str(folder)!r} holds only a LoRA adapter: merge it into its model by PEFT's "
            "merge_and_unload, and save that"
        )
    for name in present:
        if other_format(name) is not None:
            check_model(folder / name)
    named = [name for name in present if Path(name).suffix in (".safetensors", *PICKLES)]
    hint = f"; name a file of it, as {str(folder / named[0])!r}" if named else ""
    raise ValueError(f"{str(folder)!r} holds no {WEIGHTS} and no {PICKLED}{hint}")


def _is_name(value: Any) -> bool:
    """Return True for a file name without a folder."""
    return isinstance(value, str) and Path(value).name == value


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return manifest.json, or None without one. Raises ValueError for a damaged one."""
    manifest = _read_json(folder / MANIFEST)
    if manifest is None:
        return None
    if not manifest or not all(
        _is_name(name) and isinstance(entry, dict) and isinstance(entry.get("sha256"), str)
        for name, entry in manifest.items()
    ):
        raise ValueError(f"{str(folder / MANIFEST)!r} is no list of files, sizes and SHA-256")
    return manifest


def _read_json(path: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Read a JSON object. Return None for an absent file that the manifest does not name."""
    stated = (manifest or {}).get(path.name)
    if not path.exists() and stated is None:
        return None
    try:
        with open_regular(path, LARGEST_JSON) as file:
            data = file.read()
    except FileNotFoundError:
        # deleted since
        if stated is None:
            return None
        raise
    if stated is not None and stated["sha256"] != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{str(path)!r} is not as {MANIFEST} states: it is damaged or was edited; "
            f"where that is meant, delete {MANIFEST}"
        )
    return _json_object(path, data)


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} is no JSON object")
    return value


# ---- config.json


def _config(path: Path, stated: dict[str, Any], generation: dict[str, Any]) -> GPTConfig:
    """Make the shape of config.json's content, with generation_config.json's token ids.

    Raises ValueError for an architecture other than GPT-2's.
    """
    for key, allowed in {"model_type": "gpt2", "add_cross_attention": False}.items():
        if (value := stated.get(key, allowed)) != allowed:
            known = OTHERS.get(value) if isinstance(value, str) else None
            found = show(value) + (f": {known}" if known else "")
            raise ValueError(f"{str(path)!r}: {key} must be {allowed!r}, not {found}")
    ids_of_tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    ours = {f.name for f in fields(GPTConfig)} - {"dropout", *ids_of_tokens}
    theirs = {name: THEIR_NAMES.get(name, name) for name in ours}
    options = {name: stated[their] for name, their in theirs.items() if their in stated}
    activation = options.get("activation_function")
    if isinstance(activation, str):
        options["activation_function"] = ACTIVATIONS.get(activation, activation)
    ids: dict[str, Any] = {
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "pad_token_id": None,
    }
    ids |= stated | generation
    try:
        config = GPTConfig(**options)
        return replace(config, **{n: known_ids(ids[n], config.vocab_size) for n in ids_of_tokens})
    except ValueError as error:
        line = str(error).replace("block_size", THEIR_NAMES["block_size"])
        raise ValueError(f"{str(path)!r}: {line}") from None


def mingpt_heads(stated: Mapping[str, Any]) -> int | None:
    """Return n_head by the config.json of minGPT's projects; None for another file.

    minGPT writes it before the rest of the shape is known.
    """
    model = stated.get("model")
    if "model_type" in stated or not isinstance(model, dict):
        return None
    heads = model.get("n_head")
    return heads if type(heads) is int else MINGPT_HEADS.get(str(model.get("model_type")))


def config_of(source: ModelFiles, sizes: Mapping[str, Any], heads: int) -> GPTConfig:
    """Make the shape of a minGPT; its tensors show all but n_head, and its head is not tied."""
    shape = {THEIR_NAMES.get(name, name): size for name, size in sizes.items()}
    stated = {**shape, "n_head": heads, "tie_word_embeddings": False}
    return _config(source.files[0].parent / "config.json", stated, {})


def known_ids(value: Any, vocab_size: int) -> Any:
    """Return a token id, several or None; drop ids outside the vocabulary."""
    ids = value if isinstance(value, list | tuple) else [value]
    known = tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)
    return None if not known else known[0] if len(known) == 1 else known


def labels_of(source: ModelFiles, head: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of a classifier's labels; LABEL_0 and LABEL_1 where config.json has none.

    head: the shape of the classifier's head, one row for each label. Raises ValueError where rows
    and distinct names differ in number, and where a text can have several labels.
    """
    path, stated = source.files[0].parent / "config.json", source.stated
    kind = stated.get("problem_type")
    if len(head) != 2 or head[0] < 2 or kind not in (None, "single_label_classification"):
        raise ValueError(
            f"{str(path)!r} must be of a classifier that gives each text one of its labels"
        )
    # transformers leaves its default names out of the file
    named = stated.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    numbers = map(str, range(len(named))) if isinstance(named, dict) else ()
    labels = tuple(named[i] for i in numbers if isinstance(named.get(i), str))
    if not head[0] == len(labels) == len({*labels}):
        raise ValueError(
            f"{str(path)!r}: id2label must name the {head[0]} labels of score.weight, all of them "
            f"different, not {show(named)}"
        )
    return labels


def config_files(
    config: GPTConfig,
    dtype: str,
    labels: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Return config.json and generation_config.json as transformers writes them for GPT-2.

    options: of generation, beside the ids that end and pad.
    With labels the model is a classifier, and the token that ends a text also pads: transformers
    classifies at the last token before the padding.
    """
    c = config
    eos = list(c.eos_token_id) if isinstance(c.eos_token_id, tuple) else c.eos_token_id
    ids = {"bos_token_id": c.bos_token_id, "eos_token_id": eos}
    pad = c.pad_token_id
    if labels and eos is not None:
        pad = eos[0] if isinstance(eos, list) else eos
    if pad is not None:
        ids["pad_token_id"] = pad
    stated: dict[str, Any] = {
        "architectures": ["GPT2ForSequenceClassification" if labels else "GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": c.activation_function,
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_ctx": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "layer_norm_epsilon": c.layer_norm_epsilon,
        "initializer_range": 0.02,
        "dtype": dtype,
    }
    # as a file without them means OpenAI's shape, the rest is stated where it differs
    stated |= {n: getattr(c, n) for n in UNUSUAL if getattr(c, n) != getattr(GPTConfig, n)}
    if labels:
        stated["id2label"] = {str(i): label for i, label in enumerate(labels)}
        stated["label2id"] = {label: i for i, label in enumerate(labels)}
    return {
        "config.json": json.dumps(stated | ids, indent=2) + "\n",
        "generation_config.json": json.dumps({**(options or {}), **ids}, indent=2) + "\n",
    }


def read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object beside a model. Return None for an absent file."""
    return _read_json(path)


def model_digest(name: str | Path) -> str:
    """Return the SHA-256 of a model's file, in hexadecimal; of shards, that of their digests."""
    digests = []
    for path in find_files(name).files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    whole = "".join(digests).encode("ascii")
    return digests[0] if len(digests) == 1 else hashlib.sha256(whole).hexdigest()
