/* The product of 8-bit rows with weights that stay in 4 bits, where groups of columns share a scale; `linear_w4a8_cpu.py`
 * says what is computed. Sums over a group are exact, and groups are added in the order of the columns: a row's bits
 * depend on no other row.
 *
 * Weights lie in panels of 16 rows. Four neighbouring columns of them are together, two numbers in a byte:
 * - AVX2 multiplies bytes without sign by such that have one and adds two products in 16 bits. Numbers of 4 bits leave
 *   room there for eight such sums, so that it multiplies twice as many of them as of 8-bit weights.
 * - AVX-512 with VNNI, and NEON with dot products, add four products in 32 bits. */
#include "panels_cpu.h"
#include "threads_cpu.h"

#define STRIDE (DEPTH + 64) /* of numbers: rows one power of two apart would share few places of a cache */
#define LEAST_GROUP 32
#define MOST_GROUPS (DEPTH / LEAST_GROUP)
#define MIDDLE 8 /* what is added to numbers from -8 to 7, so that they have no sign */

#if defined(__AVX512VNNI__)
#define TILE 12 /* rows whose sums are in registers together */
#define QUADS 2 /* fours of columns in a vector of the weight */
#elif defined(__AVX512BW__)
#define TILE 8
#define QUADS 2
#else
#define TILE 4
#define QUADS 1
#endif

struct product {
    const uint8_t *x;      /* [rows, columns] */
    const uint8_t *weight; /* packed */
    const float *scale;    /* [panels, groups, PANEL] */
    const float *shift;    /* the same of scales times zero points, or NULL if all these are 0 */
    float *out;            /* [rows, outputs] */
    int64_t rows, outputs, columns, group;
};

/* A block of rows as the panels multiply it. */
struct block {
    int8_t x[BLOCK * STRIDE];
    int32_t sums[BLOCK * MOST_GROUPS]; /* of each row's groups */
    float out[BLOCK * PANELS * PANEL];
};

/* Some groups of a panel. */
struct panel {
    const uint8_t *weight; /* [groups, group / 4 / QUADS, PANEL, 4] with two numbers in a byte */
    const float *scale, *shift; /* [groups, PANEL]; shift may be NULL */
    int64_t group;
};

/* Pack int8 numbers from -8 to 7, [outputs, columns] with a multiple of 16 and of 32, into half as many bytes. */
void pack_w4(const int8_t *weight, int64_t outputs, int64_t columns, uint8_t *packed) {
    memset(packed, 0, (size_t)(outputs * columns / 2));
    for (int64_t n = 0; n < outputs; n++) {
        uint8_t *panel = packed + n / PANEL * PANEL * columns / 2;
        for (int64_t k = 0; k < columns; k++) {
            int64_t row = n % PANEL, quad = k / 4 % QUADS;
            /* Of two fours of columns the second, or of 16 rows the last eight, are the high halves of bytes. */
            int high = QUADS == 2 ? quad == 1 : row >= PANEL / 2;
            int64_t place = QUADS == 2 ? row : row % (PANEL / 2);
            uint8_t *byte = panel + (k / 4 - quad) * PANEL * 2 + place * 4 + k % 4;
            *byte |= (uint8_t)((weight[n * columns + k] + MIDDLE) << (high ? 4 : 0));
        }
    }
}

