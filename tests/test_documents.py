"""Documents that are no text (Word, EPUB, PDF, RTF, HTML, ...), whatever they are called."""

import gzip
import io
import sys
import zipfile

import pytest

from nanogpt2.cli.prompts import read_prompt, read_prompts
from nanogpt2.config import TrainConfig, data_files, parse
from nanogpt2.config.documents import START, document_kind
from nanogpt2.data.corpus import load_corpus
from nanogpt2.evaluate import EvaluateConfig
from nanogpt2.quantize import QuantizeConfig
from nanogpt2.tokenizer import byte_tokenizer

WORDS = "Once upon a time a boat crossed a river. " * 30


def packed(*entries):
    """A ZIP archive of (name, text)."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in entries:
            how = zipfile.ZIP_STORED if name == "mimetype" else zipfile.ZIP_DEFLATED
            archive.writestr(name, text, how)
    return file.getvalue()


ODT = "application/vnd.oasis.opendocument.text"
WORD = packed(("[Content_Types].xml", "<x/>"), ("word/document.xml", WORDS))
PAGE = f"<html><head><title>x</title></head><body><p>{WORDS}</p></body></html>"
PANDOC = "pandoc {0} -t plain --wrap=none -o book.txt"
# suffix, bytes, the kind, what makes a text of it
DOCUMENTS = [
    (
        ".docx",
        WORD,
        "docx",
        PANDOC,
    ),
    (".docx", packed(("word/numbering.xml", "<x/>"), ("xl/a.xml", "")), "docx", PANDOC),
    (".odt", packed(("mimetype", ODT), ("content.xml", WORDS)), "odt", PANDOC),
    (".epub", packed(("mimetype", "application/epub+zip"), ("a.xhtml", PAGE)), "epub", PANDOC),
    (".rtf", rb"{\rtf1\ansi " + WORDS.encode() + b"}", "rtf", PANDOC),
    (".html", f"<!DOCTYPE html>\n{PAGE}".encode(), "html", PANDOC),
    (".htm", PAGE.upper().encode(), "html", PANDOC),
    (".html", f'<div class="a">{WORDS}</div>'.encode(), "html", PANDOC),
    (".xhtml", f'<?xml version="1.0"?>\n<!-- x -->\n{PAGE}'.encode(), "html", PANDOC),
    (".html", PAGE.encode("utf-16"), "html", PANDOC),
    (".html", b"\xef\xbb\xbf" + PAGE.encode(), "html", PANDOC),
    (".fb2", f'<?xml version="1.0"?>\n<FictionBook>{WORDS}'.encode(), "fb2", PANDOC),
    (".pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "pdf", "pdftotext {0} book.txt"),
    (".doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", "doc", "libreoffice --convert-to txt {0}"),
    (".xlsx", packed(("[Content_Types].xml", ""), ("xl/a.xml", "")), "xlsx", "save it as .csv"),
    (".zip", packed(("book.txt", WORDS)), "zip", "unzip {0}"),
]
IDS = [f"{suffix} {number}" for number, (suffix, *_) in enumerate(DOCUMENTS)]
each_document = pytest.mark.parametrize(("suffix", "data", "kind", "way"), DOCUMENTS, ids=IDS)
TRAIN = ["--init", "demo"]


def refused(capsys, cls, argv):
    with pytest.raises(SystemExit) as stopped:
        parse(cls, argv)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and len(err) <= 201
    assert not err.endswith("...\n")
    return err


@each_document
def test_a_document_is_answered_with_what_makes_a_text_of_it(
    tmp_path, monkeypatch, capsys, suffix, data, kind, way
):
    monkeypatch.chdir(tmp_path)
    name = f"book{suffix}"
    (tmp_path / name).write_bytes(data)
    (tmp_path / "other.txt").write_text(WORDS)
    assert document_kind(data[:START], suffix) == kind
    said = way.format(name)
    for cls, argv, flag in (
        (TrainConfig, [name, *TRAIN], "DATA"),
        (TrainConfig, ["other.txt", "--validation", name, *TRAIN], "--validation"),
        (EvaluateConfig, [name, "--model", "demo"], "FILE"),
        (QuantizeConfig, ["demo", "--text", name], "--text"),
    ):
        err = refused(capsys, cls, argv)
        assert err.startswith(f"error: {flag} {name!r} is ") and said in err
    for read in (lambda: read_prompt("", name), lambda: read_prompts(name, False)):
        with pytest.raises(ValueError, match=f"^'{name}' is ") as raised:
            read()
        assert said in str(raised.value)


@each_document
def test_a_document_called_txt_is_known_by_its_first_bytes(
    tmp_path, monkeypatch, capsys, suffix, data, kind, way
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_bytes(data)
    if document_kind(data[:START], ".txt") is None:
        # a part of a page: only its name tells
        assert data.startswith(b"<div")
        return
    err = refused(capsys, TrainConfig, ["book.txt", *TRAIN])
    # the text gets another name, and pandoc is told the kind
    if "pandoc" in way:
        assert f"pandoc book.txt -t plain --wrap=none -o plain.txt -f {kind}" in err
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_bytes(data)
    (tmp_path / "texts/b.txt").write_text(WORDS)
    (tmp_path / f"texts/c{suffix}").write_bytes(data)
    skipped = []
    for source in ("texts", "texts/*.*", "texts/**"):
        found = data_files(source, skip=lambda reason, name: skipped.append((name, reason)))
        assert [path.name for path in found] == ["b.txt"]
    assert [name for name, _ in skipped].count("texts/a.txt") == 3
    assert ("pandoc FILE" in dict(skipped)["texts/a.txt"]) == ("pandoc" in way)


def test_a_folder_says_what_it_skipped_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    for name, data in (("a.docx", DOCUMENTS[0][1]), ("b.docx", DOCUMENTS[0][1])):
        (tmp_path / "t" / name).write_bytes(data)
    # nothing else to read
    err = refused(capsys, TrainConfig, ["t", *TRAIN])
    assert "DATA 't/a.docx' is a Word document, not text: pandoc t/a.docx" in err
    (tmp_path / "t/c.txt").write_text(WORDS)
    (tmp_path / "t/d.rtf").write_text(WORDS)
    assert (
        "skipped 2 (a Word document, not text: pandoc FILE -t plain --wrap=none -o FILE.txt): "
        "t/a.docx, t/b.docx\nskipped 1 (of another kind): t/d.rtf"
    ) in load_corpus("t", byte_tokenizer()).describe(64)


def test_packed_and_piped_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html.gz").write_bytes(gzip.compress(PAGE.encode()))
    assert "is HTML, whose tags" in refused(capsys, TrainConfig, ["page.html.gz", *TRAIN])
    (tmp_path / "book.txt").write_bytes(gzip.compress(WORDS.encode()))
    assert "its name must end in .gz" in refused(capsys, TrainConfig, ["book.txt", *TRAIN])
    for read in (lambda: load_corpus("-", byte_tokenizer()), lambda: read_prompt("-", None)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PAGE.encode())))
        with pytest.raises(ValueError, match=r"^standard input is HTML, .*: pandoc FILE -t plain"):
            read()


@pytest.mark.parametrize(
    "text",
    [
        "PK is a pair of letters",
        "a < b and <html> is a tag",
        "<|endoftext|>Once",
        "% PDF-1.7",
        "<poem>\nroses",
        '<?xml version="1.0"?>\n<mediawiki>',
        '{"text": "<html>"}',
        "",
    ],
)
def test_a_text_that_looks_a_little_like_one_is_read(tmp_path, text):
    path = tmp_path / "book.txt"
    path.write_text(text)
    assert data_files(str(path)) == [path]
    assert read_prompt("", str(path)) == text


def test_a_long_name_does_not_push_the_command_out(tmp_path, capsys):
    path = tmp_path / ("long name " * 8 + ".rtf")
    path.write_bytes(b"{\\rtf1 x}")
    err = refused(capsys, TrainConfig, [str(path), *TRAIN])
    assert "pandoc FILE -t plain --wrap=none -o FILE.txt" in err
