"""Which rows kill the engine: found by running those that were under way alone, in halves."""

from collections import Counter, deque


class Suspects:
    """A first death may be nobody's fault: all rows run again. Of rows that were under way at two, halves run alone.

    A half that lives through is cleared; one that does not is halved again, until a single row is left, which is given
    up.
    """

    def __init__(self) -> None:
        self._deaths: Counter[int] = Counter()
        self._groups: deque[list[int]] = deque()

    @property
    def alone(self) -> list[int]:
        """Rows that are to run now, and no others; empty if all may."""
        return self._groups[0] if self._groups else []

    def finished(self, rows: set[int]) -> bool:
        """Rows ended; True if those were the last of the rows that ran alone, so that others may run."""
        if not self._groups:
            return False
        self._groups[0] = [row for row in self._groups[0] if row not in rows]
        if self._groups[0]:
            return False
        self._groups.popleft()
        return True

    def died(self, under_way: list[int]) -> list[int]:
        """The engine died over these rows; those of them to give up."""
        if self._groups:
            group = self._groups.popleft()
            if len(group) == 1:
                return group
            self._halve(group)
            return []
        self._deaths.update(under_way)
        twice = [row for row in under_way if self._deaths[row] > 1]
        for row in twice:
            del self._deaths[row]
        if len(twice) == 1:
            self._groups.append(twice)
        elif twice:
            self._halve(twice)
        return []

    def _halve(self, rows: list[int]) -> None:
        middle = len(rows) // 2
        self._groups.extendleft([rows[middle:], rows[:middle]])
