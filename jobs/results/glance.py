"""`Glance`: notes a few rows as the output is merged, for the report: those that failed first, and some answers."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

FIRST = 5  # rows that are noted for each error code
MOST_LETTERS = 600  # of an answer in the report


@dataclass(frozen=True)
class Answer:
    """A row of the output, as the report shows it."""

    row: int
    text: str | None  # its first `MOST_LETTERS` characters; None if the row failed
    ended: str  # why: its finish_reason, or its error code


class Glance:
    """Looks at result columns that pass by, in the order of rows."""

    def __init__(self, answers: int = 0, total: int = 0) -> None:
        """`answers` are to be noted of `total` rows, at equal distances."""
        self.first_errors: defaultdict[str, list[int]] = defaultdict(list)
        self.answers: list[Answer] = []
        count = min(answers, total)
        self._wanted = [i * total // count for i in range(count)]

    def see(self, first: int, results: pa.Table) -> None:
        """Look at the result columns of the rows from ordinal `first` on."""
        codes = results["error_code"]
        if codes.null_count < len(codes):
            for index in np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False)).tolist():
                rows = self.first_errors[codes[index].as_py()]
                if len(rows) < FIRST:
                    rows.append(first + index)
        while len(self.answers) < len(self._wanted) and self._wanted[len(self.answers)] < first + len(results):
            row = self._wanted[len(self.answers)]
            answer = {name: results[name][row - first].as_py() for name in ("generated_text", "finish_reason")}
            text, code = answer["generated_text"], codes[row - first].as_py()
            shown = None if text is None else str(text)[:MOST_LETTERS]
            self.answers.append(Answer(row, shown, code or answer["finish_reason"]))
