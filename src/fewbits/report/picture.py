"""A page as a picture, by a browser that is on the machine: nothing else lays out a page as its readers will see it.

Chromium is run without a network of its own (its components and updates are switched off) in a profile that is removed
afterwards. It is asked for the page's height first, by a script that is added to a copy of the page.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from fewbits.errors import OutputError, UnsupportedError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTH, SCALE = 1040, 2
FLAGS = (
    "--headless",
    "--no-sandbox",  # in containers there is none; the page is our own and has no scripts
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SECONDS = 120
_MEASURE = "<script>document.documentElement.dataset.height = document.documentElement.scrollHeight</script>"
_HEIGHT = re.compile(r'data-height="(\d+)"')


def browser() -> str:
    """Path of a browser. Raises UnsupportedError, with what to install, where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UnsupportedError(
            "a picture of the report is drawn by a browser, and neither Chromium nor Chrome is on PATH; install one "
            "(Debian: apt install chromium), or open the HTML file and print it"
        )
    return found


def picture(page: str, path: Path) -> None:
    """Write a page as a PNG file. Raises UnsupportedError without a browser, OutputError where it does not draw."""
    program = browser()
    with tempfile.TemporaryDirectory() as folder:
        html, drawn = Path(folder, "page.html"), Path(folder, "page.png")
        html.write_text(page.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
        height = _HEIGHT.search(_run(program, folder, html, "--dump-dom"))
        if height is None:
            raise OutputError(f"{path}: {program} did not say how high the page is; open the HTML file instead")
        _run(program, folder, html, f"--screenshot={drawn}", f"--force-device-scale-factor={SCALE}", height=height[1])
        if not drawn.is_file():
            raise OutputError(f"{path}: {program} drew nothing; open the HTML file instead")
        try:
            shutil.copyfile(drawn, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _run(program: str, folder: str, page: Path, *options: str, height: str = "800") -> str:
    """What the browser prints."""
    command = [program, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{height}", *options]
    try:
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=SECONDS, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise OutputError(f"{program} failed ({type(error).__name__}: {str(error)[-200:]})") from error
    return done.stdout
