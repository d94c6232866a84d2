/* Vectors of 16 numbers, held as each instruction set holds them: the kernels for the CPU are written with these alone.
 *
 * Every operation is the same on all instruction sets, to the bit: products are fused with sums only by `vec_fma`, and
 * the lanes of a vector are added in one order. So a kernel gives the same bits on all of them. Nothing of the C library
 * is computed with, because libraries differ in the last bits. */
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define UNROLL _Pragma("GCC unroll 16")

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8 }; /* types of numbers in memory; float8 is e4m3 */

#if defined(__AVX512F__)

typedef __m512 vec;
typedef __m512i ints;

INLINE vec vec_set(float x) { return _mm512_set1_ps(x); }
INLINE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vec_store(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec vec_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec vec_div(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec vec_sqrt(vec a) { return _mm512_sqrt_ps(a); }
INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec vec_max(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec vec_less(vec a, vec b, vec then, vec otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}
INLINE ints vec_round(vec a) { return _mm512_cvtps_epi32(a); }
INLINE vec ints_to_vec(ints a) { return _mm512_cvtepi32_ps(a); }
INLINE ints vec_bits(vec a) { return _mm512_castps_si512(a); }
INLINE vec bits_vec(ints a) { return _mm512_castsi512_ps(a); }
INLINE ints ints_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE ints ints_load(const int32_t *p) { return _mm512_loadu_si512(p); }
INLINE ints ints_add(ints a, ints b) { return _mm512_add_epi32(a, b); }
INLINE ints ints_and(ints a, ints b) { return _mm512_and_si512(a, b); }
INLINE ints ints_or(ints a, ints b) { return _mm512_or_si512(a, b); }
INLINE ints ints_xor(ints a, ints b) { return _mm512_xor_si512(a, b); }
INLINE ints ints_max(ints a, ints b) { return _mm512_max_epu32(a, b); }
#define ints_left(a, n) _mm512_slli_epi32(a, n)
#define ints_right(a, n) _mm512_srli_epi32(a, n)
INLINE ints ints_load_u16(const uint16_t *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)); }
INLINE ints ints_load_s8(const int8_t *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)); }
INLINE vec vec_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE void ints_store_u8(uint8_t *p, ints a) { _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8(a)); }
INLINE void ints_store_u16(uint16_t *p, ints a) { _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16(a)); }
INLINE void vec_store_f16(uint16_t *p, vec a) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(a, 0)); }

/* The low and the high halves of the products of 32-bit numbers without sign. */
INLINE ints ints_product(ints a, uint32_t by, ints *high) {
    __m512i factor = _mm512_set1_epi64(by);
    __m512i even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
    *high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}

INLINE __m256 vec_low(vec a) { return _mm512_castps512_ps256(a); }
INLINE __m256 vec_high(vec a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }

#elif defined(__AVX2__)

typedef struct {
    __m256 low, high;
} vec;
typedef struct {
    __m256i low, high;
} ints;

#define EACH(type, op, a) ((type){op((a).low), op((a).high)})
#define BOTH(type, op, a, b) ((type){op((a).low, (b).low), op((a).high, (b).high)})

