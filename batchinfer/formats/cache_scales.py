"""Scales of keys and values that a checkpoint was calibrated with. They are left aside: see `kernels/kv_cache.py`."""

from batchinfer.formats.matrix import Tensors

LEFT_ASIDE = ", its kv_cache_scheme left aside"
"""What a format with such scales adds to its name, for the report."""


def drop_scales_of_keys(module: str, tensors: Tensors) -> None:
    """Count the scales of keys and values as used, by the names of all tools."""
    attention, _, projection = module.rpartition(".")
    tensors.drop(f"{module}.output_scale")
    if projection in ("k_proj", "v_proj"):
        tensors.drop(f"{module}.{projection[0]}_scale")
    for name in ("k_scale", "v_scale", "kv_scale"):
        tensors.drop(f"{attention}.{name}")
