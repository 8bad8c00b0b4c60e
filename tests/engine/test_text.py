"""Tokens, special tokens and conversations as transformers has them; text that streams without splitting characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import byte_level, sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from fewbits.engine.streaming import StopStrings
from fewbits.engine.text import Text
from fewbits.errors import CheckpointError, RequestError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% generation %}{% set x = message.content | trim %}{{ x }}{% endgeneration %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = none -%}{%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- if loop.index0 > 20 -%}{%- break -%}{%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{ bos_token + '[INST] ' + ((system + '\n\n') if loop.first and system else '') + message['content'] }}
        {{- ' [/INST]' }}
    {%- else -%}
        {{ ' ' + message['content'] + eos_token }}
    {%- endif -%}
{%- endfor -%}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{ strftime_now('%Y') }}
"""
TALK = [
    {"role": "system", "content": 'Be brief <b>&</b> "kind".'},
    {"role": "user", "content": "  Hi there! 😀\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "What is 1 + 1?"},
]


def folder(path: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


def opened(path: Path) -> Text:
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    return Text((path / "tokenizer.json").read_text(encoding="utf-8"), settings)


def with_fallback() -> Tokenizer:
    tokenizer = sentencepiece()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


TOKENIZERS = {"byte-level": byte_level("regex", added=("<tool>",)), "sentencepiece": with_fallback()}
TEXTS = {name: Text(tokenizer.to_str(), SPECIAL) for name, tokenizer in TOKENIZERS.items()}


# Tokens


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"bos_token": None, "add_bos_token": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = folder(tmp_path / "t", TOKENIZERS[kind], SPECIAL | settings)
    theirs, ours = AutoTokenizer.from_pretrained(path), opened(path)
    for text in ("It was the best", " naïve 😀", "a</s>b <s> c <tool>", "\n\n x", " naïve 😀 <s>a b" * 200):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
        bare = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=False).tolist() == bare
        assert ours.decode(bare) == theirs.decode(bare, skip_special_tokens=True)


def test_tokens_that_only_the_settings_name(tmp_path: Path) -> None:
    """One of the settings' list, one that is named special, one among the extra ones."""
    listed = {"400": {"content": "<|call|>", "special": False, "normalized": False}}
    settings = SPECIAL | {"added_tokens_decoder": listed, "pad_token": "<pad>", "extra_special_tokens": ["<|x|>"]}
    path = folder(tmp_path / "t", byte_level("regex"), settings)
    theirs, ours = AutoTokenizer.from_pretrained(path), opened(path)
    text = "a<|call|>b<pad>c<|x|>"
    assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    assert (
        ours.decode(ours.encode(text))
        == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)
        == "a<|call|>bc"
    )


