"""Documents that are no text (Word, PDF, HTML, ...): recognised by their first bytes, never read.

A document is answered with the command that makes a text of it. This file does not know where the
file comes from.
"""

import gzip
import re
import shlex
from pathlib import Path

from nanogpt2.config.flags import show

SUFFIXES = (".docx", ".odt", ".epub", ".pdf", ".rtf", ".html", ".htm", ".xhtml", ".fb2", ".doc")
START = 8192  # bytes
OFFICE = {b"word/": "docx", b"xl/": "xlsx", b"ppt/": "pptx"}
MIMETYPES = {b"application/epub+zip": "epub", b"application/vnd.oasis.opendocument.text": "odt"}
SIGNATURES = {
    b"%PDF-": "pdf",
    b"{\\rtf": "rtf",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "doc",
    b"\x1f\x8b": "gz",
    b"7z\xbc\xaf\x27\x1c": "7z",
}
# what may stand before the first tag: XML's declaration, comments, white space
HTML = re.compile(
    rb"(?:\s|<\?.*?\?>|<!--.*?-->)*<(?:!doctype\s+html|html|head|body|meta|title)\b", re.S | re.I
)
TAG = re.compile(rb"<(?:p|div|span|h[1-6]|table|a|ul|br|script|style)\b[^>]*>", re.I)
FICTION_BOOK = re.compile(rb"(?:\s|<\?.*?\?>|<!--.*?-->)*<FictionBook\b", re.S)

NAMES = {
    "docx": "a Word document",
    "odt": "an OpenDocument text",
    "epub": "an EPUB book",
    "fb2": "a FictionBook",
    "rtf": "RTF",
    "html": "HTML",
    "pdf": "a PDF",
    "doc": "an old Office document",
    "xlsx": "a spreadsheet",
    "pptx": "slides",
    "zip": "a ZIP archive",
    "gz": "a gzip archive",
    "7z": "a 7z archive",
}
OTHER_WAYS = {
    "doc": "libreoffice --convert-to txt {file}",
    "pptx": "libreoffice --convert-to pdf {file}, then pdftotext",
    "pdf": "pdftotext {file} {text}",
    "xlsx": "save it as .csv",
    "zip": "unzip {file}",
    "gz": "its name must end in .gz",
    "7z": "unpack it first",
}
LONGEST_NAME = 50  # characters of a file's name within a command


def document_kind(start: bytes, suffix: str = "") -> str | None:
    """Return the kind of a document, one of NAMES, by a file's first bytes; None for a text.

    suffix: of the file's name; with .html a tag anywhere is enough.
    """
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(start, suffix)
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            return None if (kind, suffix) == ("gz", ".gz") else kind
    # a mark and UTF-16's zeros
    plain = start.removeprefix(b"\xef\xbb\xbf").removeprefix(b"\xff\xfe").removeprefix(b"\xfe\xff")
    plain = plain.replace(b"\0", b"")
    if HTML.match(plain) or (suffix in (".html", ".htm", ".xhtml") and TAG.search(plain)):
        return "html"
    return "fb2" if FICTION_BOOK.match(plain) else None


def _zip_kind(start: bytes, suffix: str) -> str:
    for mimetype, kind in MIMETYPES.items():
        if mimetype in start[:100]:
            return kind
    # an entry's header holds its name, and the first one tells
    found = [(at, kind) for folder, kind in OFFICE.items() if (at := start.find(folder)) >= 0]
    if found:
        return min(found)[1]
    return suffix[1:] if suffix[1:] in ("docx", "xlsx", "pptx", "epub", "odt") else "zip"


def document_in(path: Path) -> str | None:
    """Return the kind of the document in a file, unpacked if it is a .gz; None for a text.

    A file that cannot be read is left to its reader.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_packed = suffixes[-1:] == [".gz"]
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            start = file.read(START)
    except (OSError, EOFError, ValueError):
        return None
    return document_kind(start, "".join(suffixes[:-1] if is_packed else suffixes[-1:]))


def refuse_document(data: bytes, name: str | None = None) -> None:
    """Raise ValueError for a document's bytes. name: the file's; None is standard input."""
    kind = document_kind(data[:START], Path(name or "").suffix.lower())
    if kind is not None:
        said = "standard input" if name is None else show(name)
        raise ValueError(f"{said} is {advice(kind, name)}")


def advice(kind: str, name: str | None = None) -> str:
    """Say what a document is and the command that makes a text of it.

    name: the file's; without it the command says FILE.
    """
    suffix = Path(name or "").suffix.lower()
    file = shlex.quote(name) if name and len(name) <= LONGEST_NAME else "FILE"
    if kind in OTHER_WAYS:
        way = OTHER_WAYS[kind]
    else:
        # pandoc goes by the name, which may be wrong
        is_named = suffix in ("", f".{kind}") or (kind == "html" and suffix.endswith("htm"))
        way = "pandoc {file} -t plain --wrap=none -o {text}" + ("" if is_named else f" -f {kind}")
    text = Path(name or "").stem + ".txt"
    if file == "FILE" or suffix == ".txt":
        # no command writes over its own file
        text = "FILE.txt" if file == "FILE" else "plain.txt"
    learnt = ", whose tags would be learnt" if kind == "html" else ", not text"
    return f"{NAMES[kind]}{learnt}: " + way.format(file=file, text=shlex.quote(text))
