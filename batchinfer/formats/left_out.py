"""`LeftOut`: the modules that a quantized checkpoint keeps in floating point, by the names in its config."""

from typing import Any

from batchinfer.formats.fields import names, pattern


def is_head(module: str) -> bool:
    """Return whether a module is the output head, which GPT-NeoX calls embed_out."""
    return module.rpartition(".")[2] in ("lm_head", "embed_out")


class LeftOut:
    """The modules that the first of some fields with a value names, matched as in transformers; by default the head.

    A name stands for modules whose names end with it, and, as a regular expression, for those whose names begin with
    it up to a dot: "layers.1" for "layers.1.mlp" and not for "layers.11.mlp". Raises `ValueError` for a field that is
    no list of names.
    """

    def __init__(self, config: dict[str, Any], *fields: str) -> None:
        field = next((field for field in fields if config.get(field) is not None), None)
        self.names = ("lm_head",) if field is None else names(config, field)
        self.patterns = [pattern(rf"(?:{name})(?:\.|(?<=\.)|\Z)", name, str(field)) for name in self.names]

    def __contains__(self, module: str) -> bool:
        """Return whether the module stays in floating point."""
        return module.endswith(self.names) or any(pattern.match(module) for pattern in self.patterns)
