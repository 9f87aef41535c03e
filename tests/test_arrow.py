"""Arrow: files, and data sets that Hugging Face's `datasets` has saved."""

import gzip
import io
import json
import sys

import pytest
from test_train import SMALL, run

from nanogpt2.data.corpus import load_corpus
from nanogpt2.data.files import DataFile, find_files
from nanogpt2.data.records import RecordError, read_records
from nanogpt2.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
ROWS = [
    {"text": f"text {i}: " + "words " * (i % 5), "label": i % 2, "other": [i]} for i in range(23)
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The library, without bars, network or a cache outside."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    return datasets


def arrow(kind="stream", rows=ROWS, batch=4):
    import pyarrow
    from pyarrow import ipc

    table = pyarrow.Table.from_pylist(rows)
    sink = io.BytesIO()
    with (ipc.new_stream if kind == "stream" else ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return sink.getvalue()


def records(data, name="a.arrow"):
    return [*read_records(DataFile(name, ".arrow", data))]


def texts(source, **more):
    corpus = load_corpus(source, BYTES, **more)
    parts = [BYTES.decode(ids.tolist()) for ids in (corpus.train, corpus.validation)]
    return sorted("".join(parts).split("<|endoftext|>"))


EXPECTED = sorted([*(row["text"] for row in ROWS), ""])


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_both_formats_of_arrow_files(here, kind):
    data = arrow(kind)
    found = records(data)
    assert [{**record.values} for record in found] == ROWS
    assert found[7].where == "'a.arrow' row 8"
    (here / "a.arrow").write_bytes(data)
    (here / "b.arrow.gz").write_bytes(gzip.compress(data))
    assert texts("a.arrow") == texts("b.arrow.gz") == EXPECTED
    with pytest.raises(RecordError, match="columns found: 'text', 'label', 'other'"):
        found[0].text("body")
    assert len(load_corpus("a.arrow", BYTES, "classify").train) == 21


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_a_file_cut_anywhere_is_one_error(kind):
    """At the end of a batch too, where the rest would look like a shorter file."""
    data = arrow(kind)
    for size in range(1, len(data)):
        with pytest.raises(ValueError, match=r"'a.arrow' is (cut off|damaged|not an Arrow file)"):
            records(data[:size])
    assert records(b"") == []


@pytest.mark.parametrize("data", [b"no arrow", b"ARROW1\0\0", b"\xff" * 64, b"PAR1" * 9])
def test_other_bytes_are_one_error(here, capsys, data):
    (here / "a.arrow").write_bytes(data)
    assert run("a.arrow", *SMALL) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: DATA ") and "a.arrow" in said and said.count("\n") == 1


def test_a_flipped_bit_never_ends_the_process():
    """An error or other records; the tables of offsets are checked before they are used."""
    data = bytearray(arrow(batch=9))
    for place in range(len(data)):
        data[place] ^= 64
        try:
            for record in records(bytes(data)):
                dict(record.values)
        except ValueError as error:
            assert "a.arrow" in str(error)
        data[place] ^= 64


def test_arrow_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"'a.arrow' needs pyarrow: pip install pyarrow"):
        records(b"x")


def test_a_saved_data_set(here, datasets):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk("saved", num_shards=3)
    # results of a map, which `datasets` keeps beside the data
    (here / "saved/cache-0123456789abcdef.arrow").write_bytes(arrow(rows=[{"text": "stale"}] * 99))
    assert texts("saved") == texts("saved/data-*.arrow") == EXPECTED
    (reading,) = load_corpus("saved", BYTES).readings
    assert (reading.files, reading.records) == (3, 23)
    assert reading.skipped["beside a saved data set"].count == 3
    # rows in another order, and some of them: as the library itself reads it back
    data.shuffle(seed=1).select(range(11)).save_to_disk("selected")
    kept = datasets.load_from_disk("selected")["text"]
    assert texts("selected") == sorted([*kept, ""]) and len(kept) == 11
    # several in a folder
    data.save_to_disk("many/one"), data.select([0]).save_to_disk("many/two")
    assert texts("many") == sorted([*EXPECTED, ROWS[0]["text"]])


def test_the_splits_of_a_saved_dict(here, datasets):
    data = datasets.Dataset.from_list(ROWS)
    parts = {"train": data, "validation": data.select(range(7)), "test": data.select(range(20))}
    datasets.DatasetDict(parts).save_to_disk("saved")
    corpus = load_corpus("saved", BYTES)
    assert [r.records for r in corpus.readings] == [23, 7]
    assert corpus.readings[0].skipped["of the split test"].count == 1
    assert "read 'saved (validation)': 1 file, 7 records" in corpus.describe(8)
    assert load_corpus("saved", BYTES, "classify").validation.lengths.size == 7
    assert texts("saved/test") == sorted([*(row["text"] for row in ROWS[:20]), ""])
    # no validation split: a tenth of the training split
    datasets.DatasetDict(train=data, test=data, unsupervised=data).save_to_disk("two")
    assert texts("two") == EXPECTED
    skipped = load_corpus("two", BYTES).readings[0].skipped
    assert {"of the split test", "of another split"} < skipped.keys()
    # to validate on another source's test split
    corpus = load_corpus("saved/train", BYTES, validation="two", block_size=8)
    assert [r.records for r in corpus.readings] == [23, 23]
    with pytest.raises(ValueError, match=r"'saved' holds several splits \(test, train, val"):
        find_files("saved")


def test_a_cache_of_the_library(here, datasets):
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = datasets.load_dataset("json", data_files="rows.jsonl", cache_dir="cache", split="train")
    data.map(lambda row: {"text": "mapped"})
    (folder,) = {path.parent for path in (here / "cache").rglob("*.arrow")}
    assert len([*folder.glob("*.arrow")]) == 2
    assert texts(str(folder)) == texts("cache") == EXPECTED


def test_the_list_of_a_saved_data_set_is_read_once_for_all_its_files(here, monkeypatch):
    names = [f"data-{i:05}-of-00040.arrow" for i in range(40)]
    (here / "saved").mkdir()
    for name in names:
        (here / "saved" / name).touch()
    state = {"_data_files": [{"filename": name} for name in names]}
    (here / "saved/state.json").write_text(json.dumps(state))
    read, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(text) or loads(text))
    assert [file.name for file in find_files("saved")] == [f"saved/{name}" for name in names]
    assert len(read) < 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"_indices_files": [{"filename": "i.arrow"}]}, "is a selection of rows"),
        (lambda s: s | {"_indices_data_files": [{"filename": "i.arrow"}]}, "flatten_indices()"),
        (lambda s: s | {"_data_files": [{"filename": "gone.arrow"}]}, "lacks gone.arrow"),
        (lambda s: s | {"_data_files": [{"filename": "../a.arrow"}]}, "outside its folder"),
        (lambda s: s | {"_data_files": 5}, "state.json' is damaged"),
        (lambda s: [s], "state.json' is damaged"),
    ],
)
def test_a_saved_data_set_that_cannot_be_read_is_one_line(here, capsys, change, message):
    """The folder is written by hand, in the layout of the library."""
    (here / "saved").mkdir()
    (here / "saved/data-00000-of-00001.arrow").write_bytes(arrow())
    (here / "saved/dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None}
    (here / "saved/state.json").write_text(json.dumps(state))
    assert texts("saved") == EXPECTED
    (here / "saved/state.json").write_text(json.dumps(change(state)))
    assert run("saved", *SMALL) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: DATA ") and message in said and said.count("\n") == 1, said
