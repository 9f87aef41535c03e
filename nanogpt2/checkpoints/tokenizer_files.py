"""The files of a tokenizer, written as transformers' AutoTokenizer reads them.

vocabulary.py names them, and reads them. This file reads no tensor and does not import torch.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanogpt2.added_tokens import AddedToken
from nanogpt2.checkpoints.folder import LARGEST_JSON, read_object
from nanogpt2.filesystem import open_regular
from nanogpt2.library_tokenizer import LibraryTokenizer
from nanogpt2.tokenizer import ROLES, Tokenizer


def is_chat(folder: Path) -> bool:
    """Tell whether the tokenizer's files in a folder have the template of `--task chat`."""
    settings = read_object(folder / "tokenizer_config.json") or {}
    with (
        suppress(OSError, ValueError),
        # where newer transformers write it
        open_regular(folder / "chat_template.jinja", LARGEST_JSON) as file,
    ):
        settings |= {"chat_template": file.read().decode()}
    return settings.get("chat_template") == CHAT_TEMPLATE


# a conversation as data/chat.py writes it for training
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set content = message['content'] | trim %}"
    "{% if message['role'] == 'assistant' %}{{ 'Friend: ' + content }}"
    "{{ eos_token if loop.last else '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'You: ' + content + '\\n' }}"
    "{% elif content %}{{ content + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Friend:' }}{% endif %}"
)


def tokenizer_files(tokenizer: Tokenizer, block_size: int, chat: bool = False) -> dict[str, str]:
    """Return the files that AutoTokenizer needs; for GPT-2's vocabulary two are OpenAI's own.

    tokenizer.json holds the other two's content, and the added tokens, for the fast tokenizers.
    chat: with the template of a model that `--task chat` trained.
    """
    is_library = isinstance(tokenizer, LibraryTokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if is_library else "GPT2Tokenizer",
        "model_max_length": block_size,
        # the class GPT2Tokenizer would name <|endoftext|> where nothing is stated.
        # GPT-2 has no other special token; the attention mask tells padding from an end
        **{role: tokenizer.roles.get(role) for role in ROLES},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    settings |= tokenizer.roles
    if tokenizer.is_own:
        # for transformers without the library, which does not read tokenizer.json
        stated = [_stated(token) for token in tokenizer.added]
        settings["added_tokens_decoder"] = {str(token.pop("id")): token for token in stated}
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    if isinstance(tokenizer, LibraryTokenizer):
        del settings["add_prefix_space"]
        return {
            "tokenizer.json": json.dumps(tokenizer.stated),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }
    return {
        "vocab.json": tokenizer.encoder_json(),
        "merges.txt": tokenizer.merges or "#version: 0.2\n",
        "tokenizer.json": json.dumps(_fast_tokenizer(tokenizer)),
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json, in the format of Hugging Face's library `tokenizers`."""
    merges = tokenizer.merges.splitlines()[1:]
    added = [_stated(token) for token in tokenizer.added]
    return library_file(tokenizer.vocabulary, merges, False) | {"added_tokens": added}


def _stated(token: AddedToken) -> dict[str, Any]:
    """Return a token as the library writes it."""
    flags = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {flag: getattr(token, flag) for flag in flags}


def library_file(
    tokens: Mapping[str, int], merges: Sequence[Any], prefixes: bool
) -> dict[str, Any]:
    """Return tokenizer.json for GPT-2's steps. prefixes: with a space in front of each text."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": prefixes,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": tokens,
            "merges": merges,
        },
    }
