"""The data-set card of a folder output, read by the Hub's own library and by datasets."""

import shutil
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from reports import REPORT
from stub_jobs import STUB, make_model, prompts, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.dataset_card import _size, dataset_card, licence_of
from batchinfer.jobs.job import run
from batchinfer.jobs.results.run_folder import RunFolder


def test_a_folder_with_its_card_is_a_data_set(tmp_path: Path) -> None:
    """The card lies beside the rows, which every reader of folders reads, and says how they were made."""
    model = make_model(tmp_path)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    template = "Say | in ```text```: {prompt}"
    job = spec(
        model,
        write(tmp_path / "in.parquet", prompt=prompts(30)),
        output=tmp_path / "labelled",
        prompt_column=None,
        prompt_template=template,
        sampling=SamplingParams(max_tokens=5, temperature=0.5),
    )
    run(job, STUB)
    assert [path.name for path in job.output.iterdir()] == ["part-000001.parquet"]
    assert pq.read_table(job.output).num_rows == 30
    text = RunFolder(job.output).card.read_text("utf-8")
    card = DatasetCard(text)
    assert card.data.size_categories == ["n<1K"] and "synthetic" in card.data.tags
    assert f"````text\n{template}\n````" in text and "apache-2.0" in text and "temperature 0.5" in text
    assert "| rows with an answer | 30 |" in text and str(model) in text
    pushed = shutil.copytree(job.output, tmp_path / "pushed")
    (pushed / "README.md").write_text(text)
    read = datasets.load_dataset(str(pushed), cache_dir=str(tmp_path / "cache"))
    assert read["train"].num_rows == 30


def test_a_file_has_no_card(tmp_path: Path) -> None:
    job = spec(make_model(tmp_path), write(tmp_path / "in.parquet", prompt=prompts(3)))
    run(job, STUB)
    assert not RunFolder(job.output).card.exists()


def test_chats_and_system_messages_are_said(tmp_path: Path) -> None:
    job = spec(tmp_path, tmp_path / "in.parquet", prompt_column=None, messages_column="chat", system_prompt="Be brief.")
    text = dataset_card(asdict(job), REPORT, tmp_path)
    assert "The chats in column `chat`." in text and "```text\nBe brief.\n```" in text
    assert "rendered with the model's chat template" in text and "not named by its checkpoint" in text


@pytest.mark.parametrize("card", ["", "no YAML", "---\nlicense\n---\n", "---\n[\n---\n", "---\ntags: [a]\n---\n"])
def test_a_model_card_that_names_no_licence_is_no_error(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) is None


@pytest.mark.parametrize(
    ("rows", "size"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (123456, "100K<n<1M"), (2 * 10**9, "n>1B")]
)
def test_sizes_have_the_names_of_the_hub(rows: int, size: str) -> None:
    assert _size(rows) == size
