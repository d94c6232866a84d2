"""Finding the rows that kill the engine, by running the rows that were in flight alone, in halves."""

from collections import Counter, deque


class Suspects:
    """Searches for the rows that kill the engine.

    After a first death all rows run again, since no row need be the cause. Rows that had begun at two deaths are split
    into halves, and each half runs alone. If the engine survives a half, its rows are cleared. If it dies, the half is
    halved again, until a single row is left, which is given up.
    """

    def __init__(self) -> None:
        self._deaths: Counter[int] = Counter()
        self._groups: deque[list[int]] = deque()

    @property
    def alone(self) -> list[int]:
        """Rows that must run now without any others; empty if all rows may run."""
        return self._groups[0] if self._groups else []

    def finished(self, rows: set[int]) -> bool:
        """Note that rows ended. Returns True if they were the last of those that ran alone, so that others may run."""
        if not self._groups:
            return False
        self._groups[0] = [row for row in self._groups[0] if row not in rows]
        if self._groups[0]:
            return False
        self._groups.popleft()
        return True

    def died(self, begun: list[int]) -> list[int]:
        """Note that the engine died after it began these rows. Returns those of them to give up."""
        if self._groups:
            group = self._groups.popleft()
            if len(group) == 1:
                return group
            self._halve(group)
            return []
        self._deaths.update(begun)
        twice = [row for row in begun if self._deaths[row] > 1]
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
