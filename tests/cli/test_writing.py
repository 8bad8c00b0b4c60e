"""generate and chat: what they show, their JSON, their exit codes, and that they can be interrupted."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

import fewbits
from fewbits.cli import main
from fewbits.engine import Engine

TINY = Path(fewbits.__file__).parent / "bundled" / "tiny"
PROMPT = "It was a dark night, and the"
ASKED = ("--temperature", "0", "--max-tokens", "8")
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def written() -> str:
    """What the bundled model goes on with."""
    return "".join(Engine(TINY, cache=False).generate(PROMPT, temperature=0, max_tokens=8))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """The bundled model, where files may be put beside it."""
    return str(shutil.copytree(TINY, tmp_path / "tiny"))


@pytest.fixture
def chatting(tiny: str) -> str:
    (Path(tiny) / "chat_template.jinja").write_text(TEMPLATE)
    return tiny


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


# generate


def test_text_to_stdout_and_figures_to_stderr(tiny: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", tiny, "--prompt", PROMPT, *ASKED]) == 0
    seen = capsys.readouterr()
    assert seen.out == written + "\n"
    assert "prompt 8 tokens, prefill" in seen.err
    assert "8 new tokens, decode" in seen.err


def test_a_prompt_from_stdin(
    tiny: str, written: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", tiny, "--prompt", "-", *ASKED]) == 0
    assert capsys.readouterr().out == written + "\n"


def test_json_with_logprobs(tiny: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", tiny, "--prompt", PROMPT, *ASKED, "--logprobs", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["text"] == written
    assert made["finish"] == "length"
    assert (made["prompt_tokens"], made["new_tokens"]) == (8, 8)
    assert made["decode_rate"] > 0
    assert "".join(token["text"] for token in made["tokens"]) == written
    for token in made["tokens"]:  # greedy: the token is the likeliest one
        assert token["top"][0] == [token["text"], token["logprob"]]
        assert token["top"][1][1] <= token["logprob"] <= 0


def test_a_stop_string_and_a_seed(tiny: str, written: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = written[5:8]
    assert main(["generate", tiny, "--prompt", PROMPT, *ASKED, "--stop", stop]) == 0
    assert capsys.readouterr().out == written[: written.index(stop)] + "\n"
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", tiny, "--prompt", PROMPT, "--max-tokens", "12", "--seed", seed, "--top-k", "50"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_what_is_refused(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", tiny, "--prompt", PROMPT, "--context", "6"]) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "the prompt has 8 tokens, and the context holds 6" in error
    assert main(["generate", tiny, "--prompt", PROMPT, "--top-p", "1.5"]) == 3
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", PROMPT]) == 3
    with pytest.raises(SystemExit) as usage:
        main(["generate", tiny, "--prompt", PROMPT, "--logprobs", "1"])
    assert usage.value.code == 2
    (Path(tiny) / "tokenizer.json").unlink()
    assert main(["generate", tiny, "--prompt", PROMPT]) == 3
    assert "tokenizer.json" in capsys.readouterr().err


# chat


def test_a_conversation(chatting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer is what the engine makes of all messages before it; a reset forgets all but the system message."""
    engine = Engine(chatting, cache=False)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    first = "".join(engine.generate(said, temperature=0, max_tokens=8))
    said += [{"role": "assistant", "content": first}, {"role": "user", "content": "And you?"}]
    second = "".join(engine.generate(said, temperature=0, max_tokens=8))
    typed(monkeypatch, "/system Be brief.", "Hello.", "", "And you?", "/nonsense", "/reset", "Hello.", "/exit", "never")
    assert main(["chat", chatting, *ASKED]) == 0
    seen = capsys.readouterr()
    assert seen.out == f"{first}\n{second}\n{first}\n"
    assert "/nonsense is no command" in seen.err
    assert "known already" in seen.err  # the second turn's prompt begins with the first one's


def test_json_is_the_conversation(
    chatting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "Hello.")
    assert main(["chat", chatting, *ASKED, "--system", "Be brief.", "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_a_model_without_a_template_goes_on_with_the_text(
    tiny: str, written: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "".join(Engine(tiny, cache=False).generate(PROMPT + written + " So", temperature=0, max_tokens=8))
    typed(monkeypatch, PROMPT, " So", "/system no")
    assert main(["chat", tiny, *ASKED]) == 0
    seen = capsys.readouterr()
    assert seen.out == f"{written}\n{more}\n"
    assert seen.err.count("has no chat template: it continues the text") == 1
    assert "no place for a system message" in seen.err


def test_an_interrupted_answer_is_kept(
    chatting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in an answer, then at the prompt: both go back to the prompt, and the next answer is whole."""
    from fewbits.engine import Batch

    step, lines = Batch.step, iter(["Hello.", KeyboardInterrupt(), "Go on."])
    steps = iter([step, step, None])

    def interrupted(batch: Batch) -> object:
        chosen = next(steps, step)
        if chosen is None:
            raise KeyboardInterrupt
        return chosen(batch)

    def line(_: str) -> str:
        found = next(lines, EOFError())
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr(Batch, "step", interrupted)
    monkeypatch.setattr("builtins.input", line)
    assert main(["chat", chatting, *ASKED, "--json"]) == 0
    messages = json.loads(capsys.readouterr().out)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    monkeypatch.setattr(Batch, "step", step)
    engine = Engine(chatting, cache=False)
    assert messages[1]["content"] == "".join(engine.generate(messages[:1], temperature=0, max_tokens=2))
    assert messages[3]["content"] == "".join(engine.generate(messages[:3], temperature=0, max_tokens=8))


def test_a_conversation_that_outgrows_the_context(
    chatting: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused with both numbers, and the conversation is as it was."""
    typed(monkeypatch, "Hello.", "word " * 100, "/reset", "Hello.")
    assert main(["chat", chatting, *ASKED, "--context", "40", "--json"]) == 0
    seen = capsys.readouterr()
    assert "and the context holds 40" in " ".join(seen.err.split())
    assert len(json.loads(seen.out)["messages"]) == 2
