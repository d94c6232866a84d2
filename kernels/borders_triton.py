"""The borders of top-k and top-p in a row of logits, in Triton, without a sort.

A pass over the vocabulary lists the largest tokens of each lane: lane l sees the tokens l, l + LANES, and so on, and
keeps the `LISTED` largest. Few tokens pass the usual filters, so no lane meets more of them than it lists, and the
border is found among listed tokens, in registers. Where a lane's list may be too short, passes that compare the whole
vocabulary with a few numbers narrow the range down until a list of that range is long enough. A sample of the
vocabulary says where the first of these numbers should lie, so that one such pass usually is enough. No loop over the
vocabulary reduces across lanes: that is done once, behind it.

Logits are compared as integers in the same order (`ordered`), among which a search ends exactly.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment,misc"
# ruff: noqa: RUF005 (a kernel cannot unpack tuples)

import triton
import triton.language as tl

LISTED = tl.constexpr(6)
"""Of 500 tokens that pass, 2,048 lanes list all but in one row of 1,600; of 1,000, but in one of 26."""
PIVOTS = tl.constexpr(7)
"""A pass compares with one number more than this."""
SAMPLED = tl.constexpr(2)
"""Rounds that ask a sample; from then on a round divides the range evenly, so that the search surely ends."""
DOUBT = tl.constexpr(3.0)
"""Standard deviations of a sampled sum within which the border is looked for."""
NOTHING = tl.constexpr(-(1 << 63))  # the key of no token
INFINITE = tl.constexpr(0x7F800000)  # `ordered` of infinity; that of NaN is larger
MINUS_INFINITE = tl.constexpr(-0x7F800001)


@triton.jit
def ordered(b_x):
    """Map float32 numbers to int32 in the same order; 0 and -0 become equal, and NaN the largest."""
    b_bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return tl.where(b_x == b_x, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def number(b_order):
    """Return the float32 number that `ordered` maps to this."""
    return (b_order ^ ((b_order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key(b_x, o_token):
    """Join a number and a token id to an int64 whose maximum is the largest number, and of equals the smallest id."""
    return (ordered(b_x).to(tl.int64) << 32) | (0x7FFFFFFF - o_token)


@triton.jit
def order_of(b_key):
    """Return the `ordered` number of a key."""
    return (b_key >> 32).to(tl.int32)


@triton.jit
def token_of(b_key):
    """Return the token id of a key."""
    return 0x7FFFFFFF - (b_key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def largest(p_row, vocab, high, LANES: tl.constexpr):
    """List the largest tokens of each lane whose order is below `high`, int64, in one pass.

    Returns (`LISTED` keys of each lane in descending order, [LANES] each; the order of the row's least finite logit).
    """
    b_nothing = tl.full((LANES,), NOTHING, tl.int64)
    keys = (b_nothing, b_nothing, b_nothing, b_nothing, b_nothing, b_nothing)
    b_least = tl.full((LANES,), float("inf"), tl.float32)
    for start in range(0, vocab, LANES):
        o_v = start + tl.arange(0, LANES)
        b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf"))
        b_finite = tl.where(b_x > float("-inf"), b_x, float("inf"))
        b_least = tl.minimum(b_least, b_finite)
        b_key = key(b_x, o_v)
        b_key = tl.where((o_v < vocab) & (order_of(b_key) < high), b_key, NOTHING)
        longer = ()
        for level in tl.static_range(LISTED):
            longer = longer + (tl.maximum(keys[level], b_key),)
            b_key = tl.minimum(keys[level], b_key)
        keys = longer
    return keys, ordered(tl.min(b_least)).to(tl.int64)


@triton.jit
def last_of(keys):
    """Return the largest order at which a lane's list ends: all tokens above it are listed."""
    return order_of(tl.max(keys[LISTED - 1])).to(tl.int64)


@triton.jit
def weights_of(keys, most, temperature, counted):
    """Return the listed tokens' weights, float32: 1 each if `counted`, else exp((logit - most) / temperature)."""
    weights = ()
    for level in tl.static_range(LISTED):
        weights = weights + (weight(number(order_of(keys[level])), most, temperature, counted),)
    return weights


@triton.jit
def weight(b_x, most, temperature, counted):
    """Return 1 for each token if `counted`, else exp((logit - most) / temperature)."""
    return tl.where(counted, 1.0, tl.exp((b_x - most) / temperature))


@triton.jit
def listed_from(keys, weights, order):
    """Sum the weights of the listed tokens whose order is at least `order`."""
    b_sum = tl.zeros(weights[0].shape, tl.float32)
    for level in tl.static_range(len(keys)):
        b_sum += tl.where(order_of(keys[level]) >= order.to(tl.int32), weights[level], 0.0)
    return tl.sum(b_sum)


@triton.jit
def border_in_list(keys, weights, wanted, low, high, above):
    """Find the largest border in [low, high) from which on the weights sum to at least `wanted`.

    `above` is the sum from `high` on. The border is right if it is not below `last_of(keys)`: from there on, tokens
    that are not listed may only add to the sum.
    """
    while high - low > 1:
        middle = (low + high) >> 1
        enough = above + listed_from(keys, weights, middle) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _sampled_range(p_row, vocab, most, temperature, counted, share, low, high, LANES: tl.constexpr):
    """Return (first, last), orders in [low, high) between which probably lies where `share` of the weight lies above.

    Read off every n-th token of the vocabulary. A sum over a sample of tokens varies as if each token had been drawn by
    itself, so the variance of the share comes from the squares of the weights above and below.
    """
    step = tl.maximum(vocab // LANES, 1)
    o_v = step * tl.arange(0, LANES)
    b_x = tl.load(p_row + o_v, o_v < vocab, float("-inf"))
    keys = (key(b_x, o_v),)
    b_in = (order_of(keys[0]) >= low) & (order_of(keys[0]) < high)
    b_weight = tl.where(b_in, weight(b_x, most, temperature, counted), 0.0)
    whole = tl.sum(b_weight)
    middle = border_in_list(keys, (b_weight,), share * whole, low, high, 0.0)
    above, squares = listed_from(keys, (b_weight * b_weight,), middle), tl.sum(b_weight * b_weight)
    doubt = DOUBT * tl.sqrt((1.0 - 2.0 * share) * above + share * share * squares)
    first = border_in_list(keys, (b_weight,), share * whole + doubt, low, high, 0.0)
    return first, border_in_list(keys, (b_weight,), share * whole - doubt, low, high, 0.0) + 1


@triton.jit
def _pivot(place, first, last, low, high, by_value):
    """Return the order of a pivot in [low, high): `low` at place 0; the places 1 to `PIVOTS` divide first to last.

    They stand in equal distances between the numbers if `by_value`, else between their orders.
    """
    share = (place - 1).to(tl.float32) / (PIVOTS - 1)
    at_value = ordered(number(first.to(tl.int32)) * (1.0 - share) + number(last.to(tl.int32)) * share).to(tl.int64)
    at_order = first + (last - first) * (place - 1) // (PIVOTS - 1)
    order = tl.where((place < PIVOTS) & by_value, at_value, at_order)
    return tl.where(place == 0, low, tl.minimum(tl.maximum(order, low + 1), high - 1)).to(tl.int32)


@triton.jit
def _narrow(
    p_row, vocab, most, temperature, counted, wanted, low, high, above, whole, first, last, by_value,
    LANES: tl.constexpr,
):  # fmt: skip
    """Narrow [low, high) down by one pass, with pivots from `first` to `last`.

    Returns (the new range, the sums of all weights from its end on and from its beginning on).
    """
    b_zero = tl.zeros((LANES,), tl.float32)
    orders, sums = (), ()
    for place in tl.static_range(PIVOTS + 1):
        orders = orders + (_pivot(tl.full((), place, tl.int64), first, last, low, high, by_value),)
        sums = sums + (b_zero,)
    for start in range(0, vocab, LANES):
        o_v = start + tl.arange(0, LANES)
        m_v = o_v < vocab
        b_x = tl.load(p_row + o_v, m_v, float("-inf"))
        b_order, b_weight = ordered(b_x), tl.where(m_v, weight(b_x, most, temperature, counted), 0.0)
        added = ()
        for place in tl.static_range(PIVOTS + 1):
            added = added + (sums[place] + tl.where(b_order >= orders[place], b_weight, 0.0),)
        sums = added
    # One reduction for all pivots.
    for _ in tl.static_range(3):
        joined = ()
        for place in tl.static_range(len(sums) // 2):
            joined = joined + (tl.join(sums[place], sums[place + len(sums) // 2]),)
        sums = joined
    b_sum = tl.sum(tl.reshape(sums[0], [LANES, PIVOTS + 1]), 0)
    b_order = _pivot(tl.arange(0, PIVOTS + 1).to(tl.int64), first, last, low, high, by_value).to(tl.int64)
    b_enough = b_sum >= wanted
    end = tl.min(tl.where(b_enough, high, b_order))
    above = tl.maximum(above, tl.max(tl.where(b_enough, 0.0, b_sum)))
    found = tl.max(tl.where(b_enough, b_order, low))
    return found, end, above, tl.max(tl.where(b_order == found, b_sum, 0.0))


@triton.jit
def border_in_vocabulary(
    p_row, vocab, most, temperature, counted, wanted, low, high, above, whole, LANES: tl.constexpr
):  # fmt: skip
    """Find what `border_in_list` finds, in any row.

    `above` is the sum of the weights from `high` on, `whole` about that from `low` on.
    """
    rounds = 0
    while high - low > 1:
        first, last = low, high - 1
        sampled = rounds < SAMPLED
        if sampled:
            share = (wanted - above) / (whole - above)
            first, last = _sampled_range(p_row, vocab, most, temperature, counted, share, low, high, LANES)
        low, high, above, whole = _narrow(
            p_row, vocab, most, temperature, counted, wanted, low, high, above, whole, first, last, sampled, LANES
        )
        if high - low > 1:
            keys, _ = largest(p_row, vocab, high, LANES)
            weights = weights_of(keys, most, temperature, counted)
            found, last = border_in_list(keys, weights, wanted, low, high, above), last_of(keys)
            if found < last:
                above += listed_from(keys, weights, last + 1)
                high = last + 1
            else:
                low, high = found, found + 1
        rounds += 1
    return low
