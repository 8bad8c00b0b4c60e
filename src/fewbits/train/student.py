"""A model that is trained to be what another one is, in fewer bits: quantization-aware training with distillation.

There is one model in memory, the original. The student is the same modules run with other parameters: matrices as the
file will hold them (`fake_quant`), norms and whatever else stays in floating point in the type that it is written in.
So teacher and student share all code and every buffer, and what is kept besides is what is being trained.

The loss is the divergence of the student's predictions from the teacher's (Hinton et al. 2015, arXiv:1503.02531; for
quantized language models Liu et al. 2023, LLM-QAT, arXiv:2305.17888),

    KL(p ‖ q) = Σ_t p(t) · (ln p(t) − ln q(t)),      p the teacher's, q the student's

plus, if wanted, the relative squared error of the hidden states between blocks, or minus the log-probability of the
text's own next token instead. A teacher's full distribution says more about each position than one token does, and it
keeps the student from learning anything else than being the teacher.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fewbits.formats import QTensor
from fewbits.methods.products import products_in
from fewbits.models import Slot
from fewbits.train.fake_quant import FakeQuantizer
from fewbits.train.inputs import FakeInputs


@dataclass(frozen=True)
class Matrix:
    """A matrix that is trained: where it lies in the model, and what it begins as."""

    slot: Slot
    start: QTensor


@dataclass(frozen=True)
class Loss:
    """What is minimised. divergence: weight of the predictions' divergence from the teacher's; hidden: of the hidden
    states' relative squared error; text: of the text's own next tokens, in nats.
    """

    divergence: float = 1.0
    hidden: float = 0.0
    text: float = 0.0

    @property
    def taught(self) -> bool:
        return self.divergence > 0 or self.hidden > 0


class Student(nn.Module):
    """What is trained of a model, and the model run with it.

    model: the original, in eval mode; it is not changed. matrices: by their names in the output. free: parameters that
    are trained as they are, and the type that each is written in. fixed: parameters that are other ones than the
    original's and not trained. inputs: matrix -> what rounds its inputs. teacher: another original to learn from, with
    the same vocabulary. products: the type that matrices are multiplied in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matrices: Mapping[str, Matrix],
        *,
        free: Mapping[str, torch.dtype] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, FakeInputs] | None = None,
        teacher: PreTrainedModel | None = None,
        loss: Loss | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        # In a tuple, and so no modules of this one: what is saved and optimised is what is trained.
        self._models = (model, teacher or model)
        self._fixed, self._dtypes = dict(fixed or {}), dict(free or {})
        self.loss, self.products = loss or Loss(), products
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self._slots = {name: matrix.slot for name, matrix in matrices.items()}
        self._names = tuple(matrices)
        self.quantizers = nn.ModuleList(
            FakeQuantizer(matrix.slot.take(parameters[matrix.slot.parameter]).float(), matrix.start)
            for matrix in matrices.values()
        )
        self._free = tuple(self._dtypes)
        self.free = nn.ParameterList(parameters[name].detach().float().clone() for name in self._free)
        self._unit = [float(p.detach().square().mean().sqrt()) or 1.0 for p in self.free]
        self._rounded = tuple(inputs or {})
        self.inputs = nn.ModuleList((inputs or {}).values())
        self._whole = _by_parameter(self._slots)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        """`loss` of token ids [B, T], a scalar."""
        hidden = self.loss.hidden > 0
        with products_in(self.products, input_ids.device):
            target = None
            if self.loss.taught:
                with torch.no_grad():
                    target = self._models[1](input_ids=input_ids, use_cache=False, output_hidden_states=hidden)
            found = self.run(input_ids, output_hidden_states=hidden)
        return {"loss": self._compare(found, target, input_ids)}

    def run(self, input_ids: Tensor, **more: Any) -> Any:
        """The student's outputs, as transformers returns them, for token ids [B, T]."""
        model = self._models[0]
        arguments = {"input_ids": input_ids, "use_cache": False, **more}
        with self._rounding_inputs():
            return torch.func.functional_call(model, self.parameters_now(), (), arguments)

    def parameters_now(self) -> dict[str, Tensor]:
        """Every parameter that is another than the original's, differentiable."""
        numbers = {name: quantizer() for name, quantizer in self._quantizers().items()}
        whole = {name: self._assembled(name, of, numbers) for name, of in self._whole.items()}
        free = {name: p.to(self._dtypes[name]).float() for name, p in zip(self._free, self.free, strict=True)}
        return {**self._fixed, **whole, **free}

    def groups(self, rate: float, scale_rate: float, free_rate: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, with the rate of each: of latent weights in levels, of the rest relative."""
        latent = [q.latent for q in self._quantizers().values()]
        learned = (*self._quantizers().values(), *self._inputs().values())
        changes = [each.change for each in learned if each.change is not None]
        groups = [{"params": latent, "lr": rate}, {"params": changes, "lr": scale_rate}]
        groups += [{"params": [p], "lr": free_rate * unit} for p, unit in zip(self.free, self._unit, strict=True)]
        return [group for group in groups if group["params"] and group["lr"]]

    def tensors(self) -> dict[str, QTensor]:
        """The matrices as the file holds them."""
        return {name: q.tensor() for name, q in self._quantizers().items()}

    def written(self) -> dict[str, Tensor]:
        """The other trained parameters, in the types that they are written in."""
        return {name: p.detach().to(self._dtypes[name]) for name, p in zip(self._free, self.free, strict=True)}

    def input_scales(self) -> dict[str, Tensor]:
        """Matrix -> static scale of its inputs, float32 [1]."""
        return {name: inputs.scale() for name, inputs in self._inputs().items() if inputs.change is not None}

    def _quantizers(self) -> dict[str, FakeQuantizer]:
        return dict(zip(self._names, cast(Iterable[FakeQuantizer], self.quantizers), strict=True))

    def _inputs(self) -> dict[str, FakeInputs]:
        return dict(zip(self._rounded, cast(Iterable[FakeInputs], self.inputs), strict=True))

    def _compare(self, found: Any, target: Any, ids: Tensor) -> Tensor:
        logits: Tensor = found.logits.float()
        loss: Tensor = logits.new_zeros(())
        if self.loss.divergence:
            p, q = target.logits.float().log_softmax(-1), logits.log_softmax(-1)
            loss = loss + self.loss.divergence * functional.kl_div(q, p, log_target=True, reduction="sum") / ids.numel()
        if self.loss.hidden:
            errors = [_relative(x, y) for x, y in zip(found.hidden_states, target.hidden_states, strict=True)]
            loss = loss + self.loss.hidden * torch.stack(errors[1:]).mean()
        if self.loss.text:
            loss = loss + self.loss.text * functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return loss

    def _assembled(self, parameter: str, names: tuple[str, ...], numbers: Mapping[str, Tensor]) -> Tensor:
        """A parameter of the model from the matrices that lie in it."""
        original = self._models[0].get_parameter(parameter)
        if len(names) == 1 and self._slots[names[0]] == Slot(parameter):
            return numbers[names[0]]
        whole = original.detach().float().clone()
        for name in names:
            self._slots[name].put(whole, numbers[name])
        return whole

    @contextmanager
    def _rounding_inputs(self) -> Iterator[None]:
        """Within it, the layers whose inputs are rounded round them."""
        hooks = []
        for name, inputs in self._inputs().items():
            layer = self._models[0].get_submodule(self._slots[name].parameter.removesuffix(".weight"))
            hooks.append(layer.register_forward_pre_hook(lambda _, x, inputs=inputs: (inputs(x[0]), *x[1:])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _by_parameter(slots: Mapping[str, Slot]) -> dict[str, tuple[str, ...]]:
    """Parameter -> the matrices in it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, slot in slots.items():
        found[slot.parameter] = (*found.get(slot.parameter, ()), name)
    return found


def _relative(x: Tensor, y: Tensor) -> Tensor:
    """‖x − y‖² / ‖y‖²."""
    return (x.float() - y.float()).square().sum() / y.float().square().sum()
