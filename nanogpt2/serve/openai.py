"""OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

A field that OpenAI has is read as OpenAI reads it, with its default: temperature 1, max_tokens 16.
All options of GenerationConfig are fields too, with their own defaults. Without an option that
chooses a search, tokens are drawn. logprobs are those of the model, before any option.

Source: platform.openai.com/docs/api-reference/completions and .../chat.
"""

import asyncio
import codecs
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nanogpt2.config import SEARCH_FLAGS, GenerationConfig, refuse_ignored
from nanogpt2.config.flags import show
from nanogpt2.data.chat import segments
from nanogpt2.data.records import Record
from nanogpt2.serve.house import OPTIONS, House, Work, house_of, read_ids, read_options
from nanogpt2.serve.web import (
    Fields,
    RefusalError,
    encoded,
    json_response,
    log_tokens,
    read_json,
    refusal_of,
    running,
    stream,
)
from nanogpt2.serve.worker import ReaderLeftError
from nanogpt2.serve.writing import (
    MOST_TEXTS,
    Piece,
    Prompt,
    Scored,
    Served,
    Task,
    Usage,
    write,
)
from nanogpt2.tokenizer import Tokenizer

MOST_LOGPROBS = 20
MOST_CHOICES = 256
DEFAULT_TOKENS = 16
LEAST_LOGPROB = -9999.0  # OpenAI's -inf
# ours -> OpenAI's
RENAMED = {"max_new_tokens": "max_tokens", "num_return_sequences": "n", "stop_strings": "stop"}
# fields of OpenAI's that change nothing here
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
# fields that must have one of these values
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
INSTEAD = {
    "presence_penalty": "; use repetition_penalty",
    "frequency_penalty": "; use repetition_penalty",
}
# where the assistant's turn ends in the format of --task chat
NEXT_TURN = "\nYou:"


@dataclass(frozen=True)
class Asked:
    """A request, read."""

    served: Served
    task: Task
    seed: int
    stream: bool
    usage: bool  # a streamed answer ends with its usage
    is_chat: bool


async def models(request: Request) -> Response:
    """GET /v1/models."""
    house = house_of(request)
    return json_response({"object": "list", "data": [_model(each, house) for each in house.models]})


async def model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    house = house_of(request)
    return json_response(_model(house.model(request.path_params["name"]), house))


def _model(served: Served, house: House) -> dict[str, Any]:
    about = {"created": house.started, "owned_by": "nanogpt2"}
    return {"id": served.name, "object": "model"} | about


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    house = house_of(request)
    return await _answer(request, _completion(Fields(await read_json(request)), house))


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    house = house_of(request)
    return await _answer(request, _chat(Fields(await read_json(request)), house))


# ---- a body


def _completion(asked: Fields, house: House) -> Asked:
    served = house.model(asked.take("model"))
    prompts = _prompts(asked.take("prompt"), served)
    most = asked.whole("max_tokens", None, 0, house.max_tokens)
    likeliest = asked.whole("logprobs", None, 0, MOST_LOGPROBS)
    echo = asked.switch("echo")
    n = asked.whole("n", 1, 1, MOST_TEXTS) or 1
    best_of = asked.whole("best_of", n, n, MOST_TEXTS) or n
    stream, usage = _streaming(asked)
    if best_of > n and stream:
        raise RefusalError(400, "best_of must be n, or left out, with stream", "best_of")
    if len(prompts) * n > MOST_CHOICES:
        raise RefusalError(400, f"prompt and n must make {MOST_CHOICES} texts at most", "prompt")
    options = _options(asked, most, DEFAULT_TOKENS, best_of)
    if options.num_beams > 1 and best_of > n:
        raise RefusalError(400, "best_of must be n, or left out, with num_beams", "best_of")
    task = Task(prompts, None if most == 0 else options, n, best_of, likeliest, echo)
    return Asked(served, task, options.seed or 0, stream, usage, is_chat=False)


