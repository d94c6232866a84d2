"""Answers out of which different things are taken, parsed together: each is what it is alone."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from chat_models import CHATML, TAGS, save

from batchinfer.text.answers import AnswerParser, AnswerParsers
from batchinfer.text.stop import Stop
from batchinfer.text.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Ulm"}}\n</tool_call>'
TEXTS = [f"<think>hm</think>Hi {CALL}", "plain", "<think>cut", "<tool_call>\n{", ""]
PARSED = [None, (), ("reasoning",), ("tool_calls",), ("reasoning", "tool_calls")]
FORMATS = {"reasoning": "think", "tool_calls": "hermes"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = save(tmp_path_factory.mktemp("model"), CHATML, tags=[*TAGS, "<tool_call>", "</tool_call>"])
    (folder / "config.json").write_text("{}")
    return Tokenizer.load(Path(folder))


def test_each_answer_is_parsed_in_its_own_way(tokenizer: Tokenizer) -> None:
    cases = [*product(TEXTS, PARSED, [Stop(), Stop(("i",))])]
    token_ids, offsets = tokenizer.encode_batch([text for text, *_ in cases], allow_special_tokens=True)
    parsers = AnswerParsers(tokenizer, "think", "hermes")
    found = parsers.parse(token_ids, offsets, None, [stop for *_, stop in cases], [parsed for _, parsed, _ in cases])
    for i, (_, parsed, stop) in enumerate(cases):
        formats = (form if parsed is None or name in parsed else None for name, form in FORMATS.items())
        ids = token_ids[offsets[i] : offsets[i + 1]]
        alone = AnswerParser(tokenizer, *formats).parse(ids, np.array([0, len(ids)]), None, [stop])
        assert (found.texts[i], found.reasoning[i], found.tool_calls[i]) == (
            alone.texts[0], alone.reasoning[0], alone.tool_calls[0],
        )  # fmt: skip
        assert (i in found.unparsed) == bool(alone.unparsed)
    assert found.texts[:2] == ["Hi", "H"] and found.reasoning[0] == "hm" and found.texts[2] == TEXTS[0]
