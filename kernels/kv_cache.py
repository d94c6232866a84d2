"""The paged cache of keys and values of one layer: rotate, store, and read back."""

import math
import mmap

import torch
from torch import Tensor

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of each type that needs a scale."""

CPU = torch.device("cpu")


class KVCache:
    """Keys and values of one layer, [blocks, kv_heads, block_size, head_dim]; 8-bit types have a scale per token and
    head.

    A slot is a token's index in the pool: block * block_size + offset. Block 0 belongs to no sequence; the keys and
    values of padding tokens are written there.

    By column they lie in memory as [blocks, kv_heads, head_dim, block_size], and `key` or `value` is the transposed
    view of that. With `values_by_column` 8-bit values do: matrix units read both operands along the sum, which for
    values runs over the keys. With `keys_by_column` keys do: a query is then multiplied by many keys at once.
    """

    def __init__(
        self,
        blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
        values_by_column: bool = False,
        keys_by_column: bool = False,
    ) -> None:
        shape, quantized = (blocks, kv_heads, block_size, head_dim), dtype in MOST
        by_column = (blocks, kv_heads, head_dim, block_size)
        # A masked position is still multiplied, by weight 0, so its contents must be finite: begin with zeros.
        self.key = zeros(by_column, dtype, device).transpose(2, 3) if keys_by_column else zeros(shape, dtype, device)
        if values_by_column and quantized:
            self.value = zeros(by_column, dtype, device).transpose(2, 3)
        else:
            self.value = zeros(shape, dtype, device)
        self.kv_heads, self.block_size = kv_heads, block_size
        self.key_scale = zeros(shape[:3], torch.float32, device) if quantized else None
        self.value_scale = zeros(shape[:3], torch.float32, device) if quantized else None

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and scales."""
        scales = [s.nbytes for s in (self.key_scale, self.value_scale) if s is not None]
        return self.key.nbytes + self.value.nbytes + sum(scales)

    def store(self, key_THd: Tensor, value_THd: Tensor, rows_TH: Tensor) -> None:
        """Write tokens' keys and values [T, kv_heads, head_dim] to the rows that `cache_rows` returned."""
        rows = rows_TH.flatten()
        for pool, scales, new in (
            (self.key, self.key_scale, key_THd),
            (self.value, self.value_scale, value_THd),
        ):
            if scales is not None:
                most = MOST[pool.dtype]
                step = new.float().abs().amax(-1, keepdim=True).div_(most)
                scales.view(-1).index_copy_(0, rows, step.flatten())
                new = new.float().div(step.clamp(min=1e-30))
                new = new.round_() if pool.dtype == torch.int8 else new.clamp_(-most, most)
            stored = new.to(pool.dtype).flatten(0, 1)
            if not pool.is_contiguous():  # by column
                by_block = _as_bytes(pool).flatten(0, 1)
                by_block[rows // self.block_size, rows % self.block_size] = _as_bytes(stored)
                continue
            flat = pool.view(-1, pool.shape[-1])
            if pool.dtype == torch.float8_e4m3fn:  # torch's index_copy_ has no float8, so copy bytes
                flat, stored = flat.view(torch.uint8), stored.view(torch.uint8)
            flat.index_copy_(0, rows, stored)

    def copy(self, blocks: Tensor, to: Tensor) -> None:
        """Copy the contents of the blocks `blocks` to the blocks `to`."""
        for pool in self._pools:
            pool[to] = pool[blocks]

    def clear(self, blocks: Tensor) -> None:
        """Set blocks to zero, so that numbers that are not finite do not reach the blocks' next sequence."""
        for pool in self._pools:
            pool[blocks] = 0

    def clear_slots(self, slots: Tensor) -> None:
        """Set single slots to zero."""
        for pool in self._pools:
            pool[slots // self.block_size, :, slots % self.block_size] = 0

    @property
    def _pools(self) -> list[Tensor]:
        """Keys, values and scales, in types that torch copies and writes."""
        pools = (self.key, self.value, self.key_scale, self.value_scale)
        return [_as_bytes(pool) for pool in pools if pool is not None]


def _as_bytes(pool: Tensor) -> Tensor:
    """Return numbers of float8, for which torch lacks some operations, as bytes; others as they are."""
    return pool.view(torch.uint8) if pool.dtype == torch.float8_e4m3fn else pool


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros. On the CPU it takes memory only as it is written, a page at a time."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def cache_rows(slots_T: Tensor, kv_heads: int, block_size: int) -> Tensor:
    """Return the rows [T, kv_heads] of slots [T] in a pool seen as [blocks * kv_heads * block_size, head_dim]."""
    block, offset = slots_T // block_size, slots_T % block_size
    heads = torch.arange(kv_heads)
    return (block[:, None] * kv_heads + heads) * block_size + offset[:, None]


def rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021) in Hugging Face's layout, which pairs the halves of a head.

    x is [T, heads, head_dim]; cos and sin are float32 [T, head_dim / 2]. The result is computed in float32 and
    returned in x's dtype.
    """
    a, b = x_THd.float().chunk(2, -1)
    cos, sin = cos_Td[:, None], sin_Td[:, None]
    out = torch.empty(x_THd.shape, dtype=torch.float32)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1.0)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out.to(x_THd.dtype)
