"""The command that runs the shards of a job on a Ray cluster. It imports large modules only when it runs."""

from typing import Annotated

import typer

from batchinfer.errors import EXIT_CODES, EngineFailed, Refused, UsageError
from batchinfer.flag import Flag
from batchinfer.jobs.cli.flags import RunArguments, SectionedCommand, takes
from batchinfer.jobs.cli.run import job_of
from batchinfer.jobs.spec import JobSpec, sharded

app = typer.Typer()


@app.command(cls=SectionedCommand)
@takes()
def ray(
    arguments: RunArguments,
    shards: Annotated[int, Flag("Divide the rows into N shards; each is one task.", at_least=1)],
    address: Annotated[
        str | None,
        Flag(
            "Connect to the cluster with this head; 'auto' takes a Ray that runs on this machine, 'local' starts "
            "one for the job. If no address is given: $RAY_ADDRESS, else 'auto', else 'local'.",
            metavar="HOST:PORT|auto|local",
        ),
    ] = None,
    gpus_per_shard: Annotated[
        int | None,
        Flag(
            "Reserve K GPUs for each shard; if nothing is given, 1 where the cluster has GPUs and --device allows "
            "them.",
            metavar="K",
        ),
    ] = None,
    cpus_per_shard: Annotated[
        int | None,
        Flag(
            "Reserve K CPUs for each shard of a job on CPUs; all of the smallest node's if nothing is given.",
            metavar="K",
        ),
    ] = None,
    max_retries: Annotated[
        int, Flag("Run a shard that was stopped, or whose worker died, at most R times again.", metavar="R")
    ] = 3,
) -> None:
    """Run the shards of a job as tasks of a Ray cluster, one on each device, and merge their outputs.

    Every node needs the same batchinfer, and must see the same files under the same paths. A shard whose worker dies
    runs again, on any node, and continues where it was. What a shard prints is in OUT-I-of-N.log.
    """
    from batchinfer.jobs.amounts import count_of
    from batchinfer.jobs.launch import ray_tasks
    from batchinfer.jobs.launch.shard_arguments import for_all_shards
    from batchinfer.jobs.merge_shards import merge_shards
    from batchinfer.jobs.results.run_folder import RunFolder

    cluster = ray_tasks.Cluster(address, gpus_per_shard, cpus_per_shard, max_retries)
    spec = job_of(arguments)
    _refuse_what_shards_cannot_have(spec)
    if RunFolder(spec.output).begun:
        raise Refused(f"output {spec.output} exists; choose another one, or remove it to merge the shards again")
    failed = ray_tasks.run_shards(spec, for_all_shards(spec, arguments, shards), shards, cluster)
    if failed:
        first, end = next(iter(failed.items()))
        kinds = {code: kind for kind, code in EXIT_CODES.items()}
        raise kinds.get(end.code, EngineFailed)(
            f"{len(failed)} of {shards} shards failed, shard {first} first: {end}; nothing was merged; give the same "
            "command to continue"
        )
    outputs = [sharded(spec.output, shard, shards) for shard in range(shards)]
    rows = merge_shards(outputs, spec.output, overwrite=False)
    print(f"{spec.output}: {count_of(rows, 'row')} of {count_of(shards, 'shard')}")


def _refuse_what_shards_cannot_have(spec: JobSpec) -> None:
    """Raise `UsageError` for flags that do not work if each shard's command may run several times."""
    for flag, given, remedy in (
        ("--shard", spec.shard is not None, "--shards N makes the shards"),
        ("--incremental", spec.incremental, "new rows are one small job: run it without shards"),
        ("--overwrite", spec.overwrite, "each try would begin anew; remove the outputs and run folders of the shards"),
        ("--no-resume", not spec.resume, "no try could continue an earlier one; choose a new output"),
        (
            "--time-limit",
            spec.time_limit is not None,
            "each try would get it all; interrupt this command instead",
        ),
    ):
        if given:
            raise UsageError(f"leave {flag} out of the arguments after --: {remedy}")
