"""Frozen dataclasses that cross rooms: what a run found out, ready to print or to write as JSON.

Everything here is plain data (numbers, strings, tuples), so any room may import it and none needs torch for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Fate = Literal["quantized", "kept", "tied", "dropped"]


@dataclass(frozen=True)
class TensorReport:
    """The ledger's line on one tensor: which parameter of the source it was, what became of it, and what that cost.

    name is the tensor's name in the output, source the parameter it was made of. error is the relative error
    ‖w − ŵ‖ / ‖w‖, None unless quantized. reason says why it was kept, tied or dropped. digests maps the name of each
    array in the output to the SHA-256 of its bytes. transformed: an exact transform of it and its neighbours, or
    training, rewrote it, so its numbers are not the source's. inputs: what the layer's inputs are rounded to.
    """

    name: str
    fate: Fate
    shape: tuple[int, ...]
    format: str
    nbytes: int
    source: str
    method: str | None = None
    error: float | None = None
    reason: str | None = None
    digests: Mapping[str, str] | None = None
    transformed: bool | None = None
    inputs: str | None = None


@dataclass(frozen=True)
class CalibrationReport:
    """What a run was calibrated on.

    source: as it was named, a file or `self`; windows: of `length` tokens each. digest: SHA-256 of the tokens.
    held_out_kld: mean KL divergence from the original, nats per token, on windows that follow the calibration text and
    were only looked at; with weights quantized, and inputs and cache not rounded.
    """

    source: str
    text: str
    windows: int
    length: int
    tokens: int
    digest: str
    held_out_tokens: int
    held_out_kld: float | None


@dataclass(frozen=True)
class ImportanceReport:
    """What `fewbits.imatrix` wrote. tensors: the matrices in it. calibration: the text, none held out."""

    source: str
    output: str
    tensors: tuple[str, ...]
    calibration: CalibrationReport
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A recipe that was tried. held_out_kld: nats per token on held-out text, None if it did not come to an end; note
    says why, or how it was run. seconds: that it took.
    """

    recipe: str
    held_out_kld: float | None
    seconds: float
    note: str | None = None


@dataclass(frozen=True)
class Estimate:
    """What a run will need, printed before it starts. Bytes and seconds."""

    peak_memory: int
    disk: int
    seconds: float

    def then(self, later: Estimate) -> Estimate:
        """What one piece of work and a later one need, whose files lie beside the first one's."""
        peak = max(self.peak_memory, later.peak_memory)
        return Estimate(peak, self.disk + later.disk, self.seconds + later.seconds)


@dataclass(frozen=True)
class Quantization:
    """What `fewbits.quantize` did. verified_with names the independent decoder that read the output back; expected_kld
    is the divergence that its plan expected, nats a token, None without a plan that was measured.
    """

    source: str
    output: str
    kind: str
    format: str
    method: str
    source_bytes: int
    output_bytes: int
    weights: int
    seconds: float
    verified_with: str | None
    tensors: tuple[TensorReport, ...]
    calibration: CalibrationReport | None = None
    trials: tuple[Trial, ...] = ()
    expected_kld: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole model, kept tensors and scales included."""
        return 8 * sum(t.nbytes for t in self.tensors) / self.weights


@dataclass(frozen=True)
class MovedTensor:
    """A tensor of a conversion's output: its format in the source and now, bytes in both.

    error: relative, ‖w − ŵ‖ / ‖w‖ with w the source's numbers; None where they are the same. reason: why they are not.
    """

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    before_bytes: int
    nbytes: int
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Conversion:
    """What `fewbits.convert` did, after its proof: every number of the output equals the source's, or is in `rounded`.

    verified_with names the independent decoder that read the output back. divergence: from the source where something
    was rounded, from another model where one was named; None if nothing was measured. notes: what does not show in the
    weights, a sentence each.
    """

    source: str
    output: str
    source_kind: str
    kind: str
    source_bytes: int
    output_bytes: int
    seconds: float
    verified_with: str | None
    tensors: tuple[MovedTensor, ...]
    divergence: Evaluation | None = None
    notes: tuple[str, ...] = ()

    @property
    def rounded(self) -> tuple[MovedTensor, ...]:
        """The tensors whose numbers are others than the source's."""
        return tuple(tensor for tensor in self.tensors if tensor.error is not None)


@dataclass(frozen=True)
class LossPoint:
    """A place of a loss curve, after so many steps: mean loss of the steps before it, and the loss on held-out text."""

    step: int
    loss: float | None
    held_out: float | None


