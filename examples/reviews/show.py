"""Print the labels that a model gave to the reviews beside those they have, and the share that is right."""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

SHOWN = 12
LABELS = ("positive", "negative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("labels", type=Path)
    args = parser.parse_args()
    table = pq.read_table(args.labels, columns=["label", "review", "generated_text"])
    rows = [(label, answer.strip(), review) for label, review, answer in zip(*table.to_pydict().values(), strict=True)]
    print(f"{'is':10}{'answer':10}review")
    for label, answer, review in rows[:SHOWN]:
        print(f"{label:10}{answer:10}{review}")
    print(f"... and {len(rows) - SHOWN} more\n")
    print(f"{'':18}{'answers':>10}\n{'':18}{LABELS[0]:>10}{LABELS[1]:>10}{'other':>10}")
    for label in LABELS:
        answers = [answer for is_label, answer, _ in rows if is_label == label]
        counts = [answers.count(answer) for answer in LABELS]
        print(f"{label + ' reviews':18}", *(f"{count:10}" for count in (*counts, len(answers) - sum(counts))), sep="")
    right = sum(label == answer for label, answer, _ in rows)
    print(f"\nright: {right} of {len(rows)}, {right / len(rows):.0%}")
    print(f"All answers: {args.labels}; the report: {args.labels.with_suffix('.run')}/report.json")


if __name__ == "__main__":
    main()
