"""Dataclass fields that are also command-line flags: declared, checked and read in one place.

A field made by `flag` carries its help and its range. `check` compares values with them, from
Python and from the command line alike. `parse` turns `argv` into an instance; a mistake gives one
line of error and exit code 2. This file knows no particular flag. No import below this
file needs more than the standard library, so `--help` and a mistake answer at once.
"""

import dataclasses
import difflib
import inspect
import json as json_module
import math
import operator
import os
import re
import signal
import sys
import textwrap
import time
import types
import typing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, NoReturn, Protocol, Self, TypeVar

from nanogpt2 import __version__
from nanogpt2.memory import is_out_of_memory
from nanogpt2.terminal import visible


class FromFlags(Protocol):
    """A configuration that can be built from a command line."""

    @classmethod
    def from_flags(cls, given: dict[str, Any]) -> Self:
        """Build it from the given flags. A ValueError's text starts with a field's name."""


MOST = 2**31 - 1  # the largest number of every flag but a seed
MAX_SEED = 2**63 - 1
MOST_THREADS = 1024
OTHERS_WAIT = 2  # seconds
HELP_COLUMNS = 80
# of the words behind a flag that may stand alone, these are its value
NUMBERS = re.compile(r"-?\d[\d.]*")
LONGEST_SHORT = 4  # characters of a flag with one hyphen, such as llama.cpp's -ngl

T = TypeVar("T", bound=FromFlags)


def flag(
    default: Any,
    help: str,  # noqa: A002
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    positional: bool = False,
    json: str = "",
    alone: str = "",
) -> Any:
    """Return a dataclass field that is also a flag.

    `low` and `high` belong to its range, `above` and `below` do not. `json` describes a structured
    value, given as JSON on the command line; its user checks the value. `alone` is the value of a
    flag that stands alone: it takes the next word only if that is `alone` or a number.
    """
    limits = {">=": low, ">": above, "<=": high, "<": below}
    metadata = {
        "help": help,
        "limits": {sign: limit for sign, limit in limits.items() if limit is not None},
        "choices": choices,
        "positional": positional,
        "json": json,
        "alone": alone,
    }
    return dataclasses.field(default=default, metadata=metadata)


# the rules for a value

_RELATIONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}


def check(config: Any) -> None:
    """Raise ValueError for the first field with a wrong type or a value out of range."""
    for f in fields(config):
        check_value(f, getattr(config, f.name))


def check_value(f: Field[Any], value: Any) -> None:
    """Raise ValueError for a value of a wrong type or out of the field's range."""
    if not f.metadata or f.metadata["json"]:
        return
    if value == "" and f.default != "" and not f.metadata["choices"]:
        raise ValueError(f"{f.name} must not be empty")
    if type(value) in (int, float) and f.name != "seed" and abs(value) > MOST:
        raise ValueError(f"{f.name} must be {MOST} at most, not {show(value)}")
    if not (_has_type(value, f.type) and _in_range(value, f.metadata)):
        raise ValueError(f"{f.name} must be {_allowed(f)}, not {show(value)}")


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Split a type: int | None -> (int, NoneType); int -> (int,)."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _has_type(value: Any, kind: Any) -> bool:
    kinds = _alternatives(kind)
    if isinstance(value, tuple):
        return _takes_several(kind) and all(type(v) is int for v in value)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _takes_several(kind: Any) -> bool:
    return any(typing.get_origin(k) is tuple for k in _alternatives(kind))


def _in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    if metadata["choices"] and isinstance(value, str):
        return value in metadata["choices"]
    numbers = value if isinstance(value, tuple) else (value,)
    return all(
        not (isinstance(number, float) and not math.isfinite(number))
        and all(_RELATIONS[sign](number, limit) for sign, limit in metadata["limits"].items())
        for number in numbers
        if isinstance(number, (int, float))
    )


def _allowed(f: Field[Any]) -> str:
    """Describe the allowed values of a field."""
    if f.metadata["json"]:
        return f"{f.metadata['json']} in JSON, or none"
    if f.metadata["choices"]:
        return "one of " + ", ".join(f.metadata["choices"])
    kinds = _alternatives(f.type)
    words = next(words for kind, words in _KINDS.items() if kind in kinds)
    limits = [f"{sign} {limit}" for sign, limit in f.metadata["limits"].items()]
    several = ["or several as 1,2"] if _takes_several(f.type) else []
    none = ["or none"] if types.NoneType in kinds else []
    return " ".join([words, *([" and ".join(limits)] if limits else []), *several, *none])


