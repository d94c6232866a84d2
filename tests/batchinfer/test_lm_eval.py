"""lm-evaluation-harness gives the same figures with `batchinfer` as with its own model of the same checkpoint."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_models import CHATML, save

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

MAX_LENGTH = 63
STOP = ("e", "\n")
WORDS = ["the system", "a model of the user", "日本語", "Hello assistant", "model model", "user and system"]
ROWS = [
    {
        "question": f"{WORDS[i % 6]} says to {WORDS[(i * 5 + 1) % 6]}:",
        "choices": [WORDS[(i + n) % 6] + "." * (n % 2) for n in range(4)],
        "answer": (i * i + i // 3) % 4,
        "text": " ".join(WORDS[(i * n) % 6] for n in range(1, 4 + 30 * (i % 3))),
    }
    for i in range(10)
]
TASKS: list[dict[str, Any]] = [
    {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    },
    {
        "task": "reading",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": [*STOP], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
]


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("models") / "tiny"
    copy.mkdir()
    for file in make_model("llama", vocab_size=520).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return save(copy, CHATML)


@pytest.fixture(scope="module")
def figures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What lm-eval finds with each of the two models."""
    before = dict(os.environ)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    import batchinfer.lm_eval
    from batchinfer import SamplingParams

    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    # Half of the answers are as expected, if the other model gives them too.
    done = batchinfer.LLM(folder).generate(
        [row["question"] for row in ROWS[::2]], SamplingParams(max_tokens=12, stop=STOP)
    )
    written = {row["question"]: answer.text for row, answer in zip(ROWS[::2], done, strict=True)}
    lines = [{**row, "written": written.get(row["question"], "nothing")} for row in ROWS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    tasks: list[Any] = [{**shared, **task} for task in TASKS]
    found = {}
    models: dict[str, dict[str, Any]] = {
        "hf": {"dtype": "float32"},
        "batchinfer": {"dtype": "float32", "max_num_seqs": 8},
    }
    for name, arguments in models.items():
        found[name] = lm_eval.simple_evaluate(
            name,
            {"pretrained": str(folder), "max_length": MAX_LENGTH, **arguments},
            tasks=tasks,
            task_manager=TaskManager(include_defaults=False),
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
            log_samples=True,
        )
    assert batchinfer.lm_eval.BatchinferLM is not None
    yield found
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("task", [task["task"] for task in TASKS])
def test_figures_are_those_of_its_own_model(figures: dict[str, Any], task: str) -> None:
    ours, theirs = (figures[name]["results"][task] for name in ("batchinfer", "hf"))
    numbers = {name: value for name, value in theirs.items() if isinstance(value, float) and "stderr" not in name}
    assert task == "reading" or any(0 < value < 1 for value in numbers.values()), "some answers are right"
    assert numbers and {name: ours[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


def test_answers_to_all_requests_are_those_of_its_own_model(figures: dict[str, Any]) -> None:
    for task in TASKS:
        ours, theirs = (figures[name]["samples"][task["task"]] for name in ("batchinfer", "hf"))
        assert len(ours) == len(theirs) == len(ROWS)
        for a, b in zip(ours, theirs, strict=True):
            assert a["doc_id"] == b["doc_id"]
            for mine, expected in zip(_flat(a["resps"]), _flat(b["resps"]), strict=True):
                assert mine == (expected if isinstance(expected, str) else pytest.approx(expected, abs=1e-3, rel=1e-5))


def test_texts_of_several_windows_are_among_them(figures: dict[str, Any], folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert any(len(tokenizer(row["text"])["input_ids"]) > 2 * MAX_LENGTH for row in ROWS)


def _flat(responses: Any) -> list[Any]:
    if isinstance(responses, list | tuple):
        return [each for part in responses for each in _flat(part)]
    return [float(responses) if isinstance(responses, float) else responses]
