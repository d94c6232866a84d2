"""How far a job is: a bar on a terminal, a plain line now and then where there is none."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 15.0


class Progress:
    """Rows done, tokens a second and time left, on stderr, counted from now on."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._started = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=" rows", dynamic_ncols=True, leave=False) if terminal else None

    def update(self, rows: int, tokens: int) -> None:
        """`rows` are done so far, and `tokens` computed, of prompts and answers together."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{tokens / seconds:,.0f} tok/s", refresh=False)
            self._bar.update(rows - self._bar.n)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = tqdm.format_interval((self._total - rows) * seconds / rows) if rows else "?"
            print(
                f"batchinfer: {rows:,} of {self._total:,} rows, {tokens / seconds:,.0f} tok/s, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Clear the bar."""
        if self._bar is not None:
            self._bar.close()
