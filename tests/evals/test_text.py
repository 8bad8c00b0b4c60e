"""Windows of tokens: where they are cut, what begins them, and what a bad file says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from fewbits.engine import load
from fewbits.errors import CheckpointError
from fewbits.evals import Windows, read_windows, self_text
from fewbits.evals.text import beginning

BOS = 1  # of stories260K


@pytest.fixture(scope="module")
def books(shared_models):
    """Byte-level BPE that puts nothing before a text; its end token is 1."""
    return AutoTokenizer.from_pretrained(shared_models / "books")


@pytest.fixture(scope="module")
def stories_tokenizer(stories):
    return AutoTokenizer.from_pretrained(stories)


def test_a_text_is_cut_from_its_start_without_overlap(books, shared_text):
    path = shared_text / "books-test.txt"
    windows = read_windows(path, books, 5, 32)
    whole = books(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    assert windows.ids.flatten().tolist() == whole[: 5 * 32]
    assert windows.description == "books-test.txt, 5 windows of 32 tokens"


def test_every_window_begins_with_the_token_that_the_tokenizer_begins_with(stories_tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time there was a little girl. " * 8)
    windows = read_windows(path, stories_tokenizer, 3, 16)
    assert windows.ids[:, 0].tolist() == [BOS] * 3
    text = stories_tokenizer(path.read_text())["input_ids"]
    assert [BOS, *windows.ids[:, 1:].flatten().tolist()] == text[: 1 + 3 * 15]


def test_documents_are_separated_by_the_beginning_token(stories_tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": "One day"}) + "\n" for _ in range(4)))
    document = stories_tokenizer("One day")["input_ids"]
    stream = (document * 4)[1:]  # the first one's beginning token is the window's
    windows = read_windows(path, stories_tokenizer, 1, 1 + 2 * len(document))
    assert windows.ids.tolist() == [[BOS, *stream[: 2 * len(document)]]]


def test_documents_are_separated_by_the_end_token_where_nothing_begins_them(books, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "One day"}\n\n{"text": "One day"}\n')
    document = books("One day")["input_ids"]
    windows = read_windows(path, books, 1, 2 * len(document) + 1)
    assert windows.ids.tolist() == [[*document, books.eos_token_id, *document]]
    assert beginning(books) is None


def test_only_as_much_of_a_text_is_read_as_it_takes(books, tmp_path):
    path = tmp_path / "text.txt"
    text = "word " * 100_000
    path.write_bytes(text.encode() + b"\xff")  # not UTF-8 far behind what is needed
    windows = read_windows(path, books, 2, 16)
    assert windows.ids.flatten().tolist() == books(text, verbose=False)["input_ids"][:32]


def test_a_text_of_long_tokens_is_read_further(books, tmp_path):
    """Forty spaces are a few tokens, so sixteen characters a token are not enough."""
    path = tmp_path / "text.txt"
    text = ("x" + " " * 400) * 2000
    path.write_text(text)
    whole = books(text, verbose=False)["input_ids"]
    windows = read_windows(path, books, 4, 64)
    assert windows.ids.flatten().tolist() == whole[: 4 * 64]


def test_a_short_text_gives_fewer_windows(books, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one two three four five six seven eight nine ten " * 4)
    windows = read_windows(path, books, 24, 16)
    assert 0 < len(windows.ids) < 24
    assert f"{len(windows.ids)} windows" in windows.description


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"too short", r"text\.txt has \d tokens, too few for a window of 32"),
        ("text.txt", b"\xff\xfe\x00" * 100, "not UTF-8 text"),
        ("text.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("text.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', 'line 3: has no string "text"'),
        ("text.jsonl", b"[1]\n", 'line 1: has no string "text"'),
    ],
)
def test_a_bad_text_is_refused_with_its_line(name, content, message, books, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_windows(tmp_path / name, books, 4, 32)


def test_a_missing_text_is_named(books, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.txt: cannot be read \(No such file or directory\)"):
        read_windows(tmp_path / "nowhere.txt", books, 4, 32)


def test_the_digest_tells_tokens_and_arrangement():
    ids = torch.arange(12)
    a, b, c = (Windows(x, "") for x in (ids.view(3, 4), ids.view(4, 3), ids.view(3, 4).flip(0)))
    assert len({a.digest, b.digest, c.digest}) == 3
    assert a.digest == Windows(ids.view(3, 4).clone(), "another name").digest


def test_self_text_is_drawn_from_the_models_own_distribution(stories):
    """After the beginning token, first tokens of many windows occur as often as the model says.

    Pearson's chi-squared over the tokens expected 5 times or more: its mean is its degrees of freedom k, its standard
    deviation √(2k). A wrong temperature of 0.8 gives a value several times k.
    """
    model = load(stories)
    windows = self_text(model, windows=4000, length=2, seed=0)
    assert windows.ids[:, 0].tolist() == [BOS] * 4000
    with torch.inference_mode():
        p = model(input_ids=torch.tensor([[BOS]])).logits[0, -1].double().softmax(-1)
    expected = 4000 * p
    observed = windows.ids[:, 1].bincount(minlength=len(p)).double()
    common = expected >= 5
    cells_e = torch.cat([expected[common], expected[~common].sum()[None]])
    cells_o = torch.cat([observed[common], observed[~common].sum()[None]])
    statistic, k = ((cells_o - cells_e) ** 2 / cells_e).sum().item(), len(cells_e) - 1
    assert statistic < k + 5 * (2 * k) ** 0.5


def test_self_text_with_its_cache_follows_the_whole_context(stories):
    """Greedy decoding cannot be read off sampled text, but likelihood can: the model must find its own text likelier
    than the same tokens in another order."""
    model = load(stories)
    ids = self_text(model, windows=4, length=48, seed=1).ids
    shuffled = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], dim=1)

    def loss(tokens):
        with torch.inference_mode():
            logits = model(input_ids=tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    assert loss(ids) < loss(shuffled) / 2


def test_self_text_depends_on_its_seed_alone(stories):
    model = load(stories)
    state = torch.get_rng_state()
    a, b, c = (self_text(model, windows=2, length=12, seed=seed).digest for seed in (7, 7, 8))
    assert a == b != c
    assert torch.equal(torch.get_rng_state(), state)
