"""Finding the models that this machine has, for `batchinfer init`: folders, GGUF files, and the Hub's cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CacheNotFound, scan_cache_dir

from batchinfer.errors import Refused
from batchinfer.models.hub import resolve_model
from batchinfer.text.tokenizer import Tokenizer

WEIGHTS = ("*.safetensors", "*.gguf")
DEPTH = 2  # folders below the one at hand that are looked into
MOST_FOLDERS = 2000  # that are looked into
LEAST_BYTES = 1 << 20  # of a GGUF file: smaller ones are vocabularies


@dataclass(frozen=True)
class LocalModel:
    """A model as `--model` names it, and the bytes of its weights."""

    name: str
    nbytes: int


def local_models(folder: Path) -> list[LocalModel]:
    """Return the models in and below a folder and in the Hub's cache, the smallest first."""
    found = {model.name: model for model in [*_in_folders(folder), *_in_cache()]}
    return sorted(found.values(), key=lambda model: (model.nbytes, model.name))


def has_chat_template(name: str) -> bool:
    """Return whether a model has a chat template; True if that cannot be told."""
    try:
        return Tokenizer.load(resolve_model(name, None)).template is not None
    except Refused:  # the job says why
        return True


def _in_folders(folder: Path) -> Iterator[LocalModel]:
    for place in _folders(folder):
        weights = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        if weights and (place / "config.json").is_file() and (place / "tokenizer.json").is_file():
            yield LocalModel(_named(place, folder), weights)
        for file in sorted(place.glob("*.gguf")):
            if file.stat().st_size >= LEAST_BYTES:
                yield LocalModel(_named(file, folder), file.stat().st_size)


def _folders(folder: Path) -> Iterator[Path]:
    """Yield a folder and those below it, without hidden ones."""
    level, seen = [folder], 0
    for _ in range(DEPTH + 1):
        below = list[Path]()
        for place in level:
            yield place
            seen += 1
            if seen >= MOST_FOLDERS:
                return
            try:
                below += sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith("."))
            except OSError:  # it is not ours to read
                continue
        level = below


def _named(path: Path, folder: Path) -> str:
    """Return the path as it is written from the folder; "./NAME" is told apart from a name on the Hub."""
    relative = path.relative_to(folder)
    return f"./{relative}" if relative != Path() else "."


def _in_cache() -> Iterator[LocalModel]:
    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, ValueError, OSError):
        return
    for repository in repositories:
        names = {file.file_name: file for revision in repository.revisions for file in revision.files}
        weights = [file for name, file in names.items() if name.endswith(".safetensors")]
        if repository.repo_type == "model" and weights and {"config.json", "tokenizer.json"} <= names.keys():
            yield LocalModel(repository.repo_id, sum(file.size_on_disk for file in weights))
        for name, file in names.items():
            if repository.repo_type == "model" and name.endswith(".gguf"):
                yield LocalModel(f"{repository.repo_id}/{name}", file.size_on_disk)
