"""Products of a mixture's experts against float64, and against whole numbers to the bit."""

from itertools import product

import torch
from gpu_check.compare import Errors, poisoned
from gpu_check.session import Session, name_of
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
SIZES = [(16, 1536, 2048), (8, 257, 512)]  # experts, rows and columns of each
TOKENS = ((1, 4), (64, 4), (700, 2))  # and the experts of each token


def run(session: Session) -> None:
    """Every type, with few rows for an expert and with many."""
    errors = Errors(session)
    cases = product(session.pick(SIZES, [(5, 17, 36)]), session.pick(TOKENS, ((9, 2),)))
    for (experts, n, k), (tokens, chosen) in session.within_time(cases):
        with session.case(f"experts, {tokens} tokens by {chosen} of {experts} x [{n}, {k}]"), poisoned():
            ids = _chosen(session, tokens, chosen, experts)
            for dtype in session.dtypes:
                _floating(session, errors, dtype, ids, experts, n, k)
            _integers(session, errors, ids, experts, n, k)
    errors.write()


def _floating(session: Session, errors: Errors, dtype: torch.dtype, ids: Tensor, experts: int, n: int, k: int) -> None:
    from batchinfer.kernels.experts_triton import by_expert, expert_tiles
    from batchinfer.kernels.products_triton import DenseProduct
    from batchinfer.kernels.rows import Rows

    x, weight = torch.randn(len(ids), k).to(dtype).to(session.device), torch.randn(experts, n, k)
    weight = weight.mul_(k**-0.5).to(dtype).to(session.device)
    expected = torch.einsum("tknd,td->tkn", weight[ids].double(), x.double())
    for many in (False, True):
        at = expert_tiles(ids, experts, many)
        made = by_expert([DenseProduct(w.clone(), None, False) for w in weight])
        found = made(Rows(x[at.tokens]), at).values[at.places]
        errors.close(f"experts, {at.rows} rows a tile", name_of(dtype), found, expected, TOLERANCE[dtype])


def _integers(session: Session, errors: Errors, ids: Tensor, experts: int, n: int, k: int) -> None:
    from batchinfer.kernels.experts_triton import by_expert, expert_tiles
    from batchinfer.kernels.products_triton import EightBitProduct
    from batchinfer.kernels.rows import Rows

    x, weight = (torch.randint(-16, 16, shape, dtype=torch.int8) for shape in ((len(ids), k), (experts, n, k)))
    x, weight = x.to(session.device), weight.to(session.device)
    ones, scale = torch.ones(len(ids), 1, device=session.device), torch.ones(n, device=session.device)
    exact = torch.einsum("tknd,td->tkn", weight[ids].double(), x.double())
    for many in (False, True):
        at = expert_tiles(ids, experts, many)
        made = by_expert([EightBitProduct(w, scale, None, torch.float32, session.gpu, False) for w in weight])
        found = made(Rows(x[at.tokens], ones[at.tokens]), at).values[at.places]
        errors.same(f"experts, {at.rows} rows a tile", "int8", found.double(), exact)


def _chosen(session: Session, tokens: int, chosen: int, experts: int) -> Tensor:
    """Choose experts [tokens, chosen], some of them far more often than others."""
    weights = torch.logspace(0, -3, experts).expand(tokens, -1)
    return torch.multinomial(weights, chosen).to(session.device)
