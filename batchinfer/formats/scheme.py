"""`QuantScheme`: how weights and activations are held in fewer bits."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class QuantScheme:
    """Bits of weights, and what activations are rounded to; 16 stands for the floating-point type of the job.

    Weights of 4 bits beside activations of 8 are those of a 4-bit checkpoint, held in 8 bits.
    """

    name: str
    weight_bits: int = 16
    activations: str = "float"  # float | int8 | fp8
    head: bool = False  # the output head too
    as_stored: bool = False  # each matrix as the checkpoint has it, those that it leaves in floating point so too

    @property
    def quantized(self) -> bool:
        """True if the decoder's matrices are held in 8 bits."""
        return self.weight_bits < 16


_SCHEMES = {
    "none": QuantScheme("none"),
    "w8a8-int8": QuantScheme("w8a8-int8", 8, "int8"),
    "w8a8-fp8": QuantScheme("w8a8-fp8", 8, "fp8"),
    "w4a8": QuantScheme("w4a8", 4, "int8"),
}

QUANTIZATIONS = ("auto", "none", "w8a8-int8", "w8a8-int8+head", "w8a8-fp8", "w8a8-fp8+head", "w4a8", "w4a8+head")
"""What `--quantization` may be."""


def scheme(name: str, eight_bit_checkpoint: bool = False) -> QuantScheme:
    """The scheme of a `--quantization` name, `+head` at its end included.

    `auto` is what the checkpoint says: 8-bit products if it was made for them (`eight_bit_checkpoint`), else products
    in floating point. A `ValueError` lists the names there are.
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
    """How a checkpoint's matrices are stored: symmetric, with a scale for each channel or group of columns."""

    name: str
    bits: int
    group_size: int = 0  # 0: the whole channel
    floating: bool = False  # float8_e4m3fn instead of whole numbers
    activations: str = "float"  # float | int8 | fp8: what inputs are rounded to when it runs
    scale_type: str = "float32"  # in which scales are stored


_WEIGHT_SCHEMES = {
    "w4a16": WeightScheme("w4a16", 4, 128),
    "w4a8": WeightScheme("w4a8", 4, 128, activations="int8"),
    "w8a16": WeightScheme("w8a16", 8),
    "w8a8-int8": WeightScheme("w8a8-int8", 8, activations="int8"),
    "w8a8-fp8": WeightScheme("w8a8-fp8", 8, floating=True, activations="fp8"),
}


def weight_scheme(name: str, group_size: int | None) -> WeightScheme:
    """The scheme of a name; `group_size` replaces its own. A `ValueError` names what is possible."""
    if name not in _WEIGHT_SCHEMES:
        raise ValueError(f"scheme is {name!r}; it must be one of {', '.join(_WEIGHT_SCHEMES)}")
    found = _WEIGHT_SCHEMES[name]
    if group_size is None:
        return found
    if found.activations != "float" and found.bits == 8 and group_size:
        raise ValueError(
            f"group_size is {group_size}; {name} has a scale a channel, for its products are of whole rows"
        )
    if group_size < 0 or group_size % 8:
        raise ValueError(f"group_size is {group_size}; it must be a multiple of 8, or 0 for whole channels")
    return replace(found, group_size=group_size)
