/* Choosing tokens from logits, the most likely or by Gumbel's trick; `sampling.py` is the reference.
 *
 * A row's noise is Philox's (Salmon et al. 2011), keyed by its seed, the position and the token, as there; it is computed
 * in float32, and no noise is stored. */
#include "threads_cpu.h"
#include "vector_cpu.h"

struct sampling {
    const float *logits;      /* [rows, vocabulary] */
    const float *temperature; /* [rows]; 0: the most likely token */
    const int64_t *seeds, *positions; /* [rows] */
    int64_t *tokens;          /* [rows] */
    uint8_t *finite;          /* [rows] whether the largest logit is finite, and none is no number */
    int64_t rows, vocabulary;
};

struct words {
    ints at[4]; /* of 16 counters: token 4 * counter + i has word i */
};

static struct words philox(ints counter, uint32_t position, uint64_t seed) {
    struct words w = {{counter, ints_set((int32_t)position), ints_set(0), ints_set(0)}};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        ints high0, high1;
        ints low0 = ints_product(w.at[0], 0xD2511F53u, &high0), low1 = ints_product(w.at[2], 0xCD9E8D57u, &high1);
        w.at[0] = ints_xor(ints_xor(high1, w.at[1]), ints_set((int32_t)k0));
        w.at[2] = ints_xor(ints_xor(high0, w.at[3]), ints_set((int32_t)k1));
        w.at[1] = low1;
        w.at[3] = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return w;
}

/* (word + 0.5) / 2^32, rounded once. */
INLINE vec share(ints word) {
    vec high = ints_to_vec(ints_right(word, 16)), low = ints_to_vec(ints_and(word, ints_set(0xffff)));
    return vec_mul(vec_fma(high, vec_set(65536.0f), vec_add(low, vec_set(0.5f))), vec_set(0x1p-32f));
}

/* Gumbel noise -log(-log(u)) of u = (word + 0.5) / 2^32. Where u is above a half, the logarithm is that of 1 - t, with t
 * counted from the other end: u itself would be rounded to 1. */
INLINE vec gumbel(ints word) {
    vec u = share(word), t = share(ints_xor(word, ints_set(-1)));
    vec y = vec_sub(vec_set(1.0f), t), lost = vec_sub(vec_set(1.0f), y); /* y is rounded: 1 - lost, not 1 - t */
    vec near = vec_div(vec_mul(vec_log(y), t), lost);
    near = vec_less(vec_set(0.0f), lost, near, vec_sub(vec_set(0.0f), t));
    vec logarithm = vec_less(t, vec_set(0.5f), near, vec_log(u));
    return vec_sub(vec_set(0.0f), vec_log(vec_sub(vec_set(0.0f), logarithm)));
}

/* The best score of each lane so far, and its token. */
struct best {
    vec score;
    ints token;
};

INLINE void look_at(struct best *b, vec score, ints token) {
    b->token = vec_bits(vec_less(b->score, score, bits_vec(token), bits_vec(b->token)));
    b->score = vec_less(b->score, score, score, b->score);
}

/* The token with the best score; of equal ones, the first. */
static int64_t first_best(const struct best *b) {
    float score[LANES];
    int32_t token[LANES];
    vec_store(score, b->score);
    memcpy(token, &b->token, sizeof token);
    int at = 0;
    for (int i = 1; i < LANES; i++)
        if (score[i] > score[at] || (score[i] == score[at] && token[i] < token[at])) at = i;
    return token[at];
}

/* Read up to 16 logits; what is behind the last one is never chosen. */
INLINE vec logits_at(const float *row, int64_t at, int64_t count) {
    if (count >= LANES) return vec_load(row + at);
    float copy[LANES];
    for (int i = 0; i < LANES; i++) copy[i] = i < count ? row[at + i] : -__builtin_inff();
    return vec_load(copy);
}

static void sample_row(const struct sampling *s, int64_t row) {
    const float *logits = s->logits + row * s->vocabulary;
    int32_t lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    ints numbers = ints_load(lanes), magnitude = ints_set(0);
    struct best likely = {vec_set(-__builtin_inff()), ints_set(0)};
    for (int64_t v = 0; v < s->vocabulary; v += LANES) {
        vec x = logits_at(logits, v, s->vocabulary - v);
        magnitude = ints_max(magnitude, ints_and(vec_bits(x), ints_set(0x7fffffff)));
        look_at(&likely, x, ints_add(numbers, ints_set((int32_t)v)));
    }
    int64_t token = first_best(&likely);
    float most = logits[token];
    int is_number = ints_most(magnitude) <= 0x7f800000u;
    s->finite[row] = is_number && most > -__builtin_inff() && most < __builtin_inff();
    s->tokens[row] = token;
    if (s->temperature[row] == 0.0f) return;
    struct best drawn = {vec_set(-__builtin_inff()), ints_set((int32_t)token)};
    vec temperature = vec_set(s->temperature[row]);
    for (int64_t counter = 0; 4 * counter < s->vocabulary; counter += LANES) {
        struct words w = philox(ints_add(numbers, ints_set((int32_t)counter)), (uint32_t)s->positions[row],
                                (uint64_t)s->seeds[row]);
        float noise[4 * LANES];
        for (int i = 0; i < 4; i++) {
            float of_words[LANES];
            vec_store(of_words, gumbel(w.at[i]));
            for (int j = 0; j < LANES; j++) noise[4 * j + i] = of_words[j];
        }
        for (int i = 0; i < 4 && 4 * counter + i * LANES < s->vocabulary; i++) {
            int64_t v = 4 * counter + i * LANES;
            vec x = vec_div(logits_at(logits, v, s->vocabulary - v), temperature);
            look_at(&drawn, vec_add(x, vec_load(noise + i * LANES)), ints_add(numbers, ints_set((int32_t)v)));
        }
    }
    s->tokens[row] = first_best(&drawn);
}

static void run(void *arguments, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) sample_row(arguments, row);
}

/* Draw a token from each row. */
void sample(struct sampling *s) { run_in_parallel(run, s, s->rows, 1); }
