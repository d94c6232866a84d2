"""Rotating queries and keys, and writing keys and values to the cache, by the kernel in C (`kv_cache_cpu.c`)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer.kernels.cpu_library import Arguments, address, floats, integers, pointers, type_number
from batchinfer.kernels.kv_cache import KVCache

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""Types of the cache that the kernel writes."""


class _Rotation(Arguments):
    _fields_ = (
        *pointers("qkv query"),
        *integers("type tokens heads kv_heads head_dim"),
        *pointers("cosine sine query_norm key_norm"),
        *integers("query_norm_stride key_norm_stride norms_last norm_values"),
        *pointers("key value key_scale value_scale"),
        *integers("kv_type block_size"),
        *pointers("slots"),
        *floats("eps"),
    )


def rotate_and_store(
    library: ctypes.CDLL,
    qkv_TX: Tensor,
    cache: KVCache | None,
    heads: int,
    cos_Td: Tensor,
    sin_Td: Tensor,
    slots_T: Tensor | None,
    norms: Sequence[Tensor | None],
    norm_values: bool,
    eps: float,
    norms_last: bool = False,
) -> Tensor:
    """Do what `Backend.rotate_and_store` says, for RMSNorms alone and a cache with its keys by column.

    Without a cache, only queries are there.
    """
    qkv, cos, sin = qkv_TX.contiguous(), cos_Td.contiguous(), sin_Td.contiguous()
    tokens, width = qkv.shape
    assert tokens == cos.shape[0] == sin.shape[0] and (slots_T is None or slots_T.shape[0] == tokens)
    kv_heads = 0 if cache is None else cache.kv_heads
    head_dim = width // (heads + 2 * kv_heads)
    query = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype)
    strides = (0 if norm is None or norm.dim() == 1 else head_dim for norm in norms)
    pools = (None,) * 4 if cache is None else (cache.key, cache.value, cache.key_scale, cache.value_scale)
    layout = (0, 1) if cache is None else (type_number(cache.key.dtype), cache.block_size)
    arguments = _Rotation(
        *(address(qkv), address(query), type_number(qkv.dtype), tokens, heads, kv_heads, head_dim),
        *map(address, (cos, sin, *norms)),
        *(*strides, norms_last, norm_values),
        *map(address, pools),
        *layout,
        *(address(slots_T), eps),
    )
    library.rotate_and_store(ctypes.byref(arguments))
    return query
