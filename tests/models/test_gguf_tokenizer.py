"""Tokenizers in GGUF: what llama.cpp makes of them must be what transformers makes of the original."""

from __future__ import annotations

import json

import pytest
from tiny import SHAPE, TEXT, byte_level, save_tokenizer, sentencepiece, write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.models import gguf_metadata
from fewbits.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3,
    NORMAL,
    PRE_TOKENIZERS,
    QWEN2,
    TEKKEN,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_metadata,
)

TRICKY = [
    "",
    " ",
    "\n",
    "a",
    "  two  spaces",
    "tab\there",
    "ünï 😀",
    "1 22 333 4444 55555",
    "x\r\n\r\ny",
    "I'LL don't",
    TEXT,
]
BPES = {
    "gpt-2": byte_level("regex"),
    "smollm": byte_level("digits", "regex"),
    "llama-bpe": byte_level(LLAMA3, ignore_merges=True),
    "smaug-bpe": byte_level(LLAMA3),
    "qwen2": byte_level(QWEN2),
    "tekken": byte_level(TEKKEN, ignore_merges=True),
}


def metadata_of(tokenizer, folder, *, vocab_size=None, **settings):
    save_tokenizer(tokenizer, folder, **settings)
    return tokenizer_metadata(folder, {"vocab_size": vocab_size or tokenizer.get_vocab_size()})


def by_llama_cpp(folder, out, size):
    """llama.cpp's tokenizer for a GGUF file without tensors made from the tokenizer in a folder."""
    llama_cpp = pytest.importorskip("llama_cpp")
    config = SHAPE | {"model_type": "llama", "vocab_size": size}
    write(out, {}, gguf_metadata(config, folder))
    model = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)

    def encode(text):
        return model.tokenize(text.encode(), add_bos=True, special=True)

    return encode


def test_every_known_pre_tokenizer_is_tested():
    assert BPES.keys() == set(PRE_TOKENIZERS.values())


