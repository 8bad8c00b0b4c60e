"""A tokenizer.json in GGUF's words: the vocabulary, how it merges, which tokens are special, the chat template.

llama.cpp brings two of its own tokenizers to bear on these families:

`gpt2`   byte-level BPE, from a list of merges. The text is first cut by regular expressions that GGUF only *names*
         (`tokenizer.ggml.pre`), so those in tokenizer.json must be ones that llama.cpp knows: see PRE_TOKENIZERS.
`llama`  SentencePiece's BPE: spaces become ▁, unknown characters bytes. There are no merges but a score per token, and
         the neighbouring pair whose union scores highest is merged first. A list of merges says the same thing if each
         pair of tokens whose union is a token may merge; then a token's score is minus the rank of its first merge.

Everything that would make llama.cpp see other tokens than transformers does is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fewbits.errors import CheckpointError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Token types (llama.h, enum llama_token_type)."""

SPACE = "▁"
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = _ENGLISH + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
QWEN2 = _ENGLISH + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)

PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("byte-level with regex",), False): "gpt-2",
    (("each digit", "byte-level with regex"), False): "smollm",
    ((LLAMA3, "byte-level"), True): "llama-bpe",
    ((LLAMA3, "byte-level"), False): "smaug-bpe",
    ((QWEN2, "byte-level"), False): "qwen2",
    ((TEKKEN, "byte-level"), True): "tekken",
}
"""(steps of the pre-tokenizer, whether a word that is a token skips merging) -> llama.cpp's name (llama-vocab.cpp)."""


def tokenizer_metadata(folder: Path, config: Mapping[str, Any], *, pre: str | None = None) -> dict[str, Any]:
    """GGUF's tokenizer.* keys for the tokenizer in `folder` and a model with config["vocab_size"] embeddings.

    Raises CheckpointError where there is no tokenizer, UnsupportedError where llama.cpp would see other tokens.
    """
    spec, settings = _tokenizer_json(folder), _settings(folder)
    model = spec.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"tokenizer of type {model.get('type')}: for these families llama.cpp has byte-level and SentencePiece BPE "
            "only; write compressed-tensors instead"
        )
    steps = tuple(_steps(spec.get("pre_tokenizer")))
    vocabulary = _Vocabulary(spec, int(config["vocab_size"]))
    if any(kind["type"] == "ByteLevel" for kind in _kinds(spec.get("pre_tokenizer"), "pretokenizers")):
        keys = _byte_level(spec, vocabulary, steps, pre)
    else:
        keys = _sentencepiece(spec, vocabulary, steps)
    ids = _special_ids(vocabulary, settings, config)
    return keys | ids | _added(spec, vocabulary, ids) | _chat_template(folder, settings)


class _Vocabulary:
    """Every token by its id: text and type, as far as both tokenizers agree about them."""

    def __init__(self, spec: Mapping[str, Any], size: int) -> None:
        model = spec["model"]
        self.ids: dict[str, int] = dict(model["vocab"])
        self.added = {token["content"]: token for token in spec.get("added_tokens") or []}
        self.ids |= {content: token["id"] for content, token in self.added.items()}
        self.unknown: str | None = model.get("unk_token")
        # A token without an embedding (Gemma 3's tokenizer has one for images) can never reach the model.
        self.texts: dict[int, str] = {i: text for text, i in self.ids.items() if i < size}
        self.size = size

    def tokens(self) -> list[str]:
        """Texts by id; [PADn] for an embedding that no token uses, so that the two counts agree."""
        texts = [self._text(i) for i in range(self.size)]
        if len(set(texts)) < self.size:
            twice = next(text for i, text in enumerate(texts) if text in texts[:i])
            raise UnsupportedError(f"two tokens read {twice!r}; llama.cpp requires every token's text to be unique")
        return texts

    def types(self, *, byte_fallback: bool) -> list[int]:
        return [self._type(i, byte_fallback) for i in range(self.size)]

    def _text(self, i: int) -> str:
        text = self.texts.get(i, f"[PAD{i}]")
        # llama.cpp looks for user-defined tokens before it turns spaces into ▁.
        return text.replace(SPACE, " ") if text in self.added and not self.added[text]["special"] else text

    def _type(self, i: int, byte_fallback: bool) -> int:
        text = self.texts.get(i)
        if text is None:
            return UNUSED
        if text == self.unknown:
            return UNKNOWN
        if text in self.added:
            return CONTROL if self.added[text]["special"] else USER_DEFINED
        return BYTE if byte_fallback and text in BYTES else NORMAL


