"""What evaluations found is there for the next plan, and a damaged file is as good as none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from measured_devices import SHAPE

from batchinfer.engine.config import EngineConfig
from batchinfer.jobs.plan.quality_file import Quality, quality_key, read_qualities, write_quality

FOUND = Quality(0.0012, 0.987, 12_000, "ORG/NAME", "evaluate")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "vocab_size": 300}))
    return EngineConfig(tmp_path, quantization="w8a8-int8")


def test_each_setting_keeps_what_was_found_of_it(config: EngineConfig) -> None:
    assert write_quality("a" * 64, config, FOUND) == []
    head = replace(FOUND, divergence=0.5)
    write_quality("a" * 64, replace(config, quantization="w8a8-int8+head", kv_cache_dtype="int8"), head)
    assert read_qualities("a" * 64) == {"w8a8-int8, KV float32": FOUND, "w8a8-int8+head, KV int8": head}
    write_quality("a" * 64, config, head)
    assert read_qualities("a" * 64)[quality_key(config)] == head
    assert read_qualities("b" * 64) == {}
    assert read_qualities("a" * 63 + "b") == {}, "the file's name has the beginning of the digest only"


@pytest.mark.parametrize("change", ["{", "[]", '{"schema_version": 1}', "negative", "more", "text"])
def test_a_damaged_file_is_as_good_as_none(config: EngineConfig, tmp_path: Path, change: str) -> None:
    write_quality("a" * 64, config, FOUND)
    (path,) = (tmp_path / "cache").rglob("*.json")
    values = json.loads(path.read_text())
    (found,) = values["settings"].values()
    changes = {"negative": {"divergence": -1}, "more": {"x": 1}, "text": {"reference": None}}
    found |= changes.get(change, {})
    path.write_text(json.dumps(values) if change in changes else change)
    assert read_qualities("a" * 64) == {}
    assert write_quality("a" * 64, config, FOUND) == [] and len(read_qualities("a" * 64)) == 1


def test_a_cache_that_cannot_be_written_is_told(config: EngineConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where the folder would be")
    (note,) = write_quality("a" * 64, config, FOUND)
    assert "is not kept for `batchinfer plan`" in note and "set XDG_CACHE_HOME" in note