def show(value: Any) -> str:
    """Format a value for an error message."""
    return _clip(repr(value))


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def parse(cls: type[T], argv: Sequence[str]) -> T:
    """Read `argv` (without the script's name) into a configuration.

    Flags are `--name value` or `--name=value`, with hyphens accepted for underscores. A bool may
    also be `--name` or `--no_name`. The last of a repeated flag wins. Wrong use prints one line
    that starts with `error:` and exits with 2. `--help` prints all flags and exits with 0.
    """
    given = _read(cls, argv)
    try:
        return cls.from_flags(given)
    except ValueError as error:
        # the text starts with the field's name
        fail(f"--{error}")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `error: message` as one line of at most 200 characters on stderr and exit."""
    if os.environ.get("RANK", "0") != "0":
        # torchrun's first process reports for all, and its exit ends the others. Wait for it; if
        # the first process has no error, this process reports its own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHERS_WAIT)
    line = visible(" ".join(f"error: {message}".split()))
    print(line if len(line) <= 200 else line[:197] + "...", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def usage_error(flag: str = "") -> Iterator[None]:
    """Report a ValueError or OSError inside as a wrong use of `flag`, and exit with 2.

    Without `flag`, the error's text must start with a flag's name. Out of memory exits with 1.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        fail(f"{flag} {error}" if flag else f"--{error}", 1 if is_out_of_memory(error) else 2)


def _read(cls: type, argv: Sequence[str]) -> dict[str, Any]:
    """Return {field name: value} for the given flags."""
    known = _flags(cls)
    positional = next((f for f in known.values() if f.metadata["positional"]), None)
    given: dict[str, Any] = {}
    words = deque(argv)
    only_text = False
    for word in words:
        # Python turns bytes that are not UTF-8 into lone surrogates
        if not _is_unicode(word):
            fail(f"{show(word)} is not UTF-8, as every argument must be")
    while words:
        word = words.popleft()
        if word == "--" and not only_text:
            only_text = True
        elif word in ("-h", "--help") and not only_text:
            print(_help(cls, known))
            raise SystemExit(0)
        elif word == "--version" and not only_text:
            print(f"nanogpt2 {__version__}")
            raise SystemExit(0)
        elif _looks_like_a_flag(cls, word) and not only_text:
            name, value = _read_flag(cls, known, word, words)
            given[name] = value
        elif positional is None:
            fail(f"{show(word)} is not a flag; {getattr(cls, 'SECOND', '--help lists the flags')}")
        elif positional.name in given:
            place, hint = positional.name.upper(), getattr(cls, "SECOND", "is it in quotes?")
            fail(f"{show(word)} is a second {place}; one is allowed ({hint})")
        else:
            given[positional.name] = word
    if positional and positional.default is MISSING and positional.name not in given:
        fail(f"{positional.name.upper()} is missing: {positional.metadata['help']}")
    return given


def _looks_like_a_flag(cls: type, word: str) -> bool:
    """Return True for --name, and for a short flag of other programs that has a hint."""
    is_short = word.startswith("-") and len(word) <= LONGEST_SHORT
    return word.startswith("--") or (is_short and word[1:] in getattr(cls, "HINTS", {}))


