/* Finding the number at which a filter cuts a row off: by radix selection over the bits of numbers, without a sort. */
#pragma once
#include "vector_cpu.h"

/* Logits at a temperature. A number's weight is e^(number - most). */
struct numbers {
    const float *logits;
    int64_t count;
    float temperature, most;
};

struct cut {
    float border;
    int64_t above; /* how many numbers are above the border */
    double mass;   /* their weights' sum */
};

/* Up to 16 logits; behind the last one is none: -inf. */
INLINE vec logits_at(const struct numbers *n, int64_t at) {
    int64_t count = n->count - at;
    if (count >= LANES) return vec_load(n->logits + at);
    float copy[LANES];
    for (int i = 0; i < LANES; i++) copy[i] = i < count ? n->logits[at + i] : -__builtin_inff();
    return vec_load(copy);
}

INLINE vec numbers_at(const struct numbers *n, int64_t at) { return vec_div(logits_at(n, at), vec_set(n->temperature)); }
INLINE vec weights_of(const struct numbers *n, vec x) { return vec_exp(vec_sub(x, vec_set(n->most))); }

/* Bits that are ordered as the numbers are, without sign; those of both zeros are the same. */
INLINE ints ordered_bits(vec x) {
    vec zero = vec_set(0.0f);
    vec flipped = vec_less(x, zero, bits_vec(ints_set(-1)), bits_vec(ints_set((int32_t)0x80000000)));
    return ints_xor(vec_bits(vec_add(x, zero)), vec_bits(flipped));
}

INLINE float of_ordered_bits(uint32_t bits) {
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The sum of all weights: of 64 in float32, of these sums in float64. */
static double mass_of(const struct numbers *n) {
    double mass = 0.0;
    for (int64_t at = 0; at < n->count; at += 4 * LANES) {
        vec sum = vec_set(0.0f);
        for (int64_t i = at; i < at + 4 * LANES && i < n->count; i += LANES)
            sum = vec_add(sum, weights_of(n, numbers_at(n, i)));
        mass += (double)vec_sum(sum);
    }
    return mass;
}

/* Find the largest number with which, and with all above it, there are `count` numbers or there is `mass`; the least
 * number if there never are. The border's bits are found a byte at a time, from the highest; weights are added in
 * float64, in the order of the row. */
static struct cut cut_at(const struct numbers *n, int64_t count, double mass) {
    uint32_t bits = 0;
    struct cut cut = {0.0f, 0, 0.0};
    for (int shift = 24; shift >= 0; shift -= 8) {
        struct {
            int64_t count;
            double mass;
        } bins[256] = {{0, 0.0}};
        for (int64_t at = 0; at < n->count; at += LANES) {
            uint32_t keys[LANES];
            float weights[LANES];
            vec x = numbers_at(n, at);
            ints key = ordered_bits(x);
            memcpy(keys, &key, sizeof keys);
            vec_store(weights, weights_of(n, x));
            int64_t left = n->count - at;
            for (int i = 0; i < (left < LANES ? left : LANES); i++) {
                if ((keys[i] ^ bits) >> shift >> 8) continue;
                bins[keys[i] >> shift & 255].count++;
                bins[keys[i] >> shift & 255].mass += (double)weights[i];
            }
        }
        int at = -1;
        for (int b = 255; b >= 0; b--) {
            if (bins[b].count == 0) continue;
            if (at >= 0) {
                cut.above += bins[at].count;
                cut.mass += bins[at].mass;
            }
            at = b;
            if (cut.above + bins[b].count >= count || cut.mass + bins[b].mass >= mass) break;
        }
        bits |= (uint32_t)at << shift;
    }
    cut.border = of_ordered_bits(bits);
    return cut;
}
