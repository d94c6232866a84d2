"""Run rows of a JSONL file through vLLM and print the seconds as JSON.

Runs in vLLM's environment: `vllm_rows.py MODEL_DIR ROWS.jsonl [--dtype TYPE] [--prefix-caching]`. A line has
`prompt_token_ids` and `max_tokens`. All rows are added at once. Eager mode, greedy, no end-of-text. `--prefix-caching`
is for rows with common beginnings.
"""

import argparse
import json
import time
from pathlib import Path

from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

MAX_NUM_SEQS = 64
MAX_NUM_BATCHED_TOKENS = 4096
KV_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefix-caching", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            args.model,
            skip_tokenizer_init=True,
            dtype=args.dtype,
            enforce_eager=True,
            enable_prefix_caching=args.prefix_caching,
            max_model_len=max(len(row["prompt_token_ids"]) + row["max_tokens"] for row in rows),
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            kv_cache_memory_bytes=KV_BYTES,
        )
    )
    # Other tokens in the same lengths, so that no prefix is in the cache when the clock starts.
    warm_up = [{"prompt_token_ids": row["prompt_token_ids"][::-1], "max_tokens": 2} for row in rows[:MAX_NUM_SEQS]]
    generate(engine, warm_up, "warm-up")
    print(json.dumps(generate(engine, rows, "row")))


def generate(engine: LLMEngine, rows: list[dict], name: str) -> dict[str, float]:
    """Seconds until every row has its first new token, seconds after that, and the new tokens after that."""
    started = time.perf_counter()
    for i, row in enumerate(rows):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=row["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(f"{name}-{i}", {"prompt_token_ids": row["prompt_token_ids"]}, params)
    generated = dict.fromkeys((f"{name}-{i}" for i in range(len(rows))), 0)
    prefilled = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            generated[output.request_id] += len(output.outputs[0].token_ids)
        if prefilled is None and min(generated.values()) > 0:
            prefilled, generated_in_prefill = time.perf_counter(), sum(generated.values())
    finished = time.perf_counter()
    if prefilled is None or list(generated.values()) != [row["max_tokens"] for row in rows]:
        raise SystemExit(f"vLLM generated {generated} tokens, not as many as asked")
    return {
        "prefill_seconds": prefilled - started,
        "decode_seconds": finished - prefilled,
        "decoded_tokens": sum(generated.values()) - generated_in_prefill,
    }


if __name__ == "__main__":
    main()
