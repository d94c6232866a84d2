/* Paged attention over a ragged batch; `attention.py` is the reference.
 *
 * A token's result depends on its own query and on the keys and values that it sees, and on nothing else: keys are taken
 * in chunks of 64 positions from the sequence's start, with the running maximum and sum of softmax (Milakov and
 * Gimelshein 2018), and each number is computed in one order. So prompts may be cut anywhere, tokens of a prompt and
 * tokens decoded one by one are computed alike, and a prefix may be read once for all sequences that share it: what it
 * leaves, a maximum, a sum and a weighted sum of values, is where each of them goes on. */
#include "threads_cpu.h"
#include "vector_cpu.h"
#include <stdlib.h>

#define CHUNK 64               /* keys that are scored together */
#define ROWS 64                /* the most rows of an item: pairs of a token and a head */
#define NUMBERS (ROWS * 128)   /* the most numbers of the queries of an item's rows, so that they stay in the cache */
#define TILE 6                 /* rows whose sums are in registers together */
#define MOST_HEAD_DIM 512
#define FEW 8                  /* with more rows, keys and values are converted once for all of them */

struct attention {
    const void *query; /* [tokens, heads, head_dim] */
    void *out;
    int64_t type; /* of both: FLOAT32, BFLOAT16 or FLOAT16 */
    int64_t heads, kv_heads, head_dim;
    const void *key;   /* [blocks, kv_heads, head_dim, block_size] */
    const void *value; /* [blocks, kv_heads, block_size, head_dim] */
    const float *key_scale, *value_scale; /* [blocks, kv_heads, block_size], of 8-bit types */
    int64_t kv_type, block_size;
    int64_t sequences;
    const int64_t *offsets;  /* [sequences + 1] where each sequence's tokens begin */
    const int64_t *contexts; /* [sequences] positions up to a sequence's last token */
    const int32_t *table;    /* [sequences, most] blocks */
    int64_t most;
    int64_t prefixes;
    const int64_t *prefix; /* [prefixes, 3]: first sequence, number of sequences, keys that they share */
    int64_t window;        /* positions that a token sees, its own included; 0: all up to its own */
    float scale, softcap;  /* softcap 0: none */
    const float *sinks;    /* [heads], or NULL */
    float *states;         /* [tokens, heads, head_dim + 2] what prefixes leave, or NULL if there are none */
};

/* Tokens [first, first + count) of the step, of one sequence or of several with the same prefix, and their keys. */
struct span {
    int64_t first, count, position; /* of the first token; behind the keys if these are a prefix */
    const int32_t *blocks;
    int64_t begin, end;    /* keys */
    int resumes, suspends; /* whether a prefix was read before, and whether this is one */
};

/* What is computed at a time: a span's tokens with some of the heads that share a key head. Each pair is a row. */
struct item {
    struct span span;
    int64_t head, first_head, heads; /* key head; query heads */
};

/* What a row has of the keys so far. */
struct rows {
    int64_t count, stride;         /* of the numbers of a row: the head's size, rounded up to whole vectors */
    int64_t position[ROWS];        /* of the row's token; the last key that it sees */
    float query[NUMBERS];
    float sum[NUMBERS];            /* of the values, weighted */
    float most[ROWS], weight[ROWS]; /* the largest score, and the sum of the weights */
    float score[ROWS * CHUNK];     /* of a chunk's keys, then their weights */
};

struct chunk {
    const char *key[CHUNK / LANES], *value[CHUNK / LANES]; /* of 16 keys each */
    const float *key_scale[CHUNK / LANES], *value_scale[CHUNK / LANES];
    int64_t key_stride; /* numbers between two of a head's columns */
    int64_t keys;       /* those that the last row sees */
    int64_t key_line, value_line; /* bytes in the cache from a column of keys to the next, and of 16 numbers of values */
    const struct chunk *next;     /* what is read behind it; itself if nothing is */
};

/* Scores of 16 keys for `count` rows. The first rows call the keys' values from memory. */
INLINE void score_tile(const int count, const int type, struct rows *r, int64_t row, int64_t head_dim,
                       const struct chunk *c, int64_t v) {
    vec sum[TILE];
    const float *query = r->query + row * r->stride;
    float *score = r->score + row * CHUNK + v * LANES;
    UNROLL
    for (int i = 0; i < count; i++) sum[i] = vec_set(0.0f);
    for (int64_t d = 0; d < head_dim; d++) {
        vec keys = numbers_load(type, c->key[v], d * c->key_stride);
        if (row == 0) __builtin_prefetch(c->value[v] + d * c->value_line);
        UNROLL
        for (int i = 0; i < count; i++) sum[i] = vec_fma(vec_set(query[i * r->stride + d]), keys, sum[i]);
    }
    UNROLL
    for (int i = 0; i < count; i++) vec_store(score + i * CHUNK, sum[i]);
}