def _is_unicode(text: str) -> bool:
    """Return False for text with a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_flag(
    cls: type, known: dict[str, Field[Any]], word: str, words: deque[str]
) -> tuple[str, Any]:
    """Return the name and value of the flag `word`, taking the value from `words` if needed."""
    name, equals, text = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    name = getattr(cls, "ALIASES", {}).get(name, name)
    if name in (hints := getattr(cls, "HINTS", {})):
        fail(f"{word.partition('=')[0]} is not a flag; {hints[name]}")
    # the word after a bool flag is its value only if that word is true or false
    takes_value = bool(equals) or (bool(words) and words[0].lower() in ("true", "false"))
    if name not in known or known[name].metadata["positional"]:
        return _negated(cls, known, name, takes_value), False
    f = known[name]
    if f.type is bool and not takes_value:
        return name, True
    if (alone := f.metadata["alone"]) and not (equals or _belongs(words, alone)):
        return name, alone
    if not equals:
        text = words.popleft() if words else "--"
        if text.startswith("--"):
            fail(f"--{name} needs a value: {_allowed(f)}")
    try:
        return name, _value(f, text)
    except ValueError as error:
        fail(f"--{error}")


def _belongs(words: deque[str], alone: str) -> bool:
    """Return True if the next word is the value of a flag that may stand alone."""
    return bool(words) and (words[0] == alone or NUMBERS.fullmatch(words[0]) is not None)


def _negated(cls: type, known: dict[str, Field[Any]], name: str, takes_value: bool) -> str:
    """Return the flag that `no_flag` turns off; for any other name, report an error and exit."""
    turned_off = name.removeprefix("no_")
    if turned_off != name and turned_off in known and known[turned_off].type is bool:
        if takes_value:
            fail(f"--{name} takes no value; --{turned_off} does: true or false")
        return turned_off
    if name in known:
        example = getattr(cls, "EXAMPLES", ("",))[0]
        fail(f"--{name} is not a flag: {name.upper()} stands by itself: {example}")
    flags = [flag for flag, f in known.items() if not f.metadata["positional"]]
    near = difflib.get_close_matches(name, flags, n=1)
    hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
    fail(f"--{_clip(name)} is not a flag; {hint}")


def value_of(cls: type, name: str, text: str) -> Any:
    """Read the value of the field `name` from text. Raises ValueError for a bad name or value."""
    known = _flags(cls)
    if name not in known:
        raise ValueError(f"{_clip(name)} is not an option")
    return _value(known[name], text)


def _value(f: Field[Any], text: str) -> Any:
    try:
        return _structure(text, f.type) if f.metadata["json"] else _convert(text, f.type)
    except (ValueError, RecursionError):
        raise ValueError(f"{f.name} must be {_allowed(f)}, not {show(text)}") from None


def _structure(text: str, kind: Any) -> Any:
    """Read JSON or none. If the field takes a str, text without a leading [ is the value."""
    if text.lower() == "none":
        return None
    plain = str in _alternatives(kind) and not text.startswith("[")
    value = text if plain else json_module.loads(text)
    # JSON's \ud800 is a lone surrogate
    if not _is_unicode(json_module.dumps(value, ensure_ascii=False)):
        raise ValueError(text)
    return value


def _convert(text: str, kind: Any) -> Any:
    kinds = _alternatives(kind)
    if text.lower() == "none" and types.NoneType in kinds:
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is bool:
        raise ValueError(text)
    if _takes_several(kind) and "," in text:
        return tuple(_convert(part, int) for part in text.split(","))
    if str in kinds:
        return text
    # int() would accept other scripts' digits and 1_0
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    if int in kinds and not text.removeprefix("-").isdigit():
        raise ValueError(text)
    return int(text) if int in kinds else float(text)


def _flags(cls: type) -> dict[str, Field[Any]]:
    """Return a configuration's fields by name, including a nested configuration's fields."""
    known: dict[str, Field[Any]] = {}
    for f in fields(cls):
        if f.metadata:
            known[f.name] = f
        elif isinstance(f.type, type) and is_dataclass(f.type):
            known |= _flags(f.type)
    return known


def _help(cls: type, known: dict[str, Field[Any]]) -> str:
    """Return the text of --help, at most 80 columns wide."""
    about, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")
    parts = [_wrapped(about), ""]
    if examples := getattr(cls, "EXAMPLES", ()):
        parts += [*(f"  {example}" for example in examples), ""]
    parts += [_wrapped(rest), ""] if rest else []
    parts.append("Flags (hyphens are accepted for underscores):")
    titles = _titles(cls)
    for f in known.values():
        if f.metadata["positional"]:
            continue
        if f.name in titles:
            parts += ["", f"{titles[f.name]}:"]
        default = "" if str(f.default) in ("None", "False", "") else f" (default: {f.default})"
        kind = "" if f.type is bool else f" {_allowed(f)}"
        kind = f" [{f.metadata['alone']}]" if f.metadata["alone"] else kind
        parts.append(_wrapped(f"--{f.name}{kind}", 2, 10))
        parts.append(_wrapped(f.metadata["help"] + default, 6, 6))
    return "\n".join(parts)


def _wrapped(text: str, indent: int = 0, later: int = 0) -> str:
    return textwrap.fill(
        text,
        HELP_COLUMNS,
        initial_indent=" " * indent,
        subsequent_indent=" " * later,
        break_on_hyphens=False,
    )


def _titles(cls: type) -> dict[str, str]:
    """Return {a group's first field: the group's title}, a nested configuration's included."""
    titles: dict[str, str] = dict(getattr(cls, "GROUPS", {}))
    for f in fields(cls):
        if not f.metadata and isinstance(f.type, type) and is_dataclass(f.type):
            titles |= _titles(f.type)
    return titles
