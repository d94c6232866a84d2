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
#define TILE 8 /* rows whose sums are in registers together */
#define ABREAST 2 /* panels that are multiplied together */
#define QUADS 2 /* fours of columns in a vector of the weight */
#elif defined(__AVX512BW__)
#define TILE 8
#define ABREAST 1
#define QUADS 2
#else
#define TILE 4
#define ABREAST 1
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

/* Some groups of a panel, and of those behind it. */
struct panel {
    const uint8_t *weight; /* [groups, group / 4 / QUADS, PANEL, 4] with two numbers in a byte */
    const float *scale, *shift; /* [groups, PANEL]; shift may be NULL */
    int64_t group, all; /* all groups of a panel: so far away is the next one */
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

/* Add to sums [rows, ABREAST] the products of `rows` rows with a group of columns of `panels` panels, which lie `apart`
 * bytes from each other, and call from memory what lies `ahead` bytes behind. Only VNNI takes two panels: it then reads
 * each four of a row's columns once for both. */
INLINE void multiply_group(const int rows, const int panels, const int8_t *x, const uint8_t *panel, int64_t apart,
                           int64_t group, int64_t ahead, ints sums[][ABREAST]) {
    (void)panels, (void)apart, (void)ahead; /* not used by all instruction sets */
#if defined(__AVX512VNNI__)
    const __m512i low_bits = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < group; k += 8) {
        __m512i first[ABREAST], second[ABREAST];
        UNROLL
        for (int j = 0; j < panels; j++) {
            const uint8_t *at = panel + j * apart + k * PANEL / 2;
            __m512i both = _mm512_loadu_si512(at);
            __builtin_prefetch(at + ahead);
            first[j] = _mm512_and_si512(both, low_bits);
            second[j] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
        }
        UNROLL
        for (int i = 0; i < rows; i++) {
            __m512i one = _mm512_set1_epi32(load_four(x + i * STRIDE + k));
            __m512i other = _mm512_set1_epi32(load_four(x + i * STRIDE + k + 4));
            /* Compilers would load these again for each panel, and all rows' first: no registers would be left for sums. */
            if (panels > 1) __asm__ volatile("" : "+v"(one), "+v"(other)::"memory");
            for (int j = 0; j < panels; j++) {
                sums[i][j] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[i][j], first[j], one), second[j], other);
                __asm__ volatile("" : "+v"(sums[i][j]));
            }
        }
    }
#elif defined(__AVX512BW__)
    const __m512i low_bits = _mm512_set1_epi8(15);
    for (int64_t k = 0; k < group; k += LEAST_GROUP) {
        __m512i pairs[TILE];
        UNROLL
        for (int i = 0; i < rows; i++) pairs[i] = _mm512_setzero_si512();
        UNROLL
        for (int j = 0; j < LEAST_GROUP; j += 8) {
            __m512i both = _mm512_loadu_si512(panel + (k + j) * PANEL / 2);
            __builtin_prefetch(panel + (k + j) * PANEL / 2 + ahead);
            __m512i first = _mm512_and_si512(both, low_bits);
            __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_bits);
            UNROLL
            for (int i = 0; i < rows; i++) {
                __m512i one = _mm512_set1_epi32(load_four(x + i * STRIDE + k + j));
                __m512i other = _mm512_set1_epi32(load_four(x + i * STRIDE + k + j + 4));
                pairs[i] = _mm512_add_epi16(pairs[i], _mm512_maddubs_epi16(first, one));
                pairs[i] = _mm512_add_epi16(pairs[i], _mm512_maddubs_epi16(second, other));
                /* Compilers would load all rows first, and have no registers left for the sums. */
                __asm__ volatile("" : "+v"(pairs[i])::"memory");
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++)
            sums[i][0] = _mm512_add_epi32(sums[i][0], _mm512_madd_epi16(pairs[i], _mm512_set1_epi16(1)));
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
            if (j % 8 == 0) __builtin_prefetch(panel + (k + j) * PANEL / 2 + ahead);
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
            sums[i][0].low = _mm256_add_epi32(sums[i][0].low, _mm256_madd_epi16(low[i], ones));
            sums[i][0].high = _mm256_add_epi32(sums[i][0].high, _mm256_madd_epi16(high[i], ones));
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
                sums[i][0].at[j] = vdotq_s32(sums[i][0].at[j], first, four);
                sums[i][0].at[j + 2] = vdotq_s32(sums[i][0].at[j + 2], second, four);
            }
        }
    }
