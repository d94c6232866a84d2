"""Reading and checking fields of a `quantization_config`, shared by the formats."""

from typing import Any, NoReturn


def whole(config: dict[str, Any], key: str) -> int:
    """Return the field `key`, an integer from -1 to 65,536. Raises `ValueError` for anything else."""
    value = config.get(key)
    if type(value) is not int or not -1 <= value <= 1 << 16:
        raise ValueError(f"config.json: quantization_config: {key} is {value!r}; it must be a whole number")
    return value


def flag(config: dict[str, Any], key: str, default: bool) -> bool:
    """Return the field `key`, true or false. Raises `ValueError` for anything else."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: quantization_config: {key} is {value!r}; it must be true or false")
    return value


def refuse_module(module: str, shape: tuple[int, int], packing: str) -> NoReturn:
    """Raise `ValueError` for a matrix whose shape cannot be packed as the config says."""
    raise ValueError(f"{module}: a matrix of {shape[0]} x {shape[1]} cannot be packed as {packing}")
