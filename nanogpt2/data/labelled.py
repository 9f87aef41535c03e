"""A source -> texts and their labels, read as `train.py --task classify` reads them.

A record has a column of texts and perhaps one of labels. A text file has one text, whose label is
its folder's name. This file does not know tokens or the model.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt2 import terminal
from nanogpt2.data.content import Columns, records_of
from nanogpt2.data.files import TOKENS, DataFile, EncodingError, encoding_of
from nanogpt2.data.records import Record, RecordError


@dataclass(frozen=True)
class LabelledText:
    """A text, its label if it has one, and their origin, such as "'mails.csv' line 3"."""

    where: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class Names:
    """The columns' names, the preferred one first: the first name that a record has is used.

    needs_label: a record without a label is an error. Otherwise its label is None.
    """

    text: tuple[str, ...]
    label: tuple[str, ...] = ()
    needs_label: bool = False


def column_names(
    model: str, text: str | None, label: str | None, needs_label: bool = False
) -> Names:
    """Return the names given, or those that the model in the folder `model` was trained with."""
    usual, trained = Columns(), Columns()
    try:
        config = json.loads((Path(model) / "run.json").read_text(encoding="utf-8"))["config"]
        trained = Columns(str(config["text_column"]), str(config["label_column"]))
    except (OSError, ValueError, LookupError, TypeError):
        # not a run's folder
        pass
    return Names(
        (trained.text, usual.text) if text is None else (text,),
        (trained.label, usual.label) if label is None else (label,),
        needs_label,
    )


def read_labelled(
    files: Sequence[DataFile], names: Names, skip_bad: bool = False
) -> Iterator[LabelledText]:
    """Yield the texts in order; skip_bad: skip records that cannot be used, with a note for each.

    Raises ValueError for a file that cannot be read, and for the first bad record otherwise.
    """
    for file in files:
        if file.format in TOKENS:
            raise ValueError(f"{file.name!r} holds tokens, not texts")
        try:
            for record in records_of(file, Columns(names.text[0], (*names.label, "label")[0])):
                try:
                    yield _labelled(record, names)
                except RecordError as error:
                    skip_or_raise(str(error), skip_bad)
        except EncodingError as error:
            skip_text_or_raise(error, skip_bad)


def skip_or_raise(message: str, skip_bad: bool) -> None:
    """Say that a record is skipped, or raise ValueError that names the flag."""
    if not skip_bad:
        raise ValueError(f"{message} (--skip_bad skips it)") from None
    terminal.note(f"skipped {message}")


def skip_text_or_raise(error: EncodingError, skip_bad: bool) -> None:
    """Say that a text in another encoding is skipped, or raise ValueError."""
    if not (skip_bad and error.file.format == ".txt"):
        raise ValueError(with_advice(error)) from None
    terminal.note(f"skipped {error}")


def with_advice(error: EncodingError) -> str:
    """Return an error's text with the encoding that would read the file, if there is one."""
    known = encoding_of([error.file]) if error.is_guessed and error.encoding == "utf-8" else None
    return f"{error}; --encoding {known} would read it" if known else str(error)


def _labelled(record: Record, names: Names) -> LabelledText:
    text, label = (
        next((name for name in wanted if name in record.values), wanted[0] if wanted else "")
        for wanted in (names.text, names.label)
    )
    if len(names.label) == 1:
        # the column was named, so it must be there
        record.value(label)
    found = None
    try:
        found = record.label(label)
    except RecordError:
        if names.needs_label:
            raise
    return LabelledText(record.where, record.text(text), found)
