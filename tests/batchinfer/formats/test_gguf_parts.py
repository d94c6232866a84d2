"""Models in several GGUF files, as the format's own library splits them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from engines import engine_of, prompts_of, tokens
from gguf import GGMLQuantizationType as Q
from gguf_models import add_byte_level, byte_level, write_model

from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.errors import Refused
from batchinfer.formats.gguf_parts import GGUFParts, part_names
from batchinfer.models.gguf_folder import unpack_gguf, weight_files
from batchinfer.models.hub import resolve_model


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    """A folder with one model whole (m.gguf) and in three parts."""
    folder = tmp_path_factory.mktemp("split")
    write_model(folder / "m.gguf", make_model("llama"), "Q8_0")
    write_model(folder / "m.gguf", make_model("llama"), "Q8_0", tensors_a_file=12)
    assert len(list(folder.iterdir())) == 4
    return folder


def test_any_part_leads_to_the_whole_model(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = resolve_model(str(split / "m.gguf"), None)
    for name in part_names("m-00001-of-00003.gguf"):
        parts = resolve_model(str(split / name), None)
        assert [file.resolve().name for file in weight_files(parts)] == part_names(name)
        for file in "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json":
            assert (parts / file).read_bytes() == (whole / file).read_bytes()
    requests = Requests.of(prompts_of(4, 60), SamplingParams(max_tokens=8, ignore_eos=True))
    assert tokens(engine_of(parts), requests) == tokens(engine_of(whole), requests)
    whole_file = gguf.GGUFReader(split / "m.gguf")
    stored = GGUFParts(weight_files(parts))
    assert stored.tensors.keys() == {tensor.name for tensor in whole_file.tensors}
    for tensor in whole_file.tensors:
        assert (stored.read(stored.tensors[tensor.name]) == tensor.data.reshape(-1).view(np.uint8)).all()


def test_a_missing_part_is_refused_by_name(split: Path, tmp_path: Path) -> None:
    for name in part_names("m-00001-of-00003.gguf")[::2]:
        shutil.copy(split / name, tmp_path)
    with pytest.raises(
        Refused, match=r"m-00003-of-00003.gguf is one of 3 files of a model; m-00002-of-00003.gguf is not"
    ):
        resolve_model(str(tmp_path / "m-00003-of-00003.gguf"), None)
    lonely = shutil.copy(split / "m-00001-of-00003.gguf", tmp_path / "m-00001-of-00007.gguf")
    with pytest.raises(
        Refused, match=r"m-00002-of-00007.gguf, m-00003-of-00007.gguf, m-00004-of-00007.gguf and 3 more are"
    ):
        resolve_model(str(lonely), None)


def write_part(path: Path, tensors: list[str], **entries: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add_byte_level(writer, byte_level("gpt-2"), "gpt-2")
    for key, value in entries.items():
        writer.add_uint16(f"split.{key.replace('_', '.')}", value)
    for name in tensors:
        writer.add_tensor(name, np.zeros((1, 54), np.uint8), raw_dtype=Q.TQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GOOD = {"count": 2, "tensors_count": 3}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({**GOOD, "no": 0}, {**GOOD, "no": 1}, "3 tensors of type TQ1_0"),
        ({**GOOD, "no": 0}, {}, r"b-00002-of-00002.gguf: split.count is 'None'; .*, 2 is expected: they are not"),
        ({**GOOD, "no": 0}, {**GOOD, "no": 0}, "b-00002-of-00002.gguf: split.no is '0'; .*, 1 is expected"),
        ({**GOOD, "no": 1}, {**GOOD, "no": 0}, "b-00001-of-00002.gguf: split.no is '1'; .*, 0 is expected"),
        ({**GOOD, "no": 0, "count": 3}, {**GOOD, "no": 1}, "split.count is '3'; of the 2 files"),
        (
            {**GOOD, "no": 0, "tensors_count": 9},
            {**GOOD, "no": 1},
            "split.tensors.count is '9'; .* which hold 3 tensors",
        ),
    ],
)
def test_files_that_are_not_parts_of_one_model_are_refused(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    write_part(tmp_path / "b-00001-of-00002.gguf", ["x", "y"], **first)
    path = write_part(tmp_path / "b-00002-of-00002.gguf", ["z"], **second)
    with pytest.raises(ValueError, match=said):
        unpack_gguf(path, tmp_path / "unpacked")


def test_a_part_under_another_name_says_how_it_must_be_named(tmp_path: Path) -> None:
    path = write_part(tmp_path / "m.gguf", ["x"], count=2, no=0, tensors_count=2)
    with pytest.raises(
        ValueError, match=r"m.gguf is one of 2 files .* name it NAME-00001-of-00002.gguf, and the others"
    ):
        unpack_gguf(path, tmp_path / "unpacked")
    alone = write_part(tmp_path / "m-00001-of-00001.gguf", ["x"], count=1, no=0, tensors_count=1)
    with pytest.raises(ValueError, match="1 tensor of type TQ1_0"):
        unpack_gguf(alone, tmp_path / "unpacked")


def test_a_tensor_in_two_parts_is_refused(split: Path, tmp_path: Path) -> None:
    first, second, third = part_names("m-00001-of-00003.gguf")
    for name in first, second, third:
        shutil.copy(split / name, tmp_path)
    data = (tmp_path / second).read_bytes()
    other = data.replace(b"blk.1.ffn_norm", b"blk.0.ffn_norm")
    assert other != data
    (tmp_path / second).write_bytes(other)
    with pytest.raises(ValueError, match=r"tensor blk.0.ffn_norm.weight is in an earlier part"):
        unpack_gguf(tmp_path / first, tmp_path / "unpacked")
