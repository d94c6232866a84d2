"""A job's schedule in the five fields of a crontab, and the same times in systemd's notation."""

import re
from dataclasses import dataclass

from batchinfer.errors import UsageError

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
TERM = re.compile(r"(?:\*|(?P<first>[a-zA-Z0-9]+)(?:-(?P<last>[a-zA-Z0-9]+))?)(?:/(?P<step>[0-9]+))?")


@dataclass(frozen=True)
class Field:
    """One of the five fields: its bounds, and its names for the numbers from `first` on."""

    name: str
    first: int
    last: int
    names: tuple[str, ...] = ()

    def values(self, text: str) -> frozenset[int]:
        """Parse a list of numbers, ranges `a-b` and `*`, the latter two also with a `/step`. Raises `ValueError`."""
        return frozenset(value for term in text.split(",") for value in self._term(term))

    def _term(self, text: str) -> range:
        term = TERM.fullmatch(text)
        if term is None or (term["step"] and term["first"] and not term["last"]):
            raise ValueError(text)
        first = self.first if term["first"] is None else self._number(term["first"])
        last = self.last if term["first"] is None else self._number(term["last"] or term["first"])
        step = int(term["step"] or 1)
        if first > last or not step:
            raise ValueError(text)
        return range(first, last + 1, step)

    def _number(self, text: str) -> int:
        if text.lower() in self.names:
            return self.first + self.names.index(text.lower())
        number = int(text)
        if not self.first <= number <= self.last:
            raise ValueError(text)
        return number


MINUTE, HOUR, DAY = Field("minute", 0, 59), Field("hour", 0, 23), Field("day of the month", 1, 31)
MONTH = Field("month", 1, 12, MONTHS)
WEEKDAY = Field("day of the week", 0, 7, WEEKDAYS)  # 7 is Sunday too
FIELDS = (MINUTE, HOUR, DAY, MONTH, WEEKDAY)


@dataclass(frozen=True)
class Schedule:
    """The times at which a job is due. `text` has the five fields, with single spaces between them."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """Parse five fields. Raises `UsageError` for fields that cron or systemd cannot have."""
        parts = text.split()
        if len(parts) != len(FIELDS):
            names = ", ".join(field.name for field in FIELDS)
            raise UsageError(f"--schedule is {text!r}; give five fields: {names}, as in '0 2 * * *'")
        minutes, hours, days, months, weekdays = map(_values, FIELDS, parts)
        return cls(" ".join(parts), minutes, hours, days, months, frozenset(day % 7 for day in weekdays))

    def calendars(self) -> list[str]:
        """Return the same times as one or two values for systemd's `OnCalendar=`.

        If both the day of the month and the day of the week are given, cron starts a job on days that match either. If
        one of them begins with `*`, the day must match both. Systemd always requires both, so the first case takes two
        lines.
        """
        _, _, day, _, weekday = self.text.split()
        any_day, any_weekday = DAY.values("*"), frozenset(range(7))
        if day.startswith("*") or weekday.startswith("*"):
            return [self._calendar(self.days, self.weekdays)]
        return [self._calendar(self.days, any_weekday), self._calendar(any_day, self.weekdays)]

    def _calendar(self, days: frozenset[int], weekdays: frozenset[int]) -> str:
        date = f"*-{_listed(self.months, MONTH)}-{_listed(days, DAY)}"
        time = f"{_listed(self.hours, HOUR)}:{_listed(self.minutes, MINUTE)}:00"
        if len(weekdays) == len(WEEKDAYS):
            return f"{date} {time}"
        return f"{','.join(WEEKDAYS[day].capitalize() for day in sorted(weekdays))} {date} {time}"


def _values(field: Field, text: str) -> frozenset[int]:
    try:
        return field.values(text)
    except ValueError as error:
        raise UsageError(
            f"--schedule has {text!r} as its {field.name}; give numbers from {field.first} to {field.last}, ranges a-b "
            "or *, the last two also with /step, and commas between them"
        ) from error


def _listed(values: frozenset[int], field: Field) -> str:
    if values == field.values("*"):
        return "*"
    return ",".join(f"{value:02}" for value in sorted(values))
