"""What a report is made of: frozen dataclasses, gathered by `pipeline` and drawn by `report`.

Plain data like `results`, so any room may import it. What could not be found is None, and `Report.missing` says in a
sentence what would bring it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fewbits.results import Benchmark, CalibrationReport, Evaluation, Figure, FrontierPoint, LossPoint, Verification


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of the checkpoint. part: its name inside its layer, experts' numbers left out; layer is None outside
    of layers. fate, error, method, reason, source, digest: as the ledger says them (`results.TensorReport`), of several
    arrays the first digest; error may have been measured instead.
    """

    name: str
    layer: int | None
    part: str
    shape: tuple[int, ...]
    weights: int
    format: str
    floating: bool
    nbytes: int
    error: float | None = None
    fate: str | None = None
    method: str | None = None
    reason: str | None = None
    source: str | None = None
    digest: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.weights)


@dataclass(frozen=True)
class Absent:
    """A parameter of the source that the checkpoint has no tensor for, and why."""

    name: str
    fate: str
    reason: str


@dataclass(frozen=True)
class Histogram:
    """Numbers of a matrix in units of their group's scale, offset taken off, from a sample of `sampled` of them.

    counts: of the original's numbers, in equal bins from low to high, what lies outside in the outermost; empty without
    the original. levels: those that occur, rising, and shares: which part of the sample is at each; both empty where
    there are too many levels to tell apart.
    """

    tensor: str
    format: str
    sampled: int
    low: float
    high: float
    counts: tuple[int, ...]
    levels: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """Bytes of something in memory or in a file."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class MemoryFacts:
    """What running the model takes: its weights by what they are, and keys and values of `context` tokens.

    original: bytes of the original's weights, None where it is not at hand. cache_fp16, cache_int8: None where the
    configuration does not say how many heads there are.
    """

    weights: tuple[Part, ...]
    original: int | None
    context: int
    cache_fp16: int | None
    cache_int8: int | None


@dataclass(frozen=True)
class PositionBin:
    """Mean divergence of the predictions behind so many tokens of a window, first to last, both included."""

    first: int
    last: int
    kld: Figure


@dataclass(frozen=True)
class CertaintyBin:
    """Predictions whose most likely token has a probability from low to high in the original. agreement: the share of
    them where the model has the same most likely token."""

    low: float
    high: float
    tokens: int
    agreement: float


@dataclass(frozen=True)
class TokenFacts:
    """Predictions behind one token. times: it was read; share: of the whole divergence of the text."""

    text: str
    times: int
    mean_kld: float
    share: float


@dataclass(frozen=True)
class Guess:
    """A most likely token and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class Parting:
    """A place where the most likely tokens part. before: the text in front of it; came: the token that followed."""

    before: str
    original: Guess
    model: Guess
    came: str
    kld: float


@dataclass(frozen=True)
class ReadToken:
    """A token of a passage. kld: of the prediction that it was to meet, None of a window's first, which is not
    predicted. parted: the two guesses, original's and model's, where they differ."""

    text: str
    kld: float | None
    parted: tuple[str, str] | None


@dataclass(frozen=True)
class Predictions:
    """How predictions differ from the original's on a text: the figures, and where in it.

    quantiles: (share, kld): so large a share of the predictions is at most so far away. tokens: those behind which most
    of the divergence lies. partings: the furthest. passage: a window whose mean divergence is the median of all.
    """

    evaluation: Evaluation
    positions: tuple[PositionBin, ...]
    quantiles: tuple[tuple[float, float], ...]
    certainties: tuple[CertaintyBin, ...]
    tokens: tuple[TokenFacts, ...]
    partings: tuple[Parting, ...]
    passage: tuple[ReadToken, ...]


@dataclass(frozen=True)
class Energy:
    """Energy of decoding, from the processor's own counters. Everything that ran on it meanwhile is in there.

    joules_per_token and watts: while decoding; idle_watts: of the same counters in a second in which nothing was asked.
    counters: which were read.
    """

    joules_per_token: float
    watts: float
    idle_watts: float
    tokens: int
    seconds: float
    counters: tuple[str, ...]


@dataclass(frozen=True)
class Planning:
    """The plan that a checkpoint was made by. divergence: that was expected, nats a token; points: the plan, the best
    at other sizes, and presets, all expected."""

    budget: str
    target: str
    method: str
    nbytes: int
    divergence: float
    measured_on: str | None
    trial: float | None
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True)
class TrainingFacts:
    """A training that a checkpoint comes from. before, after: loss on held-out text."""

    start: str
    data: str
    steps: int
    tokens: int
    before: float
    after: float
    curve: tuple[LossPoint, ...]


@dataclass(frozen=True)
class Report:
    """Everything that is known of a checkpoint.

    name: its last part of the path; nbytes: of its tensors, file_bytes: of the files that hold them; source: its
    original's name, and source_bytes of its weights. on_calibration_text: predictions were compared on the very file
    that it was calibrated on. license: as the
    original's card says. method: of the ledger. imatrix: an importance matrix's file. made_by, made_with: the command
    that wrote it, and the versions then; command, versions: those of this report. missing: what of the
    report is left out -> the sentence that says what would bring it.
    """

    name: str
    kind: str
    loaded_by: str
    architecture: str | None
    language_model: bool
    weights: int
    nbytes: int
    file_bytes: int
    tensors: tuple[TensorFacts, ...]
    memory: MemoryFacts
    histograms: tuple[Histogram, ...]
    command: str | None
    versions: Mapping[str, str]
    missing: Mapping[str, str]
    absent: tuple[Absent, ...] = ()
    source: str | None = None
    source_bytes: int | None = None
    base_model: str | None = None
    license: str | None = None
    method: str | None = None
    calibration: CalibrationReport | None = None
    imatrix: str | None = None
    planning: Planning | None = None
    training: TrainingFacts | None = None
    predictions: Predictions | None = None
    verification: Verification | None = None
    speed: Benchmark | None = None
    energy: Energy | None = None
    on_calibration_text: bool = False
    made_by: str | None = None
    made_with: Mapping[str, str] | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole model, what is kept in floating point included."""
        return 8 * self.nbytes / max(1, self.weights)
