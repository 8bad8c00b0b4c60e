"""The cache of a checkpoint: used when it is whole and fresh, made again when it is not, done without where it must."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import export, save_model

from fewbits.checkpoint import open_checkpoint
from fewbits.engine import opening, repacked
from fewbits.engine.fingerprint import fingerprint
from fewbits.engine.opening import open_runner
from fewbits.engine.program_json import decode, encode
from fewbits.engine.transformers_runner import TransformersRunner
from fewbits.errors import CheckpointError, UnsupportedError
from fewbits.pipeline import quantize
from fewbits.runtime.ops import Embed, Linear
from fewbits.runtime.reference import ReferenceRunner
from fewbits.runtime.runner import Runner
from fewbits.runtime.tiles import Floats, Tiles, arrays

CACHE = ".fewbits-tiles"


@pytest.fixture
def packed(llama: Path, tmp_path: Path) -> Path:
    """A folder of weights with zero-points, that tests may write into."""
    quantize(llama, tmp_path / "m", format="int4-asym-g32", prove=False)
    return tmp_path / "m"


def opened(path: Path, *, cache: bool = True, context: int | None = None, kv: str = "f16") -> Runner:
    return open_runner(path, slots=1, context=context, kv=kv, threads=None, cache=cache)[0]


def logits(runner: Runner) -> np.ndarray:
    rows = np.arange(6, dtype=np.int32)
    return runner.forward(np.array([5, 9, 60, 2, 2, 7], np.int32), np.zeros_like(rows), rows, rows)


def composed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that are composed from now on."""
    from fewbits.engine import composing

    calls, original = list[Path](), composing.compose
    monkeypatch.setattr(composing, "compose", lambda path, keep: (calls.append(path), original(path, keep))[1])
    return calls


def test_the_second_opening_reads_the_cache_and_computes_the_same(packed, monkeypatch):
    calls = composed(monkeypatch)
    first, plain = logits(opened(packed)), logits(opened(packed, cache=False))
    assert (packed / CACHE).is_file()
    assert len(calls) == 2
    assert np.array_equal(logits(opened(packed)), first)
    assert np.array_equal(plain, first)
    assert len(calls) == 2


@pytest.mark.parametrize("format", ["q4_k", "q6_k", "q4_1", "bf16"])
def test_every_kind_of_array_survives(format, tmp_path):
    model, file = tmp_path / "m", tmp_path / "m.gguf"
    save_model(model, "llama", hidden_size=256, intermediate_size=256, tie_word_embeddings=True)
    quantize(model, file, format=format, prove=False)
    expected = logits(opened(file, cache=False))
    assert np.array_equal(logits(opened(file)), expected)
    assert np.array_equal(logits(opened(file)), expected)
    assert (tmp_path / f"m.gguf{CACHE}").is_file()


def test_arrays_are_written_once_aligned_and_mapped_read_only(tmp_path):
    model = tmp_path / "m"
    save_model(model, "llama", hidden_size=128, tie_word_embeddings=True)
    quantize(model, tmp_path / "q", format="int8-g32", prove=False)
    opened(tmp_path / "q")
    found = repacked.read(tmp_path / "q" / CACHE, fingerprint(tmp_path / "q"))
    assert found is not None
    embed, *_, last = [op for op in found.program.ops if isinstance(op, Embed | Linear)]
    assert isinstance(embed, Embed)
    assert isinstance(last, Linear)
    assert embed.table is last.weights[0]
    weights = {id(w): w for op in found.program.ops if isinstance(op, Linear) for w in op.weights}
    every = [array for weight in weights.values() for array in arrays(weight).values()]
    assert {type(weight) for weight in weights.values()} == {Tiles, Floats}
    assert not any(array.flags.writeable for array in every)
    assert all(array.ctypes.data % (4096 if array.nbytes >= 4096 else 64) == 0 for array in every)
    stored = sum(array.nbytes for array in every)
    assert stored < (tmp_path / "q" / CACHE).stat().st_size < stored + len(every) * 4096 + 200_000


def damage(cache: Path, how: str) -> None:
    """Cut the file short, or turn a bit of its preamble, its first array, or its header."""
    data = bytearray(cache.read_bytes())
    place = {"magic": 0, "preamble": 9, "array": 4096 + 5, "header": len(data) - 100}.get(how)
    if how == "cut":
        del data[-4096:]
    elif how == "empty":
        data.clear()
    else:
        assert place is not None
        data[place] ^= 1
    cache.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "magic", "preamble", "array", "header"])
def test_a_damaged_cache_is_made_again(how, packed, monkeypatch, caplog):
    expected, whole = logits(opened(packed)), (packed / CACHE).read_bytes()
    damage(packed / CACHE, how)
    calls = composed(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(logits(opened(packed)), expected)
    assert calls == [packed]
    assert "repacking" in caplog.text
    assert (packed / CACHE).read_bytes() == whole


def test_a_changed_checkpoint_is_repacked(packed, monkeypatch):
    """One weight's byte, the file's size and name as they were."""
    expected, calls = logits(opened(packed)), composed(monkeypatch)
    file = packed / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-10] ^= 0x11
    file.write_bytes(data)
    assert not np.array_equal(logits(opened(packed)), expected)
    assert calls == [packed]


