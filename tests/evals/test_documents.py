"""Documents from tables: which rows, in which order, and what a bad table says."""

from __future__ import annotations

import json
import sys

import datasets
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table
from transformers import AutoTokenizer

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.evals import read_windows
from fewbits.evals.documents import documents

STORIES = [f"Story number {i} of a girl and her dog." for i in range(600)]  # more than one batch of rows


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "stories.parquet"
    write_table(pa.table({"id": list(range(600)), "story": STORIES, "text": ["no"] * 600}), path)
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has the data set a/b, with a part called `short`; it is streamed by `datasets` itself, from a file."""
    write_table(pa.table({"story": STORIES[:3]}), tmp_path / "short-00000.parquet")
    load = datasets.load_dataset
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if name != "a/b":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (offline)")
        return load("parquet", data_files={"short": str(tmp_path / "short-00000.parquet")}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_parquet_column_gives_its_rows_in_order(table):
    assert list(documents(f"{table}:story")) == STORIES
    assert list(documents(str(table))) == ["no"] * 600


def test_a_jsonl_field_gives_its_rows_in_order(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("\n\n".join(json.dumps({"story": s, "text": "no"}) for s in STORIES), encoding="utf-8")
    assert list(documents(f"{path}:story")) == STORIES
    assert list(documents(str(path))) == ["no"] * 600


def test_a_split_of_a_hub_data_set_is_streamed(hub):
    assert list(documents("hub:a/b:short:story")) == STORIES[:3]
    assert list(documents("hub:a/b/config:short:story")) == STORIES[:3]
    assert hub == [("a/b", None, "short", True), ("a/b", "config", "short", True)]


def test_split_and_column_of_a_hub_data_set_have_defaults(hub):
    with pytest.raises(CheckpointError, match=r"hub:a/b: cannot be streamed .*train"):
        list(documents("hub:a/b"))
    assert hub == [("a/b", None, "train", True)]
    with pytest.raises(CheckpointError, match="has no column 'text', only story; name one: hub:"):
        list(documents("hub:a/b:short"))


def test_plain_text_is_no_table():
    assert documents("a.txt") is documents("a.parquet.txt") is documents("a.md:column") is None


def test_windows_of_every_table_are_the_same(table, tmp_path, shared_models):
    """The same documents, so the same tokens as a .jsonl file of them."""
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "books")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(json.dumps({"text": s}) for s in STORIES))
    from_table, from_lines = (read_windows(source, tokenizer, 4, 64) for source in (f"{table}:story", lines))
    assert from_table.digest == from_lines.digest
    assert from_table.description == "stories.parquet:story, 4 windows of 64 tokens"


def test_a_missing_package_is_named(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r'needs pyarrow; install it with: pip install "fewbits\[data\]"'):
        list(documents(f"{table}:story"))
    with pytest.raises(UnsupportedError, match=r'need datasets; install it with: pip install "fewbits\[data\]"'):
        list(documents("hub:a/b"))


def test_a_bad_table_is_refused(table, tmp_path, hub):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not a table PAR1")
    holes = tmp_path / "holes.parquet"
    write_table(pa.table({"text": ["a", None, "c"]}), holes)
    for source, message in (
        (f"{table}:stories", r"has no column 'stories', only id, story, text; name one: stories\.parquet:COLUMN"),
        (f"{table}:id", "row 1: 'id' is int, not a string"),
        (str(holes), "row 2: 'text' is NoneType, not a string"),
        (str(broken), r"broken\.parquet: not a readable \.parquet file"),
        (str(tmp_path / "nowhere.parquet"), r"nowhere\.parquet: cannot be read \(No such file or directory\)"),
        ("hub:justaname:train", "'hub:justaname:train' does not name a data set of the hub; write hub:OWNER/NAME"),
        ("hub:c/d", r"hub:c/d: cannot be streamed from the hub \(ConnectionError: Couldn't reach 'c/d'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            list(documents(source))
