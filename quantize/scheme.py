"""`QuantScheme`: how weights and activations are held in fewer bits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantScheme:
    """Bits of weights and activations; 16 stands for the floating-point type of the job."""

    name: str
    weight_bits: int = 16
    activation_bits: int = 16
    head: bool = False  # the output head too
    as_stored: bool = False  # each matrix as the checkpoint has it, those that it leaves in floating point so too

    @property
    def quantized(self) -> bool:
        """True if the decoder's matrices are held in integers."""
        return self.weight_bits < 16


_SCHEMES = {"none": QuantScheme("none"), "w8a8-int8": QuantScheme("w8a8-int8", 8, 8)}


def scheme(name: str, integer_checkpoint: bool = False) -> QuantScheme:
    """The scheme of a `--quantization` name, `+head` at its end included.

    `auto` is what the checkpoint says: 8-bit products if it was made for them (`integer_checkpoint`), else floating
    point. A `ValueError` lists the names there are.
    """
    if name == "auto":
        return QuantScheme("auto", 8, 8, as_stored=True) if integer_checkpoint else _SCHEMES["none"]
    base, plus, rest = name.partition("+")
    found = _SCHEMES.get(base)
    if found is None or (plus and (rest != "head" or not found.quantized)):
        raise ValueError(f"quantization is {name!r}; it must be one of auto, none, w8a8-int8, w8a8-int8+head")
    return QuantScheme(name, found.weight_bits, found.activation_bits, head=bool(plus)) if plus else found
