"""The folder for what batchinfer keeps for a user beyond a job."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder, which need not exist yet (XDG Base Directory Specification). Raises `RuntimeError` without a
    home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "batchinfer"