def test_a_changed_configuration_is_repacked(packed, monkeypatch):
    opened(packed)
    calls = composed(monkeypatch)
    config = json.loads((packed / "config.json").read_text())
    times = (packed / "config.json").stat()
    text = json.dumps(config | {"rms_norm_eps": 1e-5}, indent=2)
    (packed / "config.json").write_text(text)
    os.utime(packed / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    opened(packed)
    assert calls == [packed]


def test_other_code_makes_another_fingerprint(packed, monkeypatch, tmp_path):
    before = fingerprint(packed)
    changed = tmp_path / "tiling.py"
    changed.write_text("# as it will be")
    monkeypatch.setattr("fewbits.engine.fingerprint._code", lambda: [changed])
    assert fingerprint(packed) != before


def test_parts_of_a_gguf_model_belong_to_its_fingerprint(tmp_path):
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(bytes([number]))
    before = fingerprint(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"other")
    assert fingerprint(tmp_path / "m-00001-of-00002.gguf") != before


def test_what_cannot_lie_beside_the_checkpoint_lies_in_the_users_folder(packed, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    packed.chmod(0o555)
    calls = composed(monkeypatch)
    opened(packed)
    opened(packed)
    packed.chmod(0o755)
    assert calls == [packed]
    assert not (packed / CACHE).exists()
    assert len(list((tmp_path / "home" / "fewbits").iterdir())) == 1


def test_without_any_place_the_weights_stay_in_memory(packed, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (packed / CACHE / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        found = logits(opened(packed))
    assert "stay in memory" in caplog.text
    assert np.array_equal(found, logits(opened(packed, cache=False)))
    assert not list(packed.glob("*.part"))


def test_a_full_disk_leaves_nothing_behind(packed, monkeypatch, tmp_path, caplog):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(repacked.Packing, "_write", full)
    with caplog.at_level(logging.INFO):
        opened(packed)
    assert "No space left" in caplog.text
    assert not [*packed.glob("*tiles*"), *packed.glob(".*tiles*"), *(tmp_path / "home" / "fewbits").iterdir()]


def test_what_a_killed_process_left_is_removed(packed):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, running = (packed / f"{CACHE}.{number}.part" for number in (ended.pid, 1))
    left.touch()
    running.touch()
    opened(packed)
    assert not left.exists()
    assert running.exists()


def test_a_cache_changes_nothing_for_who_reads_the_checkpoint(packed):
    before = open_checkpoint(packed)
    opened(packed)
    after = open_checkpoint(packed)
    assert after[0] is before[0]
    assert after[1].entries == before[1].entries


def test_a_folder_with_a_cache_is_quantized_without_it(mutable, tmp_path):
    opened(mutable)
    assert (mutable / CACHE).is_file()
    quantize(mutable, tmp_path / "out", format="int8", prove=False)
    assert not (tmp_path / "out" / CACHE).exists()


def test_a_second_start_imports_neither_torch_nor_transformers(packed):
    opened(packed)
    code = (
        "import sys; from pathlib import Path; from fewbits.engine.opening import open_runner;"
        f"runner, files = open_runner(Path({str(packed)!r}), slots=1, context=64, kv='f16', threads=None, cache=True);"
        "assert files['tokenizer'] and files['config']['model_type'] == 'llama', files;"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_facts_are_what_the_text_side_needs(packed):
    settings = json.loads((packed / "tokenizer_config.json").read_text())
    (packed / "chat_template.jinja").write_text("{{ messages }}")
    for _ in range(2):
        _, facts = open_runner(packed, slots=1, context=None, kv="f16", threads=None, cache=True)
        assert facts["tokenizer"] == (packed / "tokenizer.json").read_text()
        assert facts["tokenizer_config"] == settings | {"chat_template": "{{ messages }}"}
        assert facts["config"]["hidden_size"] == 128
        assert facts["generation_config"]


def test_contexts(packed):
    assert opened(packed).context == 128
    assert opened(packed, context=50).context == 50
    with pytest.raises(UnsupportedError, match=r"made for 128 tokens.* 129"):
        opened(packed, context=129)


def test_what_has_no_family_runs_through_transformers(tmp_path, caplog):
    save_model(tmp_path / "m", "gpt_neox")
    with caplog.at_level(logging.WARNING):
        runner = opened(tmp_path / "m", context=64)
    assert isinstance(runner, TransformersRunner)
    assert "'gpt_neox' is none of those" in caplog.text
    with pytest.raises(UnsupportedError, match="int8"):
        opened(tmp_path / "m", kv="int8")


def test_longrope_beyond_its_first_angles_runs_through_transformers(tmp_path, caplog):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    save_model(tmp_path / "m", "phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert not isinstance(opened(tmp_path / "m"), TransformersRunner)
    assert opened(tmp_path / "m").context == 64
    with caplog.at_level(logging.WARNING):
        assert isinstance(opened(tmp_path / "m", context=65), TransformersRunner)
    assert "beyond 64 tokens, and 65" in caplog.text


def test_a_gguf_of_llama3_keeps_its_factors(tmp_path):
    """They come back as a table, which is the same at every length."""
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    save_model(tmp_path / "m", "llama", rope_parameters=rope | {"original_max_position_embeddings": 64})
    export(tmp_path / "m", tmp_path / "m.gguf")
    assert opened(tmp_path / "m.gguf").context == 128
    found, expected = logits(opened(tmp_path / "m.gguf")), logits(opened(tmp_path / "m"))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_programs_survive_json(packed):
    found = opening.repacked(packed, cache=False)
    kept: list[np.ndarray] = []

    def number(array: np.ndarray) -> int:
        kept.append(array)
        return len(kept) - 1

    data = json.loads(json.dumps(encode(found.program, number)))
    again = decode(data, kept)
    assert np.array_equal(logits(ReferenceRunner(again, 1, 32)), logits(ReferenceRunner(found.program, 1, 32)))


def test_a_path_with_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        opened(tmp_path / "nothing")
