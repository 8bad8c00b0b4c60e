"""GGUF's tokenizer keys as tokenizer.json and tokenizer_config.json: `gguf_tokenizer` walked backwards.

`gpt2`   the merges are in the file; the regular expressions that cut the text are named, and come from PRE_TOKENIZERS.
`llama`  any two tokens whose union is a token may merge, the union of the highest score first. So each way to cut a
         token in two is a merge, in the order of the scores.

transformers can read such files itself, but chooses the expressions by the model's architecture instead of by their
name, and the special tokens by its own defaults: for five of the six names 5.17 makes other tokens of a Llama's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.models.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, SPACE, UNKNOWN, UNUSED, USER_DEFINED

Files = tuple[dict[str, Any], dict[str, Any]]
STEPS = {name: found for found, name in PRE_TOKENIZERS.items()}
BEGUN = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp puts a beginning token before a text unless the file says otherwise."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def restored_tokenizer(metadata: Mapping[str, Any]) -> Files:
    """(tokenizer.json, tokenizer_config.json) of a GGUF file's metadata, in plain values.

    Raises UnsupportedError for a tokenizer that is not among those of `gguf_tokenizer`, CheckpointError where keys are
    missing.
    """
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind = keys.get("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"the file's tokenizer is of GGUF's model {kind!r}; gpt2 and llama can be restored")
    try:
        spec = _byte_level(keys) if kind == "gpt2" else _sentencepiece(keys)
        special = _special(keys)
        spec |= {"version": "1.0", "added_tokens": _added(keys), "post_processor": _around(keys, special, kind)}
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"the file's tokenizer lacks {error}, or it is of another type; it is damaged") from error
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": text for name, text in special.items()}
    template = metadata.get("tokenizer.chat_template")
    return spec, settings | ({"chat_template": template} if template else {})


def _byte_level(keys: Mapping[str, Any]) -> dict[str, Any]:
    name = keys.get("pre")
    if name not in STEPS:
        raise UnsupportedError(f"pre-tokenizer {name!r} of the file is none of those known here ({', '.join(STEPS)})")
    steps, ignore_merges = STEPS[name]
    merges = [merge.split(" ", 1) for merge in keys["merges"]]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_step(step) for step in steps]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": _vocabulary(keys), "merges": merges, "ignore_merges": ignore_merges},
    }


def _step(step: str) -> dict[str, Any]:
    """A step by the name that `gguf_tokenizer` gives it, as tokenizer.json has it."""
    if step.startswith("byte-level"):
        regex = step == "byte-level with regex"
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
    if step == "each digit":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _sentencepiece(keys: Mapping[str, Any]) -> dict[str, Any]:
    prefix = keys.get("add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": _vocabulary(keys),
            "merges": _merges(keys["tokens"], keys["scores"], keys["token_type"]),
            "unk_token": _special(keys).get("unk"),
            "fuse_unk": True,
            "byte_fallback": BYTE in keys["token_type"],
        },
    }


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """Every way to cut a token into two, the token of the highest score first; of one token, its earliest halves."""
    ids = {text: i for i, text in enumerate(tokens) if types[i] == NORMAL}
    merges: list[tuple[str, str]] = []
    for text in sorted(ids, key=lambda text: -scores[ids[text]]):
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        whole = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        merges += sorted(whole, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _vocabulary(keys: Mapping[str, Any]) -> dict[str, int]:
    return {text: i for i, text in enumerate(keys["tokens"]) if keys["token_type"][i] != UNUSED}


def _added(keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tokens that are looked for in the text before anything else, and those that only stand for something.

    The unknown token is one of the latter.
    """
    special = {CONTROL, UNKNOWN}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": text, "special": keys["token_type"][i] in special, **plain}
        for i, text in enumerate(keys["tokens"])
        if keys["token_type"][i] in special | {USER_DEFINED}
    ]


def _special(keys: Mapping[str, Any]) -> dict[str, str]:
    ids = {name: keys.get(f"{key}_token_id") for name, key in SPECIAL.items()}
    return {name: keys["tokens"][i] for name, i in ids.items() if i is not None}


def _around(keys: Mapping[str, Any], special: Mapping[str, str], kind: str) -> dict[str, Any]:
    """What is put before and behind every text."""
    begun = keys.get("add_bos_token", kind == "llama" or keys.get("pre") in BEGUN)
    sides = {"bos": begun, "eos": keys.get("add_eos_token", False)}
    used = {name: special[name] for name, added in sides.items() if added}
    token = {name: [{"SpecialToken": {"id": text, "type_id": 0}}] for name, text in used.items()}
    text = [[{"Sequence": {"id": name, "type_id": 0}}] for name in "AB"]
    single, second = (token.get("bos", []) + part + token.get("eos", []) for part in text)
    ids = {text: {"id": text, "ids": [keys["tokens"].index(text)], "tokens": [text]} for text in used.values()}
    return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": ids}
