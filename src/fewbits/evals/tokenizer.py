"""The tokenizer of a model: of a folder as transformers loads it, of a GGUF file from what the file says."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fewbits.checkpoint import open_checkpoint
from fewbits.errors import CheckpointError
from fewbits.models import restored_tokenizer


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """Raises CheckpointError where there is none, UnsupportedError where a GGUF file's cannot be restored."""
    if path.is_file():
        return _of_gguf(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its tokenizer cannot be loaded ({error}); a text is read with the original's tokenizer"
        ) from error
    return tokenizer


def _of_gguf(path: Path) -> PreTrainedTokenizerBase:
    spec, settings = restored_tokenizer(open_checkpoint(path)[1].config)
    del settings["tokenizer_class"]
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing more special
        raise CheckpointError(f"{path}: its tokenizer cannot be made ({error}); the file is damaged") from error
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