/* Set sums [rows] to the products of `rows` rows with a panel's group of columns. */
INLINE void multiply_group(const int rows, const int8_t *x, const uint8_t *panel, int64_t group, ints *sums) {
    UNROLL
    for (int i = 0; i < rows; i++) sums[i] = ints_set(0);
#if defined(__AVX512BW__)
    const __m512i low_bits = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < group; k += LEAST_GROUP) {
#if !defined(__AVX512VNNI__)
        __m512i pairs[TILE];
        UNROLL
        for (int i = 0; i < rows; i++) pairs[i] = _mm512_setzero_si512();
#endif
        UNROLL
        for (int j = 0; j < LEAST_GROUP; j += 8) {
            __m512i both = _mm512_loadu_si512(panel + (k + j) * PANEL / 2);
            __builtin_prefetch(panel + (k + j) * PANEL / 2 + AHEAD);
            __m512i first = _mm512_and_si512(both, low_bits);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
            UNROLL
            for (int i = 0; i < rows; i++) {
                __m512i one = _mm512_set1_epi32(load_four(x + i * STRIDE + k + j));
                __m512i other = _mm512_set1_epi32(load_four(x + i * STRIDE + k + j + 4));
#if defined(__AVX512VNNI__)
                sums[i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[i], first, one), second, other);
#else
                pairs[i] = _mm512_add_epi16(pairs[i], _mm512_maddubs_epi16(first, one));
                pairs[i] = _mm512_add_epi16(pairs[i], _mm512_maddubs_epi16(second, other));
                /* Compilers would load all rows first, and have no registers left for the sums. */
                __asm__ volatile("" : "+v"(pairs[i])::"memory");
#endif
            }
        }
#if !defined(__AVX512VNNI__)
        UNROLL
        for (int i = 0; i < rows; i++)
            sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(pairs[i], _mm512_set1_epi16(1)));
#endif
    }
#elif defined(__AVX2__)
    const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < group; k += LEAST_GROUP) {
        __m256i low[TILE], high[TILE];
        UNROLL
        for (int i = 0; i < rows; i++) low[i] = high[i] = _mm256_setzero_si256();
        UNROLL
        for (int j = 0; j < LEAST_GROUP; j += 4) {
            __m256i both = _mm256_loadu_si256((const void *)(panel + (k + j) * PANEL / 2));
            if (j % 8 == 0) __builtin_prefetch(panel + (k + j) * PANEL / 2 + AHEAD);
            __m256i first = _mm256_and_si256(both, low_bits);
            __m256i second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low_bits);
            UNROLL
            for (int i = 0; i < rows; i++) {
                __m256i four = _mm256_set1_epi32(load_four(x + i * STRIDE + k + j));
                low[i] = _mm256_add_epi16(low[i], _mm256_maddubs_epi16(first, four));
                high[i] = _mm256_add_epi16(high[i], _mm256_maddubs_epi16(second, four));
                __asm__ volatile("" : "+x"(low[i]), "+x"(high[i])::"memory");
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++) {
            sums[i].low = _mm256_add_epi32(sums[i].low, _mm256_madd_epi16(low[i], ones));
            sums[i].high = _mm256_add_epi32(sums[i].high, _mm256_madd_epi16(high[i], ones));
        }
    }
#else
    for (int64_t k = 0; k < group; k += 4) {
        const uint8_t *at = panel + k * PANEL / 2;
        uint8x16_t both[2] = {vld1q_u8(at), vld1q_u8(at + 16)};
        UNROLL
        for (int i = 0; i < rows; i++) {
            int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(load_four(x + i * STRIDE + k)));
            for (int j = 0; j < 2; j++) {
                int8x16_t first = vreinterpretq_s8_u8(vandq_u8(both[j], vdupq_n_u8(15)));
                int8x16_t second = vreinterpretq_s8_u8(vshrq_n_u8(both[j], 4));
                sums[i].at[j] = vdotq_s32(sums[i].at[j], first, four);
                sums[i].at[j + 2] = vdotq_s32(sums[i].at[j + 2], second, four);
            }
        }
    }
#endif
}