def _chat(asked: Fields, house: House) -> Asked:
    served = house.model(asked.take("model"))
    if not served.is_chat:
        raise RefusalError(
            400,
            f"{served.name!r} is not a model for chat: train.py --task chat makes one; "
            "/v1/completions continues any text",
            "model",
        )
    prompt = _conversation(asked.take("messages"))
    most = asked.whole("max_completion_tokens", None, 1, house.max_tokens)
    most = asked.whole("max_tokens", most, 1, house.max_tokens)
    likeliest = asked.whole("top_logprobs", None, 0, MOST_LOGPROBS)
    if asked.switch("logprobs"):
        likeliest = likeliest or 0
    elif likeliest is not None:
        raise RefusalError(400, "top_logprobs must come with logprobs", "top_logprobs")
    n = asked.whole("n", 1, 1, MOST_TEXTS) or 1
    stream, usage = _streaming(asked)
    longest = min(house.max_tokens, served.model.config.block_size)
    options = _options(asked, most, longest, n, (NEXT_TURN,))
    task = Task([prompt], options, n, n, likeliest)
    return Asked(served, task, options.seed or 0, stream, usage, is_chat=True)


def _conversation(messages: Any) -> Prompt:
    """Write messages in the format that the model was trained on, up to the assistant's turn."""
    if not isinstance(messages, list) or not messages:
        message = f"messages must be a list of messages, not {show(messages)}"
        raise RefusalError(400, message, "messages")
    # as a record of the training, whose answer is still to be written
    record = Record("messages", {"messages": [*messages, {"role": "assistant", "content": "?"}]})
    try:
        *parts, _ = segments(record)
    except ValueError as error:
        raise RefusalError(400, str(error), "messages") from None
    return Prompt(tuple(text for text, _ in parts))


def _prompts(value: Any, served: Served) -> list[Prompt]:
    """Read a text, texts, token ids or lists of them."""
    several = value if isinstance(value, list) and value else [value]
    if several is value and all(type(each) is int for each in value):
        several = [several]
    if len(several) > MOST_CHOICES:
        raise RefusalError(400, f"prompt must have {MOST_CHOICES} texts at most", "prompt")
    if all(isinstance(each, str) for each in several):
        return [Prompt((text,)) for text in several]
    if all(isinstance(each, list) for each in several):
        return [Prompt(ids=read_ids("prompt", ids, served)) for ids in several]
    message = "prompt must be a text, a list of texts, token ids, or a list of lists of them"
    raise RefusalError(400, f"{message}, not {show(value)}", "prompt")


def _streaming(asked: Fields) -> tuple[bool, bool]:
    stream, options = asked.switch("stream"), asked.table("stream_options")
    if options and not stream:
        raise RefusalError(400, "stream_options must come with stream", "stream_options")
    return stream, options.get("include_usage") is True


def _options(
    asked: Fields, most: int | None, default: int, texts: int, stops: tuple[str, ...] = ()
) -> GenerationConfig:
    """Read the options of decoding, which are all the fields that are left.

    most: max_tokens, if given; default: the value if nothing else limits the length. texts: to
    write for a prompt. stops: more strings that end a text.
    """
    _check_neutral(asked)
    stop = asked.take("stop", [])
    given = _given(asked)
    asked.end()
    stop = [stop] if isinstance(stop, str) else stop
    if not (isinstance(stop, list) and all(isinstance(each, str) and each for each in stop)):
        message = f"stop must be a text or texts, none empty, not {show(stop)}"
        raise RefusalError(400, message, "stop")
    if strings := [*stop, *stops]:
        given["stop_strings"] = strings
    if most is not None or "max_length" not in given:
        given["max_new_tokens"] = most or default
    options = given if any(name in given for name in SEARCH_FLAGS) else {"do_sample": True} | given
    options = {"seed": int.from_bytes(os.urandom(7))} | options
    with refusals():
        refuse_ignored(given, options)
        config = GenerationConfig(**options)
        # greedy texts are all the same, so one is written
        several = texts if config.num_beams > 1 or config.samples else 1
        return GenerationConfig(**options, num_return_sequences=several)


