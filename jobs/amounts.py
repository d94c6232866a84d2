"""Formatting amounts for people: seconds, bytes and counts."""

from collections import Counter
from collections.abc import Mapping


def in_seconds(seconds: float) -> str:
    """Format a time, as 12 ms below a tenth of a second, as 12.34 s below a minute, and as 1:02:03 otherwise."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def in_bytes(size: float) -> str:
    """Format a size in MB, GB or TB, which are powers of 1000."""
    if size >= 1e12:
        return f"{size / 1e12:,.2f} TB"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def count_of(number: int, thing: str) -> str:
    """Name a number of things, as 1 row and 2,000 rows; the plural of `thing` must end in s."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def most_frequent(counts: Mapping[str, int], most: int = 6) -> str:
    """List the most frequent sizes and their counts, sorted by size."""
    frequent = sorted(Counter(counts).most_common(most), key=lambda item: int(item[0]))
    shown = ", ".join(f"{size}: {count:,}" for size, count in frequent)
    return (shown or "-") + (f", {count_of(len(counts) - most, 'more size')}" if len(counts) > most else "")
