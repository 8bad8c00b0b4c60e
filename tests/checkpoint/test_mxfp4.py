"""mxfp4: gpt-oss' experts are read to transformers' own numbers and shapes, and such a model runs."""

from __future__ import annotations

import json

import pytest
import torch
from folders import foreign, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import fewbits
from fewbits.checkpoint import KINDS, Entry, open_checkpoint
from fewbits.checkpoint.mxfp4 import FORMAT
from fewbits.errors import CheckpointError, FormatError, UnsupportedError
from fewbits.formats import FORMATS, QTensor

KIND = KINDS["mxfp4"]
NAME = "model.layers.0.mlp.experts.gate_up_proj"
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
IDS = torch.arange(2, 34).view(1, 32)


def packed(experts=3, rows=6, groups=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=g, dtype=torch.uint8)
    scales = torch.randint(100, 140, (experts, rows, groups), generator=g, dtype=torch.uint8)
    return {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}


def folder_of(path, arrays, quantization=CONFIG, **config):
    path.mkdir(parents=True, exist_ok=True)
    save_file(arrays | {"model.norm.weight": torch.ones(4)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return path


def test_bytes_worked_out_by_hand(tmp_path):
    """Byte 0x52: code 2 first, 1.0, then 5, 3.0; 0x9F: code 15, −6, then 9, −0.5. Scales 2 and 1/4 by row."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :2] = torch.tensor([0x52, 0x9F])
    blocks[0, 1, 0, 15] = 0x70  # the last of 32: code 7, 6.0
    arrays = {f"{NAME}_blocks": blocks, f"{NAME}_scales": torch.tensor([[[128], [125]]], dtype=torch.uint8)}
    kind, reader = open_checkpoint(folder_of(tmp_path / "x", arrays))
    assert kind is KIND
    assert reader.entries[NAME] == Entry(NAME, (1, 32, 2), FORMAT)
    w = reader.read(NAME).dequantize()
    assert w[0, :5, 0].tolist() == [2.0, 6.0, -12.0, -1.0, 0.0]
    assert w[0, 31].tolist() == [0.0, 1.5]


def test_every_code_under_every_scale_is_transformers_own(tmp_path):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    folder = folder_of(tmp_path / "x", {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    found = KIND.open(folder).read(NAME).dequantize()
    assert found.shape == theirs.shape == (1, 512, 255)
    assert torch.equal(found, theirs)
    assert torch.equal(foreign(KIND, folder)[NAME], theirs)


def test_experts_can_be_read_a_few_at_a_time(tmp_path):
    reader = KIND.open(folder_of(tmp_path / "x", packed()))
    whole = reader.read(NAME)
    assert torch.equal(reader.read(NAME, slice(1, 3)).dequantize(), whole.dequantize()[1:3])
    back = QTensor.from_arrays(FORMAT, whole.pack(), whole.shape)
    assert same(back, whole)
    assert reader.digests(NAME).keys() == {f"{NAME}_blocks", f"{NAME}_scales"}


def test_the_format_lies_down():
    w = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0))
    upright = FORMATS["mxfp4"]
    for search in (False, True):
        params = FORMAT.fit(w, torch.arange(64.0).view(64, 1), search=search)
        expected = upright.fit(w.mT, torch.arange(64.0), search=search)
        assert torch.equal(params["exponent"], expected["exponent"])
        q = QTensor(FORMAT, FORMAT.round(w, params), params)
        assert torch.equal(q.dequantize(), upright.decode(upright.round(w.mT, expected), expected).mT)
        assert sum(array.nbytes for array in q.pack().values()) == q.nbytes == 2 * 5 * (32 + 2)
    with pytest.raises(FormatError, match="no dimension before the two"):
        FORMAT.fit(w[0])


def test_a_model_of_gpt_oss_runs_as_transformers_runs_it(tmp_path):
    """In float32, where transformers decodes the experts to BF16 first, which holds every number of MXFP4."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    arrays = {}
    for name, w in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            ours = FORMAT.pack(FORMAT.round(w, params := FORMAT.fit(w)), params)
            arrays |= {f"{name}_blocks": ours["packed"].unflatten(-1, (-1, 16)), f"{name}_scales": ours["scale"]}
        else:
            arrays[name] = w
    folder = folder_of(tmp_path / "x", arrays, architectures=["GptOssForCausalLM"], **config.to_diff_dict())
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    ours = fewbits.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    weights = {name: p.float() for name, p in theirs.named_parameters()}
    assert all(torch.equal(p, weights[name]) for name, p in ours.named_parameters())
    with torch.inference_mode():
        expected, found = theirs.float()(IDS).logits, ours(IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{NAME}_scales": torch.zeros(3, 6, 1, dtype=torch.uint8)},
            r"_scales' torch.uint8 \[3, 6, 1\], but mxfp4, as",
        ),
        ({f"{NAME}_scales": torch.zeros(3, 6, 2)}, "_scales' torch.float32"),
        ({f"{NAME}_blocks": torch.zeros(3, 6, 2, 8, dtype=torch.uint8)}, r"\[3, 6, 2, 8\] and"),
        ({f"{NAME}_blocks": torch.zeros(3, 6, 32, dtype=torch.uint8)}, r"is torch.uint8 \[3, 6, 32\]"),
        ({f"{NAME}_scales": torch.full((3, 6, 2), 255, dtype=torch.uint8)}, "holds 255, which is NaN"),
        ({NAME: torch.zeros(3, 64, 6)}, "is there beside"),
        ({"b_scales": torch.zeros(1, 1, 1, dtype=torch.uint8)}, "'b_blocks' is missing"),
        ({"b_blocks": torch.zeros(1, 1, 1, 16, dtype=torch.uint8)}, "'b_scales' is missing"),
    ],
)
def test_damage_is_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        KIND.open(folder_of(tmp_path / "x", packed() | changes)).read(NAME)


def test_a_configuration_without_blocks_and_writing(tmp_path):
    with pytest.raises(CheckpointError, match="says mxfp4, but no tensor is named '…_blocks'"):
        KIND.open(folder_of(tmp_path / "x", {}))
    assert "writes none" in KIND.admits(Entry(NAME, (1, 32, 2), FORMAT))
    with pytest.raises(UnsupportedError, match="writes none"):
        KIND.create(tmp_path / "out", [], tmp_path, {})


@settings(max_examples=100, deadline=None)
@given(
    part=st.sampled_from(["_blocks", "_scales"]),
    shape=st.lists(st.integers(0, 33), max_size=4),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.float32, torch.float8_e8m0fnu]),
)
def test_damaged_arrays_raise_nothing_else(tmp_path_factory, part, shape, dtype):
    arrays = packed() | {NAME + part: torch.zeros(shape, dtype=torch.uint8).to(dtype)}
    folder = folder_of(tmp_path_factory.mktemp("f") / "x", arrays)
    try:
        reader = open_checkpoint(folder)[1]
        for name in reader.entries:
            reader.read(name).dequantize()
    except CheckpointError:
        pass
