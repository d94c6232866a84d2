"""`QuantScheme`: the types in which weights are held and activations rounded when a model runs; and `WeightScheme`:
how a quantized checkpoint stores its weights."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class QuantScheme:
    """Bits of the weights, and the type to which activations are rounded.

    16 bits stand for the job's floating-point type. A scheme with 4-bit weights and 8-bit activations needs a
    checkpoint with 4-bit weights, and holds them in 8 bits.
    """

    name: str
    weight_bits: int = 16
    activations: str = "float"  # float | int8 | fp8
    head: bool = False  # whether the output head is quantized too
    as_stored: bool = False  # take each matrix as the checkpoint stores it, quantized or in floating point

    @property
    def quantized(self) -> bool:
        """Whether the decoder's matrices are held in 8 bits."""
        return self.weight_bits < 16


_SCHEMES = {
    "none": QuantScheme("none"),
    "w8a8-int8": QuantScheme("w8a8-int8", 8, "int8"),
    "w8a8-fp8": QuantScheme("w8a8-fp8", 8, "fp8"),
    "w4a8": QuantScheme("w4a8", 4, "int8"),
}

QUANTIZATIONS = ("auto", "none", "w8a8-int8", "w8a8-int8+head", "w8a8-fp8", "w8a8-fp8+head", "w4a8", "w4a8+head")
"""The values that `--quantization` may have."""


def scheme(name: str, eight_bit_checkpoint: bool = False) -> QuantScheme:
    """Return the scheme for a value of `--quantization`; `+head` at its end quantizes the output head too.

    `auto` follows the checkpoint: 8-bit products if it was made for them (`eight_bit_checkpoint`), else floating-point
    products. Raises `ValueError` for an unknown name.
    """
    if name == "auto":
        return QuantScheme("auto", 8, as_stored=True) if eight_bit_checkpoint else QuantScheme("auto")
    base, plus, _ = name.partition("+")
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization is {name!r}; it must be one of {', '.join(QUANTIZATIONS)}")
    found = _SCHEMES[base]
    return replace(found, name=name, head=bool(plus))


@dataclass(frozen=True)
class WeightScheme:
    """A way of storing a checkpoint's matrices: symmetric, with a scale per channel or per group of columns."""

    name: str
    bits: int
    group_size: int = 0  # columns that share a scale; 0: all of them (per-channel scales)
    floating: bool = False  # float8_e4m3fn instead of integers
    activations: str = "float"  # float | int8 | fp8: the type to which inputs are rounded when the model runs
    scale_type: str = "float32"  # type in which scales are stored


_WEIGHT_SCHEMES = {
    "w4a16": WeightScheme("w4a16", 4, 128),
    "w4a8": WeightScheme("w4a8", 4, 128, activations="int8"),
    "w8a16": WeightScheme("w8a16", 8),
    "w8a8-int8": WeightScheme("w8a8-int8", 8, activations="int8"),
    "w8a8-fp8": WeightScheme("w8a8-fp8", 8, floating=True, activations="fp8"),
}


def weight_scheme(name: str, group_size: int | None) -> WeightScheme:
    """Return the scheme of this name. `group_size`, if given, replaces the scheme's own.

    Raises `ValueError` for an unknown name or a group size that is not possible.
    """
    if name not in _WEIGHT_SCHEMES:
        raise ValueError(f"scheme is {name!r}; it must be one of {', '.join(_WEIGHT_SCHEMES)}")
    found = _WEIGHT_SCHEMES[name]
    if group_size is None:
        return found
    if found.activations != "float" and found.bits == 8 and group_size:
        raise ValueError(
            f"group_size is {group_size}; {name} has a scale a channel, because its products add whole rows"
        )
    if group_size < 0 or group_size % 8:
        raise ValueError(f"group_size is {group_size}; it must be a multiple of 8, or 0 for whole channels")
    return replace(found, group_size=group_size)