@pytest.mark.parametrize("name", ["books", "babyllama", "stories260K"])
def test_real_models(name: str, shared_models: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(shared_models / name), opened(shared_models / name)
    text = "Once upon a time, there was a naïve 日本 cat.\n\n  It"
    assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_a_text_ends_where_the_files_say() -> None:
    made = TOKENIZERS["byte-level"].to_str()
    assert Text(made, {}, {"eos_token_id": [7, 9]}, {"eos_token_id": 3}).ends == {7, 9}
    assert Text(made, {}, {}, {"eos_token_id": 3}).ends == {3}
    assert Text(made, {}, {}, {"text_config": {"eos_token_id": 4}}).ends == {4}
    assert Text(made, SPECIAL, {"eos_token_id": 7}).ends == {7, 1}  # the tokenizer's own may be the end of a turn
    assert Text(made, {}).ends == frozenset()


def test_an_empty_prompt_is_the_token_that_begins_a_text() -> None:
    made = TOKENIZERS["byte-level"].to_str()
    assert Text(made, SPECIAL).encode("").tolist() == [0]
    assert Text(made, {"eos_token": "</s>"}).encode("").tolist() == [1]
    with pytest.raises(RequestError, match="the prompt is empty"):
        Text(made, {}).encode("")


def test_a_damaged_tokenizer() -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        Text('{"model": 3}', {})


# Conversations


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "é<x>"}}]], ids=["", "tools"])
def test_conversations_are_those_of_transformers(template: str, asked: bool, tools: Any, tmp_path: Path) -> None:
    settings = SPECIAL | {"chat_template": template, "extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    path = folder(tmp_path / "t", byte_level("regex"), settings | {"add_bos_token": True})
    theirs, ours = AutoTokenizer.from_pretrained(path), opened(path)
    expected = theirs.apply_chat_template(TALK, tools=tools, tokenize=False, add_generation_prompt=asked)
    assert ours.render(TALK, tools=tools, add_generation_prompt=asked) == expected
    if asked:
        tokens = theirs.apply_chat_template(TALK, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ours.encode_messages(TALK, tools=tools).tolist() == tokens


def test_of_several_templates_the_default_one_is_used() -> None:
    listed = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    text = Text(TOKENIZERS["byte-level"].to_str(), {"chat_template": listed})
    assert text.render([{"role": "user", "content": "yes"}]) == "yes"


def test_conversations_that_are_refused() -> None:
    made = TOKENIZERS["byte-level"].to_str()
    with pytest.raises(RequestError, match="no chat template"):
        Text(made, SPECIAL).encode_messages(TALK)
    text = Text(made, SPECIAL | {"chat_template": LLAMA})
    with pytest.raises(RequestError, match="roles must alternate"):
        text.encode_messages(TALK[:2] + TALK[3:])
    with pytest.raises(RequestError, match="0 messages"):
        text.encode_messages([])
    with pytest.raises(RequestError, match="refuses"):
        Text(made, {"chat_template": "{% if %}"}).encode_messages(TALK)
    with pytest.raises(RequestError, match="unsafe"):  # templates come from strangers
        Text(made, {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"}).encode_messages(TALK)


# Streams


def pieces(text: Text, tokens: Any, *, continues: bool = False) -> list[str]:
    stream = text.stream(continues=continues)
    return [*(stream.push(int(token)) for token in tokens), stream.flush()]


@pytest.mark.parametrize("kind", TEXTS)
@given(written=st.text(max_size=60))
@hypothesis_settings(max_examples=200, deadline=None)
def test_pieces_joined_are_the_text(kind: str, written: str) -> None:
    text = TEXTS[kind]
    tokens = text.encode(written).tolist()
    found = pieces(text, tokens)
    assert "".join(found) == text.decode(tokens)
    if "\ufffd" not in written:
        assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("kind", TEXTS)
@given(before=st.text(min_size=1, max_size=20), after=st.text(max_size=20))
@hypothesis_settings(max_examples=100, deadline=None)
def test_a_text_that_goes_on_keeps_its_spaces(kind: str, before: str, after: str) -> None:
    text = TEXTS[kind]
    prompt, tokens = text.encode(before).tolist(), text.encode(after, special=False).tolist()
    whole = text.decode(prompt + tokens)
    assert text.decode(prompt) + "".join(pieces(text, tokens, continues=True)) == whole


@given(tokens=st.lists(st.integers(0, 405), max_size=40))
@hypothesis_settings(max_examples=300, deadline=None)
def test_any_tokens_of_a_byte_level_vocabulary(tokens: list[int]) -> None:
    """Also those that are no text at all: bytes out of place, special tokens, tokens beyond the vocabulary."""
    text = TEXTS["byte-level"]
    assert "".join(pieces(text, tokens)) == text.decode(tokens)


def test_bytes_that_are_no_character_cost_no_good_one() -> None:
    text = TEXTS["sentencepiece"]
    euro = [text._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert "".join(pieces(text, [*euro, euro[0]], continues=True)) == "€\ufffd"


def test_a_character_comes_with_its_last_byte() -> None:
    text = TEXTS["byte-level"]
    tokens = text.encode("🜁", special=False).tolist()
    assert len(tokens) == 3  # of this vocabulary
    assert pieces(text, tokens) == ["", "", "🜁", ""]


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.WordPiece(cleanup=False), decoders.Fuse()], ids=str)
def test_decoders_of_other_kinds(decoder: Any) -> None:
    words = {"[UNK]": 0, "▁a": 1, "▁b": 2, "##c": 3, "▁": 4, "d": 5, "e": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoder
    text = Text(tokenizer.to_str(), {})
    for tokens in ([1, 2, 3], [5, 3, 6, 1], [4, 1, 4, 4, 5], [3, 5]):
        assert "".join(pieces(text, tokens)) == text.decode(tokens)


# Stop strings


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
@hypothesis_settings(max_examples=300, deadline=None)
def test_stop_strings_by_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    """However the text is cut into pieces: all before the stop string that is complete first, and not a letter more."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stream, out = StopStrings(stops), ""
    for part in parts:
        out += stream.push(part)
        if stream.found is not None:
            break
    out += "" if stream.found is not None else stream.flush()
    if stream.found is None:
        assert out == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(out + stream.found)
        assert not any(stop in out for stop in stops)
        assert stream.found in stops


def test_only_a_possible_beginning_is_held_back() -> None:
    stream = StopStrings(["\n\nUser:"])
    assert stream.push("Hello\n") == "Hello"
    assert stream.push("\nUse it") == "\n\nUse it"
    assert stream.push("\n\nUser") == ""
    assert stream.push(": x") == ""
    assert stream.found == "\n\nUser:"


def test_tokens_are_int32() -> None:
    assert TEXTS["byte-level"].encode("abc").dtype == np.int32
