"""What all endpoints share: models, worker, limits; how options and ids are read from JSON."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from starlette.requests import Request

from nanogpt2.config import GenerationConfig
from nanogpt2.config.flags import check_value, show
from nanogpt2.serve.web import RefusalError
from nanogpt2.serve.worker import Worker
from nanogpt2.serve.writing import MOST_PROMPT_TOKENS, Served

# the options by name; output_scores is none
OPTIONS = {f.name: f for f in fields(GenerationConfig) if f.metadata}
Work = Callable[[], Iterator[Any]]


@dataclass(frozen=True)
class House:
    """The server's state."""

    models: tuple[Served, ...]
    worker: Worker
    max_tokens: int  # new ones of a text
    started: int  # seconds since 1970

    def model(self, name: Any = None) -> Served:
        """Return a model by its name, by default the first one. Raises RefusalError."""
        for served in self.models:
            if name in (None, served.name):
                return served
        known = ", ".join(served.name for served in self.models)
        message = f"model {show(name)} is not served; the models are {known}"
        raise RefusalError(404, message, "model", "model_not_found")


def house_of(request: Request) -> House:
    """Return the state of the server that got a request."""
    house: House = request.app.state.house
    return house


def read_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the type and range of each option; lists of ids become tuples. Raises RefusalError."""
    read = {}
    for name, value in values.items():
        if name not in OPTIONS:
            raise RefusalError(400, f"{show(name)} is not an option", name[:60])
        f = OPTIONS[name]
        if isinstance(value, list) and not f.metadata["json"]:
            value = tuple(value)
        try:
            check_value(f, value)
        except ValueError as error:
            raise RefusalError(400, str(error), name) from None
        read[name] = value
    return read


def read_ids(name: str, ids: Any, served: Served) -> tuple[int, ...]:
    """Check token ids. Raises RefusalError."""
    V = served.model.config.vocab_size
    if isinstance(ids, list) and len(ids) > MOST_PROMPT_TOKENS:
        most = f"{MOST_PROMPT_TOKENS:,} tokens at most"
        raise RefusalError(400, f"{name} must have {most}, not {len(ids):,}", name)
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < V for i in ids)):
        raise RefusalError(400, f"{name} must be a list of token ids from 0 to {V - 1}", name)
    return tuple(ids)
