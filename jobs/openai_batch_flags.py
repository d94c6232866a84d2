"""The flags for files of requests in the format of OpenAI's batch API."""

from dataclasses import dataclass
from typing import Annotated

from batchinfer.flag import Flag


@dataclass(frozen=True, kw_only=True)
class OpenAIBatchFlags:
    """A user's choices for files of requests."""

    openai_batch: Annotated[
        bool,
        Flag(
            "Read each line of the input as a request in the format of OpenAI's batch files, and write its response as "
            "a line of that format.",
            "Input",
        ),
    ] = False
    any_model: Annotated[
        bool, Flag("Answer the requests of --openai-batch for whichever model they name.", "Input")
    ] = False