INLINE vec vec_set(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vec vec_load(const float *p) { return (vec){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vec_store(float *p, vec v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
INLINE vec vec_add(vec a, vec b) { return BOTH(vec, _mm256_add_ps, a, b); }
INLINE vec vec_sub(vec a, vec b) { return BOTH(vec, _mm256_sub_ps, a, b); }
INLINE vec vec_mul(vec a, vec b) { return BOTH(vec, _mm256_mul_ps, a, b); }
INLINE vec vec_div(vec a, vec b) { return BOTH(vec, _mm256_div_ps, a, b); }
INLINE vec vec_sqrt(vec a) { return EACH(vec, _mm256_sqrt_ps, a); }
INLINE vec vec_fma(vec a, vec b, vec c) {
    return (vec){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE vec vec_max(vec a, vec b) { return BOTH(vec, _mm256_max_ps, a, b); }
INLINE vec vec_less(vec a, vec b, vec then, vec otherwise) {
    return (vec){_mm256_blendv_ps(otherwise.low, then.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
                 _mm256_blendv_ps(otherwise.high, then.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
INLINE ints vec_round(vec a) { return EACH(ints, _mm256_cvtps_epi32, a); }
INLINE vec ints_to_vec(ints a) { return EACH(vec, _mm256_cvtepi32_ps, a); }
INLINE ints vec_bits(vec a) { return EACH(ints, _mm256_castps_si256, a); }
INLINE vec bits_vec(ints a) { return EACH(vec, _mm256_castsi256_ps, a); }
INLINE ints ints_set(int32_t x) { return (ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE ints ints_load(const int32_t *p) {
    return (ints){_mm256_loadu_si256((const void *)p), _mm256_loadu_si256((const void *)(p + 8))};
}
INLINE ints ints_add(ints a, ints b) { return BOTH(ints, _mm256_add_epi32, a, b); }
INLINE ints ints_and(ints a, ints b) { return BOTH(ints, _mm256_and_si256, a, b); }
INLINE ints ints_or(ints a, ints b) { return BOTH(ints, _mm256_or_si256, a, b); }
INLINE ints ints_xor(ints a, ints b) { return BOTH(ints, _mm256_xor_si256, a, b); }
INLINE ints ints_max(ints a, ints b) { return BOTH(ints, _mm256_max_epu32, a, b); }
#define ints_left(a, n) ((ints){_mm256_slli_epi32((a).low, n), _mm256_slli_epi32((a).high, n)})
#define ints_right(a, n) ((ints){_mm256_srli_epi32((a).low, n), _mm256_srli_epi32((a).high, n)})
INLINE ints ints_load_u16(const uint16_t *p) {
    return (ints){_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)),
                  _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p + 8)))};
}
INLINE ints ints_load_s8(const int8_t *p) {
    return (ints){_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)),
                  _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p + 8)))};
}
INLINE vec vec_load_f16(const uint16_t *p) {
    return (vec){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                 _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}
/* The lowest 16 bits of each number, which must lie between 0 and 65535. */
INLINE __m256i ints_pack(ints a) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.low, a.high), 0xd8);
}
INLINE void ints_store_u16(uint16_t *p, ints a) { _mm256_storeu_si256((void *)p, ints_pack(a)); }
INLINE void ints_store_u8(uint8_t *p, ints a) {
    __m256i words = ints_pack(ints_and(a, ints_set(0xff)));
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((void *)p, bytes);
}
INLINE void vec_store_f16(uint16_t *p, vec a) {
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(a.low, 0));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(a.high, 0));
}

INLINE __m256i half_product(__m256i a, uint32_t by, __m256i *high) {
    __m256i factor = _mm256_set1_epi64x(by);
    __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
    *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
/* The low and the high halves of the products of 32-bit numbers without sign. */
INLINE ints ints_product(ints a, uint32_t by, ints *high) {
    ints low;
    low.low = half_product(a.low, by, &high->low);
    low.high = half_product(a.high, by, &high->high);
    return low;
}

INLINE __m256 vec_low(vec a) { return a.low; }
INLINE __m256 vec_high(vec a) { return a.high; }

#elif defined(__ARM_NEON)

typedef struct {
    float32x4_t at[4];
} vec;
typedef struct {
    int32x4_t at[4];
} ints;

#define EACH(type, x) ({ type out; for (int i = 0; i < 4; i++) out.at[i] = (x); out; })

INLINE vec vec_set(float x) { return EACH(vec, vdupq_n_f32(x)); }
INLINE vec vec_load(const float *p) { return EACH(vec, vld1q_f32(p + 4 * i)); }
INLINE void vec_store(float *p, vec v) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.at[i]);
}
INLINE vec vec_add(vec a, vec b) { return EACH(vec, vaddq_f32(a.at[i], b.at[i])); }
INLINE vec vec_sub(vec a, vec b) { return EACH(vec, vsubq_f32(a.at[i], b.at[i])); }
INLINE vec vec_mul(vec a, vec b) { return EACH(vec, vmulq_f32(a.at[i], b.at[i])); }
INLINE vec vec_div(vec a, vec b) { return EACH(vec, vdivq_f32(a.at[i], b.at[i])); }
INLINE vec vec_sqrt(vec a) { return EACH(vec, vsqrtq_f32(a.at[i])); }
INLINE vec vec_fma(vec a, vec b, vec c) { return EACH(vec, vfmaq_f32(c.at[i], a.at[i], b.at[i])); }
/* The second number where one of the two is no number, as on x86. */
INLINE vec vec_max(vec a, vec b) {
    return EACH(vec, vbslq_f32(vcgtq_f32(a.at[i], b.at[i]), a.at[i], b.at[i]));
}
INLINE vec vec_less(vec a, vec b, vec then, vec otherwise) {
    return EACH(vec, vbslq_f32(vcltq_f32(a.at[i], b.at[i]), then.at[i], otherwise.at[i]));
}
INLINE ints vec_round(vec a) { return EACH(ints, vcvtnq_s32_f32(a.at[i])); }
INLINE vec ints_to_vec(ints a) { return EACH(vec, vcvtq_f32_s32(a.at[i])); }
INLINE ints vec_bits(vec a) { return EACH(ints, vreinterpretq_s32_f32(a.at[i])); }
INLINE vec bits_vec(ints a) { return EACH(vec, vreinterpretq_f32_s32(a.at[i])); }
INLINE ints ints_set(int32_t x) { return EACH(ints, vdupq_n_s32(x)); }
INLINE ints ints_load(const int32_t *p) { return EACH(ints, vld1q_s32(p + 4 * i)); }
INLINE ints ints_add(ints a, ints b) { return EACH(ints, vaddq_s32(a.at[i], b.at[i])); }
INLINE ints ints_and(ints a, ints b) { return EACH(ints, vandq_s32(a.at[i], b.at[i])); }
INLINE ints ints_or(ints a, ints b) { return EACH(ints, vorrq_s32(a.at[i], b.at[i])); }
INLINE ints ints_xor(ints a, ints b) { return EACH(ints, veorq_s32(a.at[i], b.at[i])); }
INLINE ints ints_max(ints a, ints b) {
    return EACH(ints, vreinterpretq_s32_u32(
                          vmaxq_u32(vreinterpretq_u32_s32(a.at[i]), vreinterpretq_u32_s32(b.at[i]))));
}
#define ints_left(a, n) EACH(ints, vshlq_n_s32((a).at[i], n))
#define ints_right(a, n) \
    EACH(ints, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32((a).at[i]), n)))
