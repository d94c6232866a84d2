"""Putting the fields of a job's prompt template into the order in which its prompts share most."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchinfer.jobs.plan.field_order import Piece, best_order, distinct_rows, shared_lengths
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.rows.field_values import FieldValues, read_field_values
from batchinfer.jobs.rows.prompts import template_columns
from batchinfer.jobs.rows.template_order import Line, TemplateLines
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.tables.table import Table
from batchinfer.kernels.ragged import Ints

NOTABLE = 0.02  # share of the prompts by which a better order must exceed the given one


@dataclass(frozen=True, eq=False)
class Reordering:
    """A prompt template, and the order of its lines in which a table's rows share most."""

    given: TemplateLines
    best: TemplateLines
    names: list[str]  # columns of the fields
    values: FieldValues  # of the rows that differ

    @staticmethod
    def of(template: str, table: Table) -> "Reordering":
        """Read the template's columns and find the best order of each run of lines.

        `best` is the template as given if no order shares notably more. The order follows from template and table
        alone, not from the machine. Raises `Refused` and `UsageError` as `template_columns` does.
        """
        given = TemplateLines.of(template)
        names = list(dict.fromkeys(template_columns(template, table.paths[0], table.schema)))
        values = distinct_rows(read_field_values(table, names))
        found = Reordering(given, given.reordered(_best_orders(given, names, values)), names, values)
        more = found.shared(found.best).sum() - found.shared(given).sum()
        return found if more and more >= NOTABLE * found.bytes else replace(found, best=given)

    @property
    def bytes(self) -> int:
        """Bytes of all prompts that differ."""
        pieces = _pieces(self.given, self.names)
        total = sum(length for length, _ in pieces) * self.values.rows
        return total + sum(int(self.values.lengths[index].sum()) for _, index in pieces if index is not None)

    def shared(self, template: TemplateLines) -> Ints:
        """Return how many bytes of each prompt an earlier one begins with [rows that differ], in this order."""
        return shared_lengths(_pieces(template, self.names), self.values)


def with_field_order(spec: JobSpec, table: Table) -> tuple[JobSpec, list[str]]:
    """Return the job with the template that `--reorder-fields` makes, and a note for the report which order that is.

    `table` has the rows of all shards, so that all take one order. A job that began before goes on with the order that
    it began with, and so does a growing table, whose first rows decide. Raises as `Reordering.of` does.
    """
    if not spec.reorder_fields or spec.prompt_template is None:
        return spec, []
    given = TemplateLines.of(spec.prompt_template)
    order = ", ".join(given.fields)
    if spec.incremental and not spec.adds_file:  # a run of such a job, which was given the order
        return spec, [f"--reorder-fields: the fields' order is that of the first run: {order}"]
    if not any(len(run) > 1 for run in given.runs):
        return spec, [
            "--reorder-fields changes nothing: only whole lines with fields change places, with the lines next to "
            "them, and no two such lines of --prompt-template are neighbours"
        ]
    begun = None if spec.overwrite else RunFolder(spec.output).prompt_template
    if begun is not None and (kept := TemplateLines.of(begun)).has_lines_of(given):
        fields = ", ".join(kept.fields)
        return replace(spec, prompt_template=begun), [f"--reorder-fields: the order is as the job began: {fields}"]
    found = Reordering.of(spec.prompt_template, table)
    step = found.values.step
    sampled = f" (by every {step}th row)" if step > 1 else ""
    if found.best == given:
        said = f"no other order of its fields shares {NOTABLE:.0%} more of the prompts{sampled}: {order}"
        return spec, [f"--reorder-fields keeps --prompt-template as it is: {said}"]
    before, after = (found.shared(template).sum() / found.bytes for template in (given, found.best))
    note = (
        f"--reorder-fields puts the template's fields into this order: {', '.join(found.best.fields)}; about "
        f"{after:.0%} of the prompts' text is then shared with other prompts, and {before:.0%} as given{sampled}"
    )
    return replace(spec, prompt_template=found.best.text), [note]


def _best_orders(template: TemplateLines, names: Sequence[str], values: FieldValues) -> list[list[int]]:
    """Return the best order of each run, as indices of lines. It does not depend on the order of earlier runs."""
    orders = []
    before: list[int] = []
    for run in template.runs:
        between = sum(map(len, template.ends[run[0] : run[1]])) if len(run) > 1 else 0
        lines = [[*_of_line(template.lines[index], names), (between, None)] for index in run]
        orders.append([run[place] for place in best_order(lines, values, before)] if len(run) > 1 else run)
        before += [i for line in lines for _, i in line if i is not None and i not in before]
    return orders


def _pieces(template: TemplateLines, names: Sequence[str]) -> list[Piece]:
    pieces: list[Piece] = []
    for line, end in zip(template.lines, template.ends, strict=True):
        pieces += [*_of_line(line, names), (len(end), None)]
    return pieces


def _of_line(line: Line, names: Sequence[str]) -> list[Piece]:
    return [(len(text.encode()), None if name is None else names.index(name)) for text, name in line]
