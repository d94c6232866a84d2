"""The models that a machine has, in folders and in the Hub's cache."""

import os
from pathlib import Path

import pytest
from chat_models import save
from stub_jobs import make_model

from batchinfer.jobs import local_models
from batchinfer.jobs.local_models import LocalModel, has_chat_template


def folder(path: Path, nbytes: int, *left_out: str) -> None:
    path.mkdir(parents=True)
    for name in {"config.json", "tokenizer.json"} - set(left_out):
        (path / name).write_text("{}")
    if "weights" not in left_out:
        (path / "model.safetensors").write_bytes(bytes(nbytes))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub's library, with one model in it as that library keeps models."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(local_models, "scan_cache_dir", lambda: scan(cache))
    return cache


def scan(cache: Path) -> object:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(cache)


def test_models_are_found_in_folders_the_smallest_first(tmp_path: Path) -> None:
    here = tmp_path / "work"
    folder(here / "b", 300)
    folder(here / "models" / "a", 200)
    folder(here / "models" / "no-tokenizer", 10, "tokenizer.json")
    folder(here / "no-weights", 10, "weights")
    folder(here / ".hidden", 10)
    folder(here / "1" / "2" / "3", 10)
    (here / "m.gguf").write_bytes(bytes(local_models.LEAST_BYTES))
    (here / "vocabulary.gguf").write_bytes(bytes(100))
    found = local_models.local_models(here)
    assert found == [
        LocalModel("./models/a", 200),
        LocalModel("./b", 300),
        LocalModel("./m.gguf", local_models.LEAST_BYTES),
    ]


def test_the_folder_itself_may_be_a_model(tmp_path: Path) -> None:
    folder(tmp_path / "m", 10)
    assert [model.name for model in local_models.local_models(tmp_path / "m")] == ["."]


def test_models_in_the_hubs_cache_have_their_names_there(tmp_path: Path, empty_cache: Path) -> None:
    snapshot = empty_cache / "models--org--name" / "snapshots" / "0123"
    blobs = empty_cache / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (empty_cache / "models--org--name" / "refs").mkdir()
    (empty_cache / "models--org--name" / "refs" / "main").write_text("0123")
    for name, size in (("config.json", 2), ("tokenizer.json", 2), ("model.safetensors", 5000), ("small.gguf", 700)):
        (blobs / name).write_bytes(bytes(size))
        os.symlink(blobs / name, snapshot / name)
    found = local_models.local_models(tmp_path / "nothing-here" if (tmp_path / "nothing-here").mkdir() else tmp_path)
    assert LocalModel("org/name", 5000) in found and LocalModel("org/name/small.gguf", 700) in found


def test_chat_templates_are_told(tmp_path: Path) -> None:
    plain = make_model(tmp_path)
    assert not has_chat_template(str(plain))
    save(plain, "{{ messages[0].content }}")
    assert has_chat_template(str(plain))
    assert has_chat_template("./not/there"), "the job says what is wrong"
