"""A transformers model without its weights: the right class, built from a configuration in a few milliseconds.

Large parameters are allocated by `torch.empty`, everything that a constructor *computes* (rotary frequencies, masks,
embedding scales, norms of one) by other functions. So only `torch.empty` is sent to the meta device, where a tensor has
a shape and no memory; what is computed is computed, on the CPU, and needs no repair afterwards. Building all of it on
the meta device, as transformers does, loses the buffers that are not in the file, and each has to be recomputed by code
that knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.models import model_class


class _EmptyOnMeta(TorchFunctionMode):
    """Within it `torch.empty` allocates nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | {"device": "meta"}) if func is torch.empty else func(*args, **kwargs)


def configuration(path: Path, values: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers configuration of config.json's values; what they say about quantization is left out.

    Raises UnsupportedError for an architecture that this transformers does not have, CheckpointError for values that
    its configuration refuses.
    """
    from transformers import CONFIG_MAPPING

    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{path}: model_type '{model_type}' is not in the installed transformers; "
            "a newer one may have it (code that comes with a model is never run)"
        )
    kept = {key: value for key, value in values.items() if key != "quantization_config"}
    try:
        config = CONFIG_MAPPING[model_type].from_dict(kept)
    except Exception as error:  # whatever a configuration class raises about its values
        raise CheckpointError(f"{path}: config.json is not a {model_type} configuration: {error}") from error
    config.name_or_path = str(path)
    return config


def is_causal(config: PretrainedConfig) -> bool:
    """Whether the model predicts the next token at every position."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_class(config).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def attention(config: PretrainedConfig) -> dict[str, str]:
    """The argument by which transformers computes attention as the architecture defines it, where its choice does not.

    Its default kernels know no bound on scores (Gemma 2's `attn_logit_softcapping`) and leave it out in silence.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device, in `dtype` where the architecture has no dtype of its own.

    Other constructors may leave small parameters on the CPU; every one is to be replaced by the file's.
    """
    with _EmptyOnMeta():
        model: PreTrainedModel = model_class(config)._from_config(config, dtype=dtype, **attention(config))
    return cast(PreTrainedModel, model.eval())
