"""The demo job with every drafter: token by token what it answers without one.

Of its rows some, from all over the table, or as many as `DEMO_ROWS` says: 640 are all, and take half an hour.
"""

import os
import subprocess
import sys
import tomllib
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
from engines import run
from repository import STDLIB

from batchinfer.engine.config import EngineConfig, Speculation
from batchinfer.engine.engine import Engine
from batchinfer.engine.request import Requests
from batchinfer.engine.sampling_params import SamplingParams
from batchinfer.text.tokenizer import Tokenizer

ROWS = int(os.environ.get("DEMO_ROWS", "24"))
DRAFTERS = {
    "off": Speculation("off"),
    "ngram": Speculation("ngram", gate=False),
    "suffix": Speculation("suffix", gate=False),
    "draft_model": Speculation("draft_model", 4, STDLIB / "draft", gate=False),
    "auto": Speculation("auto", model=STDLIB / "draft"),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    subprocess.run([sys.executable, str(STDLIB / "prompts.py"), "-o", str(path)], check=True)
    texts: list[str] = pq.read_table(path)["prompt"].to_pylist()
    return texts[:: len(texts) // ROWS][:ROWS]


@pytest.mark.long(minutes=3)
@pytest.mark.parametrize(("dtype", "quantization"), [("float32", "none"), ("bfloat16", "w8a8-int8")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_answers_are_the_same_whoever_drafts(
    prompts: list[str], dtype: str, quantization: str, temperature: float
) -> None:
    job = tomllib.loads((STDLIB / "job.toml").read_text())
    params = SamplingParams(
        max_tokens=job["max-tokens"], temperature=temperature, top_p=job["top-p"], stop=tuple(job["stop"])
    )
    tokenizer = Tokenizer.load(STDLIB / "target")
    ids, offsets = tokenizer.encode_batch(prompts, False)
    requests = Requests.of([ids[a:b].tolist() for a, b in pairwise(offsets)], params)
    answers = {}
    for name, speculation in DRAFTERS.items():
        config = EngineConfig(
            STDLIB / "target",
            dtype=dtype,
            quantization=quantization,
            max_model_len=1152,
            max_num_seqs=min(ROWS // 3, 64),
            kv_cache_tokens=min(ROWS // 3, 64) * 1152,
            speculation=speculation,
        )
        engine = Engine(config, tokenizer)
        answers[name] = run(engine, requests)
        drafted, accepted = engine.stats().drafted, engine.stats().accepted
        assert name in ("off", "auto") or drafted > accepted > 100, name
    assert all(answer == answers["off"] for answer in answers.values())