def _check_neutral(asked: Fields) -> None:
    """Drop OpenAI's fields without effect here. Raises RefusalError for one that would have one."""
    for name in IGNORED:
        asked.take(name)
    for name, allowed in NEUTRAL.items():
        value = asked.take(name, allowed[0])
        if value not in allowed:
            only = " or ".join(map(repr, allowed))
            text = f"{name} must be {only}, or left out{INSTEAD.get(name, '')}"
            raise RefusalError(400, f"{text}, not {show(value)}", name)


def _given(asked: Fields) -> dict[str, Any]:
    """Take the options of GenerationConfig out of the fields."""
    for ours, theirs in RENAMED.items():
        if ours in asked.rest:
            raise RefusalError(400, f"{ours} is called {theirs} here", ours)
    for name in ("temperature", "top_p", "seed"):
        if asked.rest.get(name, 0) is None:
            # OpenAI's null; an option of ours may be null by itself
            del asked.rest[name]
    given = read_options({name: asked.rest.pop(name) for name in OPTIONS if name in asked.rest})
    if bias := asked.table("logit_bias"):
        if "sequence_bias" in given:
            raise RefusalError(400, "logit_bias must be left out with sequence_bias", "logit_bias")
        if not all(i.isascii() and i.isdigit() and len(i) < 10 for i in bias):
            raise RefusalError(400, "logit_bias must be a table of token ids", "logit_bias")
        given["sequence_bias"] = [[[int(i)], value] for i, value in bias.items()]
    return given


