/* The product of 8-bit rows with 8-bit weights; `linear_w8a8.py` is the reference, and sums are exact, as there.
 *
 * Weights lie in panels of 16 rows, in the order in which the instruction set multiplies them:
 * - AVX2, and AVX-512 without VNNI, have no exact product of bytes. Both are widened to 16 bits, and products of two
 *   neighbours are added in 32.
 * - AVX-512 with VNNI adds products of four neighbours, of bytes without sign with such that have one. Rows keep the 128
 *   by which they are shifted, and what that adds is taken off at the end.
 * - NEON with dot products does the same with signs on both sides. */
#include "panels_cpu.h"
#include "threads_cpu.h"

#define STRIDE (DEPTH + 64 / sizeof(operand)) /* of operands: rows one power of two apart would share few places of a cache */

#if defined(__AVX512VNNI__)
#define TILE 12 /* rows whose sums are in registers together */
#define ABREAST 2 /* panels that are multiplied together */
#define TOGETHER 4 /* neighbouring columns of a row of the weight, which one instruction adds */
typedef uint8_t operand;
enum { SHIFT = 0 };
#elif defined(__AVX2__)
#if defined(__AVX512BW__)
#define TILE 12
#else
#define TILE 6
#endif
#define ABREAST 1
#define TOGETHER 2
typedef int16_t operand;
enum { SHIFT = 128 };
#else
#define TILE 6
#define ABREAST 1
#define TOGETHER 4
typedef int8_t operand;
enum { SHIFT = 128 };
#endif

struct product {
    const uint8_t *x;      /* [rows, columns] */
    const int8_t *weight;  /* packed */
    const int32_t *sums;   /* [outputs] of the weight's rows */
    const float *scale;    /* [outputs] */
    float *out;            /* [rows, outputs] */
    int64_t rows, outputs, columns;
};

static int64_t padded(int64_t columns) { return (columns + 3) / 4 * 4; }

/* Bytes of a packed weight [outputs, columns]. */
int64_t packed_w8_bytes(int64_t outputs, int64_t columns) {
    return (outputs + PANEL - 1) / PANEL * PANEL * padded(columns);
}

/* Pack an int8 weight [outputs, columns]; `sums` are those of its rows. */
void pack_w8(const int8_t *weight, int64_t outputs, int64_t columns, int8_t *packed, int32_t *sums) {
    memset(packed, 0, (size_t)packed_w8_bytes(outputs, columns));
    for (int64_t n = 0; n < outputs; n++) {
        int8_t *panel = packed + n / PANEL * PANEL * padded(columns);
        int32_t sum = 0;
        for (int64_t k = 0; k < columns; k++) {
            int8_t w = weight[n * columns + k];
            panel[(k / TOGETHER * PANEL + n % PANEL) * TOGETHER + k % TOGETHER] = w;
            sum += w;
        }
        sums[n] = sum;
    }
}

/* Add to sums [rows, panels * PANEL] the products of `rows` rows with the `depth` columns of `panels` panels, which lie
 * `apart` bytes from each other. Only VNNI takes two panels: it then reads each operand of the rows once for both. */
INLINE void multiply_tile(const int rows, const int panels, const operand *x, const int8_t *panel, int64_t apart,
                          int64_t depth, int32_t *sums, int64_t stride) {
    (void)panels, (void)apart; /* used with VNNI alone */
#if defined(__AVX512VNNI__)
    __m512i sum[TILE][ABREAST], w[ABREAST];
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < panels; j++) sum[i][j] = _mm512_loadu_si512(sums + i * stride + j * PANEL);
    for (int64_t k = 0; k < depth; k += 4) {
        int64_t next = k * PANEL + ahead(k * PANEL, depth * PANEL, panels, apart);
        UNROLL
        for (int j = 0; j < panels; j++) {
            w[j] = _mm512_loadu_si512(panel + j * apart + k * PANEL);
            __builtin_prefetch(panel + j * apart + next);
        }
        UNROLL
        for (int i = 0; i < rows; i++) {
            __m512i four = _mm512_set1_epi32(load_four(x + i * STRIDE + k));
            for (int j = 0; j < panels; j++) {
                sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], four, w[j]);
                /* Compilers would load all rows first, and have no registers left for the sums. */
                __asm__ volatile("" : "+v"(sum[i][j])::"memory");
            }
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < panels; j++) _mm512_storeu_si512(sums + i * stride + j * PANEL, sum[i][j]);
#elif defined(__AVX512BW__)
    __m512i sum[TILE];
    UNROLL
    for (int i = 0; i < rows; i++) sum[i] = _mm512_loadu_si512(sums + i * stride);
    for (int64_t k = 0; k < depth; k += 2) {
        __builtin_prefetch(panel + k * PANEL + AHEAD);
        __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)(panel + k * PANEL)));
        UNROLL
        for (int i = 0; i < rows; i++) {
            __m512i both = _mm512_set1_epi32(load_four(x + i * STRIDE + k));
            sum[i] = _mm512_add_epi32(sum[i], _mm512_madd_epi16(both, w));
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) _mm512_storeu_si512(sums + i * stride, sum[i]);
#elif defined(__AVX2__)
    __m256i low[TILE], high[TILE];
    UNROLL
    for (int i = 0; i < rows; i++) {
        low[i] = _mm256_loadu_si256((const void *)(sums + i * stride));
        high[i] = _mm256_loadu_si256((const void *)(sums + i * stride + 8));
    }
    for (int64_t k = 0; k < depth; k += 2) {
        __builtin_prefetch(panel + k * PANEL + AHEAD);
        __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(panel + k * PANEL)));
        __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(panel + k * PANEL + 16)));
        UNROLL
        for (int i = 0; i < rows; i++) {
            __m256i both = _mm256_set1_epi32(load_four(x + i * STRIDE + k));
            low[i] = _mm256_add_epi32(low[i], _mm256_madd_epi16(both, first));
            high[i] = _mm256_add_epi32(high[i], _mm256_madd_epi16(both, second));
            /* Compilers would load all rows first, and have no registers left for the sums. */
            __asm__ volatile("" : "+x"(low[i]), "+x"(high[i])::"memory");
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        _mm256_storeu_si256((void *)(sums + i * stride), low[i]);
        _mm256_storeu_si256((void *)(sums + i * stride + 8), high[i]);
    }
