"""The envelope of a line: what is wrong with it is named, and nothing makes it raise anything else."""

import json
from typing import Any

import pytest
from batch_files import chat, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchinfer.engine.prompts import BadPrompt
from batchinfer.jobs.openai_batch.request import custom_id_of, read_request

GOOD = chat("a", model="m")


def error_of(line: bytes | None) -> tuple[str, str]:
    with pytest.raises(BadPrompt) as raised:
        read_request(line, ("m", "org/m"))
    return raised.value.row_error.code, raised.value.row_error.message


@pytest.mark.parametrize(
    ("line", "code", "named"),
    [
        (None, "too_large", "33554432 bytes"),
        (b"\xff{}", "invalid_utf8", "byte 1"),
        (b'{"custom_id": "\\ud800"}', "invalid_utf8", "surrogate"),
        (b'{"a": 1', "invalid_json_line", "column 8"),
        (b"\x00", "invalid_json_line", "column 1"),
        (b'{"a": 1, "a": 2}', "invalid_json_line", "a key twice"),
        (b"[" * 100_000, "invalid_json_line", "not JSON"),
        (b"[" * 700 + b"]" * 700, "invalid_json_line", "500 levels"),
        (b"9" * 5000, "invalid_json_line", "not JSON"),
        (b"[]", "bad_line", "holds a list"),
        (b"null", "bad_line", "holds a NoneType"),
    ],
)
def test_a_line_that_is_no_object_is_named(line: bytes | None, code: str, named: str) -> None:
    found, message = error_of(line)
    assert found == code and named in message


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        *(({name: None}, "bad_line", f"no '{name}'") for name in ("custom_id", "method", "url", "body")),
        ({"custom_id": 7}, "bad_line", "custom_id is 7"),
        ({"custom_id": ""}, "bad_line", 'custom_id is ""'),
        ({"method": "GET"}, "bad_line", 'method is "GET"; it must be POST'),
        ({"body": []}, "bad_line", "body is []"),
        ({"more": 1}, "bad_line", 'a field "more"'),
        ({"body": {"model": "x"}}, "model_mismatch", "model is \"x\", and this job runs 'm'"),
        ({"body": {"model": ["m"]}}, "model_mismatch", 'model is ["m"]'),
        *(
            ({"url": url}, "unsupported_url", f"({url.rsplit('/', 1)[-1]})")
            for url in ("/v1/embeddings", "/score", "/v1/score", "/rerank", "/v2/rerank", "/v1/rerank")
        ),
        ({"url": "/v1/responses"}, "unsupported_url", '"/v1/responses" is not answered; give /v1/chat/completions or'),
        ({"url": "/v1/chat/completions/"}, "unsupported_url", "is not answered"),
        ({"url": ["/v1/completions"]}, "unsupported_url", "is not answered"),
    ],
)
def test_a_wrong_envelope_is_named(change: dict[str, Any], code: str, named: str) -> None:
    found, message = error_of(json.dumps(GOOD | change).encode())
    assert found == code and named in message


def test_a_model_goes_by_each_of_its_names_or_by_any() -> None:
    assert read_request(json.dumps(GOOD).encode(), ("m",)).body == GOOD["body"]
    for body in ({"model": "org/m"}, {"model": None}, {}):
        assert read_request(json.dumps(GOOD | {"body": body}).encode(), ("m", "org/m")).body == body
    assert read_request(json.dumps(request("é", model="x")).encode(), None).custom_id == "é"


def test_the_custom_id_of_a_wrong_line_is_found_where_it_has_one() -> None:
    assert custom_id_of(b'{"custom_id": "a", "url": 3}') == "a"
    for line in (None, b"{", b"[]", b"{}", b'{"custom_id": 3}', b'{"custom_id": ""}', b'{"custom_id": "\\udc00"}'):
        assert custom_id_of(line) is None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary()
    | st.dictionaries(st.sampled_from([*GOOD]), values | st.just("POST")).map(lambda x: json.dumps(x).encode())
)
def test_no_line_raises_anything_else(line: bytes) -> None:
    try:
        read_request(line, ("m",))
    except BadPrompt as error:
        assert error.row_error.code and error.row_error.message
    custom_id_of(line)
