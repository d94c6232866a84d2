"""Checkpoints on disk: in one file, in shards, and damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import assert_logits_of_transformers, engine_of
from families import made
from fused_experts import fused, write
from safetensors.torch import load_file, save_file

from batchinfer.formats.scheme import weight_scheme
from batchinfer.models.config import read_model_config
from batchinfer.models.weights import SafetensorsWeights, with_stored_head
from batchinfer.quantize.methods import method
from batchinfer.quantize.walk import Quantizer


def folder_with(tmp_path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_every_tensor_is_accounted_for_both_ways(tmp_path: Path) -> None:
    weights = SafetensorsWeights(folder_with(tmp_path, a=torch.ones(2, 3), b=torch.zeros(4), c=torch.ones(1)))
    assert weights.take("a", (2, 3)).equal(torch.ones(2, 3))
    with pytest.raises(ValueError, match="no tensor d"):
        weights.take("d", (1,))
    with pytest.raises(ValueError, match=r"b has shape \[4\]; config.json asks for \[5\]"):
        weights.take("b", (5,))
    with pytest.raises(ValueError, match="1 tensors that the model does not use: c"):
        weights.finish()
    weights.drop("c")
    weights.finish()


def test_shards_and_their_index_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def write(weight_map: dict[str, str]) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))

    write({"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert SafetensorsWeights(tmp_path).files.keys() == {"a", "b"}
    write({"a": "model-1.safetensors", "b": "model-1.safetensors"})
    with pytest.raises(ValueError, match="disagree about tensor b"):
        SafetensorsWeights(tmp_path)
    write({"a": "../model-1.safetensors"})
    with pytest.raises(ValueError, match=r"not a \*\.safetensors file beside it"):
        SafetensorsWeights(tmp_path)
    write({"a": "model-3.safetensors"})
    with pytest.raises(ValueError, match=r"model-3.safetensors is missing"):
        SafetensorsWeights(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        SafetensorsWeights(tmp_path)


def test_files_beside_the_model_are_not_its_weights(tmp_path: Path) -> None:
    """Transformers reads `model.safetensors` alone where there is one, whatever lies beside it."""
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    save_file({"exp_avg": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    # An index whose shards a later, smaller save_pretrained deleted.
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    weights = SafetensorsWeights(folder_with(tmp_path, a=torch.ones(1)))
    assert weights.names() == ["a"] and weights.take("a", (1,)).equal(torch.ones(1))
    weights.finish()


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"two sets of weights: model.safetensors, and model-1.safetensors .* delete"):
        SafetensorsWeights(folder_with(tmp_path, a=torch.ones(1)))


def test_the_one_file_of_an_index_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert SafetensorsWeights(folder_with(tmp_path, a=torch.ones(1))).names() == ["a"]


def with_head(model: Path, folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a tied model that holds a head too, in a file of its own: the embedding, changed."""
    shutil.copytree(model, folder)
    rest = (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    head = folder / "model-2.safetensors"
    save_file({"lm_head.weight": change(load_file(rest)["model.embed_tokens.weight"])}, head, {"format": "pt"})
    weight_map = {name: path.name for path in (rest, head) for name in load_file(path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def last_row_changed(embedding: torch.Tensor) -> torch.Tensor:
    embedding[-1] += 1
    return embedding


@pytest.mark.parametrize(("family", "change"), [("llama", torch.neg), ("qwen3", last_row_changed)])
def test_a_stored_head_is_used_even_if_the_config_ties_it(
    make_model: Callable[..., Path], tmp_path: Path, family: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = with_head(make_model(family, tie_word_embeddings=True), tmp_path / "model", change)
    assert_logits_of_transformers(model)
    assert any("lm_head.weight is stored and differs from" in note for note in engine_of(model).stats().notes)


def test_a_stored_head_that_is_the_embedding_is_tied(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = with_head(make_model("llama", tie_word_embeddings=True), tmp_path / "model", lambda embedding: embedding)
    config = read_model_config(model)
    assert with_stored_head(config, SafetensorsWeights(model)) == config and config.tied
    assert engine_of(model).stats().notes == []


def test_files_that_are_not_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        SafetensorsWeights(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        SafetensorsWeights(tmp_path)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a safetensors file"):
        SafetensorsWeights(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, a=torch.ones(100, 100))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a safetensors file"):
        SafetensorsWeights(folder)


def test_integers_are_not_weights(tmp_path: Path) -> None:
    weights = SafetensorsWeights(folder_with(tmp_path, a=torch.ones(2, dtype=torch.int32)))
    with pytest.raises(ValueError, match="a is int32; expected floating point"):
        weights.take("a", (2,))


def with_fused_experts(model: Path, folder: Path) -> Path:
    """The same checkpoint with its experts in two tensors of a layer, as Qwen3.5's are published."""
    return write(fused(load_file(model / "model.safetensors"), "qwen3_5"), folder, model)


@pytest.mark.parametrize("case", ["qwen3_5_moe_text", "qwen3_moe"])
def test_experts_may_lie_in_two_tensors(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    folder = with_fused_experts(made(make_model, case), tmp_path / "fused")
    assert_logits_of_transformers(folder)


def test_quantizing_fused_experts_is_quantizing_each_by_itself(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = made(make_model, "qwen3_5_moe_text")
    outputs = []
    for source in (model, with_fused_experts(model, tmp_path / "fused")):
        outputs.append(tmp_path / f"{len(outputs)}-quantized")
        quantizer = Quantizer(source, outputs[-1], weight_scheme("w4a16", 32), method("rtn-mse"))
        assert len(list(quantizer.run())) == 4
        quantizer.finish("# A card\n")
    found = [{file.name: file.read_bytes() for file in output.glob("*.safetensors")} for output in outputs]
    assert len(found[0]) == 4 and found[0] == found[1]


def test_experts_that_nobody_asked_for_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_fused_experts(made(make_model, "qwen3_moe"), tmp_path / "fused")
    raw = json.loads((folder / "config.json").read_text())
    for count, message in ((5, "holds 6 experts; config.json asks for 5"), (7, "cannot be read")):
        (folder / "config.json").write_text(json.dumps(raw | {"num_local_experts": count}))
        tensors = load_file(folder / "model.safetensors")
        gates = {
            name: t[:1].expand(count, -1).contiguous()
            for name, t in tensors.items()
            if name.endswith("mlp.gate.weight")
        }
        save_file(tensors | gates, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            engine_of(folder)
