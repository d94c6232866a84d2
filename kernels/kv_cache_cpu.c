/* Rotary embedding, and writing keys and values to the paged cache; `kv_cache.py` is the reference. */
#include "threads_cpu.h"
#include "vector_cpu.h"
#include <stddef.h>

#define MOST_HEAD_DIM 512
#define AT_A_TIME 4 /* tokens */

struct rotation {
    const void *qkv; /* [tokens, heads + 2 * kv_heads, head_dim]; without keys and values if kv_heads is 0 */
    void *query;     /* [tokens, heads, head_dim] */
    int64_t type, tokens, heads, kv_heads, head_dim;
    const float *cosine, *sine;          /* [tokens, head_dim / 2] */
    const void *query_norm, *key_norm;   /* weights in `type`, or NULL */
    int64_t query_norm_stride, key_norm_stride; /* head_dim if each head has weights of its own, else 0 */
    int64_t norms_last, norm_values;     /* whether heads are normed after rotation; whether values are normed */
    void *key;                           /* [blocks, kv_heads, head_dim, block_size] */
    void *value;                         /* [blocks, kv_heads, block_size, head_dim] */
    float *key_scale, *value_scale;      /* [blocks, kv_heads, block_size], of int8 */
    int64_t kv_type, block_size;
    const int64_t *slots; /* [tokens] */
    float eps;
};

/* Read a head, and divide it by its root mean square if it is normed. */
INLINE void norm_head(const int type, float *head, int64_t d, const void *weight, int64_t at, float eps) {
    vec squares = vec_set(0.0f);
    for (int64_t i = 0; i < d; i += LANES) {
        vec v = numbers_load_upto(FLOAT32, head, i, d - i);
        squares = vec_fma(v, v, squares);
    }
    float inverse = 1.0f / float_of(vec_sqrt(vec_set(vec_sum(squares) / (float)d + eps)));
    for (int64_t i = 0; i < d; i += LANES) {
        vec v = numbers_rounded(type, vec_mul(numbers_load_upto(FLOAT32, head, i, d - i), vec_set(inverse)));
        if (weight) v = numbers_rounded(type, vec_mul(v, numbers_load_upto(type, weight, at + i, d - i)));
        numbers_store_upto(FLOAT32, head, i, d - i, v);
    }
}

INLINE void rotate_head(const int type, float *head, int64_t d, const float *cosine, const float *sine) {
    int64_t half = d / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t left = half - i;
        vec a = numbers_load_upto(FLOAT32, head, i, left), b = numbers_load_upto(FLOAT32, head, half + i, left);
        vec c = numbers_load_upto(FLOAT32, cosine, i, left), s = numbers_load_upto(FLOAT32, sine, i, left);
        vec first = vec_fma(vec_sub(vec_set(0.0f), b), s, vec_mul(a, c));
        vec second = vec_fma(a, s, vec_mul(b, c));
        numbers_store_upto(FLOAT32, head, i, left, numbers_rounded(type, first));
        numbers_store_upto(FLOAT32, head, half + i, left, numbers_rounded(type, second));
    }
}

/* Divide a head by its largest magnitude / 127 and round it; return that step. */
static float quantize_head(const float *head, int64_t d, int8_t *to) {
    ints most = ints_set(0);
    for (int64_t i = 0; i < d; i += LANES)
        most = ints_max(most, ints_and(vec_bits(numbers_load_upto(FLOAT32, head, i, d - i)), ints_set(0x7fffffff)));
    uint32_t bits = ints_most(most);
    float step;
    memcpy(&step, &bits, 4);
    step /= 127.0f;
    vec divisor = vec_set(step < 1e-30f ? 1e-30f : step);
    for (int64_t i = 0; i < d; i += LANES) {
        uint8_t bytes[LANES];
        int64_t left = d - i < LANES ? d - i : LANES;
        ints_store_u8(bytes, vec_round(vec_div(numbers_load_upto(FLOAT32, head, i, left), divisor)));
        memcpy(to + i, bytes, (size_t)left);
    }
    return step;
}

