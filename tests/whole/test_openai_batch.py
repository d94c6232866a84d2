"""A batch file of 24 requests of all kinds, by the command line: the answers are those of transformers, in order.

The first lines are of the forms that vLLM documents for its own command over such files.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from batch_files import answered, chat, completion, lines_of, parsed, refused, request, write_batch
from chat_models import CHATML, save

from batchinfer.jobs.verify import verify

NEW = 12
SCHEMA = {
    "type": "object",
    "properties": {"town": {"enum": ["Ulm", "Bonn"]}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["town", "stars"],
}
FORM = {"type": "json_schema", "json_schema": {"name": "review", "strict": True, "schema": SCHEMA}}
TALK = [{"role": "system", "content": "You answer briefly."}, {"role": "user", "content": "Which river is long?"}]
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 10}
RERANK = {"query": "a river", "documents": ["the Rhine", "a hill"]}
LINES: list[Any] = [
    request("documented-1", messages=TALK, model="model", max_completion_tokens=NEW),
    request("documented-2", messages=TALK[1:], model="model", max_completion_tokens=4, logprobs=True, top_logprobs=2),
    completion("documented-3", "The river", model="model", max_tokens=NEW, logprobs=0),
    request("documented-4", "/v1/embeddings", model="model", input="A river is long."),
    request("documented-5", "/v1/score", model="model", text_1="a river", text_2=["the Rhine", "a hill"]),
    request("documented-6", "/score", model="model", queries="a river", documents=["the Rhine"]),
    request("documented-7", "/rerank", model="model", **RERANK),
    request("documented-8", "/v2/rerank", model="model", **RERANK),
    chat("form-1", "A review", response_format=FORM, max_tokens=40),
    chat("form-2", "A digit", structured_outputs={"regex": "[0-9]{3}"}),
    completion("form-3", "Yes or no?", structured_outputs={"choice": ["yes", "no, never"]}),
    b'{"custom_id": "cut',
    chat("sampled-1", "Say something", seed=5, **SAMPLED),
    chat("sampled-2", "Say something", seed=5, **SAMPLED),
    chat("sampled-3", "Say something", seed=6, **SAMPLED),
    chat("sampled-4", "Say something", **SAMPLED),
    completion("tokens", [20, 30, 40, 50], max_tokens=NEW),
    completion("listed", ["The river"], max_tokens=NEW, stop=None, user="someone"),
    chat("ban", "Hello", logit_bias={"50": -100}),
    chat("image", [{"type": "image_url", "image_url": {"url": "data:,"}}]),
    chat("other model", model="gpt-4o"),
    chat("documented-1", "again"),
    chat("cut", "Hello", max_tokens=1, temperature=0, stream=False, metadata={"a": "b"}),
    chat("minimum", "Hello", min_tokens=NEW, max_tokens=NEW, presence_penalty=0.0),
]
CODES = {
    **dict.fromkeys([f"documented-{i}" for i in range(4, 9)], "unsupported_url"),
    **{"ban": "unsupported_field", "image": "bad_messages", "other model": "model_mismatch"},
}


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the file was run."""
    there = tmp_path_factory.mktemp("batch")
    shutil.copytree(make_model("llama", vocab_size=520, max_position_embeddings=512), there / "model")
    save(there / "model", CHATML)
    write_batch(there / "in.jsonl", *LINES)
    command = [sys.executable, "-P", "-m", "batchinfer", "run", "in.jsonl", "--openai-batch", "--model", "model"]
    command += ["-o", "out.jsonl", "--max-tokens", str(NEW)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=there, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert verify(there / "out.jsonl")[0].startswith(f"{there / 'out.jsonl'}: 24 rows (10 error")
    return there


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """The output's lines by custom_id, without the lines that have none or one that is taken."""
    lines = lines_of(folder / "out.jsonl")
    assert [line["custom_id"] for line in lines] == [None if isinstance(x, bytes) else x["custom_id"] for x in LINES]
    assert refused(lines[11])[0] == "invalid_json_line" and refused(lines[21])[0] == "duplicate_custom_id"
    return {line["custom_id"]: line for i, line in enumerate(lines) if i not in (11, 21)}


def test_greedy_answers_are_those_of_transformers(folder: Path, answers: dict[str, dict[str, Any]]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")

    def expected(ids: list[int], new: int) -> tuple[str, int]:
        with torch.no_grad():
            prompt = torch.tensor([ids])
            made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
        return tokenizer.decode(made[0][len(ids) :], skip_special_tokens=True), len(made[0])

    def rendered(messages: list[dict[str, str]]) -> list[int]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [*map(int, ids)]

    prompts = {
        "documented-1": (rendered(TALK), NEW),
        "documented-2": (rendered(TALK[1:]), 4),
        "documented-3": (tokenizer("The river").input_ids, NEW),
        "listed": (tokenizer("The river").input_ids, NEW),
        "tokens": ([20, 30, 40, 50], NEW),
        "cut": (rendered([{"role": "user", "content": "Hello"}]), 1),
    }
    for custom_id, (ids, new) in prompts.items():
        found: Any = parsed(answers[custom_id])
        (choice,) = found.choices
        text = choice.text if found.object == "text_completion" else choice.message.content
        assert (text, found.usage.total_tokens) == expected(ids, new), custom_id
        assert found.usage.prompt_tokens == len(ids) and found.model == "model"


def test_log_probabilities_are_those_of_transformers(folder: Path, answers: dict[str, dict[str, Any]]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    prompt = tokenizer.apply_chat_template(TALK[1:], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.no_grad():
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    content = answered(answers["documented-2"]).logprobs.content
    assert len(content) == len(made.logits) == 4
    for token, logits in zip(content, made.logits, strict=True):
        top = logits[0].log_softmax(-1).topk(2)
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(float(top.values[0]), abs=1e-4)
    plain = answered(answers["documented-3"]).logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == NEW and max(plain.token_logprobs) < 0
    assert answered(answers["documented-1"]).logprobs is None


def test_answers_have_the_forms_that_were_asked_for(answers: dict[str, dict[str, Any]]) -> None:
    review = answered(answers["form-1"])
    assert review.finish_reason == "stop"
    jsonschema.validate(json.loads(review.message.content), SCHEMA)
    assert re.fullmatch("[0-9]{3}", answered(answers["form-2"]).message.content)
    assert answered(answers["form-3"]).text in ("yes", "no, never")
    usage: Any = parsed(answers["minimum"])
    assert usage.usage.completion_tokens == NEW


def test_seeds_decide_what_is_drawn(answers: dict[str, dict[str, Any]]) -> None:
    texts = [answered(answers[f"sampled-{i}"]).message.content for i in range(1, 5)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_what_is_not_answered_is_named(answers: dict[str, dict[str, Any]]) -> None:
    codes = {name: refused(line)[0] for name, line in answers.items() if line["error"] is not None}
    assert codes == CODES
    for name, url in (
        ("documented-4", "/v1/embeddings"),
        ("documented-5", "/v1/score"),
        ("documented-8", "/v2/rerank"),
    ):
        assert f'url "{url}" asks for what a pooling model computes' in refused(answers[name])[1]
    assert "'image_url'" in refused(answers["image"])[1] and "logit_bias" in refused(answers["ban"])[1]
