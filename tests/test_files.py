"""Sources -> files -> text: names, folders, globs, packing, encodings."""

import gzip
import io
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanogpt2.config import check_data, data_files, data_kind
from nanogpt2.data import files
from nanogpt2.data.files import DataFile, encoding_of, find_files


def text_of(data, name="book.txt"):
    return "".join(DataFile(name, ".txt", data).text())


def test_a_folder_holds_the_files_of_known_formats_by_name(tmp_path):
    for name in ("b.txt", "sub/c.csv.gz", "a.JSONL", "d.parquet", "e.tsv.zst", "sub/deep/a.txt.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("f.json", "g.ndjson.gz", "ignored.md", "ids.tokens", "notes", "x.gz"):
        (tmp_path / name).write_text("")
    skipped = []
    found = find_files(str(tmp_path), skip=lambda reason, name: skipped.append((reason, name)))
    assert [file.name.removeprefix(f"{tmp_path}/") for file in found] == [
        "a.JSONL", "b.txt", "d.parquet", "e.tsv.zst", "f.json", "g.ndjson.gz",
        "sub/c.csv.gz", "sub/deep/a.txt.gz",
    ]  # fmt: skip
    formats = [".jsonl", ".txt", ".parquet", ".tsv", ".json", ".jsonl", ".csv", ".txt"]
    assert [file.format for file in found] == formats
    others = ("ids.tokens", "ignored.md", "notes", "x.gz")
    assert skipped == [("of another kind", str(tmp_path / name)) for name in others]
    assert data_kind("a.md") is None and data_kind("a.csv") == ".csv"


def test_a_named_file_or_a_globs_may_have_any_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "c[1].txt").write_text("c")
    assert find_files("b.md") == [DataFile("b.md", ".txt")]
    assert [file.name for file in find_files("*.md")] == ["a.md", "b.md"]
    assert [file.name for file in find_files(f"{tmp_path}/**/a.*")] == [f"{tmp_path}/a.md"]
    # the name of an existing file is not a pattern
    assert [file.name for file in find_files("c[1].txt")] == ["c[1].txt"]


def tree(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def names_in(source, **options):
    skipped = []
    found = find_files(source, skip=lambda reason, name: skipped.append((reason, name)), **options)
    return [file.name for file in found], skipped


@pytest.mark.parametrize("source", ["d", "d/**/*.txt", "./d/**/*.txt", "**/*.txt", "d/**/**/*.txt"])
def test_every_real_file_is_read_once_whatever_links_there_are(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "d/a.txt", "d/z/b.txt", "d/z/q/c.txt", "far/x.txt")
    links = {"self": ".", "up": "..", "again": "z", "far": "../far", "one.txt": "a.txt"}
    for name, target in links.items():
        (tmp_path / "d" / name).symlink_to(target)
    for folder in ("d/z", "d/z/q", "far"):
        for name in ("self", "other"):
            (tmp_path / folder / name).symlink_to(tmp_path / "d")
    (tmp_path / "d/broken.txt").symlink_to("nowhere")
    far = "far/x.txt" if source == "**/*.txt" else "d/far/x.txt"
    found, skipped = names_in(source)
    assert found == sorted(["d/a.txt", far, "d/z/b.txt", "d/z/q/c.txt"])
    assert ("a link to a file already read", "d/one.txt") in skipped


def test_a_folder_of_links_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "store/one/a.txt", "store/b.txt")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/one").symlink_to("../store/one")
    (tmp_path / "d/b.txt").symlink_to("../store/b.txt")
    assert names_in("d")[0] == ["d/b.txt", "d/one/a.txt"]


