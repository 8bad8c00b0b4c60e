"""Texts alone and together, prefixes, drafts and limits, on a runner worked out by hand; then on real models."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tiny import save_model
from toy import LETTERS, Toy, text
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fewbits.engine import Engine, Text
from fewbits.engine.sampling import Sampling, choose
from fewbits.engine.speculation import TRIALS, Acceptance, Lookup, Pace
from fewbits.engine.text_files import text_files
from fewbits.engine.transformers_runner import TransformersRunner
from fewbits.errors import RequestError, UnsupportedError


def engine(toy: Toy | None = None, ends: str = "", speculate=False) -> Engine:
    return Engine.on(toy or Toy(), text(ends), {}, speculate)


def by_hand(toy: Toy, prompt: str, count: int, sampling: Sampling) -> str:
    """What a text is by the definition: a token at a time, from the whole prefix."""
    tokens, rng = [LETTERS.index(letter) for letter in prompt], sampling.generator()
    for _ in range(count):
        tokens.append(choose(toy.logits(tokens), np.array(tokens, np.int32), sampling, rng))
    return "".join(LETTERS[token] for token in tokens[len(prompt) :])


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_k": 3, "repetition_penalty": 1.2},
]


# One text


@pytest.mark.parametrize("speculate", [False, True, "auto"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prompt", ["a", "abcabcabc", "abcdefghabcdefghabc"])
def test_a_text_is_what_it_is_by_hand(prompt: str, settings: dict, speculate) -> None:
    """Longer prompts than a call takes, shorter ones, and with drafts: always the same text."""
    toy = Toy()
    found = "".join(engine(toy, speculate=speculate).generate(prompt, max_tokens=12, **settings))
    assert found == by_hand(toy, prompt, 12, Sampling(**settings))


def test_drafts_save_runs() -> None:
    """A table of one row repeats its likeliest letter, so a lookup is always right."""
    plain, drafted = Toy(states=1), Toy(states=1)
    texts = [
        "".join(engine(toy, speculate=s).generate("aa", max_tokens=24, temperature=0))
        for toy, s in ((plain, False), (drafted, True))
    ]
    assert texts[0] == texts[1]
    assert len(plain.calls) == 24
    assert len(drafted.calls) < 10


def test_drafts_leave_the_distribution_alone() -> None:
    """χ² of 4,000 texts of three letters, drafts checked, against all 512 texts' probabilities; 1e-4 by chance."""
    toy, prompt = Toy(states=5, sharp=1.0), [0, 1, 0, 1, 0]

    def probability(letters: tuple[int, ...]) -> float:
        made = 1.0
        for i, letter in enumerate(letters):
            logits = toy.logits([*prompt, *letters[:i]]).astype(np.float64)
            made *= np.exp(logits[letter]) / np.exp(logits).sum()
        return made

    expected = {letters: 4000 * probability(letters) for letters in itertools.product(range(8), repeat=3)}
    made = engine(toy, speculate=True)
    counts = dict.fromkeys(expected, 0)
    for seed in range(4000):
        counts[tuple(p.token for p in made.stream(prompt, max_tokens=3, temperature=1.0, seed=seed))] += 1
    assert max(toy.calls) > 1  # there were drafts
    often = [letters for letters in expected if expected[letters] >= 5]
    rare = [letters for letters in expected if expected[letters] < 5]
    pairs = [
        ([counts[x] for x in often] + [sum(counts[x] for x in rare)]),
        ([expected[x] for x in often] + [sum(expected[x] for x in rare)]),
    ]
    assert chisquare(*pairs).pvalue > 1e-4


def test_where_a_text_ends() -> None:
    toy = Toy()
    whole = by_hand(toy, "abc", 20, Sampling(temperature=0))
    end = whole[4]
    made = list(engine(Toy(), ends=end).stream("abc", temperature=0))
    assert "".join(p.text for p in made) == whole[: whole.index(end)]
    assert [p.finish for p in made] == [None] * (len(made) - 1) + ["stop"]
    made = list(engine(Toy()).stream("abc", temperature=0, stop=whole[2:5]))
    assert "".join(p.text for p in made) == whole[: whole.index(whole[2:5])]
    assert made[-1].finish == "stop"
    made = list(engine(Toy()).stream("abc", temperature=0, max_tokens=5, stop=whole[4] + "?"))
    assert "".join(p.text for p in made) == whole[:5]  # what was held back comes with the last piece
    assert made[-1].finish == "length"


@pytest.mark.parametrize("speculate", [False, True])
def test_a_text_ends_with_the_context(speculate: bool) -> None:
    """32 tokens fit; the one behind the last needs no room, because it is not run."""
    toy = Toy(context=32, states=1)
    found = "".join(engine(toy, speculate=speculate).generate("a" * 10, temperature=0))
    assert len(found) == 23
    assert len("".join(engine(toy).generate("a" * 32, temperature=0))) == 1


