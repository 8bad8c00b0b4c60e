"""A mapped file reads the same while and after it is moved into huge pages."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fewbits.runtime.compiled import compiled
from fewbits.runtime.mapping import Mapping

HUGE_PAGE = 2 << 20


def written(path: Path, size: int) -> np.ndarray:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    path.write_bytes(data.tobytes())
    return data


@pytest.mark.parametrize("size", [1, 4096, HUGE_PAGE - 1, HUGE_PAGE, 40 * HUGE_PAGE + 77])
def test_moving_changes_no_byte(tmp_path: Path, size: int) -> None:
    """Also not for who reads meanwhile; 40 huge pages are three pieces, the rest stays where it is."""
    data = written(tmp_path / "file", size)
    mapped = Mapping(tmp_path / "file")
    assert np.array_equal(mapped.bytes, data)
    wrong = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            if not np.array_equal(mapped.bytes, data):
                wrong.append(size)

    reader = threading.Thread(target=read)
    reader.start()
    mapped.move()
    mapped.wait()
    done.set()
    reader.join()
    assert not wrong
    assert np.array_equal(mapped.bytes, data)
    assert mapped.moved % HUGE_PAGE == 0
    assert mapped.moved <= size


@pytest.mark.skipif(compiled() is None, reason="the kernels were not compiled")
def test_huge_pages_are_used_where_the_system_has_them(tmp_path: Path) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this system has no huge pages")
    written(tmp_path / "file", 3 * HUGE_PAGE + 5)
    mapped = Mapping(tmp_path / "file")
    mapped.move()
    mapped.wait()
    assert mapped.moved == 3 * HUGE_PAGE
    assert mapped.bytes.flags.writeable is False


ENDED = """
import sys
from pathlib import Path
from fewbits.runtime.mapping import Mapping
mapped = Mapping(Path(sys.argv[1]))
mapped.move()
"""


def test_a_program_may_end_while_it_moves(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(150 * HUGE_PAGE)  # sparse: a tenth of a second to copy, longer than a program takes to end
    subprocess.run([sys.executable, "-c", ENDED, str(tmp_path / "file")], check=True, timeout=60)


def test_views_outlive_the_mapping(tmp_path: Path) -> None:
    data = written(tmp_path / "file", HUGE_PAGE)
    view = Mapping(tmp_path / "file").bytes[10:20]
    assert np.array_equal(view, data[10:20])


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch(), lambda path: path.mkdir()])
def test_what_cannot_be_mapped_is_an_os_error(tmp_path: Path, make) -> None:
    make(tmp_path / "file")
    with pytest.raises((OSError, ValueError)):
        Mapping(tmp_path / "file")
