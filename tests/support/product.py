"""The product's sources by module."""

from repository import ROOT


def product() -> dict[str, str]:
    """Source by dotted name, of all that is installed; a package stands under its own name."""
    sources = {}
    for folder in ("batchinfer", "kernels", "quantize", "jobs"):
        for path in ROOT.glob(f"{folder}/**/*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            sources[".".join(parts if folder == "batchinfer" else ("batchinfer", *parts))] = path.read_text()
    return sources