@pytest.mark.parametrize("source", ["d", "d/**/*"])
def test_hidden_files_and_the_files_of_runs_are_no_data(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "d/a.txt", "d/.hidden.txt", "d/.git/x.txt", "d/sub/.cache/y.txt")
    # the run's folder, on another disk; an earlier run with a text beside it; a model
    tree(tmp_path, "disk/merges.txt", "disk/vocab.json", "disk/note.txt")
    (tmp_path / "d/out").symlink_to("../disk")
    tree(tmp_path, "d/old/merges.txt", "d/old/vocab.json", "d/old/run.json", "d/old/book.txt")
    tree(tmp_path, "d/old/metrics.jsonl", "d/old/checkpoints/step-1/merges.txt")
    tree(tmp_path, "d/gpt2/config.json", "d/gpt2/merges.txt", "d/gpt2/vocab.json")
    # of nobody's
    tree(tmp_path, "d/plain/merges.txt")
    found, skipped = names_in(source, out="d/out")
    assert found == ["d/a.txt", "d/old/book.txt", "d/plain/merges.txt"]
    # a glob does not match hidden files in the first place
    hidden = {"d/.git", "d/sub/.cache"} | ({"d/.hidden.txt"} if source == "d" else set())
    assert {name for reason, name in skipped if reason == "hidden"} == hidden
    own = [name for reason, name in skipped if reason == "of a model or a run"]
    assert {"d/out", "d/old/merges.txt", "d/old/checkpoints", "d/gpt2/merges.txt"} < {*own}
    # what is named itself is read
    assert names_in("d/old/merges.txt")[0] == ["d/old/merges.txt"]
    assert names_in("d/.git")[0] == ["d/.git/x.txt"]


def test_data_may_be_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "a.txt", "run.json", "metrics.jsonl", "merges.txt", "checkpoints/s/merges.txt")
    assert names_in(".", out=".")[0] == ["a.txt"]


@pytest.mark.parametrize("source", ["", "missing.txt", "texts/*.txt", "nothing", "a\0b", "[", "**"])
def test_a_source_without_files_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"is not a file|has no file to read \(.txt, .jsonl"):
        check_data(source)
    with pytest.raises(ValueError):
        find_files(source)


def test_names_need_no_file(monkeypatch):
    for name in ("pydocs", "shakespeare", "-"):
        check_data(name)
    texts = ["".join(file.text()) for file in find_files("pydocs")]
    assert len(texts) > 50 and any("lambda" in text for text in texts)