/* Add the products of `rows` rows of a block, from row `first` on, with `groups` groups of a panel's columns. */
INLINE void multiply_tile(const int rows, const struct panel *w, const struct block *b, int64_t first, int64_t groups,
                          float *out) {
    const int8_t *x = b->x + first * STRIDE;
    const int32_t *of_rows = b->sums + first * MOST_GROUPS;
    for (int64_t g = 0; g < groups; g++) {
        ints sums[TILE];
        multiply_group(rows, x + g * w->group, w->weight + g * w->group * PANEL / 2, w->group, sums);
        vec scale = vec_load(w->scale + g * PANEL), shift = vec_load((w->shift ? w->shift : w->scale) + g * PANEL);
        UNROLL
        for (int i = 0; i < rows; i++) {
            int32_t of_row = of_rows[i * MOST_GROUPS + g];
            vec exact = ints_to_vec(ints_add(sums[i], ints_set(-MIDDLE * of_row)));
            vec result = vec_fma(exact, scale, vec_load(out + i * PANELS * PANEL));
            if (w->shift) result = vec_fma(vec_set(-(float)of_row), shift, result);
            vec_store(out + i * PANELS * PANEL, result);
        }
    }
}

static void multiply_rows(int64_t rows, const struct panel *w, const struct block *b, int64_t first, int64_t groups,
                          float *out) {
#define CASE(n) \
    case n: multiply_tile(n, w, b, first, groups, out); break
    switch (rows) {
        CASE(1); CASE(2); CASE(3); CASE(4);
#if TILE > 4
        CASE(5); CASE(6); CASE(7); CASE(8);
#endif
#if TILE > 8
        CASE(9); CASE(10); CASE(11); CASE(12);
#endif
    }
}

/* Copy groups of columns of rows with their signs, and add up each. */
static void copy_rows(const struct product *p, int64_t first, int64_t rows, int64_t from, int64_t groups,
                      struct block *b) {
    for (int64_t i = 0; i < rows; i++) {
        const uint8_t *x = p->x + (first + i) * p->columns + from * p->group;
        int8_t *to = b->x + i * STRIDE;
        for (int64_t g = 0; g < groups; g++) {
            int32_t sum = 0;
            for (int64_t k = 0; k < p->group; k++) sum += *to++ = (int8_t)(*x++ - 128);
            b->sums[i * MOST_GROUPS + g] = sum;
        }
    }
}

static void multiply_item(const struct product *p, int64_t first, int64_t first_panel, struct block *b) {
    int64_t rows = p->rows - first < BLOCK ? p->rows - first : BLOCK, panels = p->outputs / PANEL - first_panel;
    int64_t all = p->columns / p->group, at_a_time = DEPTH / p->group;
    if (panels > PANELS) panels = PANELS;
    memset(b->out, 0, sizeof(float) * (size_t)(rows * PANELS * PANEL));
    for (int64_t from = 0; from < all; from += at_a_time) {
        int64_t groups = all - from < at_a_time ? all - from : at_a_time;
        copy_rows(p, first, rows, from, groups, b);
        for (int64_t j = 0; j < panels; j++) {
            int64_t group = (first_panel + j) * all + from;
            struct panel w = {p->weight + group * p->group * PANEL / 2, p->scale + group * PANEL,
                              p->shift ? p->shift + group * PANEL : NULL, p->group};
            for (int64_t i = 0; i < rows; i += TILE)
                multiply_rows(rows - i < TILE ? rows - i : TILE, &w, b, i, groups, b->out + (i * PANELS + j) * PANEL);
        }
    }
    for (int64_t i = 0; i < rows; i++)
        memcpy(p->out + (first + i) * p->outputs + first_panel * PANEL, b->out + i * PANELS * PANEL,
               sizeof(float) * (size_t)(panels * PANEL));
}

static void run(void *arguments, int64_t begin, int64_t end) {
    const struct product *p = arguments;
    int64_t blocks = (p->rows + BLOCK - 1) / BLOCK;
    struct block b;
    /* The row blocks of one group of panels follow each other: its weights are read from memory once. */
    for (int64_t item = begin; item < end; item++)
        multiply_item(p, item % blocks * BLOCK, item / blocks * PANELS, &b);
}

void linear_w4a8(struct product *p) {
    int64_t blocks = (p->rows + BLOCK - 1) / BLOCK, panels = p->outputs / PANEL;
    run_in_parallel(run, p, blocks * ((panels + PANELS - 1) / PANELS), 1);
}
