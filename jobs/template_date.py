"""The moment that chat templates take for now: one for a whole job, whenever and wherever its rows run."""

from collections.abc import Sequence
from datetime import datetime

from batchinfer.errors import UsageError
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec
from batchinfer.text.chat import ChatTemplate


def now() -> datetime:
    """Return the local time, to the second. Like that of transformers, it has no time zone."""
    return datetime.now().replace(microsecond=0)


def known_moment(spec: JobSpec) -> datetime | None:
    """Return the moment of `--template-date` or of the run that this job continues; None if there is neither.

    Of a part of an incremental job that was begun, the run's own moment counts: the flag is for new parts.
    """
    begun = None if spec.overwrite else RunFolder(spec.output).template_date
    return begun or spec.template_date if spec.incremental else spec.template_date or begun


def moment_of_prompts(spec: JobSpec, templates: Sequence[ChatTemplate], known: datetime | None) -> datetime | None:
    """Return the moment that the chat `templates` write into the job's prompts, or None.

    Raises `UsageError` for a shard that would choose a moment by itself, if none is `known`.
    """
    if not any(template.tells_time for template in templates):
        return None
    moment = templates[0].moment
    if spec.shard is not None and known is None:
        raise UsageError(
            f"--shard needs --template-date, since the chat template of {spec.tokenizer or spec.model} writes the date "
            f"into prompts; give all shards the same one, as --template-date {moment.date()}"
        )
    return moment


def notes_about(spec: JobSpec, moment: datetime | None) -> list[str]:
    """Return a note for the report: which `moment` is in the prompts, or that `--template-date` changes nothing."""
    if moment is not None:
        return [f"the chat template takes {moment.isoformat(' ')} for now in every prompt (--template-date)"]
    if spec.template_date is not None and spec.shard is None:  # shards are given one before their template is known
        return ["--template-date changes nothing: no chat template writes the date into these prompts"]
    return []