/* Add 16 columns of the weighted values of a chunk's keys to `count` rows' sums; fewer than 16 if `part` says so. The
 * first rows call the next chunk's keys from memory. */
INLINE void value_tile(const int count, const int type, const int part, struct rows *r, int64_t row, int64_t column,
                       int64_t head_dim, const struct chunk *c) {
    vec sum[TILE];
    float *at = r->sum + row * r->stride + column;
    const float *weight = r->score + row * CHUNK;
    UNROLL
    for (int i = 0; i < count; i++) sum[i] = vec_load(at + i * r->stride);
    for (int64_t v = 0; v * LANES < c->keys; v++) {
        int64_t keys = c->keys - v * LANES < LANES ? c->keys - v * LANES : LANES, from = column;
        for (int64_t t = 0; t < keys; t++, from += head_dim, weight++) {
            vec values = part ? numbers_load_upto(type, c->value[v], from, head_dim - column)
                              : numbers_load(type, c->value[v], from);
            if (row == 0) __builtin_prefetch(c->next->key[v] + (column + t) * c->next->key_line);
            UNROLL
            for (int i = 0; i < count; i++) sum[i] = vec_fma(vec_set(weight[i * CHUNK]), values, sum[i]);
        }
    }
    UNROLL
    for (int i = 0; i < count; i++) vec_store(at + i * r->stride, sum[i]);
}

/* Call a tile for `count` rows, at most TILE: compilers keep the sums of a fixed number of rows in registers. */
#define FOR_COUNT(count, tile, ...) \
    switch (count) { \
    case 1: tile(1, __VA_ARGS__); break; \
    case 2: tile(2, __VA_ARGS__); break; \
    case 3: tile(3, __VA_ARGS__); break; \
    case 4: tile(4, __VA_ARGS__); break; \
    case 5: tile(5, __VA_ARGS__); break; \
    default: tile(6, __VA_ARGS__); \
    }

INLINE void products(const int type, struct rows *r, int64_t head_dim, const struct chunk *c, int values) {
    for (int64_t row = 0; row < r->count; row += TILE) {
        int64_t count = r->count - row;
        if (!values) {
            for (int64_t v = 0; v * LANES < c->keys; v++)
                FOR_COUNT(count, score_tile, type, r, row, head_dim, c, v)
            continue;
        }
        int64_t whole = head_dim / LANES * LANES;
        for (int64_t column = 0; column < whole; column += LANES)
            FOR_COUNT(count, value_tile, type, 0, r, row, column, head_dim, c)
        if (whole < head_dim) FOR_COUNT(count, value_tile, type, 1, r, row, whole, head_dim, c)
    }
}

static void multiply(int64_t type, struct rows *r, int64_t head_dim, const struct chunk *c, int values) {
    switch (type) {
    case FLOAT32: products(FLOAT32, r, head_dim, c, values); break;
    case BFLOAT16: products(BFLOAT16, r, head_dim, c, values); break;
    case FLOAT16: products(FLOAT16, r, head_dim, c, values); break;
    case INT8: products(INT8, r, head_dim, c, values); break;
    default: products(FLOAT8, r, head_dim, c, values); break;
    }
}

/* Turn a row's scores into weights, and bring what it has to the new maximum. */
static void weigh(const struct attention *a, struct rows *r, int64_t row, const struct chunk *c, int64_t start) {
    float *score = r->score + row * CHUNK;
    int64_t last = r->position[row], first = a->window ? last - a->window + 1 : 0;
    int64_t vectors = (c->keys + LANES - 1) / LANES;
    vec most = vec_set(r->most[row]);
    for (int64_t v = 0; v < vectors; v++) {
        vec s = vec_load(score + v * LANES);
        if (c->key_scale[v]) s = vec_mul(s, vec_load(c->key_scale[v]));
        if (a->softcap != 0.0f) s = vec_mul(vec_tanh(vec_div(s, vec_set(a->softcap))), vec_set(a->softcap));
        vec_store(score + v * LANES, s);
        int64_t at = start + v * LANES;
        if (at < first || at + LANES - 1 > last) {
            for (int64_t i = 0; i < LANES; i++)
                if (at + i < first || at + i > last) score[v * LANES + i] = -__builtin_inff();
            s = vec_load(score + v * LANES);
        }
        most = vec_max(s, most);
    }
    float largest = vec_most(most), shift = largest == -__builtin_inff() ? 0.0f : largest; /* no key is seen yet */
    vec total = vec_set(0.0f);
    for (int64_t v = 0; v < vectors; v++) {
        vec weight = vec_exp(vec_sub(vec_load(score + v * LANES), vec_set(shift)));
        total = vec_add(total, weight);
        if (c->value_scale[v]) weight = vec_mul(weight, vec_load(c->value_scale[v]));
        vec_store(score + v * LANES, weight);
    }
    vec factor = vec_exp(vec_set(r->most[row] - shift));
    r->weight[row] = float_of(vec_fma(vec_set(r->weight[row]), factor, vec_set(vec_sum(total))));
    r->most[row] = largest;
    for (int64_t d = 0; d < r->stride; d += LANES) {
        float *sum = r->sum + row * r->stride + d;
        vec_store(sum, vec_mul(vec_load(sum), factor));
    }
}

