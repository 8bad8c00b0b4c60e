"""What writing and running ONNX files takes beside fewbits."""

from __future__ import annotations

from importlib.util import find_spec

from fewbits.errors import UnsupportedError

WRITING = ("onnx", "onnxscript")
RUNNING = ("onnxruntime",)


def require_installed(*, running: bool) -> None:
    """Raise UnsupportedError unless the packages are there that write ONNX files and, if asked, run them."""
    missing = [name for name in WRITING + (RUNNING if running else ()) if find_spec(name) is None]
    if not missing:
        return
    without = "; --no-run (run=False) writes without running" if missing == [*RUNNING] else ""
    raise UnsupportedError(f"{', '.join(missing)} not installed: pip install 'fewbits[onnx]'{without}")