INLINE ints ints_load_u16(const uint16_t *p) {
    return EACH(ints, vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p + 4 * i))));
}
INLINE ints ints_load_s8(const int8_t *p) {
    int8x16_t bytes = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return (ints){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
                   vmovl_s16(vget_high_s16(high))}};
}
INLINE vec vec_load_f16(const uint16_t *p) {
    return EACH(vec, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
/* The low and the high halves of the products of 32-bit numbers without sign. */
INLINE ints ints_product(ints a, uint32_t by, ints *high) {
    ints low;
    for (int i = 0; i < 4; i++) {
        uint32x4_t x = vreinterpretq_u32_s32(a.at[i]);
        uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vdup_n_u32(by)));
        uint32x4_t second = vreinterpretq_u32_u64(vmull_u32(vget_high_u32(x), vdup_n_u32(by)));
        low.at[i] = vreinterpretq_s32_u32(vuzp1q_u32(first, second));
        high->at[i] = vreinterpretq_s32_u32(vuzp2q_u32(first, second));
    }
    return low;
}
INLINE void ints_store_u16(uint16_t *p, ints a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vmovn_u32(vreinterpretq_u32_s32(a.at[i])));
}
INLINE void ints_store_u8(uint8_t *p, ints a) {
    for (int i = 0; i < 16; i++) p[i] = (uint8_t)a.at[i / 4][i % 4];
}
INLINE void vec_store_f16(uint16_t *p, vec a) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.at[i])));
}

#else
#error "the kernels are written for AVX2, AVX-512 and NEON"
#endif

/* The sum of 16 lanes: lane i and lane i + 8 first, then i + 4, i + 2 and i + 1. */
INLINE float vec_sum(vec a) {
#if defined(__x86_64__)
    __m256 eight = _mm256_add_ps(vec_low(a), vec_high(a));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float32x4_t four = vaddq_f32(vaddq_f32(a.at[0], a.at[2]), vaddq_f32(a.at[1], a.at[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
#endif
}

/* The largest of 16 lanes. */
INLINE float vec_most(vec a) {
#if defined(__x86_64__)
    __m256 eight = _mm256_max_ps(vec_low(a), vec_high(a));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.at[0], a.at[2]), vmaxq_f32(a.at[1], a.at[3])));
#endif
}