/* Write a head as numbers `stride` apart. */
INLINE void store_head(const int type, const float *head, int64_t d, void *pool, int64_t at, int64_t stride, float *scale) {
    if (type == INT8) {
        int8_t bytes[MOST_HEAD_DIM];
        *scale = quantize_head(head, d, bytes);
        for (int64_t i = 0; i < d; i++) ((int8_t *)pool)[at + i * stride] = bytes[i];
        return;
    }
    if (stride == 1 || type == FLOAT32) {
        for (int64_t i = 0; stride == 1 && i < d; i += LANES)
            numbers_store_upto(type, pool, at + i, d - i, numbers_load_upto(FLOAT32, head, i, d - i));
        for (int64_t i = 0; stride != 1 && i < d; i++) ((float *)pool)[at + i * stride] = head[i];
        return;
    }
    uint16_t words[MOST_HEAD_DIM];
    for (int64_t i = 0; i < d; i += LANES)
        numbers_store_upto(type, words, i, d - i, numbers_load_upto(FLOAT32, head, i, d - i));
    for (int64_t i = 0; i < d; i++) ((uint16_t *)pool)[at + i * stride] = words[i];
}

INLINE void store(const struct rotation *r, const float *head, int64_t token, int64_t kv_head, int values) {
    int64_t slot = r->slots[token], d = r->head_dim, size = r->block_size;
    int64_t block = slot / size * r->kv_heads + kv_head, offset = slot % size;
    int64_t at = block * size * d + (values ? offset * d : offset), stride = values ? 1 : size;
    void *pool = values ? r->value : r->key;
    float *scales = values ? r->value_scale : r->key_scale;
    float *scale = scales ? scales + block * size + offset : NULL;
    switch (r->kv_type) {
    case FLOAT32: store_head(FLOAT32, head, d, pool, at, stride, scale); break;
    case BFLOAT16: store_head(BFLOAT16, head, d, pool, at, stride, scale); break;
    case FLOAT16: store_head(FLOAT16, head, d, pool, at, stride, scale); break;
    default: store_head(INT8, head, d, pool, at, stride, scale);
    }
}

INLINE void rotate_token(const int type, const struct rotation *r, int64_t token) {
    int64_t d = r->head_dim, turned = r->heads + r->kv_heads, all = turned + r->kv_heads;
    float head[MOST_HEAD_DIM];
    for (int64_t h = 0; h < all; h++) {
        int64_t from = (token * all + h) * d, own = h - r->heads; /* number of a key head, then of a value head */
        for (int64_t i = 0; i < d; i += LANES)
            numbers_store_upto(FLOAT32, head, i, d - i, numbers_load_upto(type, r->qkv, from + i, d - i));
        if (h >= turned) {
            if (r->norm_values) norm_head(type, head, d, NULL, 0, r->eps);
            store(r, head, token, own - r->kv_heads, 1);
            continue;
        }
        const void *norm = own < 0 ? r->query_norm : r->key_norm;
        int64_t at = own < 0 ? h * r->query_norm_stride : own * r->key_norm_stride;
        if (norm && !r->norms_last) norm_head(type, head, d, norm, at, r->eps);
        rotate_head(type, head, d, r->cosine + token * (d / 2), r->sine + token * (d / 2));
        if (norm && r->norms_last) norm_head(type, head, d, norm, at, r->eps);
        if (own >= 0) {
            store(r, head, token, own, 0);
            continue;
        }
        for (int64_t i = 0; i < d; i += LANES)
            numbers_store_upto(type, r->query, (token * r->heads + h) * d + i, d - i,
                               numbers_load_upto(FLOAT32, head, i, d - i));
    }
}

static void run(void *arguments, int64_t begin, int64_t end) {
    const struct rotation *r = arguments;
    for (int64_t token = begin; token < end; token++) {
        if (r->type == FLOAT32)
            rotate_token(FLOAT32, r, token);
        else
            rotate_token(BFLOAT16, r, token);
    }
}

/* Norm and rotate queries and keys, and write keys and values to the cache. */
void rotate_and_store(struct rotation *r) { run_in_parallel(run, r, r->tokens, AT_A_TIME); }
