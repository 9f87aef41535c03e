"""Files of records: their values, and errors that name the line."""

import csv
import io
import json
import math
import sys
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt2.data import files
from nanogpt2.data.files import DataFile
from nanogpt2.data.records import Record, RecordError, read_records


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
    first, bad, last = read('{"text": "fine"}\n\n' + line + '\n{"text": "too"}\n', ".jsonl")
    assert first.text("text") == "fine" and last.text("text") == "too"
    # a malformed record is an error where it is used, so that the others can be read
    for use in (lambda: bad.text("text"), lambda: "x" in bad.values, lambda: [*bad.values]):
        with pytest.raises(
            RecordError, match=f"^'data.jsonl' line 3 is not a JSON object: .*{shown}"
        ) as raised:
            use()
        assert raised.value.where == "'data.jsonl' line 3"


TWO = [{"text": "a\nb"}, {"text": "é"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "data",
    [
        "\n".join(map(json.dumps, TWO)),
        json.dumps(TWO),
        f"\n {json.dumps(TWO, indent=2)}\n",
        "[" + ",\n".join(map(json.dumps, TWO)) + "]",
        "\n".join(json.dumps(one, indent=1) for one in TWO),
    ],
    ids=["lines", "array", "indented", "array of lines", "objects"],
)
def test_every_form_of_json(data, ends, suffix):
    assert values(data.replace("\n", ends), suffix) == TWO


def test_json_of_one_object_or_none():
    assert (
        values('{"text": "a"}', ".json") == values('{\n"text": "a"\n}', ".json") == [{"text": "a"}]
    )
    assert values("[]", ".json") == values("", ".json") == []


def test_items_of_an_array_are_numbered():
    first, bad = read('[{"text": "a"}, 5]', ".json")
    assert first.where == "'data.json' item 1" and first.text("text") == "a"
    with pytest.raises(RecordError, match=r"^'data\.json' item 2 is not a JSON object: '5'"):
        bad.text("text")


@pytest.mark.parametrize("data", ['[{"a": 1},\n{"a": 2},\n]', '{\n"a": 1,\n}', '[{"a": 1}'])
def test_a_malformed_array_names_the_line(data):
    with pytest.raises(ValueError, match=r"'data.json' is not JSON Lines or an array: .* line \d"):
        read(data, ".json")


def test_a_first_line_that_is_malformed_is_one_record():
    records = read('{"text": "a",}\n{"text": "b"}\n', ".jsonl")
    assert len(records) == 2 and records[1].text("text") == "b"
    records = read('[1, 2]\n{"text": "b"}\n', ".jsonl")
    assert len(records) == 2 and records[1].text("text") == "b"


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
        ("a,b\n1,2\n1,2,3\n3,4\n", "line 3 has 3 fields, not 2"),
        ("a,b\n1\n3,4\n", "line 2 has 1 fields, not 2"),
        ("a,b\n3,4\n\n1,2,\n3,4\n", "line 4 has 3 fields, not 2"),
        ('a,b\n3,4\n"open,2\n', "line 3 is malformed"),
        ("a\tb\n3\t4\n5\n3\t4\n", "line 3 has 1 fields, not 2"),
        ('a\tb\n3\t4\n5\t6\t"7\n3\t4\n', "line 3 has 3 fields, not 2"),
    ],
)
def test_a_malformed_record_names_the_line_and_leaves_the_others(data, message):
    *_, last = records = read(data, ".csv")
    (bad,) = [record for record in records if not is_good(record)]
    assert last is bad or last.values == {"a": "3", "b": "4"}
    with pytest.raises(RecordError, match=f"'data.csv' {message}"):
        bad.text("a")