/* Find the blocks of the keys [start, end), a chunk at most. Behind the last of them the first ones are named again. */
static void find(const struct attention *a, const struct item *it, int64_t start, int64_t end, struct chunk *c) {
    int64_t size = bytes_of((int)a->kv_type);
    c->keys = end - start < CHUNK ? end - start : CHUNK;
    for (int64_t v = 0; v < CHUNK / LANES; v++) {
        int64_t position = v * LANES < c->keys ? start + v * LANES : start, offset = position % a->block_size;
        int64_t block = it->span.blocks[position / a->block_size] * a->kv_heads + it->head;
        int64_t numbers = block * a->block_size * a->head_dim;
        c->key[v] = (const char *)a->key + (numbers + offset) * size;
        c->value[v] = (const char *)a->value + (numbers + offset * a->head_dim) * size;
        c->key_scale[v] = a->key_scale ? a->key_scale + block * a->block_size + offset : NULL;
        c->value_scale[v] = a->value_scale ? a->value_scale + block * a->block_size + offset : NULL;
    }
    c->key_stride = a->block_size;
    c->key_line = a->block_size * size;
    c->value_line = LANES * size;
}

/* Convert a chunk's keys or values to float32, in place of what `c` names; the numbers stay the same. */
static void convert(const struct attention *a, struct chunk *c, int values, float *to) {
    int64_t lines = values ? LANES : a->head_dim, width = values ? a->head_dim : LANES;
    int64_t from_stride = values ? a->head_dim : a->block_size;
    for (int64_t v = 0; v * LANES < c->keys; v++, to += LANES * a->head_dim) {
        const char **at = values ? &c->value[v] : &c->key[v];
        for (int64_t line = 0; line < lines; line++)
            for (int64_t i = 0; i < width; i += LANES) {
                vec numbers = numbers_load_upto((int)a->kv_type, *at, line * from_stride + i, width - i);
                numbers_store_upto(FLOAT32, to, line * width + i, width - i, numbers);
            }
        *at = (const char *)to;
    }
    if (!values) c->key_stride = LANES;
}

static void attend(const struct attention *a, const struct item *it, struct rows *r, float *wide) {
    const struct span *s = &it->span;
    int64_t last = r->position[r->count - 1], end = last + 1 < s->end ? last + 1 : s->end;
    int64_t seen = a->window ? r->position[0] - a->window + 1 : 0; /* the first key that a row sees */
    int converted = r->count > FEW && a->kv_type != FLOAT32;
    int64_t start = (seen > s->begin ? seen : s->begin) / CHUNK * CHUNK;
    struct chunk chunks[2];
    if (start < end) find(a, it, start, end, &chunks[0]);
    for (int i = 0; start < end; start += CHUNK, i = !i) {
        struct chunk *c = &chunks[i], *next = &chunks[!i];
        if (start + CHUNK < end) find(a, it, start + CHUNK, end, next);
        c->next = start + CHUNK < end ? next : c;
        if (converted) convert(a, c, 0, wide);
        multiply(converted ? FLOAT32 : a->kv_type, r, a->head_dim, c, 0);
        for (int64_t row = 0; row < r->count; row++) weigh(a, r, row, c, start);
        if (converted) convert(a, c, 1, wide);
        multiply(converted ? FLOAT32 : a->kv_type, r, a->head_dim, c, 1);
    }
}

/* The number of a row among all pairs of a token and a head. */
static int64_t pair(const struct attention *a, const struct item *it, int64_t row) {
    return (it->span.first + row / it->heads) * a->heads + it->first_head + row % it->heads;
}

static void begin_rows(const struct attention *a, const struct item *it, struct rows *r) {
    int64_t d = a->head_dim;
    r->count = it->span.count * it->heads;
    r->stride = whole_vectors(d);
    memset(r->sum, 0, sizeof(float) * r->count * r->stride);
    for (int64_t row = 0; row < r->count; row++) {
        r->position[row] = it->span.position + row / it->heads;
        for (int64_t i = 0; i < d; i += LANES) {
            vec q = numbers_load_upto((int)a->type, a->query, pair(a, it, row) * d + i, d - i);
            vec_store(r->query + row * r->stride + i, vec_mul(q, vec_set(a->scale)));
        }
        r->most[row] = -__builtin_inff();
        r->weight[row] = 0.0f;
        if (it->span.resumes) {
            const float *state = a->states + pair(a, it, row) * (d + 2);
            memcpy(r->sum + row * r->stride, state, sizeof(float) * d);
            r->most[row] = state[d];
            r->weight[row] = state[d + 1];
        }
    }
}

