"""The page and its own endpoints under /api/.

Options are sample.py's: its rules and defaults, so that the command line writes the same text.
"""

import os
from collections.abc import AsyncGenerator
from dataclasses import fields, replace
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nanogpt2 import __version__
from nanogpt2.config import MAX_SEED, GenerationConfig, decoding_options
from nanogpt2.config.presets import TASKS
from nanogpt2.serve import inside
from nanogpt2.serve.house import OPTIONS, Work, house_of, read_ids, read_options
from nanogpt2.serve.web import (
    MOST_BYTES,
    Fields,
    RefusalError,
    encoded,
    json_response,
    read_json,
    refusal_of,
    running,
    stream,
)
from nanogpt2.serve.worker import ReaderLeftError
from nanogpt2.serve.writing import MOST_PROMPT_TOKENS, MOST_TEXTS, Prompt, Served

MOST_ALTERNATIVES = 20
DEFAULT_BEAMS = 4
# nothing from elsewhere, and in nobody's frame
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: Request) -> Response:
    """GET /."""
    html = files("nanogpt2.serve").joinpath("page.html").read_bytes()
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
    return Response(html, headers=headers, media_type="text/html")


async def models(request: Request) -> Response:
    """GET /api/models: the models, the options, the presets, the limits."""
    house = house_of(request)
    return json_response(
        {
            "version": __version__,
            "models": [_model(served) for served in house.models],
            "options": _options(),
            "presets": [
                {"name": name, "about": t.about, "template": t.template, "options": t.options}
                for name, t in TASKS.items()
            ],
            "limits": {
                "max_new_tokens": house.max_tokens,
                "max_prompt_tokens": MOST_PROMPT_TOKENS,
                "max_texts": MOST_TEXTS,
                "max_body_bytes": MOST_BYTES,
                "max_alternatives": MOST_ALTERNATIVES,
            },
        }
    )


def _model(served: Served) -> dict[str, Any]:
    shape = served.model.config
    names = ("block_size", "n_layer", "n_head", "n_embd", "vocab_size")
    found = {name: getattr(shape, name) for name in names}
    return {"name": served.name, "chat": served.is_chat, "parameters": shape.n_parameters} | found


def _options() -> list[dict[str, Any]]:
    """Describe the options of decoding, with sample.py's defaults."""
    defaults, group, found = decoding_options({}), "", []
    for f in fields(GenerationConfig):
        if f.name not in OPTIONS:
            continue
        group = GenerationConfig.GROUPS.get(f.name, group)
        limits = f.metadata["limits"]
        signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
        found.append(
            {
                "name": f.name,
                "help": f.metadata["help"],
                "group": group,
                "kind": _kind(f.metadata, str(f.type)),
                "default": getattr(defaults, f.name),
                "none": "None" in str(f.type) or f.type is Any,
                "choices": [*f.metadata["choices"]],
            }
            | {name: limits.get(sign) for name, sign in signs.items()}
        )
    return found


def _kind(metadata: Any, kind: str) -> str:
    if metadata["json"]:
        return "json"
    if metadata["choices"]:
        return "choice"
    return next((name for name in ("bool", "float", "int") if name in kind), "text")


# ---- endpoints that stream


async def generate(request: Request) -> Response:
    """POST /api/generate."""
    house, asked = house_of(request), Fields(await read_json(request))
    served = house.model(asked.take("model"))
    prompt = _prompt(asked, served)
    alternatives = asked.whole("alternatives", 4, 0, MOST_ALTERNATIVES) or 0
    options = _decoding(asked.table("options"))
    asked.end()
    _refuse_several(options, "/api/beams")
    work = partial(inside.generate, served, prompt, options, alternatives, house.max_tokens)
    return await stream(_streamed(request, work))


async def beams(request: Request) -> Response:
    """POST /api/beams."""
    house, asked = house_of(request), Fields(await read_json(request))
    served = house.model(asked.take("model"))
    prompt = _prompt(asked, served)
    options = _decoding({"num_beams": DEFAULT_BEAMS} | asked.table("options"))
    asked.end()
    if options.num_beams == 1:
        raise RefusalError(400, "num_beams must be above 1, not 1", "num_beams")
    work = partial(inside.beams, served, prompt, options, house.max_tokens)
    return await stream(_streamed(request, work))


