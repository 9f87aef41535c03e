"""Files of records: their values, and errors that name the line."""

import csv
import io
import json
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from nanogpt2.data import files
from nanogpt2.data.files import DataFile
from nanogpt2.data.records import Record, read_records


def read(data, suffix):
    data = data.encode() if isinstance(data, str) else data
    return [*read_records(DataFile(f"data{suffix}", suffix, data))]


def values(data, suffix):
    return [record.values for record in read(data, suffix)]


def test_jsonl():
    lines = '{"text": "a\u2028b\x85"}\r\n\n  \n{"text": 5, "x": [1]}\n{"text": "end"}'
    records = read(lines, ".jsonl")
    assert [r.values for r in records] == [
        {"text": "a\u2028b\x85"}, {"text": 5, "x": [1]}, {"text": "end"},
    ]  # fmt: skip
    assert [r.where for r in records] == [f"'data.jsonl' line {n}" for n in (1, 4, 5)]


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"text": "unfinished', "unfinished"),
        ("[1, 2]", r"\[1, 2\]"),
        ('"text"', "text"),
        ("no json at all " * 20, r"no json at all no json at all no json\.\.\.'$"),
        ("[" * 100_000, r"\[\[\["),
        ('{"n": ' + "9" * 5000 + "}", "999"),
    ],
)
def test_a_malformed_line_is_named_with_an_excerpt(line, shown):
    with pytest.raises(ValueError, match=f"^'data.jsonl' line 3 is not a JSON object: .*{shown}"):
        read('{"text": "fine"}\n\n' + line + "\n", ".jsonl")


def test_tables():
    data = 'text, label\r\n"two\nlines, ""quoted""",ham\r\n\r\nplain,spam\r\n'
    records = read(data, ".csv")
    assert [r.values for r in records] == [
        {"text": 'two\nlines, "quoted"', "label": "ham"},
        {"text": "plain", "label": "spam"},
    ]
    # a record's line is its first one
    assert [r.where for r in records] == ["'data.csv' line 2", "'data.csv' line 5"]
    assert values("text\tlabel\na, b\tham\n", ".tsv") == [{"text": "a, b", "label": "ham"}]
    assert values("", ".csv") == values("text\n", ".csv") == []
    long = "word " * 100_000
    assert values(f"text\n{long}\n", ".csv") == [{"text": long}]
    assert values("text\na\0b\n", ".csv") == [{"text": "a\0b"}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, not 2"),
        ("a,b\n1\n", "line 2 has 1 fields, not 2"),
        ("a,a\n1,2\n", "line 1 names a column twice"),
        ('a,b\n1,2\n"open,2\n', "line 3 is malformed"),
        ('a,b\n"x"y,2\n', "line 2 is malformed"),
        ("a,b\r1,2\r", "line 1 is malformed"),
    ],
)
def test_a_malformed_table_names_the_line(data, message):
    with pytest.raises(ValueError, match=f"'data.csv' {message}"):
        read(data, ".csv")


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(st.lists(st.tuples(cells, cells)), st.integers(1, 20))
def test_any_table_and_any_json_come_back(rows, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_SIZE", size)
        table = io.StringIO()
        csv.writer(table, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
        expected = [{"text": text, "label": label} for text, label in rows]
        assert values(table.getvalue(), ".csv") == expected
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in expected)
        assert values(lines, ".jsonl") == expected


def test_parquet(tmp_path):
    rows = [{"text": f"text {i}", "label": i} for i in range(5)] + [{"text": None, "label": 7}]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    records = read(path.read_bytes(), ".parquet")
    assert [r.values for r in records] == rows
    assert records[4].where == "'data.parquet' row 5"
    for damaged in (b"", b"no parquet", path.read_bytes()[:-9]):
        with pytest.raises(ValueError, match=r"'data.parquet' is not a Parquet file"):
            read(damaged, ".parquet")


def test_parquet_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read(b"", ".parquet")


def test_columns():
    record = Record(
        "'x.csv' line 7", {"text": "a", "n": 5, "blank": " \n", "yes": True, "l": " b "}
    )
    assert record.text("text") == "a" and record.label("n") == "5" and record.label("l") == "b"
    for method, column, message in (
        (record.text, "body", "line 7 has no column 'body'; columns found: 'text', 'n', 'blank'"),
        (record.text, "n", "line 7: 'n' must be text, not '5'"),
        (record.text, "blank", "line 7: 'blank' is empty"),
        (record.label, "blank", "line 7: 'blank' is empty"),
        (record.label, "yes", "must be text or a whole number, not 'True'"),
    ):
        with pytest.raises(ValueError, match=message):
            method(column)