#else
    int32x4_t sum[TILE][4];
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++) sum[i][j] = vld1q_s32(sums + i * stride + 4 * j);
    for (int64_t k = 0; k < depth; k += 4) {
        int8x16_t w[4];
        for (int j = 0; j < 4; j++) w[j] = vld1q_s8(panel + k * PANEL + 16 * j);
        UNROLL
        for (int i = 0; i < rows; i++) {
            int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(load_four(x + i * STRIDE + k)));
            for (int j = 0; j < 4; j++) sum[i][j] = vdotq_s32(sum[i][j], w[j], all);
        }
    }
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++) vst1q_s32(sums + i * stride + 4 * j, sum[i][j]);
#endif
}

static void multiply_rows(int64_t rows, int panels, const operand *x, const int8_t *panel, int64_t apart, int64_t depth,
                          int32_t *sums, int64_t stride) {
#define CASE(n)                                                                  \
    case n:                                                                      \
        if (panels == ABREAST)                                                   \
            multiply_tile(n, ABREAST, x, panel, apart, depth, sums, stride);     \
        else                                                                     \
            multiply_tile(n, 1, x, panel, apart, depth, sums, stride);           \
        break
    switch (rows) {
        CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#if TILE > 6
        CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
#endif
    }
}

/* Copy columns of rows as operands; columns behind the last one are 0. */
static void copy_operands(const struct product *p, int64_t first, int64_t rows, int64_t from, int64_t depth,
                          operand *to) {
    for (int64_t i = 0; i < rows; i++) {
        const uint8_t *x = p->x + (first + i) * p->columns + from;
        int64_t real = p->columns - from < depth ? p->columns - from : depth;
        for (int64_t k = 0; k < real; k++) to[i * STRIDE + k] = (operand)(x[k] - SHIFT);
        for (int64_t k = real; k < depth; k++) to[i * STRIDE + k] = 0;
    }
}

static void multiply_item(const struct product *p, int64_t first, int64_t first_panel) {
    operand x[BLOCK * STRIDE];
    int32_t sums[BLOCK * PANELS * PANEL];
    int64_t panels = (p->outputs + PANEL - 1) / PANEL, stride = PANELS * PANEL;
    int64_t rows = p->rows - first < BLOCK ? p->rows - first : BLOCK;
    int64_t some = panels - first_panel < PANELS ? panels - first_panel : PANELS;
    memset(sums, 0, sizeof(int32_t) * (size_t)(rows * stride));
    for (int64_t from = 0; from < padded(p->columns); from += DEPTH) {
        int64_t depth = padded(p->columns) - from < DEPTH ? padded(p->columns) - from : DEPTH;
        copy_operands(p, first, rows, from, depth, x);
        int abreast;
        for (int64_t j = 0; j < some; j += abreast) {
            const int8_t *panel = p->weight + ((first_panel + j) * padded(p->columns) + from) * PANEL;
            /* Few rows wait for memory, which one long run reads fastest. */
            abreast = rows <= TILE || some - j < ABREAST ? 1 : ABREAST;
            for (int64_t i = 0; i < rows; i += TILE)
                multiply_rows(rows - i < TILE ? rows - i : TILE, abreast, x + i * STRIDE, panel,
                              padded(p->columns) * PANEL, depth, sums + i * stride + j * PANEL, stride);
        }
    }
    for (int64_t j = 0; j < some; j++) {
        int64_t n = (first_panel + j) * PANEL, count = p->outputs - n;
        vec scale = numbers_load_upto(FLOAT32, p->scale, n, count);
        for (int64_t i = 0; i < rows; i++) {
            ints sum = ints_load(sums + i * stride + j * PANEL);
#if defined(__AVX512VNNI__)
            sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(_mm512_loadu_si512(p->sums + n), 7));
#endif
            numbers_store_upto(FLOAT32, p->out, (first + i) * p->outputs + n, count, vec_mul(ints_to_vec(sum), scale));
        }
    }
}

static void run(void *arguments, int64_t begin, int64_t end) {
    const struct product *p = arguments;
    int64_t blocks = (p->rows + BLOCK - 1) / BLOCK;
    /* The row blocks of one group of panels follow each other: its weights are read from memory once. */
    for (int64_t item = begin; item < end; item++)
        multiply_item(p, item % blocks * BLOCK, item / blocks * PANELS);
}

void linear_w8a8(struct product *p) {
    int64_t blocks = (p->rows + BLOCK - 1) / BLOCK, panels = (p->outputs + PANEL - 1) / PANEL;
    run_in_parallel(run, p, blocks * ((panels + PANELS - 1) / PANELS), 1);
}
