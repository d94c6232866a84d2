"""What all shards of a job must have alike, chosen once, when they are submitted."""

from collections.abc import Sequence

from batchinfer.host.device import device_of
from batchinfer.jobs.results.run_folder import RunFolder
from batchinfer.jobs.spec import JobSpec, sharded
from batchinfer.jobs.template_date import now
from batchinfer.kernels.cpu_library import cpu_path


def for_all_shards(spec: JobSpec, arguments: Sequence[str], count: int) -> list[str]:
    """Return the job's `arguments` with those that all of its `count` shards must share in front.

    These are a `--template-date`, if they may need one: that of a shard which was begun before, if there is one. And
    a `--cpu-path` on CPUs, since machines may differ and rows of one job come from one kind of kernels.
    """
    chosen = []
    if spec.template_date is None and spec.renders_chats:
        begun = (RunFolder(sharded(spec.output, shard, count)).template_date for shard in range(count))
        moment = next(filter(None, begun), None) or now()
        chosen.append(f"--template-date={moment.isoformat()}")
    if spec.cpu_path == "auto" and device_of(spec.device) == "cpu":
        chosen.append(f"--cpu-path={cpu_path()}")
    return [*chosen, *arguments]
