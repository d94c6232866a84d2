"""What most tests of the job layer need: a model without weights, and engines that misbehave."""

from collections.abc import Callable
from pathlib import Path

import pytest
from stub_jobs import ENGINES, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what the job layer needs of a model, once for all tests of a file."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Return `name_of(engine)`, the name by which a job's process imports an engine of `ENGINES`."""
    (tmp_path / "engines_of_the_test.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    return "engines_of_the_test:{}".format
