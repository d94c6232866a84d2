"""Finding a model: a directory, a GGUF file, or a Hub id, which is downloaded to the local cache."""

import hashlib
import os
from pathlib import Path
from typing import Any

from batchinfer.errors import Refused
from batchinfer.formats.gguf_parts import part_names
from batchinfer.host.files import read_object

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", "*config.json"]
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]  # never a pickle


def resolve_model(model: str, revision: str | None, files: list[str] = MODEL_FILES, tokenizer: bool = True) -> Path:
    """Return the directory of a model.

    `model` is a directory, a GGUF file, or one of the two on the Hub (`ORG/NAME`, `ORG/NAME/FILE.gguf`), which is
    downloaded unless the cache has it. Of a model in several GGUF files, any one names all. Without `tokenizer`, the
    tokenizer in a GGUF file is not read. Raises `Refused` if there is no such model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise Refused(f"--revision {revision} is for Hub ids; {model} is a directory")
        return path
    if path.suffix == ".gguf" and path.is_file():
        if revision is not None:
            raise Refused(f"--revision {revision} is for Hub ids; {model} is a file")
        return _unpacked(path, tokenizer)
    if path.exists():
        raise Refused(f"model {model} is a file; expected a directory with config.json, a .gguf file, or a Hub id")
    file = _file_in_repository(model)
    if model.startswith(("/", ".", "~")) or (model.count("/") > 1 and file is None):
        raise Refused(f"model {model}: no such directory" + (" or file" if path.suffix == ".gguf" else ""))
    found = _download(model, revision, files, None)
    return found if file is None else _unpacked(found, tokenizer)


def _file_in_repository(model: str) -> tuple[str, str] | None:
    """Split the name of a GGUF file on the Hub into ("ORG/NAME", "FILE.gguf"); return None for another name.

    The file may be in a folder of the repository.
    """
    organization, _, rest = model.partition("/")
    name, _, file = rest.partition("/")
    return (f"{organization}/{name}", file) if file.endswith(".gguf") else None


def _unpacked(path: Path, tokenizer: bool) -> Path:
    """Make a checkpoint folder in the cache from a GGUF file. It is made anew each time."""
    from batchinfer.models.gguf_folder import unpack_gguf

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    folder = cache / "batchinfer" / "gguf" / f"{path.stem}-{digest}"
    try:
        unpack_gguf(path, folder, tokenizer)
    except ValueError as error:
        raise Refused(str(error)) from error
    return folder


def fetch_model(model: str, revision: str | None, folder: Path | None) -> Path:
    """Download a model or a GGUF file from the Hub into `folder` (None: the cache), for machines without internet.

    Of a model in several GGUF files, any one names all. Returns the model's folder, or the GGUF file. Raises `Refused`
    if that is not possible.
    """
    return _download(model, revision, MODEL_FILES, folder)


def _download(model: str, revision: str | None, files: list[str], folder: Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    file = _file_in_repository(model)
    try:
        if file is not None:
            return _download_parts(*file, revision, folder)
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, local_dir=folder))
    except HFValidationError as error:
        raise Refused(f"model {model}: neither a directory nor the name of a Hub model") from error
    except GatedRepoError as error:
        raise Refused(f"model {model} has a licence to accept: do that on its Hub page, then hf auth login") from error
    except RepositoryNotFoundError as error:
        raise Refused(f"model {model}: no such directory, nor a public model on the Hub (try hf auth login)") from error
    except RevisionNotFoundError as error:
        raise Refused(f"model {model} has no revision {revision}") from error
    except (EntryNotFoundError, HfHubHTTPError, ConnectionError) as error:
        raise Refused(
            f"model {model}: no such directory, not in the cache, and the Hub cannot be reached; run "
            f"'batchinfer fetch {model}' on a machine with internet, with --to DIR to carry it over"
        ) from error


def _download_parts(repository: str, name: str, revision: str | None, folder: Path | None) -> Path:
    """Download a GGUF file and the other parts of its model, if it is one of several; return that file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found = {}
    for part in part_names(name):
        try:
            found[part] = Path(hf_hub_download(repository, part, revision=revision, local_dir=folder))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise Refused(f"model {repository}/{name}: the Hub's {repository} has no file {part}") from error
    return found[name]


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's `config.json`. Raises `Refused` if it is missing or not a JSON object."""
    try:
        return read_object(folder / "config.json")
    except OSError as error:
        raise Refused(f"model {folder}: cannot read config.json ({error.strerror})") from error
    except ValueError as error:
        raise Refused(f"model {error}") from error
