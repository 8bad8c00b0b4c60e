"""Energy counters in a tree like Linux' own: sums, counters that go round, and what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fewbits.errors import UnsupportedError
from fewbits.evals import energy
from fewbits.evals.energy import Counter, Meter, counters, decode_energy


def counter(root: Path, folder: str, name: str, microjoules: int, most: int = 262_143_328_850) -> Path:
    made = root / folder
    made.mkdir(parents=True)
    (made / "name").write_text(f"{name}\n")
    (made / "max_energy_range_uj").write_text(f"{most}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    return made / "energy_uj"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Two packages, of which one counts its memory apart; cores and the whole platform are in other sums already."""
    counter(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    counter(tmp_path, "intel-rapl:0:0", "core", 5)
    counter(tmp_path, "intel-rapl:0:1", "dram", 2_000_000)
    counter(tmp_path, "intel-rapl:1", "package-1", 3_000_000, most=4_000_000)
    counter(tmp_path, "intel-rapl:2", "psys", 9)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_and_memory_are_summed_once(machine: Path) -> None:
    assert [each.name for each in counters(machine)] == ["package-0", "dram", "package-1"]


def test_a_counter_that_went_round_is_noticed(machine: Path) -> None:
    meter = Meter(counters(machine))
    (machine / "intel-rapl:0" / "energy_uj").write_text("1500000")
    assert meter.joules == 0.5
    (machine / "intel-rapl:1" / "energy_uj").write_text("500000")  # 1 J to its end, and 0.5 J from its beginning
    assert meter.joules == 0.5 + 1.5
    assert meter.joules == 2.0


def test_steps_by_hand() -> None:
    each = Counter(Path(), "package-0", 1000)
    assert [each.between(10, 30), each.between(900, 100), each.between(5, 5)] == [20, 200, 0]


def test_no_counters_are_said_and_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no intel-rapl counters"):
        counters(tmp_path)
    counter(tmp_path, "intel-rapl:0:1", "dram", 1)
    with pytest.raises(UnsupportedError, match="no intel-rapl counters"):
        counters(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_without_the_right_to_read_it_is_said_what_to_do(machine: Path) -> None:
    (machine / "intel-rapl:0" / "energy_uj").chmod(0)
    with pytest.raises(UnsupportedError, match=r"chmod a\+r"):
        Meter(counters(machine))


def test_a_counter_that_is_no_number_is_an_error(machine: Path) -> None:
    (machine / "intel-rapl:0" / "energy_uj").write_text("")
    with pytest.raises(UnsupportedError, match="cannot be read"):
        Meter(counters(machine))


class Runner:
    """Each token costs half a joule on one package's counter."""

    vocabulary, context = 7, 3

    def __init__(self, file: Path) -> None:
        self.file, self.positions = file, list[int]()

    def forward(self, tokens, slots, positions, wanted):
        self.positions.append(int(positions[0]))
        self.file.write_text(str(int(self.file.read_text()) + 500_000))


def test_joules_a_token(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(machine / "intel-rapl:0" / "energy_uj")
    monkeypatch.setattr(energy, "open_runner", lambda *_, **__: (runner, {}))
    monkeypatch.setattr(energy, "IDLE", 0.0)
    found = decode_energy(Path("model"), seconds=0.01, root=machine)
    assert found.joules_per_token == pytest.approx(0.5)
    assert found.tokens % energy.TOGETHER == 0
    assert found.tokens == len(runner.positions) - 1
    assert runner.positions[:5] == [0, 1, 2, 0, 1]
    assert found.watts == pytest.approx(0.5 * found.tokens / found.seconds)
    assert found.idle_watts == 0
    assert found.counters == ("package-0", "dram", "package-1")
