"""The results of all stages so far: one JSON, and a page of markdown made of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Stage = dict[str, Any]


def stage_result(title: str, seconds: float, parts: Sequence[Mapping[str, Any]]) -> Stage:
    """What the parts of a stage have found, put together; tables of one title are one table."""
    ran: Mapping[str, str] = next((part["conditions"] for part in parts if "conditions" in part), {"device": "unknown"})
    tables: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for name, rows in part["tables"].items():
            tables.setdefault(name, []).extend(rows)
    gathered = {key: [found for part in parts for found in part[key]] for key in ("aims", "faults", "notes")}
    ended = [part["status"] for part in parts]
    status = "failed" if gathered["faults"] else "under way" if "under way" in ended else "ok"
    if status == "ok" and {"not run", "stopped at its time"} & set(ended):
        status = "not all of it was run"
    return {
        "title": title,
        "status": status,
        "seconds": round(seconds, 1),
        "conditions": dict(ran),
        "parts": [{key: part[key] for key in ("part", "status", "seconds")} for part in parts],
        "tables": tables,
        **gathered,
    }


class Results:
    """`gpu_check.json` and `gpu_check.md` in a folder; stages that are there already stay until they run again."""

    def __init__(self, folder: Path) -> None:
        self.json_file, self.page_file = folder / "gpu_check.json", folder / "gpu_check.md"
        self.stages: dict[str, Stage] = {}
        if self.json_file.exists():
            self.stages = json.loads(self.json_file.read_text())["stages"]

    def put(self, name: str, stage: Stage) -> None:
        """Replace a stage, and write both files; a process that is killed meanwhile leaves the files as they were."""
        self.stages[name] = stage
        self.stages = dict(sorted(self.stages.items()))
        for file, text in (
            (self.json_file, json.dumps({"stages": self.stages}, indent=1) + "\n"),
            (self.page_file, self.page()),
        ):
            whole = file.with_suffix(".new")
            whole.write_text(text)
            whole.rename(file)

    def page(self) -> str:
        """The markdown."""
        lines = [
            "# batchinfer on a GPU",
            "",
            "`make gpu-check` wrote this page. An aim that is missed is no fault.",
            "",
        ]
        lines += [*_conditions(self.stages), *self._overview()]
        for name, stage in self.stages.items():
            lines += _stage(name, stage)
        return "\n".join(lines).rstrip() + "\n"

    def summary(self) -> str:
        """What belongs on a screen: stages, aims, and a line for each fault."""
        faults = [
            f"stage {name}, {fault['case']}: {fault['error']}"
            for name, stage in self.stages.items()
            for fault in stage["faults"]
        ]
        return "\n".join([*self._overview(), *faults]).rstrip()

    def _overview(self) -> list[str]:
        stages = [
            {"stage": name, "what": stage["title"], "status": stage["status"], "seconds": stage["seconds"]}
            for name, stage in self.stages.items()
        ]
        aims = [
            {"aim": aim["aim"], "measured": aim["measured"], "met": "yes" if aim["met"] else "no", "stage": name}
            for name, stage in self.stages.items()
            for aim in stage["aims"]
        ]
        none = ["None of the stages that ran has one."]
        return [*markdown(stages), "", "## Aims", "", *(markdown(aims) if aims else none), ""]


def _conditions(stages: Mapping[str, Stage]) -> list[str]:
    """Each set of conditions once, with the stages that ran under it; their dates aside."""
    groups: dict[str, list[str]] = {}
    for name, stage in stages.items():
        ran = ", ".join(f"{key} {value}" for key, value in stage["conditions"].items() if key != "date")
        groups.setdefault(ran, []).append(f"{name} on {stage['conditions'].get('date', 'unknown')}")
    return [line for ran, ofs in groups.items() for line in (f"{ran}. Stages: {'; '.join(ofs)}.", "")]


def _stage(name: str, stage: Stage) -> list[str]:
    lines = [f"## {name}. {stage['title']}", "", f"{stage['status']}, {stage['seconds']} s. Parts: "]
    lines[-1] += ", ".join(f"{part['part']} {part['status']}" for part in stage["parts"]) + "."
    lines += ["", *(f"- {note}" for note in stage["notes"]), *([""] if stage["notes"] else [])]
    for title, rows in stage["tables"].items():
        lines += [f"### {title}", "", *markdown(rows), ""]
    for fault in stage["faults"]:
        lines += [f"### Fault: {fault['case']}", "", "```", fault["error"], "", fault["traceback"].rstrip(), "```", ""]
    return lines


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table, with the columns of all rows in the order in which they come up; names to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {c for c in columns if all(isinstance(row.get(c, 0), int | float | None) for row in rows)}
    lines = ["| " + " | ".join(columns) + " |", "|" + "".join("---:|" if c in numeric else "---|" for c in columns)]
    return lines + ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    """Numbers in four digits or so."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value != value or abs(value) == float("inf"):
            return str(value)
        if value and abs(value) < 0.01:
            return f"{value:.1e}"
        return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2}f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")
