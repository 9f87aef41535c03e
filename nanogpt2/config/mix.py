"""--mix SOURCE=WEIGHT,SOURCE=WEIGHT,...: several sources of data and their shares.

A source's name may contain commas and equals signs: a weight is the number between the last
equals sign of its source and a comma or the end. This file does not read the sources.
"""

import math
import os
import re
from fractions import Fraction

from nanogpt2.config.flags import show

PAIR = re.compile(r"(.+?)=([^=,]*)(?:,|\Z)", re.DOTALL)
NUMBER = re.compile(r"\+?(\d{1,400}\.?\d{0,400}|\.\d{1,400})([eE][+-]?\d{1,3})?", re.ASCII)


def read_mix(text: str) -> dict[str, Fraction]:
    """Return the weight of each source. Raises ValueError for a malformed mix."""
    found: dict[str, Fraction] = {}
    seen: set[str] = set()
    at = 0
    while at < len(text) or not found:
        pair = PAIR.match(text, at)
        if pair is None:
            left = show(text[at:])
            raise ValueError(f"mix must be SOURCE=WEIGHT,SOURCE=WEIGHT,...; {left} has no weight")
        source, weight = pair[1], pair[2]
        if not NUMBER.fullmatch(weight) or not 0 < float(weight) < math.inf:
            raise ValueError(
                f"mix: the weight of {show(source)} must be a number above 0, not {show(weight)}"
            )
        if source == "-":
            raise ValueError("mix: '-', standard input, cannot be one of several sources")
        first = source.split(",")[0]
        # os.path: pathlib's methods raise for a long name and for a loop of links
        exists = os.path.exists
        if first not in ("", source) and not exists(source) and exists(first):
            raise ValueError(f"mix: {show(first)} has no weight; write {first}=1")
        real = os.path.realpath(source) if "\0" not in source else source
        if real in seen:
            raise ValueError(f"mix names {show(source)} twice")
        seen.add(real)
        found[source] = Fraction(weight)
        at = pair.end()
    if text.endswith(","):
        raise ValueError(f"mix must not end in a comma, as {show(text)} does")
    return found
