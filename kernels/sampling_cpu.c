/* Choosing tokens from logits, the most likely or by Gumbel's trick; `sampling.py` is the reference.
 *
 * A row's noise is Philox's (Salmon et al. 2011), keyed by its seed, the position and the token, as there; it is computed
 * in float32, and no noise is stored. Where filters leave tokens, a row's likeliest tokens are listed first: they are
 * mostly all that pass, so that nothing is selected from the whole vocabulary, and noise is computed for them alone. */
#include "border_cpu.h"
#include "threads_cpu.h"
#include "vector_cpu.h"

struct sampling {
    const float *logits;      /* [rows, vocabulary] */
    const float *temperature; /* [rows]; 0: the most likely token */
    const int64_t *top_k;     /* [rows]; 0: off */
    const float *top_p, *min_p; /* [rows]; 1 and 0: off */
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

INLINE ints lane_numbers(int64_t first) {
    int32_t lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = (int32_t)first + i;
    return ints_load(lanes);
}

enum {
    GROUP = 4 * LANES, /* tokens whose noise is computed at once */
    LIKELIEST = 256,   /* groups among whose tokens top-p is looked for first */
    LISTED = 2048,     /* the most tokens that are listed */
};

/* The likeliest tokens of a row, in the row's order. */
struct list {
    int64_t count;
    float logits[LISTED];
    int32_t tokens[LISTED];
};

/* List the tokens of a row at or above a border; return whether all have room. `most` has each group's largest. */
static int list_from(struct list *list, const struct numbers *row, const float *most, float border) {
    for (int64_t group = 0; group * GROUP < row->count; group++) {
        if (!(most[group] >= border)) continue;
        for (int64_t v = group * GROUP; v < (group + 1) * GROUP && v < row->count; v += LANES) {
            float x[LANES];
            vec_store(x, numbers_at(row, v));
            for (int i = 0; i < LANES && v + i < row->count; i++) {
                if (!(x[i] >= border)) continue;
                if (list->count == LISTED) return 0;
                list->logits[list->count] = row->logits[v + i];
                list->tokens[list->count++] = (int32_t)(v + i);
            }
        }
    }
    return 1;
}

/* List a row's likeliest tokens, `least` of them or more. With 0 of them: those at or above the border. */
static int list_likeliest(struct list *list, const struct numbers *row, int64_t least, float border) {
    int64_t groups = (row->count + GROUP - 1) / GROUP;
    list->count = 0;
    if (least > groups) return 0;
    float most[groups];
    for (int64_t group = 0; group < groups; group++) {
        vec largest = numbers_at(row, group * GROUP);
        for (int64_t v = group * GROUP + LANES; v < (group + 1) * GROUP && v < row->count; v += LANES)
            largest = vec_max(largest, numbers_at(row, v));
        most[group] = vec_most(largest);
    }
    /* As many tokens as groups are at or above the largest of so many groups. */
    if (least) border = cut_at(&(struct numbers){most, groups, 1.0f, row->most}, least, __builtin_inf()).border;
    return list_from(list, row, most, border);
}

/* Find the least number that a row's filters leave, and list the tokens that may pass; `listed` says whether all are. The
 * mass of top-p is that of the tokens that top-k leaves: of those that tie at its border as many as it counts. */
static float filter(const struct sampling *s, int64_t index, const struct numbers *row, struct list *list, int *listed) {
    int64_t top_k = s->top_k[index] < row->count ? s->top_k[index] : row->count;
    double top_p = (double)s->top_p[index];
    float min_p = s->min_p[index], floor = -__builtin_inff();
    const float tiny = 0x1p-126f; /* smaller numbers have no logarithm here */
    if (min_p > 0.0f) floor = row->most + float_of(vec_log(vec_set(min_p < tiny ? tiny : min_p)));
    *listed = list_likeliest(list, row, top_k > 0 ? top_k : top_p < 1.0 ? LIKELIEST : 0, floor);
    struct numbers likeliest = {list->logits, list->count, row->temperature, row->most};
    const struct numbers *from = *listed ? &likeliest : row;
    double mass = 0.0;
    if (top_k > 0) {
        struct cut cut = cut_at(from, top_k, __builtin_inf());
        mass = cut.mass + (double)(top_k - cut.above) * (double)float_of(weights_of(row, vec_set(cut.border)));
        floor = cut.border > floor ? cut.border : floor;
    }
    if (top_p < 1.0) {
        if (top_k == 0) {
            mass = mass_of(row);
            if (*listed && mass_of(&likeliest) < top_p * mass) *listed = 0, from = row;
        }
        float border = cut_at(from, INT64_MAX, top_p * mass).border;
        floor = border > floor ? border : floor;
    }
    return floor;
}

/* Look at the tokens of a row at or above the floor, with their noise. */
static void draw_from_row(struct best *drawn, const struct numbers *row, float floor, uint32_t position, uint64_t seed) {
    for (int64_t v = 0; v < row->count; v += GROUP) {
        vec x[4], most = vec_set(-__builtin_inff());
        for (int i = 0; i < 4; i++) {
            x[i] = v + i * LANES < row->count ? numbers_at(row, v + i * LANES) : vec_set(-__builtin_inff());
            x[i] = vec_less(x[i], vec_set(floor), vec_set(-__builtin_inff()), x[i]);
            most = vec_max(most, x[i]);
        }
        if (vec_most(most) == -__builtin_inff()) continue;
        struct words w = philox(lane_numbers(v / 4), position, seed);
        float noise[GROUP];
        for (int i = 0; i < 4; i++) {
            float of_words[LANES];
            vec_store(of_words, gumbel(w.at[i]));
            for (int j = 0; j < LANES; j++) noise[4 * j + i] = of_words[j];
        }
        for (int i = 0; i < 4; i++)
            look_at(drawn, vec_add(x[i], vec_load(noise + i * LANES)), lane_numbers(v + i * LANES));
    }
}

/* The same of listed tokens. */
static void draw_from_list(struct best *drawn, const struct numbers *likeliest, const int32_t *tokens, float floor,
                           uint32_t position, uint64_t seed) {
    for (int64_t at = 0; at < likeliest->count; at += LANES) {
        int64_t left = likeliest->count - at;
        int32_t token[LANES] = {0}, chosen[LANES], word[4][LANES];
        memcpy(token, tokens + at, (size_t)(left < LANES ? left : LANES) * sizeof *token);
        struct words w = philox(ints_right(ints_load(token), 2), position, seed);
        memcpy(word, &w, sizeof word);
        for (int i = 0; i < LANES; i++) chosen[i] = word[token[i] & 3][i];
        vec x = numbers_at(likeliest, at);
        x = vec_less(x, vec_set(floor), vec_set(-__builtin_inff()), x);
        look_at(drawn, vec_add(x, gumbel(ints_load(chosen))), ints_load(token));
    }
}

static void sample_row(const struct sampling *s, int64_t index) {
    const float *logits = s->logits + index * s->vocabulary;
    struct numbers row = {logits, s->vocabulary, 1.0f, 0.0f};
    ints magnitude = ints_set(0);
    struct best likely = {vec_set(-__builtin_inff()), ints_set(0)};
    for (int64_t v = 0; v < s->vocabulary; v += LANES) {
        vec x = logits_at(&row, v);
        magnitude = ints_max(magnitude, ints_and(vec_bits(x), ints_set(0x7fffffff)));
        look_at(&likely, x, lane_numbers(v));
    }
    int64_t token = first_best(&likely);
    float most = logits[token];
    int is_number = ints_most(magnitude) <= 0x7f800000u;
    s->finite[index] = is_number && most > -__builtin_inff() && most < __builtin_inff();
    s->tokens[index] = token;
    if (s->temperature[index] == 0.0f || !s->finite[index]) return;
    row.temperature = s->temperature[index];
    row.most = most / row.temperature;
    uint32_t position = (uint32_t)s->positions[index];
    uint64_t seed = (uint64_t)s->seeds[index];
    struct best drawn = {vec_set(-__builtin_inff()), ints_set((int32_t)token)};
    struct list list;
    int listed = 0;
    float floor = -__builtin_inff();
    if (s->top_k[index] > 0 || s->top_p[index] < 1.0f || s->min_p[index] > 0.0f)
        floor = filter(s, index, &row, &list, &listed);
    if (listed) {
        struct numbers likeliest = {list.logits, list.count, row.temperature, row.most};
        draw_from_list(&drawn, &likeliest, list.tokens, floor, position, seed);
    } else {
        draw_from_row(&drawn, &row, floor, position, seed);
    }
    s->tokens[index] = first_best(&drawn);
}

static void run(void *arguments, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) sample_row(arguments, row);
}

/* Draw a token from each row. */
void sample(struct sampling *s) { run_in_parallel(run, s, s->rows, 1); }