def test_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9")))
    (file,) = find_files("-", stdin_format=".jsonl")
    assert file.format == ".jsonl"
    for data, kind in (
        (b'\n{"text": "a"}\n', ".jsonl"),
        (b'\xef\xbb\xbf{"text": "a"}\n', ".jsonl"),
        ('{"text": "a"}\r\n'.encode("utf-16"), ".jsonl"),
        (b'[{"text": "a"}, 5]', ".jsonl"),
        (b'\n[\n {\n  "text": "a"\n }\n]\n', ".jsonl"),
        (b'{"te', ".txt"),
        (b"{a}\nb", ".txt"),
        (b"[1] a\n[2] b", ".txt"),
        (b"[1, 2]", ".txt"),
        (b"caf\xe9", ".txt"),
        (b"", ".txt"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert find_files("-")[0].format == kind
    # standard input can be read twice
    assert [*file.text()] == [*file.text()] == ["café", ""]


def test_a_token_file_stands_alone(tmp_path):
    for name in ("a.tokens", "b.txt"):
        (tmp_path / name).write_text("")
    assert find_files(str(tmp_path / "a.tokens"))[0].format == ".tokens"
    assert data_files(str(tmp_path)) == [tmp_path / "b.txt"]
    with pytest.raises(ValueError, match="give one such file alone"):
        find_files(str(tmp_path / "*"))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_encodings_in_pieces_of_any_size(monkeypatch, size, encoding):
    monkeypatch.setattr(files, "PIECE_SIZE", size)
    text = "naïve 文字 😀\r\n\u2028end"
    mark = {"utf-16-be": "\ufeff", "utf-32-be": "\ufeff"}.get(encoding, "")
    # every line end is a line feed
    assert text_of((mark + text).encode(encoding)) == text.replace("\r\n", "\n")
    assert text_of(mark.encode(encoding)) == ""


@given(st.text(), st.integers(1, 9), st.sampled_from(["utf-8-sig", "utf-16", "utf-32"]))
def test_any_text(text, size, encoding):
    # UTF-16's mark followed by a NUL is UTF-32's mark
    assume(encoding != "utf-16" or not text.startswith("\0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_SIZE", size)
        data = text.encode(encoding, "replace")
        lines = data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        assert text_of(data) == lines


@pytest.mark.parametrize("size", [1, 2, 4, 1 << 20])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"good \xff bad", "UTF-8: byte 0xff at offset 5"),
        (b"\xef\xbb\xbfgood \xff bad", "UTF-8: byte 0xff at offset 8"),
        (b"cut \xe2\x82", "UTF-8: byte 0xe2 at offset 4"),
        (b"within \xe2\x82 it", "UTF-8: byte 0xe2 at offset 7"),
        ("caf\xe9".encode("latin-1"), "UTF-8: byte 0xe9 at offset 3"),
        (b"\xff\xfe" + "odd".encode("utf-16-le") + b"x", "UTF-16-LE: byte 0x78 at offset 8"),
        (b"\xff\xfea\0\0\xdcb\0", "UTF-16-LE: byte 0x00 at offset 4"),
    ],
)
def test_an_undecodable_byte_is_named(monkeypatch, size, data, message):
    monkeypatch.setattr(files, "PIECE_SIZE", size)
    with pytest.raises(ValueError, match=message) as raised:
        text_of(data)
    assert "'book.txt'" in str(raised.value)


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_an_encoding_is_used_where_no_mark_stands(monkeypatch, size):
    monkeypatch.setattr(files, "PIECE_SIZE", size)

    def read(data, encoding):
        return "".join(DataFile("a.txt", ".txt", data, encoding).text())

    for encoding in ("cp1252", "latin-1", "utf-16", "utf-16-be", "utf-32", "shift_jis", "utf-7"):
        text = "\u65e5\u672c" if encoding == "shift_jis" else "caf\xe9"
        data = text.encode({"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding))
        assert read(data, encoding) == text
        assert read("caf\xe9".encode("utf-8-sig"), encoding) == "caf\xe9"


def test_an_encoding_is_proposed_if_it_would_read():
    def proposed(*data):
        return encoding_of([DataFile("a.txt", ".txt", one) for one in data])

    assert proposed(b"caf\xe9", b"it\x92s") == "cp1252"
    assert proposed(b"caf\xe9", b"\x81") == "latin-1"
    assert proposed(b"caf\xe9", b"\x89PNG\0") is None


def frames(data):
    import zstandard

    packer = zstandard.ZstdCompressor()
    half = len(data) // 2
    return packer.compress(data[:half]) + packer.compress(data[half:])


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", frames)])
@pytest.mark.parametrize("size", [16, 1 << 20])
def test_packed_files(tmp_path, monkeypatch, suffix, pack, size):
    monkeypatch.setattr(files, "PIECE_SIZE", size)
    text = "to be or not to be 文字\n" * 99
    path = tmp_path / f"book.txt{suffix}"
    path.write_bytes(pack(text.encode("utf-16")))
    (file,) = find_files(str(path))
    assert file.format == ".txt" and "".join(file.text()) == text
    whole = path.read_bytes()
    middle = len(whole) // 2
    scrambled = whole[:middle] + bytes(reversed(whole[middle:]))
    for damaged in (whole[:-3], whole[:9], scrambled, b"plain text, not packed"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"book.txt.* is damaged"):
            [*file.text()]


def test_zst_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.zst").write_bytes(b"x")
    with pytest.raises(ValueError, match="pip install zstandard"):
        [*find_files(str(tmp_path / "a.zst"))[0].text()]


def zst(data):
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_an_archive_of_one_byte_is_refused(tmp_path, monkeypatch, pack):
    """48 KB can unpack to more than the memory; a text never shrinks that far."""
    monkeypatch.setattr(files, "BOMB_SIZE", 1 << 22)
    path = tmp_path / ("a.gz" if pack is gzip.compress else "a.zst")
    path.write_bytes(pack(bytes(1 << (24 if pack is gzip.compress else 26))))
    pieces = DataFile(str(path), ".txt").pieces()
    with pytest.raises(ValueError, match=r"'.*' unpacks to more than 250 times its size and 4 MiB"):
        assert max(len(piece) for piece in pieces) <= 1 << 25
    # neither a small one nor one of ordinary text
    path.write_bytes(pack(bytes(1 << 22)))
    assert sum(map(len, DataFile(str(path), ".txt").pieces())) == 1 << 22
    text = b"".join(b"%d words in a line\n" % i for i in range(300_000))
    path.write_bytes(pack(text))
    assert b"".join(DataFile(str(path), ".txt").pieces()) == text