def is_good(record):
    try:
        return bool(record.values)
    except RecordError:
        return False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a,a\n1,2\n", "line 1 names a column twice"),
        ('"a,b\n', "line 1 is malformed"),
        # records that a quote swallowed cannot be counted
        ('a,b\n1,2\n"3,4\n5,6\n', r"line 3 opens a quote .*\(read to line 4\)"),
        ('a,b\n1,"2\n3,4\n5,"6"\n', r"line 2 opens a quote .*\(read to line 4\)"),
    ],
)
def test_a_malformed_table_names_the_line(data, message):
    with pytest.raises(ValueError, match=f"'data.csv' {message}"):
        read(data, ".csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_any_delimiter_and_any_line_end(delimiter, ends, suffix):
    data = '\n"my, text";label\nhe said: no;ham\n"two\nlines, ""in quotes""";spam\n'
    data = data.replace(";", delimiter).replace("\n", ends)
    assert values(data, suffix) == [
        {"my, text": "he said: no", "label": "ham"},
        {"my, text": 'two\nlines, "in quotes"', "label": "spam"},
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line", ["sep={}\r\n", '"sep={}"\n', "\n\nSEP={}\n\n"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_line_that_states_the_delimiter_is_no_record(delimiter, line, suffix):
    data = line.format(delimiter) + f"my, text{delimiter}label\nyes; no, x{delimiter}ham\n"
    if delimiter in ";,":
        data = data.replace("my, text", '"my, text"').replace("yes; no, x", '"yes; no, x"')
    (record,) = read(data, suffix)
    assert record.values == {"my, text": "yes; no, x", "label": "ham"}
    assert record.where.endswith(f"line {len(line.splitlines()) + 2}")


def test_a_column_alone_may_hold_other_delimiters():
    assert values('text\n"a;b, c"\n', ".csv") == [{"text": "a;b, c"}]
    assert values("text\na;b, c\n", ".tsv") == [{"text": "a;b, c"}]
    assert values("a;b,c\n1,2\n", ".csv") == [{"a;b": "1", "c": "2"}]


def test_columns_without_a_name_are_ignored():
    assert values("v1,v2,,,\nham,text,more,,\n", ".csv") == [{"v1": "ham", "v2": "text"}]
    assert values(",text\n0,a\n", ".csv") == [{"text": "a"}]


def test_a_field_that_begins_in_quotes_is_kept():
    assert values('a,b\n"x"y,2\n', ".csv") == [{"a": "xy", "b": "2"}]


@pytest.mark.parametrize(
    ("lines", "texts"),
    [
        # stray quotes, each alone, at both ends of several records, at the end of the file
        (['ham\t"a', "ham\tb"], ['"a', "b"]),
        (['ham\t"a', "ham\tb", 'ham\tc"', "ham\td"], ['"a', "b", 'c"', "d"]),
        (['ham\t"a', "", 'ham\tc"'], ['"a', 'c"']),
        (["ham\ta", 'ham\t"b'], ["a", '"b']),
        (['ham\t"a" b', 'ham\tc "d" e', 'ham\t"'], ['"a" b', 'c "d" e', '"']),
        # quotes that enclose a field
        (['ham\t"a ""b"" c"', 'ham\t"tab\tin"'], ['a "b" c', "tab\tin"]),
        (['ham\t"two', 'lines"', "ham\tb"], ["two\nlines", "b"]),
        (['ham\t"three', "", 'lines"', 'ham\t"b'], ["three\n\nlines", '"b']),
    ],
)
def test_stray_quotes_keep_every_record(lines, texts):
    data = "\n".join(["label\ttext", *lines]) + "\n"
    assert [v["text"] for v in values(data, ".tsv")] == texts
    assert {v["label"] for v in values(data, ".tsv")} == {"ham"}


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(st.lists(st.tuples(cells, cells)), st.integers(1, 20))
def test_any_table_and_any_json_come_back(rows, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_SIZE", size)
        table = io.StringIO()
        csv.writer(table, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
        expected = [{"text": text, "label": label} for text, label in rows]
        ends = {ord("\r"): "\n"}
        assert values(table.getvalue(), ".csv") == [
            {name: text.replace("\r\n", "\n").translate(ends) for name, text in row.items()}
            for row in expected
        ]
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in expected)
        assert values(lines, ".jsonl") == expected


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": f"text {i}", "label": i} for i in range(5)] + [{"text": None, "label": 7}]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    records = read(path.read_bytes(), ".parquet")
    assert [r.values for r in records] == rows
    assert records[4].where == "'data.parquet' row 5"
    assert read(b"", ".parquet") == []
    for damaged in (b"no parquet", path.read_bytes()[:-9]):
        with pytest.raises(ValueError, match=r"'data.parquet' is not a Parquet file"):
            read(damaged, ".parquet")


def test_parquet_reads_only_the_columns_that_are_used(monkeypatch):
    """A date, a duration or nanoseconds that Python cannot express never matter."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "text": ["a", "b"],
            "when": pyarrow.array([1, 2**62 + 1], pyarrow.timestamp("ns")),
            "day": pyarrow.array([-(2**31), 2**31 - 1], pyarrow.date32()),
            "took": pyarrow.array([1, 2**62 + 1], pyarrow.duration("ns")),
            "label": [True, False],
        }
    )
    file = io.BytesIO()
    parquet.write_table(table, file)
    asked = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, group, columns: asked.extend(columns) or real(self, group, columns),
    )
    records = read(file.getvalue(), ".parquet")
    assert [record.text("text") for record in records] == ["a", "b"]
    assert [record.label("label") for record in records] == ["true", "false"]
    assert asked == ["text", "label"]
    with pytest.raises(RecordError, match=r"row 2: 'day' cannot be read|'day' must be text"):
        records[1].label("day")
    with pytest.raises(RecordError, match="columns found: 'text', 'when', 'day', 'took', 'label'"):
        records[0].text("body")


def test_parquet_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        read(b"", ".parquet")


def test_columns():
    record = Record(
        "'x.csv' line 7",
        {"text": "a", "n": 5, "blank": " \n", "nan": math.nan, "l": " b ", "half": "a\ud83d"},
    )
    assert record.text("text") == "a" and record.label("n") == "5" and record.label("l") == "b"
    labels = {"a": True, "b": False, "c": 1.5, "d": -2, "e": Decimal("1.0")}
    numbers = [Record("", labels).label(name) for name in labels]
    assert numbers == ["true", "false", "1.5", "-2", "1.0"]
    for method, column, message in (
        (record.text, "body", "line 7 has no column 'body'; columns found: 'text', 'n', 'blank'"),
        (record.text, "n", "line 7: 'n' must be text, not '5'"),
        (record.text, "blank", "line 7: 'blank' is empty"),
        (record.text, "half", r"line 7: 'half' has \\ud83d, half a surrogate pair"),
        (record.label, "half", "half a surrogate pair"),
        (record.label, "blank", "line 7: 'blank' is empty"),
        (record.label, "nan", "must be text, a number, true or false, not 'nan'"),
    ):
        with pytest.raises(ValueError, match=message):
            method(column)