static void end_rows(const struct attention *a, const struct item *it, struct rows *r) {
    int64_t d = a->head_dim;
    for (int64_t row = 0; row < r->count; row++) {
        const float *sum = r->sum + row * r->stride;
        if (it->span.suspends) {
            float *state = a->states + pair(a, it, row) * (d + 2);
            memcpy(state, sum, sizeof(float) * d);
            state[d] = r->most[row];
            state[d + 1] = r->weight[row];
            continue;
        }
        vec factor = vec_set(1.0f), weight = vec_set(r->weight[row]);
        if (a->sinks) {
            float sink = a->sinks[it->first_head + row % it->heads];
            float most = sink > r->most[row] ? sink : r->most[row];
            factor = vec_exp(vec_set(r->most[row] - most));
            weight = vec_fma(weight, factor, vec_exp(vec_set(sink - most)));
        }
        factor = vec_div(factor, weight);
        for (int64_t i = 0; i < d; i += LANES)
            numbers_store_upto((int)a->type, a->out, pair(a, it, row) * d + i, d - i, vec_mul(vec_load(sum + i), factor));
    }
}

/* Spans, and how each is split into items. */
struct step {
    const struct attention *attention;
    const struct span *spans;
    int64_t heads, parts; /* query heads of an item, and the items of a key head */
};

static void run(void *arguments, int64_t begin, int64_t end) {
    const struct step *step = arguments;
    const struct attention *a = step->attention;
    struct rows r;
    float wide[CHUNK * MOST_HEAD_DIM];
    for (int64_t i = begin; i < end; i++) {
        struct item it = {.span = step->spans[i / step->parts / a->kv_heads], .head = i / step->parts % a->kv_heads};
        int64_t group = a->heads / a->kv_heads, from = i % step->parts * step->heads;
        it.first_head = it.head * group + from;
        it.heads = group - from < step->heads ? group - from : step->heads;
        begin_rows(a, &it, &r);
        attend(a, &it, &r, wide);
        end_rows(a, &it, &r);
    }
}

/* Cut `count` tokens into spans of at most `most` tokens; return the next free span. */
static struct span *cut(struct span *next, struct span whole, int64_t most) {
    for (int64_t done = 0; done < whole.count; done += most) {
        *next = whole;
        next->first += done;
        next->position += whole.suspends ? 0 : done;
        next->count = whole.count - done < most ? whole.count - done : most;
        next++;
    }
    return next;
}

/* Compute attention's outputs for the tokens of all sequences. Returns 0, or 1 where memory is missing. */
int attention(const struct attention *a) {
    int64_t tokens = a->offsets[a->sequences], group = a->heads / a->kv_heads;
    int64_t rows = NUMBERS / whole_vectors(a->head_dim) < ROWS ? NUMBERS / whole_vectors(a->head_dim) : ROWS;
    int64_t heads = group < rows ? group : rows, at_a_time = rows / heads;
    struct step step = {a, NULL, heads, (group + heads - 1) / heads};
    struct span *spans = malloc(sizeof(struct span) * (2 * tokens + 1)), *next = spans;
    int64_t *shared = calloc(a->sequences + 1, sizeof(int64_t)); /* keys of each sequence's prefix */
    if (spans == NULL || shared == NULL) {
        free(spans);
        free(shared);
        return 1;
    }
    for (int64_t p = 0; p < a->prefixes; p++) {
        int64_t first = a->prefix[3 * p], last = first + a->prefix[3 * p + 1], keys = a->prefix[3 * p + 2];
        for (int64_t s = first; s < last; s++) shared[s] = keys;
        struct span prefix = {a->offsets[first], a->offsets[last] - a->offsets[first], keys,
                              a->table + first * a->most, 0, keys, 0, 1};
        next = cut(next, prefix, at_a_time);
    }
    step.spans = spans;
    run_in_parallel(run, &step, (next - spans) * a->kv_heads * step.parts, 1);
    next = spans;
    for (int64_t s = 0; s < a->sequences; s++) {
        int64_t count = a->offsets[s + 1] - a->offsets[s];
        struct span own = {a->offsets[s], count, a->contexts[s] - count, a->table + s * a->most,
                           shared[s], a->contexts[s], shared[s] > 0, 0};
        next = cut(next, own, at_a_time);
    }
    run_in_parallel(run, &step, (next - spans) * a->kv_heads * step.parts, 1);
    free(spans);
    free(shared);
    return 0;
}
