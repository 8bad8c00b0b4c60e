"""A report made by hand, of as many layers as a test wants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewbits.findings import (
    Absent,
    CertaintyBin,
    Energy,
    Guess,
    Histogram,
    MemoryFacts,
    Part,
    Parting,
    Planning,
    PositionBin,
    Predictions,
    ReadToken,
    Report,
    TensorFacts,
    TokenFacts,
    TrainingFacts,
)
from fewbits.results import (
    Benchmark,
    CalibrationReport,
    Evaluation,
    Figure,
    FrontierPoint,
    LossPoint,
    Measured,
    Together,
    Verification,
)

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def tensors(layers: int) -> tuple[TensorFacts, ...]:
    """Seven matrices a layer, a norm, and the embeddings."""
    found = [_tensor("model.embed_tokens.weight", None, "embed_tokens", "fp16", (512, 64), None)]
    for layer in range(layers):
        for i, part in enumerate(PARTS):
            format = ("int4-g32", "int3-g32")[(layer + i) % 2]
            name = f"model.layers.{layer}.{part}.weight"
            found.append(_tensor(name, layer, part, format, (64, 64), 0.02 * (i + 1) + 0.001 * layer))
        norm = f"model.layers.{layer}.input_layernorm.weight"
        found.append(_tensor(norm, layer, "input_layernorm", "fp16", (64,), None))
    return tuple(found)


def _tensor(
    name: str, layer: int | None, part: str, format: str, shape: tuple[int, ...], error: float | None
) -> TensorFacts:
    weights = shape[0] * (shape[1] if len(shape) > 1 else 1)
    bits = {"fp16": 16, "int4-g32": 4.5, "int3-g32": 3.5}[format]
    return TensorFacts(
        name=name,
        layer=layer,
        part=part,
        shape=shape,
        weights=weights,
        format=format,
        floating=format == "fp16",
        nbytes=round(weights * bits / 8),
        error=error,
        fate="kept" if error is None else "quantized",
        method=None if error is None else "gptq",
        reason="norm: small, and every token passes through it" if len(shape) == 1 else None,
        source=name,
        digest="0123456789abcdef" * 4,
    )


def bare(layers: int = 2, **changes: Any) -> Report:
    """What headers alone tell."""
    found = tensors(layers)
    nbytes = sum(t.nbytes for t in found)
    report = Report(
        name="tiny-int4",
        kind="compressed-tensors",
        loaded_by="a folder for transformers and vLLM",
        architecture="LlamaForCausalLM",
        language_model=True,
        weights=sum(t.weights for t in found),
        nbytes=nbytes,
        file_bytes=nbytes + 4000,
        tensors=found,
        memory=MemoryFacts((Part("codes", nbytes - 500), Part("scales and zero-points", 500)), None, 1024, None, None),
        histograms=(),
        command=None,
        versions={"Python": "3.11.7", "fewbits": "0.1.0", "processor": "a processor"},
        missing={
            "ledger": "there is no ledger",
            "predictions": "give the original: --against MODEL",
            "planning": "it was not made by a plan",
            "training": "it was not trained",
            "calibration": "it was made without text",
            "speed": "it was not to be measured",
            "energy": "no counters",
            "original weights": "give the original: --against MODEL",
            "cache": "config.json has no heads",
        },
    )
    return replace(report, **changes)


def whole(layers: int = 2, **changes: Any) -> Report:
    """Everything that a report can have."""
    found = bare(layers)
    return replace(
        found,
        source="tiny",
        source_bytes=2 * found.weights,
        base_model="owner/tiny",
        license="apache-2.0",
        method="gptq",
        absent=(Absent("lm_head.weight", "tied", "shares the weights of model.embed_tokens.weight"),),
        memory=replace(found.memory, original=2 * found.weights, cache_fp16=65536, cache_int8=32768),
        histograms=(_histogram(),),
        calibration=CalibrationReport("/text/c.txt", "c.txt, 8 windows", 8, 256, 2048, "ab" * 32, 512, 0.01),
        planning=Planning("4.25 bits a weight", "vllm", "gptq", found.file_bytes, 0.011, "c.txt", None, points()),
        training=TrainingFacts("gptq", "d.txt", 20, 40960, 0.5, 0.1, _curve()),
        predictions=predictions(),
        verification=Verification("tiny-int4", "compressed-tensors", len(found.tensors), ()),
        speed=_speed(),
        energy=Energy(0.25, 40.0, 10.0, 512, 3.2, ("package-0", "dram")),
        made_by="fewbits quantize /home/me/tiny tiny-int4 --bpw 4.25",
        made_with={"fewbits": "0.1.0", "torch": "2.13.0"},
        command="fewbits report tiny-int4 --against tiny",
        missing={},
        **changes,
    )


def points() -> tuple[FrontierPoint, ...]:
    plans = [FrontierPoint("", 100_000 * n, 4.0 ** (3 - n) / 10, "plan", measured=False) for n in range(1, 8)]
    return (
        FrontierPoint("this plan", 350_000, 0.03, "plan", measured=False),
        *plans,
        FrontierPoint("Q4_K_M", 420_000, 0.05, "preset", measured=False),
        FrontierPoint("GPTQ", 410_000, 0.04, "peer", measured=True),
    )


def predictions() -> Predictions:
    passage = (
        ReadToken("Once", None, None),
        ReadToken(" upon", 0.001, None),
        ReadToken(" a", 0.05, (" the", " a")),
        ReadToken("\n<b>time", 0.5, None),
    )
    return Predictions(
        evaluation=evaluation(),
        positions=tuple(PositionBin(8 * i + 1, 8 * i + 8, Figure(0.01 + 0.001 * i, 0.002)) for i in range(24)),
        quantiles=((0.01, 0.0), (0.5, 0.004), (0.9, 0.02), (0.99, 0.1), (1.0, 0.7)),
        certainties=tuple(CertaintyBin(i / 10, (i + 1) / 10, 100, 0.8 + 0.02 * i) for i in range(10)),
        tokens=(TokenFacts(" the", 40, 0.02, 0.125),),
        partings=(Parting("Once upon a", Guess(" time", 0.6), Guess(" day", 0.5), " time", 0.7),),
        passage=passage,
    )


def evaluation() -> Evaluation:
    return Evaluation(
        model="tiny-int4",
        against="tiny",
        text="t.txt, 4 windows of 256 tokens",
        tokens=1020,
        windows=4,
        perplexity=Figure(10.5, 0.3),
        reference_perplexity=Figure(10.0, 0.3),
        perplexity_ratio=Figure(1.05, 0.002),
        mean_kld=Figure(0.012, 0.001),
        median_kld=Figure(0.004, 0.0005),
        kld_99=Figure(0.1, 0.01),
        top1_agreement=Figure(0.925, 0.004),
    )


def _histogram() -> Histogram:
    levels = tuple(float(x) for x in range(-8, 8))
    return Histogram(
        tensor="model.layers.0.mlp.up_proj.weight",
        format="int4-g32",
        sampled=4096,
        low=-8.5,
        high=7.5,
        counts=tuple(10 + min(i, 63 - i) for i in range(64)),
        levels=levels,
        shares=tuple(1 / 16 for _ in levels),
    )


def _curve() -> tuple[LossPoint, ...]:
    held = {0: 0.5, 10: 0.2, 20: 0.1}
    return tuple(LossPoint(step, None if step == 0 else 0.6 / (step + 1), held.get(step)) for step in range(0, 21, 2))


def _speed() -> Benchmark:
    rate = Measured(100.0, 90.0, 110.0)
    return Benchmark(
        model="tiny-int4",
        runner="compiled kernels for avx2",
        threads=2,
        kv="f16",
        context=512,
        prompt_tokens=512,
        new_tokens=64,
        runs=3,
        prefill=Measured(1000.0, 900.0, 1100.0),
        decode=rate,
        together=(Together(8, Measured(500.0, 450.0, 550.0)),),
        first_token_seconds=Measured(0.2, 0.1, 0.3),
        weight_memory=1000,
        other_memory=50_000_000,
        cache_bytes=65536,
        roofline=None,
        peer=None,
    )
