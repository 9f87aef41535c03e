"""What was read from a source, and what was skipped and why: counts, with the first places.

A run prints it and keeps it in run.json. This file does not know files or records.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN = 3  # places of each reason


@dataclass
class Skipped:
    """How many things one reason skipped, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Reading:
    """The counts of one source. It is kept as JSON: `asdict` and `reading_from`."""

    source: str = ""
    files: int = 0
    records: int = 0  # or texts
    tokens: int = 0
    cut: int = 0  # records longer than a sequence
    skipped: dict[str, Skipped] = field(default_factory=dict)
    advice: str = ""  # on another task that the records allow

    def skip(self, reason: str, what: str) -> None:
        """Count one thing that is not read."""
        skipped = self.skipped.setdefault(reason, Skipped())
        skipped.count += 1
        if len(skipped.first) < SHOWN:
            skipped.first.append(what)

    def describe(self) -> str:
        """Return the counts in a line, and a line for each reason to skip."""
        counts = [
            f"{count:,} {name}{'' if count == 1 else 's'}"
            for count, name in (
                (self.files, "file"),
                (self.records, "record"),
                (self.tokens, "token"),
            )
            if count
        ]
        lines = [f"read {self.source!r}: {', '.join(counts)}"]
        for reason, skipped in self.skipped.items():
            more = ", ..." if skipped.count > len(skipped.first) else ""
            lines.append(f"skipped {skipped.count:,} ({reason}): {', '.join(skipped.first)}{more}")
        return "\n".join([*lines, *([self.advice] if self.advice else [])])


def reading_from(values: dict) -> Reading:
    """Return the reading that `asdict` made a dictionary of."""
    skipped = {reason: Skipped(**one) for reason, one in values["skipped"].items()}
    return Reading(**(values | {"skipped": skipped}))