async def compare(request: Request) -> Response:
    """POST /api/compare."""
    house, asked = house_of(request), Fields(await read_json(request))
    seed = asked.whole("seed", None, 0, MAX_SEED)
    seed = int.from_bytes(os.urandom(7)) if seed is None else seed
    sides = []
    for name in ("a", "b"):
        side = Fields(asked.table(name))
        served, options = house.model(side.take("model")), _decoding(side.table("options"))
        side.end()
        _refuse_several(options, "/api/beams")
        sides.append((served, replace(options, seed=seed)))
    prompt = _prompt(asked, sides[0][0])
    asked.end()
    work = partial(inside.compare, sides, prompt, house.max_tokens)
    return await stream(_streamed(request, work))


def _prompt(asked: Fields, served: Served, name: str = "prompt") -> Prompt:
    """Read the text or the ids to start from."""
    literal = asked.switch("literal")
    text, ids = asked.take(name), asked.take("ids")
    if (text is None) == (ids is None):
        raise RefusalError(400, f"{name} or ids must be given, and one of both", name)
    if ids is not None:
        return Prompt(ids=read_ids("ids", ids, served))
    if not isinstance(text, str):
        raise RefusalError(400, f"{name} must be a text", name)
    return Prompt((text,), literal=literal)


def _decoding(values: dict[str, Any]) -> GenerationConfig:
    """Read options by sample.py's rules; draw a seed where none is given."""
    given = read_options(values)
    try:
        config = decoding_options(given)
    except ValueError as error:
        raise refusal_of(error) from None
    seed = int.from_bytes(os.urandom(7)) if config.seed is None else config.seed
    return replace(config, seed=seed)


def _refuse_several(options: GenerationConfig, instead: str) -> None:
    for name, other in (("num_beams", f"; {instead} searches"), ("num_return_sequences", "")):
        if (value := getattr(options, name)) > 1:
            raise RefusalError(400, f"{name} must be 1 here, not {value}{other}", name)


async def _streamed(request: Request, work: Work) -> AsyncGenerator[bytes]:
    """Yield what the work yields, after one item that says that the request is right."""
    async with running(house_of(request).worker, request.receive, work) as job:
        events = job.events()
        first = await anext(events)
        yield b""
        yield first
        try:
            async for event in events:
                yield event
        except ReaderLeftError:
            raise
        except Exception as error:
            # the status is sent, so the error is an event
            yield encoded({"type": "error", "message": str(refusal_of(error))})


# ---- endpoints with one answer


async def score(request: Request) -> Response:
    """POST /api/score."""
    house, asked = house_of(request), Fields(await read_json(request))
    served = house.model(asked.take("model"))
    prompt = _prompt(asked, served, "text")
    alternatives = asked.whole("alternatives", 4, 0, MOST_ALTERNATIVES) or 0
    asked.end()
    return await _whole(request, partial(inside.score, served, prompt, alternatives))


async def inspect(request: Request) -> Response:
    """POST /api/inspect."""
    house, asked = house_of(request), Fields(await read_json(request))
    served = house.model(asked.take("model"))
    prompt, shape = _prompt(asked, served, "text"), served.model.config
    kinds = asked.take("kinds")
    known = isinstance(kinds, list) and all(kind in inside.KINDS for kind in kinds)
    if not known or not kinds:
        message = f"kinds must be a list of some of {', '.join(inside.KINDS)}"
        raise RefusalError(400, message, "kinds")
    layer = asked.whole("layer", 0, 0, shape.n_layer - 1) or 0
    head = asked.whole("head", 0, 0, shape.n_head - 1) or 0
    k = asked.whole("k", 5, 1, MOST_ALTERNATIVES) or 5
    token = asked.whole("token", None, 0, shape.vocab_size - 1)
    if token is None and "neighbours" in kinds:
        raise RefusalError(400, "token must be given for neighbours", "token")
    asked.end()
    work = partial(inside.look, served, prompt, kinds, layer, head, k, token or 0)
    return await _whole(request, work)


async def _whole(request: Request, work: Work) -> Response:
    """Answer with the only thing that the work yields."""
    async with running(house_of(request).worker, request.receive, work) as job:
        (answer,) = [event async for event in job.events()]
    return json_response(answer)
