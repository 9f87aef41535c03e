"""nanogpt2: GPT-2 by hand. Each public name is imported on first use.

Importing the package imports neither torch nor any other dependency.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanogpt2.checkpoints.load import load_classifier as load_classifier
    from nanogpt2.checkpoints.load import load_generator as load_generator
    from nanogpt2.checkpoints.load import load_model as load_model
    from nanogpt2.checkpoints.load import load_tokenizer as load_tokenizer
    from nanogpt2.checkpoints.load import open_checkpoint as open_checkpoint
    from nanogpt2.checkpoints.save import save_model as save_model
    from nanogpt2.classifier import GPTClassifier as GPTClassifier
    from nanogpt2.config import GenerationConfig as GenerationConfig
    from nanogpt2.config import GPTConfig as GPTConfig
    from nanogpt2.generation import generate as generate
    from nanogpt2.model import GPT as GPT
    from nanogpt2.tokenizer import Tokenizer as Tokenizer

_HOME = {
    "GPT": "model",
    "GPTClassifier": "classifier",
    "GPTConfig": "config",
    "GenerationConfig": "config",
    "Tokenizer": "tokenizer",
    "generate": "generation",
    "load_classifier": "checkpoints.load",
    "load_generator": "checkpoints.load",
    "load_model": "checkpoints.load",
    "load_tokenizer": "checkpoints.load",
    "open_checkpoint": "checkpoints.load",
    "save_model": "checkpoints.save",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name's module and return the name (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'nanogpt2' has no attribute {name!r}")
    value = getattr(import_module(f"nanogpt2.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