def test_a_prompt_longer_than_the_context() -> None:
    with pytest.raises(RequestError, match=r"the prompt has 33 tokens, and the context holds 32"):
        engine().generate("a" * 33)


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("a", {"max_tokens": 0}, "max_tokens is 0"),
        ("a", {"logprobs": -1}, "logprobs is -1"),
        ("a", {"top_p": 2.0}, "top_p is 2.0"),
        ([], {}, "0 tokens"),
        ([8], {}, "token 8 is none of the model's 8"),
        ("", {}, "the prompt is empty"),
        ([{"role": "user", "content": "a"}], {}, "no chat template"),
    ],
)
def test_what_is_refused_is_refused_at_once(prompt, settings: dict, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        engine().stream(prompt, **settings)


def test_logprobs() -> None:
    toy = Toy()
    (piece,) = engine(toy).stream("ab", max_tokens=1, temperature=0, logprobs=2)
    expected = torch.from_numpy(toy.logits([0, 1])).log_softmax(-1)
    assert piece.logprob == pytest.approx(expected.max().item(), abs=1e-6)
    assert [token for token, _ in piece.top] == expected.topk(2).indices.tolist()
    assert [p.logprob for p in engine(toy).stream("ab", max_tokens=1)] == [None]


# Several texts


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("speculate", [False, True])
def test_texts_side_by_side_are_what_they_are_alone(slots: int, speculate: bool) -> None:
    """Iterators that take turns, with prompts longer than a call; more of them than slots, too."""
    toy = Toy(slots=slots)
    made = engine(toy, speculate=speculate)
    prompts = ["abcabcabcabcabc", "h", "abcabcabcabcd", "gg"]
    settings = [SETTINGS[i % 3] for i in range(4)]
    streams = [made.generate(p, max_tokens=9, **s) for p, s in zip(prompts, settings, strict=True)]
    rounds = list(itertools.zip_longest(*streams, fillvalue=""))
    for i, prompt in enumerate(prompts):
        assert "".join(r[i] for r in rounds) == by_hand(toy, prompt, 9, Sampling(**settings[i]))
    assert made.batch.idle


def test_a_step_writes_for_all_and_reads_beside() -> None:
    toy = Toy(slots=3, most_rows=8)
    made = engine(toy)
    for prompt in ("a", "b", "c" * 20):
        made.batch.add(made.sequence(prompt, temperature=0.0, max_tokens=4))
    while not made.batch.idle:
        made.batch.step()
    assert toy.calls == [8, 8, 8, 4, 1, 1, 1]  # 1 + 1 + 6 of the twenty, three times; with its end the third writes too


def test_a_text_that_nobody_asks_for_any_more_frees_its_slot() -> None:
    made = engine(Toy(slots=1))
    first = made.generate("abc", temperature=0)
    next(first)
    first.close()
    assert made.batch.idle
    assert len("".join(made.generate("abc", max_tokens=3, temperature=0))) == 3


# Prefixes


def test_the_next_turn_runs_only_what_is_new() -> None:
    toy = Toy(most_rows=32)
    made = engine(toy)
    reply = "".join(made.generate("abcdefgh", max_tokens=4, temperature=0))
    toy.calls.clear()
    found = "".join(made.generate("abcdefgh" + reply + "ab", max_tokens=3, temperature=0))
    assert toy.calls == [3, 1, 1]  # the reply's last token had not been run
    assert found == by_hand(toy, "abcdefgh" + reply + "ab", 3, Sampling(temperature=0))
    toy.calls.clear()
    assert "".join(made.generate("abcdefha", max_tokens=1, temperature=0)) == by_hand(
        toy, "abcdefha", 1, Sampling(temperature=0)
    )
    assert toy.calls == [2]


def test_a_shared_beginning_is_copied_to_another_slot() -> None:
    toy = Toy(slots=2, most_rows=32)
    made = engine(toy)
    list(made.generate("aaaabb", max_tokens=1, temperature=0))
    list(made.generate("aaaacc", max_tokens=1, temperature=0))
    assert toy.copies == [(0, 1, 4)]
    toy.calls.clear()
    list(made.generate("aaaabbaa", max_tokens=1, temperature=0))  # the first one's slot still holds it
    assert toy.calls == [2]
    running = made.generate("hhhhhh", max_tokens=20, temperature=0)
    next(running)
    before = len(toy.copies)
    found = "".join(made.generate("hhhhhg", max_tokens=2, temperature=0))  # from a slot in use
    assert toy.copies[before:] == [(toy.copies[before][0], 1 - toy.copies[before][0], 5)]
    assert found == by_hand(toy, "hhhhhg", 2, Sampling(temperature=0))
    assert next(running)


# Drafts


def test_a_lookup_by_hand() -> None:
    lookup = Lookup()
    lookup.extend([1, 2, 3, 9, 2, 3, 7, 1, 2])
    assert lookup.draft(3) == [3, 9, 2]  # behind the other "1 2"
    lookup.extend([3])
    assert lookup.draft(2) == [9, 2]  # "1 2 3" is longer than "2 3", which came later
    lookup.extend([5])
    assert lookup.draft(2) == []
    lookup.extend([6, 7, 6, 7])
    assert lookup.draft(5) == [6, 7, 6, 7, 6]


def test_drafts_are_as_long_as_pays() -> None:
    pace, sure, unsure = Pace("auto"), Acceptance(), Acceptance()
    for _ in range(100):
        sure.saw(1, wrong=False)
        unsure.saw(0, wrong=True)
    asked = []
    for rows in [1] * TRIALS + [8] * TRIALS + [4] * TRIALS + [2] * TRIALS:
        asked.append(pace.length(sure, 7))
        pace.took(rows, {1: 1.0, 2: 1.1, 4: 1.3, 8: 4.0}[rows])  # nearly free up to four
    assert asked == [0] * TRIALS + [7] * TRIALS + [3] * TRIALS + [1] * TRIALS  # each length is tried first
    assert pace.length(sure, 7) == 3  # 4 tokens in 1.3 beat 8 in 4
    assert pace.length(sure, 2) == 1
    assert pace.length(sure, 0) == 0
    assert pace.length(unsure, 7) == 0
    slow = Pace("auto")
    for rows in (1, 2, 4, 8):
        for _ in range(TRIALS):
            slow.took(rows, float(rows))  # a machine on which tokens cost the same in any number
    assert slow.length(sure, 7) == 0
    assert Pace(True).length(unsure, 5) == 3
    assert Pace(False).length(sure, 7) == 0


def test_acceptance_is_seen_without_drafts_being_run() -> None:
    made = engine(Toy(states=1))
    sequence = made.sequence("aa", temperature=0.0, max_tokens=20)
    made.batch.add(sequence)
    while not made.batch.idle:
        made.batch.step()
    assert sequence.acceptance.rate > 0.8


# Real models


@pytest.fixture(scope="module")
def books(shared_models: Path) -> Engine:
    path = shared_models / "books"
    runner = TransformersRunner(path, slots=2, reason="a test")
    files = text_files(path)
    return Engine.on(runner, Text(files["tokenizer"], files["tokenizer_config"], {}, files["config"]), {}, True)


def test_greedy_text_is_that_of_transformers(books: Engine, shared_models: Path) -> None:
    path = shared_models / "books"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    streams, expected = [], []
    for prompt in ("It was a dark night, and the", "“Yes,” said the captain"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=64, pad_token_id=0)[0, ids.shape[1] :]
        expected.append(tokenizer.decode(out, skip_special_tokens=True))
        assert "".join(books.generate(prompt, temperature=0, max_tokens=64)) == expected[-1]
        streams.append(books.generate(prompt, temperature=0, max_tokens=64))
    rounds = list(itertools.zip_longest(*streams, fillvalue=""))  # both together, prefixes reused
    assert ["".join(r[i] for r in rounds) for i in range(2)] == expected


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
        ("falcon_mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_going_back_and_copying_in_transformers(model_type: str, settings: dict, tmp_path: Path) -> None:
    """Against runs of whole prefixes without any cache; 1e-4 is many times what another order of sums changes."""
    model = save_model(tmp_path / "m", model_type, **settings)
    runner = TransformersRunner(tmp_path / "m", slots=2, reason="a test")

    def run(tokens: list[int], slot: int, start: int) -> np.ndarray:
        rows = np.arange(len(tokens), dtype=np.int32)
        return runner.forward(np.array(tokens, np.int32), np.full_like(rows, slot), rows + start, rows)

    def expected(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()

    a = [5, 6, 7, 8, 9, 10, 11, 12]
    np.testing.assert_allclose(run(a, 0, 0), expected(a), atol=1e-4)
    np.testing.assert_allclose(run([20, 21], 0, 5), expected([*a[:5], 20, 21])[5:], atol=1e-4)  # back
    runner.copy(0, 1, 6)
    np.testing.assert_allclose(run([30], 1, 6), expected([*a[:5], 20, 30])[6:], atol=1e-4)
    np.testing.assert_allclose(run([22], 0, 7), expected([*a[:5], 20, 21, 22])[7:], atol=1e-4)


def test_a_model_that_writes_nothing_is_refused(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["bert"](hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="cannot write a text"):
        TransformersRunner(tmp_path / "m", slots=1, reason="a test")


def test_a_context_that_the_model_was_not_made_for(llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"made for \d+ tokens, and a context of 1000000"):
        TransformersRunner(llama, slots=1, reason="a test", context=1_000_000)


def test_starting_needs_neither_torch_nor_transformers() -> None:
    names = ["engine", "batch", "text", "chat", "sampling", "streaming", "sequences", "slots", "speculation"]
    code = "import sys\nfrom fewbits.engine import " + ", ".join(names)
    code += "\nimport fewbits.cli.generate, fewbits.cli.chat\nassert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
