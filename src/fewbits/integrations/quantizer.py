"""transformers' hook into loading: `FewbitsQuantizer`.

A model that is to be quantized: transformers reads one parameter at a time from the files, and each that the plan
names is rounded, packed and put into a quantized layer before the next is read, so the model is never there in floating
point. A checkpoint that is quantized already, by whatever tool: see `stored`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from fewbits.errors import UnsupportedError
from fewbits.integrations.config import Config
from fewbits.integrations.registering import watch_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fewbits.integrations.planning import ModelPlan
    from fewbits.integrations.stored import Stored
    from fewbits.results import TensorReport

LISTED = 5  # names in a warning


class FewbitsQuantizer(HfQuantizer):
    """Loads a model into fewbits' layers. reports: a line for each matrix that was quantized while loading."""

    requires_calibration = False
    quantization_config: Config

    def __init__(self, quantization_config: Config, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        if not self.pre_quantized and not quantization_config.asks:
            raise UnsupportedError(
                "fewbits.Config() says no format, and the checkpoint is not quantized yet; give load_in_4bit=True, "
                "load_in_8bit=True, a format or a plan"
            )
        if not self.pre_quantized:
            from fewbits.integrations.rounding import solver_named

            solver_named(quantization_config.method)
        self.reports: dict[str, TensorReport] = {}
        self._plan: ModelPlan | None = None
        self._stored: Stored | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **more: Any
    ) -> None:
        if self.pre_quantized:
            from fewbits.integrations.stored import Stored

            if not checkpoint_files:
                raise UnsupportedError("a quantized model is read from its files, and there are none; give its folder")
            with torch.device("cpu"):  # not on the meta device, within which transformers calls this
                self._stored = Stored(model, Path(checkpoint_files[0]).parent)
            self.pre_quantized = False  # what it leaves to transformers is plain: to be cast as in any model
            return
        from fewbits.integrations.planning import planned

        with torch.device("cpu"):
            self._plan = planned(model, self.quantization_config)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **more: Any) -> bool:
        return self._plan is not None and param_name in self._plan.chosen

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of one weight: what device maps are made by."""
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        from fewbits.integrations.planning import nbytes

        assert self._plan is not None
        return nbytes(self._plan.chosen[param_name].format, tuple(param.shape)) / param.numel()

    def get_quantize_ops(self) -> ConversionOps:
        return _Rounding(self)

    def put(self, model: PreTrainedModel, name: str, w: Tensor) -> list[str]:
        """Quantize a parameter's numbers and put them into the model; the parameters that are gone by that."""
        from fewbits.integrations.placing import place

        assert self._plan is not None
        method = self.quantization_config.method
        self.reports[name], gone = place(model, name, w, self._plan.chosen[name], method)
        return gone

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **more: Any) -> PreTrainedModel:
        from fewbits.integrations.saving import save_pretrained

        if self._stored is not None:
            self._stored.fill(model)
            self._stored = None
        if self._plan is not None:
            self._finish(model, self._plan)
        watch_peft()
        model.save_pretrained = partial(save_pretrained, model)  # type: ignore[method-assign]
        return model

    def _finish(self, model: PreTrainedModel, plan: ModelPlan) -> None:
        """What transformers' conversions brought beside the parameter that it asked about, and what stays."""
        for name in plan.chosen.keys() - self.reports.keys():
            self.put(model, name, model.get_parameter(name))
        if plan.kept:
            warnings.warn(_kept(plan.kept), stacklevel=2)

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """transformers' renamings, behind those of the checkpoint's kind."""
        return weight_conversions if self._stored is None else [*self._stored.renamings, *weight_conversions]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True


class _Rounding(ConversionOps):
    """The last step of a parameter's way from the file: into the model, packed."""

    def __init__(self, quantizer: FewbitsQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        *,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """What is left for transformers to put into the model."""
        left = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            if self.quantizer.param_needs_quantization(model, name):
                gone = self.quantizer.put(model, name, value)
                if missing_keys is not None:
                    missing_keys.difference_update(gone)
            else:
                left[name] = value
        return left


def _kept(kept: Mapping[str, str]) -> str:
    listed = [f"{name} ({why})" for name, why in list(kept.items())[:LISTED]]
    more = f" and {len(kept) - LISTED} more" if len(kept) > LISTED else ""
    return f"fewbits leaves {len(kept)} matrices as they are: {', '.join(listed)}{more}"
