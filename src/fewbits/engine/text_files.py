"""The files of a checkpoint that its text side is made of, of a folder and of a GGUF file alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewbits.checkpoint import open_checkpoint
from fewbits.engine.weights import restored_model
from fewbits.errors import CheckpointError
from fewbits.models import restored_tokenizer


def text_files(path: Path) -> dict[str, Any]:
    """config, tokenizer_config and generation_config as values, tokenizer as the text of tokenizer.json.

    A chat template in a file of its own is put where older folders have it, into tokenizer_config.
    Raises CheckpointError where there is no tokenizer.json, or a file is no JSON.
    """
    kind, reader = open_checkpoint(path)
    if kind.name == "gguf":
        tokenizer, settings = restored_tokenizer(reader.config)
        config = restored_model(reader)[0]
        return _files(config, json.dumps(tokenizer, ensure_ascii=False), settings, {})
    settings = _values(path / "tokenizer_config.json")
    template = path / "chat_template.jinja"
    if template.is_file():
        settings |= {"chat_template": template.read_text(encoding="utf-8")}
    return _files(reader.config, _tokenizer(path), settings, _values(path / "generation_config.json"))


def _files(config: Any, tokenizer: str, settings: Any, generation: Any) -> dict[str, Any]:
    return {"config": config, "tokenizer": tokenizer, "tokenizer_config": settings, "generation_config": generation}


def _tokenizer(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{file} is missing, so the model cannot read or write text; copy it from the original, or let "
            "transformers' save_pretrained make one"
        )
    return file.read_text(encoding="utf-8")


def _values(file: Path) -> dict[str, Any]:
    """A JSON file's object; without the file, none of its keys."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); it is damaged") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object; it is damaged")
    return found