@contextmanager
def refusals() -> Iterator[None]:
    """Answer a ValueError inside with 400; an option of ours is named as OpenAI does."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        name = RENAMED.get(name, name.lower())
        raise RefusalError(400, f"{name} {rest}", name if name.isidentifier() else None) from None


# ---- the answer


async def _answer(request: Request, asked: Asked) -> Response:
    house = house_of(request)
    most = house.max_tokens

    def work() -> Iterator[Usage | Piece | None]:
        with refusals():
            yield from write(asked.served, asked.task, most)

    answer = Answer(asked)
    log_tokens(request, answer)
    if asked.stream:
        return await stream(_streamed(request, answer, work))
    async with running(house.worker, request.receive, work) as job:
        async for event in job.events():
            answer.add(event)
    # a long answer takes a moment
    return json_response(await asyncio.to_thread(lambda: encoded(answer.whole())))


async def _streamed(request: Request, answer: "Answer", work: Work) -> AsyncGenerator[bytes]:
    """Yield what EventStream sends, after one item that says that the request is right."""
    async with running(house_of(request).worker, request.receive, work) as job:
        events = job.events()
        answer.add(await anext(events))
        yield b""
        try:
            for chunk in answer.first_chunks():
                yield encoded(chunk)
            async for event in events:
                for chunk in answer.chunks(event):
                    yield encoded(chunk)
            for chunk in answer.last_chunks():
                yield encoded(chunk)
        except ReaderLeftError:
            raise
        except Exception as error:
            # the status is sent, so the error is an event
            yield encoded(refusal_of(error).as_json())
        yield b"[DONE]"


@dataclass
class Choice:
    """A text of the answer so far."""

    text: str = ""
    held: str = ""  # of a chat: blanks that may be the last ones
    ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0  # characters of the tokens so far
    utf8: Any = field(default_factory=codecs.getincrementaldecoder("utf-8"))
    finish_reason: str | None = None
    score: float | None = None


class Answer:
    """An answer in OpenAI's form, from the pieces of its texts."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._tokenizer = asked, asked.served.tokenizer
        count = len(asked.task.prompts) * asked.task.n
        self._choices = [Choice(utf8=_utf8()) for _ in range(count)]
        self.prompt_tokens = self.new_tokens = 0
        kind = "chatcmpl" if asked.is_chat else "cmpl"
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.served.name,
            "seed": asked.seed,
        }

    def add(self, event: Usage | Piece) -> dict[str, Any] | None:
        """Take a piece; return what is new of its choice."""
        if isinstance(event, Usage):
            self.prompt_tokens += event.prompt
            self.new_tokens += event.unseen
            return None
        choice = self._choices[event.index]
        self.new_tokens += len(event.ids)
        text = self._trimmed(choice, event) if self._asked.is_chat else event.text
        logprobs = None
        if self._asked.task.likeliest is not None:
            logprobs = [self._logprob(choice, each) for each in event.scored]
            choice.logprobs += logprobs
        choice.text += text
        choice.ids += event.ids
        choice.finish_reason, choice.score = event.finish_reason, event.score
        found = self._choice(event.index, text, event.ids, logprobs, event.finish_reason, True)
        return found if text or event.ids or event.finish_reason else None

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        name = "chat.completion" if self._asked.is_chat else "text_completion"
        choices = [
            self._choice(i, c.text, c.ids, c.logprobs, c.finish_reason, False)
            for i, c in enumerate(self._choices)
        ]
        return self._head | {"object": name, "choices": choices, "usage": self._usage()}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the first objects of a stream: a chat's say who speaks."""
        if self._asked.is_chat:
            for index in range(len(self._choices)):
                delta = {"role": "assistant", "content": ""}
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield self._chunk([choice])

    def chunks(self, event: Usage | Piece) -> Iterator[dict[str, Any]]:
        """Yield the objects of a stream for a piece."""
        found = self.add(event)
        if found is not None:
            yield self._chunk([found])

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the last objects of a stream."""
        if self._asked.usage:
            yield self._chunk([]) | {"usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._asked.is_chat else "text_completion"
        return self._head | {"object": name, "choices": choices}

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
        }

    def _choice(
        self,
        index: int,
        text: str,
        ids: list[int],
        logprobs: list[dict[str, Any]] | None,
        finish_reason: str | None,
        streams: bool,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index}
        if self._asked.is_chat and streams:
            found["delta"] = {"content": text} if text else {}
        elif self._asked.is_chat:
            found["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            found["text"] = text
        found["logprobs"] = None
        if self._asked.task.likeliest is not None and logprobs is not None:
            content = {"content": logprobs, "refusal": None}
            found["logprobs"] = content if self._asked.is_chat else _columns(logprobs)
        found |= {"finish_reason": finish_reason, "token_ids": ids}
        score = self._choices[index].score
        return found if score is None else found | {"score": score}

    def _trimmed(self, choice: Choice, piece: Piece) -> str:
        """Return a chat's new text without the blanks around the whole."""
        text = choice.held + piece.text
        text = text if choice.text else text.lstrip()
        kept = text.rstrip()
        choice.held = text[len(kept) :]
        return kept

    def _logprob(self, choice: Choice, scored: Scored) -> dict[str, Any]:
        """Return a token's probabilities, in the form of a chat or as a row of _columns."""
        top = scored.likeliest or []
        if self._asked.is_chat:
            rows = [self._chat_token(i, value) for i, value in top]
            return self._chat_token(scored.token, scored.logprob) | {"top_logprobs": rows}
        offset = choice.size
        choice.size += len(choice.utf8.decode(self._tokenizer.decode_bytes([scored.token])))
        likeliest = None
        if scored.logprob is not None:
            both = [*top, (scored.token, scored.logprob)]
            likeliest = {_token(self._tokenizer, i): _bounded(value) for i, value in both}
        return {
            "tokens": _token(self._tokenizer, scored.token),
            "token_logprobs": _bounded(scored.logprob),
            "top_logprobs": likeliest,
            "text_offset": offset,
        }

    def _chat_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._tokenizer.decode_bytes([token])
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": _bounded(logprob), "bytes": [*data]}


def _utf8() -> Any:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn the rows of a completion's tokens into lists."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [row[name] for row in rows] for name in names}


def _token(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text; a part of a character is written as bytes, as OpenAI does."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bounded(logprob: float | None) -> float | None:
    return logprob if logprob is None or math.isfinite(logprob) else LEAST_LOGPROB
