"""Run rows of a JSONL file through OpenVINO GenAI's continuous batching and print the seconds.

Runs in OpenVINO's environment: `openvino_rows.py MODEL_DIR ROWS.jsonl MAX_NUM_BATCHED_TOKENS [PROPERTY=VALUE ...]`. A
line has `prompt_token_ids` and `max_tokens`. All rows are added at once; blocks of equal prefixes are kept and shared.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

BLOCK_LEN = 32  # tokens in a KV block of the CPU plugin
WARM_UP = [{"prompt_token_ids": list(range(3, 67)), "max_tokens": 4}] * 4


def main(model_dir: str, rows: Path, max_num_batched_tokens: int, properties: dict[str, str]) -> None:
    requests = [json.loads(line) for line in rows.read_text().splitlines()]
    blocks = sum(-(-(len(r["prompt_token_ids"]) + r["max_tokens"]) // BLOCK_LEN) + 1 for r in requests)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = max_num_batched_tokens
    scheduler.max_num_seqs = 64
    scheduler.num_kv_blocks = blocks + len(WARM_UP) * 4
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", properties)
    generate(pipeline, WARM_UP)
    print(json.dumps(generate(pipeline, requests)))


def generate(pipeline: openvino_genai.ContinuousBatchingPipeline, requests: list[dict[str, list[int]]]) -> float:
    """Seconds until the last row has ended."""
    started = time.perf_counter()
    handles = []
    for i, request in enumerate(requests):
        config = openvino_genai.GenerationConfig()
        config.do_sample, config.ignore_eos, config.max_new_tokens = False, True, request["max_tokens"]
        prompt = openvino.Tensor(np.array([request["prompt_token_ids"]], np.int64))
        handles.append(pipeline.add_request(i, prompt, config))
    generated = [0] * len(requests)
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for i, handle in enumerate(handles):
            if handle.can_read():
                generated[i] += sum(len(output.generated_ids) for output in handle.read().values())
    seconds = time.perf_counter() - started
    expected = [request["max_tokens"] for request in requests]
    if generated != expected:
        raise SystemExit(f"OpenVINO GenAI generated {generated} tokens, wanted {expected}")
    return seconds


if __name__ == "__main__":
    model, table, batched_tokens, *assignments = sys.argv[1:]
    main(model, Path(table), int(batched_tokens), dict(assignment.split("=", 1) for assignment in assignments))
