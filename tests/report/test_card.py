"""The model card: front matter that the hub takes, tables, commands without anybody's folders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import bare, whole

from fewbits.checkpoint import KINDS
from fewbits.report.card import MARKER, card, cell, without_folders
from fewbits.report.card import yaml as written
from fewbits.report.running import LIBRARIES, WAYS
from fewbits.report.svg import shown


def front(text: str) -> dict[str, object]:
    _, block, _ = text.split("---\n", 2)
    found = yaml.safe_load(block)
    assert isinstance(found, dict)
    return found


def test_the_front_matter_is_as_the_hub_expects() -> None:
    assert front(card(whole())) == {
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fewbits", "quantized", "compressed-tensors", "int4-g32", "int3-g32"],
    }


def test_what_is_not_known_is_left_out() -> None:
    found = front(card(bare()))
    assert "base_model" not in found
    assert "license" not in found
    assert front(card(bare(), "me/other"))["base_model"] == "me/other"


def test_tables_have_as_many_cells_as_heads() -> None:
    for text in (card(whole()), card(bare())):
        assert MARKER in text
        assert "None" not in text
        heads = 0
        for line in text.splitlines():
            cells = line.count("|") - line.count("\\|")
            if line.startswith("|"):
                heads = heads or cells
                assert cells == heads, line
            else:
                heads = 0


def test_figures_and_origin_are_there() -> None:
    text = card(whole())
    assert "| mean KL divergence, nats a token | 0.012 | 0.001 |" in text
    assert "[owner/tiny](https://huggingface.co/owner/tiny) in 8.37 bits a weight" in text
    assert "fewbits quantize tiny tiny-int4 --bpw 4.25" in text
    assert "/home/me" not in text
    assert "0.5 → 0.1 nats a token" in text
    assert "Not measured for this card: give the original" in card(bare())


def test_text_that_was_calibrated_on_is_told() -> None:
    assert "**the file that it was calibrated on**" in card(whole(on_calibration_text=True))


@settings(deadline=None)
@given(st.text())
def test_yaml_gives_back_any_text(text: str) -> None:
    assert yaml.safe_load(f"- {written(text)}") == [shown(text)]


@settings(deadline=None)
@given(st.text())
def test_a_cell_stays_in_its_line(text: str) -> None:
    found = cell(text)
    assert len(found.splitlines()) <= 1
    assert "|" not in found.replace("\\|", "")


def test_only_folders_are_cut_from_commands() -> None:
    assert without_folders("fewbits quantize '/a b/c' x/y --bpw 4") == "fewbits quantize c x/y --bpw 4"


def test_a_changed_command_is_still_cut() -> None:
    assert without_folders("fewbits '/a/b\n") == "fewbits ''\"'\"'/a/b'"
    assert without_folders("fewbits /a/b 'c\n") == "fewbits b ''\"'\"'c'"


def test_a_name_with_markup_is_no_markup() -> None:
    text = card(replace(whole(), source="a|b<script>", base_model=None))
    assert "a\\|b\\<script\\>" in text


def test_kinds_that_can_be_written_say_how_they_are_run() -> None:
    assert WAYS.keys() <= KINDS.keys()
    assert LIBRARIES.keys() <= KINDS.keys()
    missing = {name for name, kind in KINDS.items() if kind.written} - WAYS.keys()
    assert not missing


@pytest.mark.parametrize("kind", sorted(WAYS))
def test_what_is_typed_names_the_checkpoint(kind: str) -> None:
    text = card(replace(whole(), kind=kind, name="a-model"))
    assert text.count("a-model") > len(WAYS[kind])
    for way in WAYS[kind]:
        if way.language == "python":
            compile(way.text.format(name="'a-model'"), kind, "exec")