@dataclass(frozen=True)
class Training:
    """What a training did.

    before, after: the loss on held-out text, which is the divergence from the teacher in nats a token unless another
    one was asked for. tokens: that were trained on, windows seen again counted again. seconds: all of the run.
    """

    source: str
    output: str
    kind: str
    format: str
    start: str
    data: str
    steps: int
    tokens: int
    seconds: float
    before: float
    after: float
    curve: tuple[LossPoint, ...]
    source_bytes: int
    output_bytes: int
    weights: int
    verified_with: str | None
    tensors: tuple[TensorReport, ...]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole model, kept tensors and scales included."""
        return 8 * sum(t.nbytes for t in self.tensors) / self.weights


@dataclass(frozen=True)
class AdapterTraining:
    """What the training of an adapter did.

    base: format of the frozen base; its bytes, and what they would be in 16 bits. before, after: loss on held-out
    samples, nats a token that is a target. notes: what was noticed about the data.
    """

    source: str
    output: str
    base: str
    data: str
    rank: int
    trained_weights: int
    base_bytes: int
    base_bytes_in_16_bits: int
    steps: int
    tokens: int
    seconds: float
    before: float
    after: float
    curve: tuple[LossPoint, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeWay:
    """One way to merge an adapter. nbytes: of weights and adapter on disk; kld: from the adapted model, nats a token.

    Both are None where the way cannot be gone, and note says why.
    """

    name: str
    summary: str
    seconds: float
    nbytes: int | None = None
    kld: Figure | None = None
    note: str | None = None


@dataclass(frozen=True)
class Merge:
    """What merging an adapter did. base: format of the weights that it was trained on; text: what divergences were
    measured on; chosen: name of the way that was taken.
    """

    source: str
    adapter: str
    output: str
    base: str
    format: str
    chosen: str
    reason: str
    text: str
    seconds: float
    ways: tuple[MergeWay, ...]


@dataclass(frozen=True)
class Figure:
    """A measured value and its standard error."""

    value: float
    error: float

    def __format__(self, spec: str) -> str:
        return f"{self.value:{spec}} ± {self.error:{spec}}"


@dataclass(frozen=True)
class Evaluation:
    """How a model differs from the original on a text. Divergences in nats per token.

    Each figure's standard error comes from resampling whole windows, because tokens of one window are not independent.
    warning: that the model was calibrated on text unlike this one.
    """

    model: str
    against: str
    text: str
    tokens: int
    windows: int
    perplexity: Figure
    reference_perplexity: Figure
    perplexity_ratio: Figure
    mean_kld: Figure
    median_kld: Figure
    kld_99: Figure
    top1_agreement: Figure
    warning: str | None = None


@dataclass(frozen=True)
class Measured:
    """A figure measured in several rounds: their median, the least and the most of them."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Together:
    """How fast several sequences are decoded in one batch; rate: tokens a second of all of them."""

    sequences: int
    rate: Measured


@dataclass(frozen=True)
class Roofline:
    """What the machine can do at most, and which part of it was reached.

    bytes_per_token: of weights, read for every decoded token. read_bandwidth: bytes a second that the threads read
    from memory. operations_per_token: of products of integers, for every token of a prompt but the last, each
    multiplication and each addition counted. integer_peak: such operations a second from registers. The parts are of
    the limit that was measured in the same round; bandwidth_part is above one where caches hold the weights.
    """

    bytes_per_token: int
    read_bandwidth: Measured
    bandwidth_part: Measured
    operations_per_token: int
    integer_peak: Measured
    integer_part: Measured


@dataclass(frozen=True)
class Peer:
    """Another program's speed, measured in the same rounds. Ratios, of one round each, are ours over theirs."""

    program: str
    model: str
    prefill: Measured
    decode: Measured
    prefill_ratio: Measured
    decode_ratio: Measured


@dataclass(frozen=True)
class Benchmark:
    """How fast a model runs, rates in tokens a second.

    runner: which code ran it. prefill: of prompts of `prompt_tokens`. decode: of `new_tokens` tokens from an empty
    context, one after the other. first_token_seconds: from the start of a process to its first token behind a prompt
    of 16, where the checkpoint has been opened before. weight_memory: bytes in memory of the file of weights that is
    mapped, 0 where there is none; other_memory: bytes of everything else in memory behind a prompt of `prompt_tokens`;
    both None where the system does not tell. cache_bytes: of keys and values, of as many sequences as were decoded
    together, `context` tokens each. roofline: None for runners other than the compiled kernels.
    """

    model: str
    runner: str
    threads: int
    kv: str
    context: int
    prompt_tokens: int
    new_tokens: int
    runs: int
    prefill: Measured
    decode: Measured
    together: tuple[Together, ...]
    first_token_seconds: Measured
    weight_memory: int | None
    other_memory: int | None
    cache_bytes: int | None
    roofline: Roofline | None
    peer: Peer | None


@dataclass(frozen=True)
class FrontierPoint:
    """A quantized model in a figure of size against divergence (nats per token, the mean).

    kind: a plan of fewbits', one of llama.cpp's presets, or what another program made. measured: or else predicted.
    """

    name: str
    nbytes: int
    divergence: float
    kind: Literal["plan", "preset", "peer"]
    measured: bool


@dataclass(frozen=True)
class Verification:
    """What `fewbits.verify` proved about an output.

    decoder names the independent library that read the tensors, stack the one that ran the model. logit_kld is the mean
    KL divergence (nats) between the next-token distributions of that stack and of fewbits' own reading, None where the
    model was not run. mismatches has one sentence for each thing that is not as meant.
    """

    output: str
    decoder: str | None
    tensors: int
    mismatches: tuple[str, ...]
    stack: str | None = None
    logit_kld: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.mismatches


@dataclass(frozen=True)
class OnnxRun:
    """onnxruntime's outputs beside fewbits' own, on `rows` tokens (or texts, where a model has one output for each).

    exact: each operator by its definition, or as onnxruntime does by default. difference: relative, by the norm;
    largest: of one number. limit: the difference that float32's rounding explains, None where nothing is proven by it.
    top1_agreement: share of the rows with the same largest logit, None for outputs that are no logits.
    """

    exact: bool
    difference: float
    largest: float
    rows: int
    top1_agreement: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class OnnxExport:
    """What `fewbits.export_onnx` wrote and proved. formats: how many weights are in which; kept: tensors in floating
    point; runs is empty where onnxruntime was left out.
    """

    source: str
    output: str
    way: str
    opset: int
    sequence: int | None
    formats: dict[str, int]
    kept: int
    source_bytes: int
    output_bytes: int
    seconds: float
    runs: tuple[OnnxRun, ...]


def as_json(result: Any) -> Any:
    """A result dataclass as plain JSON values."""
    return asdict(result)
