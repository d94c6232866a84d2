"""Run a workload once on OpenVINO GenAI's continuous batching and print its rates as JSON.

Runs in OpenVINO's environment: `openvino_generate.py MODEL_DIR WORKLOAD MAX_NUM_BATCHED_TOKENS [PROPERTY=VALUE ...]`.
"""

import json
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import openvino
import openvino_genai
from workload import Rates, Shape, Workload

BLOCK_LEN = 32  # tokens in a KV block of the CPU plugin


def main(model_dir: str, workload: Workload, max_num_batched_tokens: int, properties: dict[str, str]) -> None:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = max_num_batched_tokens
    scheduler.max_num_seqs = workload.num_prompts
    scheduler.num_kv_blocks = workload.num_prompts * -(-(workload.input_len + workload.output_len) // BLOCK_LEN) + 1
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(model_dir, scheduler, "CPU", properties)

    generator = np.random.default_rng(0)
    _generate(pipeline, generator, replace(workload, output_len=4))
    print(json.dumps(asdict(_generate(pipeline, generator, workload))))


def _generate(
    pipeline: openvino_genai.ContinuousBatchingPipeline, generator: np.random.Generator, workload: Workload
) -> Rates:
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.ignore_eos = True
    config.max_new_tokens = workload.output_len
    # Ids from 3 on: an id below may be a special token.
    rows = workload.num_prompts
    prompts = generator.integers(3, Shape.load().vocab_size, (rows, 1, workload.input_len), dtype=np.int64)

    started = time.perf_counter()
    handles = [pipeline.add_request(row, openvino.Tensor(prompts[row]), config) for row in range(rows)]
    generated = [0] * rows
    prefilled = None
    generated_in_prefill = 0
    while pipeline.has_non_finished_requests():
        pipeline.step()
        for row, handle in enumerate(handles):
            if handle.can_read():
                generated[row] += sum(len(output.generated_ids) for output in handle.read().values())
        if prefilled is None and min(generated) > 0:
            prefilled = time.perf_counter()
            generated_in_prefill = sum(generated)
    finished = time.perf_counter()

    if prefilled is None or set(generated) != {workload.output_len}:
        raise SystemExit(f"OpenVINO GenAI generated {sorted(set(generated))} tokens a request, not as many as asked")
    return Rates.of(workload, prefilled - started, finished - prefilled, sum(generated) - generated_in_prefill)


if __name__ == "__main__":
    model, wanted, batched_tokens, *assignments = sys.argv[1:]
    main(
        model, Workload.parse(wanted), int(batched_tokens), dict(assignment.split("=", 1) for assignment in assignments)
    )
