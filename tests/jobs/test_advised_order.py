"""The order that `plan` advises, against what it tells of the template in that order: those figures are exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from measured_devices import SHAPE, cost_of
from stub_jobs import make_model, spec, write

from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.jobs.outlook import Outlook, plan
from batchinfer.jobs.plan.device_file import DeviceKey, write_device_cost
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec

TEMPLATE = "Look:\nText: {text}\nGenus: {genus}\nOrder: {order}\n"
ROWS = 40
COLUMNS = {
    "text": [f"{i:03} of the texts of which no two begin alike" for i in range(ROWS)],
    "order": [["a" * 150, "b" * 170][i % 2] for i in range(ROWS)],
    "genus": [chr(99 + i % 8) * 130 for i in range(ROWS)],
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shape and a tokenizer of bytes, no weights; and a cache of measured devices that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder := tmp_path / "model").mkdir()
    make_model(folder, **SHAPE | {"max_position_embeddings": 1024})
    (folder / "chat_template.jinja").write_text("<<{{ 'system' * 10 }}>>{{ messages[0].content }}<<answer>>")
    return folder


def job(model: Path, columns: dict[str, list[Any]] | None = None, **fields: Any) -> JobSpec:
    defaults = {
        "prompt_column": None, "prompt_template": TEMPLATE, "device": "cpu", "cpu_path": "reference",
        "sampling": SamplingParams(max_tokens=5, ignore_eos=True),
    }  # fmt: skip
    return spec(model, write(model.parent / "in.parquet", **(columns or COLUMNS)), **{**defaults, **fields})


@pytest.mark.parametrize("chat", [False, True])
def test_tokens_and_seconds_are_nearly_those_of_the_reordered_template(model: Path, chat: bool) -> None:
    write_device_cost(DeviceKey.of("cpu", "reference"), cost_of(model))
    given = job(model, chat=chat)
    before, after = plan(given), plan(replace(given, reorder_fields=True))
    advised = before.field_order
    assert advised is not None and after.field_order is None
    assert advised.fields == ["order", "genus", "text"]
    assert after.prompt_tokens == before.prompt_tokens == advised.prompt_tokens
    assert advised.shared_tokens == pytest.approx(after.shared_tokens - before.shared_tokens, rel=0.1)
    assert before.prediction is not None and after.prediction is not None and advised.seconds is not None
    saved = before.prediction.generate_seconds - after.prediction.generate_seconds
    assert advised.seconds == pytest.approx(saved, rel=0.15) and saved > 0


def test_what_is_printed_names_order_worth_and_flag(model: Path) -> None:
    found = plan(job(model))
    assert found.field_order is not None and found.field_order.seconds is None
    tokens, all_tokens = found.field_order.shared_tokens, found.prompt_tokens
    said = f"field order    order, genus, text: about {tokens:,} more of {all_tokens:,} prompt tokens shared; "
    assert _squeezed(f"{said}--reorder-fields makes it so") in _squeezed(found.text(None))
    assert found.json()["field_order"]["fields"] == ["order", "genus", "text"]


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def advised(found: Outlook) -> bool:
    assert ("field order" in found.text(None)) is (found.field_order is not None)
    return found.field_order is not None


def test_nothing_is_advised_where_no_order_is_notably_better(model: Path) -> None:
    best = "Look:\nOrder: {order}\nGenus: {genus}\nText: {text}\n"
    for template in (best, TEMPLATE.replace("\n", " "), "{text}\nof\n{order}"):
        assert not advised(plan(job(model, prompt_template=template)))
    short = {**COLUMNS, "genus": ["c", "d"] * 20, "order": ["a", "b"] * 20}
    assert not advised(plan(job(model, short)))  # less than a tile
    assert not advised(plan(job(model, {name: values[:0] for name, values in COLUMNS.items()})))


def test_nothing_is_advised_for_a_shard_or_where_the_order_is_settled(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert advised(plan(job(model)))
    assert not advised(plan(job(model, shard=(0, 2))))
    monkeypatch.setattr(RunFolder, "prompt_template", TEMPLATE)
    assert not advised(plan(job(model)))
    assert advised(plan(job(model, overwrite=True)))
