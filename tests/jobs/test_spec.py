"""What a job may be: bounds of its fields, and the TOML file."""

from pathlib import Path
from typing import Any

import pytest

from batchinfer.errors import UsageError
from batchinfer.jobs.flag_values import read_job_file
from batchinfer.jobs.flags import FLAGS
from batchinfer.jobs.spec import JobSpec

KNOWN = {flag.name: flag for flag in FLAGS.values()}


def spec(**fields: Any) -> JobSpec:
    return JobSpec(
        **{"inputs": (Path("in.parquet"),), "output": Path("out.parquet"), "model": "m", "prompt_column": "p"} | fields
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": ()}, "no input"),
        ({"prompt_column": None}, "got none"),
        ({"messages_column": "m"}, "got --prompt-column and --messages-column"),
        ({"output": Path("out.csv")}, r"out\.csv; its name must end in \.parquet"),
        ({"output": Path("x/../in.parquet")}, "is an input too"),
        ({"columns": ()}, "--columns is empty"),
        (
            {"inputs": (Path("a.parquet"), Path("s3://b/c.parquet"))},
            "INPUT is s3:/b/c.parquet, which begins like a URL",
        ),
        ({"output": Path("gs://b/c.parquet")}, "--output is gs:/b/c.parquet, which begins like a URL"),
        ({"reuse": (Path("https://b/c.parquet"),)}, "--reuse is https:/b/c.parquet, which begins like a URL"),
        ({"model": "s3://b/model"}, "--model is s3://b/model, which begins like a URL"),
        ({"system_prompt": "Be brief."}, "--system-prompt needs"),
        ({"tools_column": "tools"}, "--tools-column needs --chat or --messages-column"),
        ({"prompt_column": None, "messages_column": "m", "chat": True}, "--chat"),
        ({"device": "tpu"}, "--device is 'tpu'; it must be one of auto, cpu, cuda"),
        ({"dtype": "int4"}, "--dtype"),
        ({"quantization": "w2a2"}, "--quantization"),
        ({"kv_cache_dtype": "bf16"}, "--kv-cache-dtype"),
        ({"seed": -1}, "--seed is -1; it must be 0 or more"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_num_batched_tokens": 0}, "--max-num-batched-tokens"),
        ({"block_size": 0}, "--block-size"),
        ({"max_model_len": 1}, "--max-model-len is 1; it must be 2 or more"),
        ({"commit_rows": 0}, "--commit-rows"),
        ({"commit_seconds": float("nan")}, "--commit-seconds"),
        ({"metrics_textfile": Path("job.txt")}, r"--metrics-textfile is job\.txt; its name must end in \.prom"),
        ({"max_error_rate": 1.5}, "--max-error-rate is 1.5; it must be from 0 to 1"),
    ],
)
def test_a_spec_out_of_bounds_names_the_flag(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec(**fields)


def test_defaults_fit() -> None:
    assert spec().max_model_len is None
    assert spec(prompt_column=None, messages_column="m", system_prompt="Be brief.").columns is None


def job_file(folder: Path, text: str) -> dict[str, Any]:
    path = folder / "job.toml"
    path.write_text(text)
    return read_job_file(path, KNOWN)


def test_keys_are_the_flags_and_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    values = job_file(tmp_path, 'input = "a.parquet"\noutput = "/x/o.parquet"\nmodel = "model"\nmax-tokens = 3\n')
    assert values == {
        "input": [str(tmp_path / "a.parquet")],
        "output": "/x/o.parquet",
        "model": str(tmp_path / "model"),
        "max_tokens": 3,
    }


def test_a_name_that_is_no_folder_is_a_hub_id(tmp_path: Path) -> None:
    assert job_file(tmp_path, 'model = "org/name"')["model"] == "org/name"


def test_lists_may_be_given_as_one_text(tmp_path: Path) -> None:
    values = job_file(tmp_path, 'input = ["a.parquet", "b.parquet"]\nstop = "END"\ncolumns = "id"')
    assert values["input"] == [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    assert (values["stop"], values["columns"]) == (["END"], ["id"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt_colum = "p"', "unknown key 'prompt_colum'; the nearest known key is 'prompt_column'"),
        ("max_tokens = ", r"job\.toml is not valid TOML"),
        ("max_tokens = 1\nmax-tokens = 2", "'max_tokens' twice"),
        ("max_tokens = { a = 1 }", "max_tokens is a dict; expected one value"),
        ("max_tokens = [1, 2]", "max_tokens is a list; expected one value"),
        ("stop = [1]", r"stop is \[1\]; expected a text or a list of texts"),
        ("input = 5", "input is 5; expected a text"),
    ],
)
def test_a_wrong_job_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        job_file(tmp_path, text)


def test_a_missing_job_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_job_file(tmp_path / "none.toml", KNOWN)


def test_an_output_in_a_folder_of_the_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is in an input folder"):
        JobSpec((tmp_path,), tmp_path / "out.parquet", "model", prompt_column="prompt")
