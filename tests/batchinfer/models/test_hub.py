"""Fetching a GGUF file from a Hub server that the test runs on the loopback address."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from batchinfer.errors import Refused
from batchinfer.jobs.cli.main import main
from batchinfer.models.hub import resolve_model

COMMIT = "0123456789" * 4
FILE = b"not GGUF at all"


class Hub(BaseHTTPRequestHandler):
    """Has one repository, org/name, on one branch, main: one model whole, one in two parts, and one part of another."""

    asked: list[str]
    files = ("q4/m.gguf", "q8/m-00001-of-00002.gguf", "q8/m-00002-of-00002.gguf", "q2/m-00002-of-00002.gguf")

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if self._answer():
            self.wfile.write(FILE)

    def _answer(self) -> bool:
        self.asked.append(self.path)
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        missing = None
        if repository != "org/name":
            missing = "RepoNotFound"
        elif revision not in ("main", COMMIT):
            missing = "RevisionNotFound"
        elif name not in self.files:
            missing = "EntryNotFound"
        self.send_response(200 if missing is None else 404)
        if missing is None:
            self.send_header("ETag", '"abc"')
        else:
            self.send_header("X-Error-Code", missing)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(FILE) if missing is None else 0))
        self.end_headers()
        return missing is None

    def log_message(self, *_: object) -> None:
        """Not to the terminal."""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that were asked of the Hub, which runs meanwhile."""
    from huggingface_hub import constants

    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield Hub.asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_file_is_fetched_and_no_other(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "carried"
    monkeypatch.setattr(sys, "argv", ["batchinfer", "fetch", "org/name/q4/m.gguf", "--to", str(to)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and capsys.readouterr().out == f"{to}/q4/m.gguf\n"
    assert (to / "q4" / "m.gguf").read_bytes() == FILE
    assert {path for path in asked if "/resolve/" in path} == {"/org/name/resolve/main/q4/m.gguf"}


@pytest.mark.parametrize("part", [1, 2])
def test_one_part_leads_to_all(
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: int,
) -> None:
    named, to = f"q8/m-0000{part}-of-00002.gguf", tmp_path / "carried"
    monkeypatch.setattr(sys, "argv", ["batchinfer", "fetch", f"org/name/{named}", "--to", str(to)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and capsys.readouterr().out == f"{to}/{named}\n"
    assert {path.name for path in (to / "q8").iterdir()} == {"m-00001-of-00002.gguf", "m-00002-of-00002.gguf"}


def test_what_was_downloaded_goes_on_as_a_local_file(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"snapshots/.*/q4/m\.gguf .*GGUF"):
        resolve_model("org/name/q4/m.gguf", None)
    assert asked


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("org/name/q5.gguf", None, "model org/name/q5.gguf: the Hub's org/name has no file q5.gguf"),
        ("org/name/q2/m-00002-of-00002.gguf", None, "Hub's org/name has no file q2/m-00001-of-00002.gguf"),
        ("org/other/m.gguf", None, "model org/other/m.gguf: no such directory, nor a public model on the Hub"),
        ("org/name/q4/m.gguf", "v2", "model org/name/q4/m.gguf has no revision v2"),
        ("a b/name/m.gguf", None, "neither a directory nor the name of a Hub model"),
        ("org/name/folder", None, "model org/name/folder: no such directory$"),
        ("/org/name/m.gguf", None, "model /org/name/m.gguf: no such directory or file$"),
    ],
)
def test_what_is_not_there_is_refused_by_name(asked: list[str], model: str, revision: str | None, message: str) -> None:
    with pytest.raises(Refused, match=message):
        resolve_model(model, revision)


def test_a_file_without_a_hub_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Refused, match=r"'batchinfer fetch org/name/m\.gguf' on a machine with internet"):
        resolve_model("org/name/m.gguf", None)
    (tmp_path / "m.gguf").write_bytes(FILE)
    with pytest.raises(Refused, match="--revision main is for Hub ids"):
        resolve_model(str(tmp_path / "m.gguf"), "main")
