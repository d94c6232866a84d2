"""Print a few answers of a finished job, each under the end of its prompt, and where the report lies."""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

SHOWN = 4
PROMPT_LINES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("answers", type=Path)
    args = parser.parse_args()
    rows = pq.read_table(args.answers, columns=["id", "prompt", "generated_text", "finish_reason"]).to_pylist()
    for row in [r for r in rows if r["finish_reason"] == "stop"][:SHOWN]:
        print(f"--- {row['id']}")
        print(*row["prompt"].splitlines()[-PROMPT_LINES:], sep="\n")
        print(*(f"  > {line}" for line in row["generated_text"].rstrip().splitlines()), sep="\n")
    print(f"\nThe answers to {len(rows)} prompts: {args.answers}")
    print(f"The report: {args.answers.with_suffix('.run')}/report.json")


if __name__ == "__main__":
    main()
