"""Samples: where the loss is, how they are packed, and what a file is refused for, by its lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import fewbits
from fewbits.errors import CheckpointError
from fewbits.evals.tokenizer import tokenizer_of
from fewbits.train.samples import IGNORED, PackedSamples, Sample, read_samples

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}[end]{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tokenizer_of(TINY)


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def targets(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(
        tokenizer.decode([token for token, is_target in zip(sample.ids, sample.targets, strict=True) if is_target])
    )


def test_the_loss_is_on_completions(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = written(
        tmp_path / "a.jsonl", {"prompt": "What is it?", "completion": " A dark night."}, {"text": "It rained."}
    )
    first, second = read_samples(file, tokenizer, 64).samples
    assert targets(first, tokenizer).removesuffix(tokenizer.eos_token or "") == " A dark night."
    assert all(second.targets)
    assert first.ids[-1] == second.ids[-1] == tokenizer.eos_token_id


def test_the_loss_is_on_what_the_assistant_says(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "Who came?"), ("assistant", "Nobody."), ("user", "And then?"), ("assistant", "The rain.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (sample,) = read_samples(written(tmp_path / "a.jsonl", {"messages": messages}), tokenizer, 256).samples
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(sample.ids) == whole
    assert targets(sample, tokenizer) == "Nobody.[end]The rain.[end]"


def test_lines_that_are_no_samples_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = ({"text": "fine"}, "{broken\n", {"prompt": "no answer"}, [1], {"title": "x"}, {"messages": []}, {"text": 5})
    with pytest.raises(CheckpointError) as refused:
        read_samples(written(tmp_path / "bad.jsonl", *rows), tokenizer, 64)
    message = str(refused.value)
    assert "6 lines are no samples" in message
    for part in (
        "line 2: ",
        'line 3: has no string "completion"',
        "line 4: is no object",
        "line 5:",
        "line 6:",
        "1 more",
    ):
        assert part in message


def test_empty_lines_and_long_samples_are_noted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = written(tmp_path / "a.jsonl", {"text": "short"}, "\n", {"text": "long " * 100}, "   \n", {"text": "short"})
    found = read_samples(file, tokenizer, 16)
    assert found.empty == (2, 4)
    assert found.cut == (3,)
    assert [len(sample.ids) <= 16 for sample in found.samples] == [True] * 3
    assert found.notes == (
        "2 empty lines were passed over: lines 2, 4",
        "1 samples were cut to a window's length: lines 3",
    )


@pytest.mark.parametrize("rows", [(), ("\n",)])
def test_a_file_without_samples(rows: tuple[str, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CheckpointError, match="holds no sample"):
        read_samples(written(tmp_path / "none.jsonl", *rows), tokenizer, 16)


def test_what_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_samples(tmp_path / "nowhere.jsonl", tokenizer, 16)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_samples(tmp_path / "latin.jsonl", tokenizer, 16)


def test_packing_by_hand() -> None:
    samples = [Sample([1, 2, 3], [False, True, True]), Sample([4, 5], [True, True]), Sample([6, 7, 8], [True] * 3)]
    windows = [PackedSamples(samples, 6, pad=0, seed=seed)[i] for seed in range(3) for i in range(2)]
    for window in windows:
        assert {name: values.shape for name, values in window.items()} == dict.fromkeys(window, torch.Size([6]))
    every = sorted(int(token) for window in windows[:2] for token in window["input_ids"] if token)
    assert every == [1, 2, 3, 4, 5, 6, 7, 8]
    (only,) = (PackedSamples(samples[:2], 6, pad=0, seed=0)[i] for i in range(1))
    first_is_three = only["input_ids"].tolist() == [1, 2, 3, 4, 5, 0]
    assert first_is_three or only["input_ids"].tolist() == [4, 5, 1, 2, 3, 0]
    assert only["labels"].tolist() == (
        [IGNORED, 2, 3, IGNORED, 5, IGNORED] if first_is_three else [IGNORED, 5, IGNORED, 2, 3, IGNORED]
    )
    assert only["position_ids"].tolist() == ([0, 1, 2, 0, 1, 0] if first_is_three else [0, 1, 0, 1, 2, 0])


def test_packed_samples_do_not_read_each_other() -> None:
    """A sample's predictions are the same alone and behind another one."""
    model = fewbits.load(TINY)
    a, b = list(range(40, 60)), list(range(100, 130))
    window = PackedSamples([Sample(a, [True] * 20), Sample(b, [True] * 30)], 64, pad=0, seed=0)[0]
    ids, positions = window["input_ids"][None], window["position_ids"][None]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        for sample in (a, b):
            start = next(i for i in range(len(ids[0])) if ids[0, i : i + len(sample)].tolist() == sample)
            alone = model(input_ids=torch.tensor([sample]), use_cache=False).logits[0]
            assert float((together[start : start + len(sample)] - alone).abs().max()) < 1e-4 * float(alone.abs().max())