def _byte_level(
    spec: Mapping[str, Any], vocabulary: _Vocabulary, steps: tuple[str, ...], pre: str | None
) -> dict[str, Any]:
    for kind in _kinds(spec.get("normalizer"), "normalizers"):
        # llama.cpp does not normalize; NFC changes nothing in text that is composed already, as nearly all is.
        if kind["type"] != "NFC":
            raise UnsupportedError(f"normalizer {kind['type']} before byte-level BPE: llama.cpp has no such step")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or _pre_name(steps, bool(spec["model"].get("ignore_merges"))),
        "tokenizer.ggml.tokens": vocabulary.tokens(),
        "tokenizer.ggml.token_type": vocabulary.types(byte_fallback=False),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in _merges(spec)],
    }


def _pre_name(steps: tuple[str, ...], ignore_merges: bool) -> str:
    name = PRE_TOKENIZERS.get((steps, ignore_merges))
    if name is None:
        raise UnsupportedError(
            f"pre-tokenizer {list(steps)} with ignore_merges {str(ignore_merges).lower()} is none of those known here "
            f"({', '.join(PRE_TOKENIZERS.values())}); if llama.cpp has it under some name, give that name "
            "(--pretokenizer NAME), else write compressed-tensors"
        )
    return name


def _sentencepiece(spec: Mapping[str, Any], vocabulary: _Vocabulary, steps: tuple[str, ...]) -> dict[str, Any]:
    missing = BYTES - vocabulary.ids.keys()
    if missing or not spec["model"].get("byte_fallback"):
        raise UnsupportedError(
            f"BPE over {SPACE} without byte fallback ({len(missing)} of 256 byte tokens are missing): llama.cpp has no "
            "other way to write an unknown character"
        )
    scores = _scores(vocabulary, _merges(spec))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary.tokens(),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": vocabulary.types(byte_fallback=True),
        "tokenizer.ggml.add_space_prefix": _space_prefix(spec, steps),
    }


def _scores(vocabulary: _Vocabulary, merges: list[tuple[str, str]]) -> list[float]:
    """Score of each token: minus the rank of the first merge that makes it; tokens that no merge makes come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    _require_complete(vocabulary, set(merges))
    return [-float(ranks.get(vocabulary.texts.get(i, ""), len(merges))) for i in range(vocabulary.size)]


def _require_complete(vocabulary: _Vocabulary, merges: set[tuple[str, str]]) -> None:
    """Raise UnsupportedError unless all that llama.cpp would merge may merge: any two tokens whose union is a token.

    It starts from single characters, whether they are tokens or not.
    """
    plain = {text for text in vocabulary.ids if text not in vocabulary.added and text not in BYTES}
    for token in plain:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in merges and all(part in plain or len(part) == 1 for part in pair):
                raise UnsupportedError(
                    f"no merge joins {pair[0]!r} and {pair[1]!r}, though {token!r} is a token: SentencePiece did not "
                    "make this BPE, and llama.cpp, which goes by scores alone, would merge them"
                )


def _space_prefix(spec: Mapping[str, Any], steps: tuple[str, ...]) -> bool:
    """Whether a space is put before the text. Raises UnsupportedError for a step that SentencePiece does not have."""
    normalizers = [_normalizer(kind) for kind in _kinds(spec.get("normalizer"), "normalizers")]
    found = {*normalizers, *steps}
    known = {"space to ▁", "prepend ▁", "after each space", "metaspace first", "metaspace always", "metaspace never"}
    if found - known:
        raise UnsupportedError(f"step {sorted(found - known)} before SentencePiece's BPE: llama.cpp has none such")
    return bool(found & {"prepend ▁", "metaspace first", "metaspace always"})


def _normalizer(kind: Mapping[str, Any]) -> str:
    match kind:
        case {"type": "Prepend", "prepend": "▁"}:
            return "prepend ▁"
        case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            return "space to ▁"
    return str(kind["type"])


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[str]:
    """The pre-tokenizer step by step: the regular expression of a step that has one, else what it does."""
    for kind in _kinds(pre_tokenizer, "pretokenizers"):
        match kind:
            case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
                yield "byte-level with regex" if rest.get("use_regex", True) else "byte-level"
            case {"type": "Digits", "individual_digits": True}:
                yield "each digit"
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                yield _escaped(pattern)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
                yield _escaped(pattern)
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}:
                yield "after each space"
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}:
                yield f"metaspace {scheme}"
            case _:
                yield json.dumps(kind, ensure_ascii=False)


def _escaped(pattern: str) -> str:
    r"""The pattern with line ends written as \r and \n, which some files hold as they are."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _kinds(node: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """A Sequence's steps, or the one step that is there, or none."""
    if node is None:
        return []
    return list(node[parts]) if node["type"] == "Sequence" else [node]