#endif
}

/* Add the products of `rows` rows of a block, from row `first` on, with `groups` groups of columns of `panels` panels. */
INLINE void multiply_tile(const int rows, const int panels, const struct panel *w, const struct block *b, int64_t first,
                          int64_t groups, float *out) {
    const int8_t *x = b->x + first * STRIDE;
    const int32_t *of_rows = b->sums + first * MOST_GROUPS;
    const int64_t bytes = w->group * PANEL / 2; /* of a panel's group */
    for (int64_t g = 0; g < groups; g++) {
        ints sums[TILE][ABREAST];
        UNROLL
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < panels; j++) sums[i][j] = ints_set(-MIDDLE * of_rows[i * MOST_GROUPS + g]);
        multiply_group(rows, panels, x + g * w->group, w->weight + g * bytes, w->all * bytes, w->group,
                       ahead(g * bytes, groups * bytes, panels, w->all * bytes), sums);
        UNROLL
        for (int j = 0; j < panels; j++) {
            int64_t at = (g + j * w->all) * PANEL;
            vec scale = vec_load(w->scale + at);
            UNROLL
            for (int i = 0; i < rows; i++) {
                float *to = out + i * PANELS * PANEL + j * PANEL;
                vec_store(to, vec_fma(ints_to_vec(sums[i][j]), scale, vec_load(to)));
            }
            if (!w->shift) continue;
            vec shift = vec_load(w->shift + at);
            UNROLL
            for (int i = 0; i < rows; i++) {
                float *to = out + i * PANELS * PANEL + j * PANEL;
                vec_store(to, vec_fma(vec_set(-(float)of_rows[i * MOST_GROUPS + g]), shift, vec_load(to)));
            }
        }
    }
}

static void multiply_rows(int64_t rows, int panels, const struct panel *w, const struct block *b, int64_t first,
                          int64_t groups, float *out) {
#define CASE(n)                                                    \
    case n:                                                        \
        if (panels == ABREAST)                                     \
            multiply_tile(n, ABREAST, w, b, first, groups, out);   \
        else                                                       \
            multiply_tile(n, 1, w, b, first, groups, out);         \
        break
    switch (rows) {
        CASE(1); CASE(2); CASE(3); CASE(4);
#if TILE > 4
        CASE(5); CASE(6); CASE(7); CASE(8);
#endif
    }
}

/* The sum of bytes, a multiple of 32. */
INLINE int32_t add_up(const uint8_t *x, int64_t count) {
#if defined(__AVX2__)
    __m256i sums = _mm256_setzero_si256();
    for (int64_t k = 0; k < count; k += 32)
        sums = _mm256_add_epi64(sums, _mm256_sad_epu8(_mm256_loadu_si256((const void *)(x + k)), _mm256_setzero_si256()));
    __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2);
#else
    uint32x4_t sums = vdupq_n_u32(0);
    for (int64_t k = 0; k < count; k += 16) sums = vpadalq_u16(sums, vpaddlq_u8(vld1q_u8(x + k)));
    return (int32_t)vaddvq_u32(sums);
#endif
}

/* Copy groups of columns of rows with their signs, and add up each. */
static void copy_rows(const struct product *p, int64_t first, int64_t rows, int64_t from, int64_t groups,
                      struct block *b) {
    for (int64_t i = 0; i < rows; i++) {
        const uint8_t *x = p->x + (first + i) * p->columns + from * p->group;
        for (int64_t k = 0; k < groups * p->group; k++) b->x[i * STRIDE + k] = (int8_t)(x[k] - 128);
        for (int64_t g = 0; g < groups; g++)
            b->sums[i * MOST_GROUPS + g] = add_up(x + g * p->group, p->group) - 128 * (int32_t)p->group;
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
        int abreast;
        for (int64_t j = 0; j < panels; j += abreast) {
            int64_t group = (first_panel + j) * all + from;
            struct panel w = {p->weight + group * p->group * PANEL / 2, p->scale + group * PANEL,
                              p->shift ? p->shift + group * PANEL : NULL, p->group, all};
            /* Few rows wait for memory, which one long run reads fastest. */
            abreast = rows <= TILE || panels - j < ABREAST ? 1 : ABREAST;
            for (int64_t i = 0; i < rows; i += TILE)
                multiply_rows(rows - i < TILE ? rows - i : TILE, abreast, &w, b, i, groups,
                              b->out + (i * PANELS + j) * PANEL);
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
