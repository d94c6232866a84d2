"""Fields of a `quantization_config`, checked; and what all formats refuse in the same words."""

from typing import Any, NoReturn


def whole(config: dict[str, Any], key: str) -> int:
    """A whole number from -1 to 65,536; a `ValueError` names the field."""
    value = config.get(key)
    if type(value) is not int or not -1 <= value <= 1 << 16:
        raise ValueError(f"config.json: quantization_config: {key} is {value!r}; it must be a whole number")
    return value


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    """True or false; a `ValueError` names the field."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: quantization_config: {key} is {value!r}; it must be true or false")
    return value


def refuse_module(module: str, shape: tuple[int, int], why: str) -> NoReturn:
    """Raise for a matrix that cannot be packed as the config says."""
    raise ValueError(f"{module}: a matrix of {shape[0]} x {shape[1]} does not go into {why}")