def _merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, also from files that write a pair as one string."""
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in spec["model"]["merges"]]
    for pair in pairs:
        if len(pair) != 2 or any(" " in part for part in pair):
            raise UnsupportedError(f"merge {pair}: GGUF writes a merge as two tokens with a space between")
    return [(left, right) for left, right in pairs]


_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _special_ids(vocabulary: _Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """The tokenizer's word comes first, then the model's."""
    ids = {}
    for kind, key in _SPECIAL.items():
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = vocabulary.ids.get(str(text)) if text else config.get(f"{kind}_token_id")
        found = found[0] if isinstance(found, list) else found
        if found is None and kind == "unk" and vocabulary.unknown:
            found = vocabulary.ids.get(vocabulary.unknown)
        if found is not None and 0 <= found < vocabulary.size:
            ids[f"tokenizer.ggml.{key}_token_id"] = int(found)
    if "tokenizer.ggml.eos_token_id" not in ids:
        raise UnsupportedError(
            "the tokenizer has no end-of-sequence token, and llama.cpp would take token 2 or 11 for it; "
            "name one as eos_token in tokenizer_config.json"
        )
    return ids


def _added(spec: Mapping[str, Any], vocabulary: _Vocabulary, ids: Mapping[str, int]) -> dict[str, bool]:
    """Whether bos and eos go around every text, as the post-processor has it."""
    template: list[Mapping[str, Any]] = []
    for kind in _kinds(spec.get("post_processor"), "processors"):
        template = kind["single"] if kind["type"] == "TemplateProcessing" else template
    here = [i for i, part in enumerate(template) if "Sequence" in part]
    sides = {"bos": template[: here[0]] if here else [], "eos": template[here[0] + 1 :] if here else []}
    for side, parts in sides.items():
        expected = ids.get(f"tokenizer.ggml.{side}_token_id")
        found = [vocabulary.ids.get(part["SpecialToken"]["id"]) for part in parts]
        if found and found != [expected]:
            raise UnsupportedError(f"the tokenizer puts tokens {found} around a text; llama.cpp can put {side} only")
    return {f"tokenizer.ggml.add_{side}_token": bool(parts) for side, parts in sides.items()}


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The default chat template: a file of its own, or in tokenizer_config.json (alone or among named ones)."""
    file = folder / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return {"tokenizer.chat_template": template} if template else {}


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _tokenizer_json(folder: Path) -> dict[str, Any]:
    """tokenizer.json, made by transformers from older files (tokenizer.model, vocab.json) where it is missing."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return dict(json.loads(tokenizer.backend_tokenizer.to_str()))
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and none could be made ({error}); GGUF carries its tokenizer within"
        ) from error
