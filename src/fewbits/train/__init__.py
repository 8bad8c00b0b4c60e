"""Training with few bits: quantization-aware training, and adapters on a quantized base."""

from fewbits.train import _installed  # noqa: F401  first, for its error
from fewbits.train.course import Course, Length, Trained, train
from fewbits.train.fake_quant import FakeQuantizer
from fewbits.train.inputs import FakeInputs
from fewbits.train.lora import register
from fewbits.train.student import Loss, Matrix, Student

register()

__all__ = ["Course", "FakeInputs", "FakeQuantizer", "Length", "Loss", "Matrix", "Student", "Trained", "train"]
