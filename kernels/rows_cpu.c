/* Norms and activations, whose results are rounded to 8 bits at once where the next product takes these; `norm.py`,
 * `activation.py` and `rows.py` are the references. A row is read from memory once. */
#include "threads_cpu.h"
#include "vector_cpu.h"

enum { SILU, GELU, GELU_TANH, RELU2, CLAMPED_SWIGLU };

/* Rows that a thread takes at a time. */
static int64_t at_a_time(int64_t columns) { return columns < 8192 ? 1 + 8192 / (columns + 1) : 1; }

INLINE ints magnitude(vec v) { return ints_and(vec_bits(v), ints_set(0x7fffffff)); }

/* Round a float32 row to bytes about 128; return its scale. `most` is the largest magnitude, as bits: as integers, these
 * are in the order of the numbers, with what is not finite above all others. So such a row has such a scale. */
static float quantize(const float *row, int64_t columns, ints most, uint8_t *to) {
    uint32_t bits = ints_most(most);
    float absmax;
    memcpy(&absmax, &bits, 4);
    float step = (absmax < 1e-30f ? 1e-30f : absmax) / 127.0f;
    vec factor = vec_set(1.0f / step);
    for (int64_t i = 0; i < columns; i += LANES) {
        int64_t left = columns - i;
        ints rounded = ints_add(vec_round(vec_mul(numbers_load_upto(FLOAT32, row, i, left), factor)), ints_set(128));
        if (left >= LANES) {
            ints_store_u8(to + i, rounded);
        } else {
            uint8_t bytes[LANES];
            ints_store_u8(bytes, rounded);
            memcpy(to + i, bytes, (size_t)left);
        }
    }
    return step;
}

struct add_norm {
    void *x;             /* [rows, columns], to which y is added */
    const void *y;       /* [rows, columns] in x's type, or NULL */
    const float *y_scale; /* [rows] or NULL */
    const void *weight;  /* [columns] in x's type, or NULL */
    const void *bias;    /* [columns] in x's type: a LayerNorm; NULL: an RMSNorm */
    void *out;           /* [rows, columns] in x's type, or bytes */
    float *scale;        /* [rows] of bytes; NULL: `out` is not rounded to bytes */
    int64_t type, rows, columns;
    float eps;
    int normed; /* whether there is a norm */
};

/* Subtract the mean from a row; return the sums of squares of what is left. The sums are those of the numbers in it. */
static vec center(float *row, int64_t columns, vec sums) {
    vec mean = vec_set(vec_sum(sums) / (float)columns), squares = vec_set(0.0f);
    for (int64_t i = 0; i < columns; i += LANES) {
        vec_store(row + i, vec_sub(vec_load(row + i), mean));
        vec v = numbers_load_upto(FLOAT32, row, i, columns - i);
        squares = vec_fma(v, v, squares);
    }
    return squares;
}

INLINE void add_norm_row(const int type, const struct add_norm *a, int64_t row, float *scratch) {
    int64_t n = a->columns, at = row * n;
    vec squares = vec_set(0.0f), sums = squares, y_scale = vec_set(a->y_scale ? a->y_scale[row] : 1.0f);
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = numbers_load_upto(type, a->x, at + i, n - i);
        if (a->y) {
            vec y = numbers_load_upto(type, a->y, at + i, n - i);
            v = numbers_rounded(type, a->y_scale ? vec_fma(y, y_scale, v) : vec_add(v, y));
            numbers_store_upto(type, a->x, at + i, n - i, v);
        }
        squares = vec_fma(v, v, squares);
        sums = vec_add(sums, v);
        vec_store(scratch + i, v);
    }
    if (a->bias) squares = center(scratch, n, sums);
    float inverse = a->normed ? 1.0f / float_of(vec_sqrt(vec_set(vec_sum(squares) / (float)n + a->eps))) : 1.0f;
    /* What goes to bytes is not yet multiplied by the inverse, which is one factor of the row and goes into the scale; a
     * bias must be added behind it. */
    vec factor = vec_set(a->scale && !a->bias ? 1.0f : inverse);
    ints most = ints_set(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = vec_mul(vec_load(scratch + i), factor);
        if (a->bias) {
            v = vec_fma(v, numbers_load_upto(type, a->weight, i, n - i), numbers_load_upto(type, a->bias, i, n - i));
        } else {
            if (a->scale == NULL) v = numbers_rounded(type, v);
            if (a->weight) v = vec_mul(v, numbers_load_upto(type, a->weight, i, n - i));
        }
        if (a->scale) {
            most = ints_max(most, magnitude(v));
            vec_store(scratch + i, v);
        } else {
            numbers_store_upto(type, a->out, at + i, n - i, v);
        }
    }
    if (a->scale) {
        float step = quantize(scratch, n, most, (uint8_t *)a->out + at);
        a->scale[row] = a->bias ? step : step * inverse;
    }
}

