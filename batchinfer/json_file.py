"""JSON objects in files that came with a checkpoint. Free of torch."""

import json
from pathlib import Path
from typing import Any

from batchinfer.quantize.lfs import refuse_pointer


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. A `ValueError` names the file and what it is instead; an `OSError` if it is not there."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected an object")
    return value
