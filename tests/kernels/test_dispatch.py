"""The environment variable that forces a path."""

import pytest

from batchinfer.kernels import dispatch
from batchinfer.kernels.backends import choose_backend


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHINFER_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        dispatch.choose(("reference",))
    monkeypatch.setenv("BATCHINFER_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="only with TRITON_INTERPRET=1"):
        choose_backend("cpu", deterministic=False)
