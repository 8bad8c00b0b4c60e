"""GGUF's tokenizer keys turned back: the ids must be those of the tokenizer that the keys were made of."""

from __future__ import annotations

import json

import pytest
from test_gguf_tokenizer import BPES, TRICKY
from tiny import byte_level, save_tokenizer, sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.models import restored_tokenizer
from fewbits.models.gguf_tokenizer import tokenizer_metadata


def metadata_of(tokenizer, folder, **settings):
    save_tokenizer(tokenizer, folder, **settings)
    return tokenizer_metadata(folder, {"vocab_size": tokenizer.get_vocab_size()})


def restored(metadata):
    return Tokenizer.from_str(json.dumps(restored_tokenizer(metadata)[0]))


@pytest.mark.parametrize("pre", BPES)
def test_byte_level_ids_are_the_originals(tmp_path, shared_text, pre):
    again = restored(metadata_of(BPES[pre], tmp_path))
    for text in (*TRICKY, "a</s>b <s> c", (shared_text / "wikitext2-valid.txt").read_text()[:50_000]):
        expected = BPES[pre].encode(text)
        assert again.encode(text).ids == expected.ids, text
        assert again.decode(expected.ids) == BPES[pre].decode(expected.ids)


@pytest.mark.parametrize(("bos", "metaspace"), [(True, None), (False, None), (True, "first"), (True, "never")])
def test_sentencepiece_ids_are_the_originals(tmp_path, shared_text, bos, metaspace):
    tokenizer = sentencepiece(bos=bos, metaspace=metaspace)
    again = restored(metadata_of(tokenizer, tmp_path, unk_token="<unk>"))
    for text in (*TRICKY, (shared_text / "wikitext2-valid.txt").read_text()[:50_000]):
        if metaspace == "first" and text.startswith(" "):
            continue  # tokenizers adds no ▁ before a space there, llama.cpp always does
        assert again.encode(text).ids == tokenizer.encode(text).ids, text


@pytest.mark.parametrize("name", ["books", "babyllama", "stories260K"])
def test_real_models_tokenizers_come_back(shared_models, shared_text, name):
    """With special tokens, and everything that a user may ask of them."""
    folder = shared_models / name
    original = AutoTokenizer.from_pretrained(folder, model_max_length=1 << 30)
    metadata = tokenizer_metadata(folder, json.loads((folder / "config.json").read_text()))
    again, (_, settings) = restored(metadata), restored_tokenizer(metadata)
    for file in ("wikitext2-valid.txt", "shakespeare.txt"):
        text = (shared_text / file).read_text()[:100_000]
        assert again.encode(text).ids == original(text).input_ids
    assert again.encode("a</s>b <s> c").ids == original("a</s>b <s> c").input_ids
    assert (settings["bos_token"], settings["eos_token"]) == (original.bos_token, original.eos_token)


def test_added_tokens_templates_and_settings(tmp_path):
    tokenizer = byte_level("regex", added=("<tool>", "two words"))
    metadata = metadata_of(tokenizer, tmp_path, chat_template="{{ messages }}", pad_token="</s>")
    _, settings = restored_tokenizer(metadata)
    assert settings["chat_template"] == "{{ messages }}"
    assert [settings[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["<s>", "</s>", "</s>"]
    text = "use <tool> for two words</s>"
    assert restored(metadata).encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize(("pre", "begun"), [("llama-bpe", True), ("qwen2", False)])
def test_without_a_word_on_it_llama_cpps_default_counts(tmp_path, pre, begun):
    metadata = metadata_of(BPES[pre], tmp_path)
    del metadata["tokenizer.ggml.add_bos_token"]
    assert (restored(metadata).encode("a").ids[0] == metadata["tokenizer.ggml.bos_token_id"]) is begun


def test_other_tokenizers_are_refused(tmp_path):
    metadata = metadata_of(BPES["gpt-2"], tmp_path)
    for key, value in {"model": "bert", "pre": "deepseek-r1-qwen"}.items():
        with pytest.raises(UnsupportedError, match=value):
            restored_tokenizer(metadata | {f"tokenizer.ggml.{key}": value})
    for damaged in ({"tokenizer.ggml.bos_token_id": 9999}, {"tokenizer.ggml.token_type": [1]}):
        with pytest.raises(CheckpointError, match="damaged"):
            restored_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True} | damaged)
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(CheckpointError, match="merges"):
        restored_tokenizer(metadata)
