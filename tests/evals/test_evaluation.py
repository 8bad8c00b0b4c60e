"""evaluate, end to end, against a direct computation in torch."""

from __future__ import annotations

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.evals import evaluate, evaluation, read_windows, run_tasks

SHORT = {"windows": 4, "length": 64}


@pytest.fixture
def text(shared_text):
    return shared_text / "tinystories-eval.jsonl"


def direct(path, windows) -> torch.Tensor:
    """Log-probabilities, float64 [windows · (length − 1), vocab], by transformers and torch alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=windows.ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)


def test_every_figure_is_that_of_a_direct_computation(stories, damaged, text):
    found = evaluate(damaged, stories, text=text, **SHORT)
    windows = read_windows(text, AutoTokenizer.from_pretrained(stories), 4, 64)
    p, q, tokens = direct(stories, windows), direct(damaged, windows), windows.ids[:, 1:].flatten()
    kld = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).numpy()
    losses = [functional.cross_entropy(x, tokens).item() for x in (p, q)]
    # 16-bit references move a mean divergence by less than 1e-6, a single token's by a little more; batches of other
    # sizes move logits of float32 in their last digits.
    assert found.mean_kld.value == pytest.approx(kld.mean(), abs=1e-6)
    assert found.median_kld.value == pytest.approx(np.quantile(kld, 0.5, method="inverted_cdf"), abs=1e-5)
    assert found.kld_99.value == pytest.approx(np.quantile(kld, 0.99, method="inverted_cdf"), abs=1e-4)
    assert found.reference_perplexity.value == pytest.approx(np.exp(losses[0]), rel=1e-6)
    assert found.perplexity.value == pytest.approx(np.exp(losses[1]), rel=1e-6)
    assert found.perplexity_ratio.value == pytest.approx(np.exp(losses[1] - losses[0]), rel=1e-6)
    assert found.top1_agreement.value == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert (found.tokens, found.windows) == (4 * 63, 4)
    means = kld.reshape(4, 63).mean(1)
    assert found.mean_kld.error == pytest.approx(means.std(ddof=1) / 2, rel=4 / np.sqrt(2 * 500))


def test_a_model_does_not_differ_from_itself(stories, text):
    found = evaluate(stories, stories, text=text, **SHORT)
    assert 0 <= found.mean_kld.value < 1e-8  # what 16 bits leave: half the variance of their rounding
    assert found.top1_agreement.value == 1
    assert (found.perplexity_ratio.value, found.perplexity_ratio.error) == (1, 0)


def test_the_published_perplexity_of_books(shared_models, shared_text):
    """56.65 on 24 windows of 256 tokens: consecutive, no special tokens, 255 predictions each."""
    books = shared_models / "books"
    found = evaluate(books, books, text=shared_text / "books-test.txt")
    assert round(found.perplexity.value, 2) == 56.65
    assert found.mean_kld.value < 1e-8


def counting(monkeypatch) -> list[str]:
    """Names of the folders that are loaded from now on."""
    loaded = []
    load = evaluation.load

    def spy(path, **options):
        loaded.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(evaluation, "load", spy)
    return loaded


def test_the_original_runs_once_for_a_text(stories, damaged, text, monkeypatch):
    loaded = counting(monkeypatch)
    first = evaluate(damaged, stories, text=text, **SHORT)
    assert loaded == [stories.name, damaged.name]
    assert evaluate(damaged, stories, text=text, **SHORT) == first
    assert loaded == [stories.name, damaged.name, damaged.name]
    evaluate(damaged, stories, text=text, windows=3, length=64)
    assert loaded[3:] == [stories.name, damaged.name]


def test_text_by_the_model_itself_is_made_once(stories, damaged, monkeypatch):
    loaded = counting(monkeypatch)
    first = evaluate(damaged, stories, **SHORT)
    assert evaluate(damaged, stories, **SHORT) == first
    assert loaded == [stories.name, damaged.name, damaged.name]
    assert "written by the original (seed 0), 4 windows of 64 tokens" in first.text
    assert first.mean_kld.value > 0.01
    assert evaluate(damaged, stories, seed=1, **SHORT) != first


def test_a_damaged_reference_is_made_again_and_says_so(stories, damaged, text, cache, caplog):
    first = evaluate(damaged, stories, text=text, **SHORT)
    (file,) = cache.rglob("*.reference")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with caplog.at_level(logging.WARNING, logger="fewbits"):
        assert evaluate(damaged, stories, text=text, **SHORT) == first
    assert "a checksum does not fit" in caplog.text
    assert "the original runs again" in caplog.text


def test_a_changed_original_is_another_original(stories, damaged, tmp_path, monkeypatch):
    original = tmp_path / "original"
    shutil.copytree(stories, original, copy_function=shutil.copyfile)
    evaluate(damaged, original, **SHORT)
    shutil.copyfile(damaged / "model.safetensors", original / "model.safetensors")
    assert evaluate(damaged, original, **SHORT).mean_kld.value < 1e-8


def test_progress_is_told(stories, damaged, text):
    calls = []
    evaluate(damaged, stories, text=text, progress=lambda *call: calls.append(call), **SHORT)
    assert calls == [(i, 4, label) for label in ("original", "model") for i in range(1, 5)]


def test_other_vocabularies_are_refused(stories, shared_models, text):
    with pytest.raises(UnsupportedError, match=r"vocabulary of 361.*vocabulary of 512.*do not share"):
        evaluate(shared_models / "babyllama", stories, text=text)


def test_another_tokenizer_of_the_same_size_is_refused(stories, damaged, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(damaged, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedError, match="do not share their tokens"):
        evaluate(other, stories)


def test_windows_longer_than_the_context_are_refused(stories, damaged, text):
    with pytest.raises(UnsupportedError, match="windows of 513 tokens; its context allows 2 to 512"):
        evaluate(damaged, stories, text=text, length=513)


def test_one_window_is_refused_before_anything_is_loaded(stories, damaged, monkeypatch):
    loaded = counting(monkeypatch)
    with pytest.raises(UnsupportedError, match="no standard error"):
        evaluate(damaged, stories, windows=1)
    assert not loaded


def test_an_encoder_is_refused(stories, tmp_path):
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=32, **size)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match=r"BertModel does not predict next tokens; evaluate needs a causal"):
        evaluate(tmp_path / "bert", stories)


def test_a_folder_without_tokenizer_needs_no_text(stories, damaged, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(stories, bare, copy_function=shutil.copyfile)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert evaluate(damaged, bare, **SHORT).tokens == 4 * 63
    (tmp_path / "text.txt").write_text("Once upon a time")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        evaluate(damaged, bare, text=tmp_path / "text.txt", **SHORT)


def test_tasks_without_the_harness_say_what_to_install(stories, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'fewbits\[eval\]'"):
        run_tasks(stories, ["arc_easy"], limit=2)