@pytest.mark.parametrize("pre", BPES)
def test_byte_level_tokens_are_those_of_llama_cpp(tmp_path, pre):
    tokenizer = BPES[pre]
    save_tokenizer(tokenizer, tmp_path / "t")
    encode = by_llama_cpp(tmp_path / "t", tmp_path / "m.gguf", tokenizer.get_vocab_size())
    for text in TRICKY:
        assert encode(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize(("bos", "metaspace"), [(True, None), (False, None), (True, "always"), (True, "never")])
def test_sentencepiece_tokens_are_those_of_llama_cpp(tmp_path, bos, metaspace):
    tokenizer = sentencepiece(bos=bos, metaspace=metaspace)
    save_tokenizer(tokenizer, tmp_path / "t", unk_token="<unk>")
    encode = by_llama_cpp(tmp_path / "t", tmp_path / "m.gguf", tokenizer.get_vocab_size())
    for text in TRICKY:
        if metaspace == "always" and text.startswith(" "):
            continue  # tokenizers adds no ▁ before a space there, llama.cpp always does
        assert encode(text) == tokenizer.encode(text).ids, text


@pytest.mark.parametrize("name", ["books", "stories260K"])
def test_real_text_gives_the_tokens_of_transformers(shared_models, shared_text, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_models / name, model_max_length=1 << 30)
    encode = by_llama_cpp(shared_models / name, tmp_path / "m.gguf", len(tokenizer))
    if name == "books":
        texts = [(shared_text / "books-test.txt").read_text()[:100_000]]
    else:
        lines = (shared_text / "tinystories-eval.jsonl").read_text().splitlines()[:100]
        texts = [json.loads(line)["text"] for line in lines]
    for text in (*texts, "a</s>b <s> c"):
        assert encode(text) == tokenizer(text).input_ids


def test_byte_level_keys(tmp_path):
    tokenizer = byte_level("regex", added=("<tool>",))
    size = tokenizer.get_vocab_size()
    found = metadata_of(tokenizer, tmp_path, vocab_size=size + 2, pad_token={"content": "</s>"})
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<s>", "</s>", "!"]
    assert tokens[-3:] == ["<tool>", f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert types[:3] == [CONTROL, CONTROL, NORMAL]
    assert types[-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert len(tokens) == len(types) == size + 2
    assert found["tokenizer.ggml.merges"][0] == " ".join(json.loads(tokenizer.to_str())["model"]["merges"][0])
    ids = {key: found[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")}
    assert ids == {"bos": 0, "eos": 1, "padding": 1}
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)


def test_sentencepiece_keys(tmp_path):
    tokenizer = sentencepiece()
    found = metadata_of(tokenizer, tmp_path)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert found["tokenizer.ggml.unknown_token_id"] == 0
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert scores["".join(merges[0])] == 0.0
    assert scores["".join(merges[-1])] == -float(
        next(i for i, m in enumerate(merges) if "".join(m) == "".join(merges[-1]))
    )
    assert scores["<s>"] == -len(merges)


def test_added_tokens_beyond_the_embeddings_are_left_out(tmp_path):
    tokenizer = byte_level("regex", added=("<image>",))
    found = metadata_of(tokenizer, tmp_path, vocab_size=tokenizer.get_vocab_size() - 1)
    assert "<image>" not in found["tokenizer.ggml.tokens"]


@pytest.mark.parametrize("where", ["file", "settings", "named"])
def test_chat_template_is_found(tmp_path, where):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    settings = {
        "file": {"chat_template": "other"},
        "settings": {"chat_template": template},
        "named": {"chat_template": [{"name": "tools", "template": "other"}, {"name": "default", "template": template}]},
    }[where]
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
    assert metadata_of(byte_level("regex"), tmp_path, **settings)["tokenizer.chat_template"] == template


def test_tokenizer_json_is_made_where_only_the_older_files_are(tmp_path):
    save_tokenizer(byte_level("regex"), tmp_path / "new")
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    (old / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = tokenizer_metadata(old, {"vocab_size": len(model["vocab"])})
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]


def test_missing_tokenizer_is_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        tokenizer_metadata(tmp_path, {"vocab_size": 4})


def test_unknown_pre_tokenizer_is_printed_and_can_be_named(tmp_path):
    tokenizer = byte_level(r"[A-Z]?[a-z]+|\s+|.")
    with pytest.raises(UnsupportedError, match=r"\[A-Z\]\?\[a-z\].*give that name"):
        metadata_of(tokenizer, tmp_path)
    config = SHAPE | {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size()}
    assert gguf_metadata(config, tmp_path, pre="deepseek-llm")["tokenizer.ggml.pre"] == "deepseek-llm"


def prefixed():
    tokenizer = byte_level("regex")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def lowercased():
    tokenizer = byte_level("regex")
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def framed():
    tokenizer = byte_level("regex")
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    return tokenizer


def stripped():
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.Strip()
    return tokenizer


def incomplete():
    spec = json.loads(sentencepiece().to_str())
    spec["model"]["merges"] = spec["model"]["merges"][1:]
    return Tokenizer.from_str(json.dumps(spec))


def charless():
    spec = json.loads(sentencepiece().to_str())
    spec["model"]["vocab"]["\r\n"] = len(spec["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(spec))


def byteless():
    spec = json.loads(sentencepiece().to_str())
    spec["model"]["byte_fallback"] = False
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (prefixed, "add_prefix_space"),
        (lowercased, "Lowercase"),
        (framed, r"tokens \[1\] around a text"),
        (stripped, "Strip"),
        (incomplete, "no merge joins"),
        (charless, "no merge joins"),
        (byteless, "byte fallback"),
        (lambda: Tokenizer(models.Unigram([("a", -1.0)])), "type Unigram"),
    ],
)
def test_what_llama_cpp_would_tokenize_otherwise_is_refused(tmp_path, make, named):
    with pytest.raises(UnsupportedError, match=named):
        metadata_of(make(), tmp_path)


def test_end_of_sequence_is_required(tmp_path):
    with pytest.raises(UnsupportedError, match="end-of-sequence"):
        metadata_of(byte_level("regex"), tmp_path, eos_token=None)


def test_what_goes_around_a_text_is_what_transformers_puts_there(tmp_path):
    for bos in (True, False):
        folder = tmp_path / str(bos)
        found = metadata_of(sentencepiece(bos=bos), folder, unk_token="<unk>", add_bos_token=not bos)
        loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        assert (loaded("a").input_ids[0] == loaded.bos_token_id) is found["tokenizer.ggml.add_bos_token"]