INLINE uint32_t ints_most(ints a) {
    uint32_t lanes[LANES], most = 0;
    memcpy(lanes, &a, sizeof lanes);
    for (int i = 0; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* e^x, with an error of a few units in the last place; 0 where that is below the smallest normal number, infinite for x
 * above 88, and no number where x is none. The polynomial is that of the Cephes library (Moshier 1992). */
INLINE vec vec_exp(vec x) {
    const float least = -87.33654f, largest = 88.0f;
    vec bounded = vec_less(vec_set(largest), x, vec_set(largest), vec_less(x, vec_set(least), vec_set(least), x));
    ints n = vec_round(vec_mul(bounded, vec_set(1.44269504088896341f)));
    vec steps = ints_to_vec(n);
    vec r = vec_fma(steps, vec_set(-0.693359375f), bounded);
    r = vec_fma(steps, vec_set(2.12194440e-4f), r);
    vec p = vec_set(1.9875691500e-4f);
    p = vec_fma(p, r, vec_set(1.3981999507e-3f));
    p = vec_fma(p, r, vec_set(8.3334519073e-3f));
    p = vec_fma(p, r, vec_set(4.1665795894e-2f));
    p = vec_fma(p, r, vec_set(1.6666665459e-1f));
    p = vec_fma(p, r, vec_set(5.0000001201e-1f));
    p = vec_fma(p, vec_mul(r, r), vec_add(r, vec_set(1.0f)));
    vec power = bits_vec(ints_left(ints_add(n, ints_set(127)), 23));
    vec found = vec_less(vec_set(largest), x, vec_set(__builtin_inff()), vec_mul(p, power));
    return vec_less(x, vec_set(least), vec_set(0.0f), found);
}

/* The natural logarithm of a normal positive number, with an error of a few units in the last place. The polynomial is
 * that of the Cephes library. */
INLINE vec vec_log(vec x) {
    ints bits = vec_bits(x);
    ints exponent = ints_add(ints_right(bits, 23), ints_set(-126));
    vec m = bits_vec(ints_or(ints_and(bits, ints_set(0x7fffff)), ints_set(0x3f000000))); /* from 0.5 up to 1 */
    vec e = ints_to_vec(exponent), half = vec_set(0.70710678f);
    e = vec_less(m, half, vec_sub(e, vec_set(1.0f)), e);
    m = vec_sub(vec_less(m, half, vec_add(m, m), m), vec_set(1.0f));
    vec square = vec_mul(m, m), p = vec_set(7.0376836292e-2f);
    p = vec_fma(p, m, vec_set(-1.1514610310e-1f));
    p = vec_fma(p, m, vec_set(1.1676998740e-1f));
    p = vec_fma(p, m, vec_set(-1.2420140846e-1f));
    p = vec_fma(p, m, vec_set(1.4249322787e-1f));
    p = vec_fma(p, m, vec_set(-1.6668057665e-1f));
    p = vec_fma(p, m, vec_set(2.0000714765e-1f));
    p = vec_fma(p, m, vec_set(-2.4999993993e-1f));
    p = vec_fma(p, m, vec_set(3.3333331174e-1f));
    p = vec_mul(p, vec_mul(m, square));
    p = vec_fma(e, vec_set(-2.12194440e-4f), p);
    p = vec_fma(square, vec_set(-0.5f), p);
    return vec_fma(e, vec_set(0.693359375f), vec_add(m, p));
}

/* 1 / (1 + e^-x). */
INLINE vec vec_sigmoid(vec x) {
    return vec_div(vec_set(1.0f), vec_add(vec_set(1.0f), vec_exp(vec_sub(vec_set(0.0f), x))));
}

/* tanh(x) = 1 - 2 / (1 + e^2x); near 0, where that cancels, its series. */
INLINE vec vec_tanh(vec x) {
    vec far = vec_sub(vec_set(1.0f), vec_div(vec_set(2.0f), vec_add(vec_set(1.0f), vec_exp(vec_add(x, x)))));
    vec square = vec_mul(x, x);
    vec series = vec_set(-0.021869488536155f);
    series = vec_fma(series, square, vec_set(0.053968253968254f));
    series = vec_fma(series, square, vec_set(-0.133333333333333f));
    series = vec_fma(series, square, vec_set(0.333333333333333f));
    vec near = vec_fma(vec_mul(vec_sub(vec_set(0.0f), x), square), series, x);
    return vec_less(square, vec_set(0.09f), near, far);
}

/* erf(x), with an error below six units in the last place: x times a quotient of polynomials of its square up to 3.92,
 * from where on it is rounded to 1. The quotient is a minimax fit of erf(x) / x, by Lawson's algorithm (1961) with the
 * denominators of the turn before as weights. */
INLINE vec vec_erf(vec x) {
    vec size = bits_vec(ints_and(vec_bits(x), ints_set(0x7fffffff))), end = vec_set(3.92f);
    vec t = vec_less(end, size, end, size), square = vec_mul(t, t);
    vec p = vec_set(2.0500908703979803e-06f), q = vec_set(3.809171903412789e-05f);
    p = vec_fma(p, square, vec_set(0.0002848820586223155f));
    p = vec_fma(p, square, vec_set(0.0037655895575881004f));
    p = vec_fma(p, square, vec_set(0.05274863541126251f));
    p = vec_fma(p, square, vec_set(0.19040584564208984f));
    p = vec_fma(p, square, vec_set(1.1283791065216064f));
    q = vec_fma(q, square, vec_set(0.001162528875283897f));
    q = vec_fma(q, square, vec_set(0.01496916078031063f));
    q = vec_fma(q, square, vec_set(0.1141088455915451f));
    q = vec_fma(q, square, vec_set(0.5020754933357239f));
    q = vec_fma(q, square, vec_set(1.0f));
    vec found = vec_div(vec_mul(t, p), q);
    found = vec_less(vec_set(1.0f), found, vec_set(1.0f), vec_less(end, size, vec_set(1.0f), found));
    return bits_vec(ints_or(vec_bits(found), ints_and(vec_bits(x), ints_set((int32_t)0x80000000))));
}

INLINE float float_of(vec a) {
    float lanes[LANES];
    vec_store(lanes, a);
    return lanes[0];
}

/* 16 numbers of a type in memory. */
INLINE vec numbers_load(const int type, const void *base, int64_t at) {
    if (type == FLOAT32) return vec_load((const float *)base + at);
    if (type == BFLOAT16) return bits_vec(ints_left(ints_load_u16((const uint16_t *)base + at), 16));
    if (type == FLOAT16) return vec_load_f16((const uint16_t *)base + at);
    ints bytes = ints_load_s8((const int8_t *)base + at);
    if (type == INT8) return ints_to_vec(bytes);
    /* float8's exponent and fraction become those of a float32, whose exponent is 120 too small. What is no number reads
     * as 480: the scale of such a head is no number either. */
    ints magnitude = ints_left(ints_and(bytes, ints_set(0x7f)), 20);
    ints sign = ints_and(bytes, ints_set((int32_t)0x80000000));
    return bits_vec(ints_or(sign, vec_bits(vec_mul(bits_vec(magnitude), vec_set(0x1p120f)))));
}

/* Write 16 numbers as float32, bfloat16 or float16, rounded to the nearest and half to even. */
INLINE void numbers_store(const int type, void *base, int64_t at, vec v) {
    if (type == FLOAT32) {
        vec_store((float *)base + at, v);
    } else if (type == FLOAT16) {
        vec_store_f16((uint16_t *)base + at, v);
    } else {
        ints bits = vec_bits(v);
        ints odd = ints_and(ints_right(bits, 16), ints_set(1));
        ints rounded = ints_right(ints_add(bits, ints_add(odd, ints_set(0x7fff))), 16);
        /* Infinity, and what is no number, are cut off: rounding could carry into the sign. */
        vec magnitude = bits_vec(ints_and(bits, ints_set(0x7fffffff)));
        vec cut = bits_vec(ints_right(bits, 16));
        rounded = vec_bits(vec_less(magnitude, vec_set(__builtin_inff()), bits_vec(rounded), cut));
        ints_store_u16((uint16_t *)base + at, rounded);
    }
}

/* The numbers as they are after being written in a type. */
INLINE vec numbers_rounded(const int type, vec v) {
    if (type == FLOAT32) return v;
    uint16_t copy[LANES];
    numbers_store(type, copy, 0, v);
    return numbers_load(type, copy, 0);
}

INLINE int bytes_of(const int type) { return type == FLOAT32 ? 4 : type >= INT8 ? 1 : 2; }
INLINE int64_t whole_vectors(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }

/* The same for the first `count` numbers if these are fewer than 16: nothing behind them is read or written, and the
 * others are 0. */
INLINE vec numbers_load_upto(const int type, const void *base, int64_t at, int64_t count) {
    if (count >= LANES) return numbers_load(type, base, at);
    char copy[LANES * sizeof(float)] = {0};
    memcpy(copy, (const char *)base + at * bytes_of(type), (size_t)(count * bytes_of(type)));
    return numbers_load(type, copy, 0);
}

INLINE void numbers_store_upto(const int type, void *base, int64_t at, int64_t count, vec v) {
    if (count >= LANES) {
        numbers_store(type, base, at, v);
        return;
    }
    char copy[LANES * sizeof(float)];
    numbers_store(type, copy, 0, v);
    memcpy((char *)base + at * bytes_of(type), copy, (size_t)(count * bytes_of(type)));
}
