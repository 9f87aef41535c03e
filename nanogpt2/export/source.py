"""The model that is exported, and the errors of a weight that is no number."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nanogpt2.metrics import finite
from nanogpt2.model import GPT
from nanogpt2.tokenizer import Tokenizer


@dataclass
class Source:
    """A model in eval mode on the CPU, its vocabulary if it has one, and the type to write.

    is_chat: it has the template of `--task chat`. A check deletes `model` once it has what it
    needs of it: the other program takes as much memory.
    """

    name: str
    model: GPT
    tokenizer: Tokenizer | None
    is_chat: bool
    dtype: str

    def check_weights(self) -> None:
        """Raise FloatingPointError for a weight that is not finite."""
        for weight in self.model.parameters():
            for end in weight.aminmax():
                finite(end.item())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters by our names, projections as [out, in]."""
        for name, tensor in self.model.state_dict().items():
            yield name, tensor.detach()

    def encode(self, text: str) -> list[int]:
        """Return a text's ids; none without a vocabulary."""
        return self.tokenizer.encode(text) if self.tokenizer else []
