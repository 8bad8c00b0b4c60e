"""Pictures: what the browser is asked, by one that is none; the real one is only known by its name here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbits.errors import OutputError, UnsupportedError
from fewbits.report.picture import picture

FAKE = """#!/bin/sh
for word in "$@"; do
  case "$word" in
    --window-size=*) echo "$word" >> "$LOG" ;;
    --dump-dom) echo '<html data-height="1234">' ;;
    --screenshot=*) printf PNG > "${word#--screenshot=}" ;;
  esac
done
"""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def browser(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "chromium"
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_whole_height_is_drawn(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser(tmp_path, monkeypatch, FAKE)
    picture("<html><body></body></html>", tmp_path / "page.png")
    assert (tmp_path / "page.png").read_text() == "PNG"
    assert log.read_text().split() == ["--window-size=1040,800", "--window-size=1040,1234"]


def test_without_a_browser_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="apt install chromium"):
        picture("<html></html>", tmp_path / "page.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\nexit 1\n", "failed"),
        ("#!/bin/sh\ntrue\n", "how high"),
        (FAKE.replace("printf PNG >", "true"), "drew nothing"),
    ],
)
def test_a_browser_that_fails_is_named(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    browser(tmp_path, monkeypatch, text)
    with pytest.raises(OutputError, match=message):
        picture("<html><body></body></html>", tmp_path / "page.png")
    assert not (tmp_path / "page.png").exists()