static void run_add_norm(void *arguments, int64_t begin, int64_t end) {
    const struct add_norm *a = arguments;
    float scratch[whole_vectors(a->columns)];
    for (int64_t row = begin; row < end; row++) {
        if (a->type == FLOAT32)
            add_norm_row(FLOAT32, a, row, scratch);
        else
            add_norm_row(BFLOAT16, a, row, scratch);
    }
}

/* x += y * y_scale, and out = the norm of x. */
void add_norm(struct add_norm *a) { run_in_parallel(run_add_norm, a, a->rows, at_a_time(a->columns)); }

struct activation {
    const void *x;      /* [rows, 2 * columns] gate and up, or [rows, columns] without a gate */
    const float *scale; /* [rows] of x, or NULL */
    void *out;          /* [rows, columns] in x's type, or bytes */
    float *out_scale;   /* [rows] of bytes; NULL: `out` is not rounded to bytes */
    int64_t type, rows, columns, kind, gated;
};

INLINE vec activated(const int kind, vec x) {
    if (kind == SILU) return vec_mul(x, vec_sigmoid(x));
    if (kind == RELU2) { /* what is no number stays so */
        vec rectified = vec_less(x, vec_set(0.0f), vec_set(0.0f), x);
        return vec_mul(rectified, rectified);
    }
    vec half = vec_mul(x, vec_set(0.5f));
    if (kind == GELU) return vec_fma(half, vec_erf(vec_mul(x, vec_set(0.7071067811865476f))), half);
    vec inner = vec_mul(vec_fma(vec_mul(vec_mul(x, x), x), vec_set(0.044715f), x), vec_set(0.7978845608028654f));
    return vec_fma(half, vec_tanh(inner), half);
}

INLINE void activate_row(const int type, const int kind, const struct activation *a, int64_t row, float *scratch) {
    int64_t n = a->columns, at = row * n, gate = a->gated ? 2 * at : at, up = gate + n;
    float scale = a->scale ? a->scale[row] : 1.0f;
    /* The scale of `up`, as a factor of the whole row, goes into the scale of bytes. */
    int up_is_scaled = a->gated && kind != CLAMPED_SWIGLU;
    ints most = ints_set(0);
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = vec_mul(numbers_load_upto(type, a->x, gate + i, n - i), vec_set(scale));
        if (kind == CLAMPED_SWIGLU) {
            vec u = vec_mul(numbers_load_upto(type, a->x, up + i, n - i), vec_set(scale));
            u = vec_less(vec_set(7.0f), u, vec_set(7.0f), vec_less(u, vec_set(-7.0f), vec_set(-7.0f), u));
            v = vec_less(vec_set(7.0f), v, vec_set(7.0f), v);
            vec share = vec_mul(v, vec_sigmoid(vec_mul(v, vec_set(1.702f))));
            v = vec_mul(share, vec_add(u, vec_set(1.0f)));
        } else {
            v = activated(kind, v);
            if (a->gated) v = vec_mul(v, numbers_load_upto(type, a->x, up + i, n - i));
        }
        if (a->out_scale) {
            most = ints_max(most, magnitude(v));
            vec_store(scratch + i, v);
        } else {
            numbers_store_upto(type, a->out, at + i, n - i, up_is_scaled ? vec_mul(v, vec_set(scale)) : v);
        }
    }
    if (a->out_scale) {
        float step = quantize(scratch, n, most, (uint8_t *)a->out + at);
        a->out_scale[row] = up_is_scaled ? step * scale : step;
    }
}

INLINE void activate_rows(const int type, const struct activation *a, int64_t begin, int64_t end) {
    float scratch[whole_vectors(a->columns)];
    for (int64_t row = begin; row < end; row++)
        switch (a->kind) {
        case SILU: activate_row(type, SILU, a, row, scratch); break;
        case GELU: activate_row(type, GELU, a, row, scratch); break;
        case GELU_TANH: activate_row(type, GELU_TANH, a, row, scratch); break;
        case RELU2: activate_row(type, RELU2, a, row, scratch); break;
        default: activate_row(type, CLAMPED_SWIGLU, a, row, scratch);
        }
}

static void run_activation(void *arguments, int64_t begin, int64_t end) {
    const struct activation *a = arguments;
    if (a->type == FLOAT32)
        activate_rows(FLOAT32, a, begin, end);
    else
        activate_rows(BFLOAT16, a, begin, end);
}

/* out = activation(gate) * up. */
void activate(struct activation *a) { run_in_parallel(run_activation, a, a->rows, at_a_time(a->columns)); }
