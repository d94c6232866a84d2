/* See threads_cpu.h. The pool is that of the OpenMP library which torch has loaded, by the call that compilers make for
 * `#pragma omp parallel`. */
#include "threads_cpu.h"
#include <stddef.h>

typedef void (*parallel)(void (*region)(void *), void *data, unsigned threads, unsigned flags);

static parallel start;
static unsigned most_threads = 1;

/* Take OpenMP's GOMP_parallel, or NULL to compute on the calling thread alone, and the number of threads. */
void set_threads(parallel gomp_parallel, unsigned threads) {
    start = gomp_parallel;
    most_threads = threads;
}

struct region {
    work work;
    void *arguments;
    int64_t items, at_a_time, next;
};

static void take_items(void *data) {
    struct region *r = data;
    for (;;) {
        int64_t begin = __atomic_fetch_add(&r->next, r->at_a_time, __ATOMIC_RELAXED);
        if (begin >= r->items) return;
        int64_t end = begin + r->at_a_time;
        r->work(r->arguments, begin, end < r->items ? end : r->items);
    }
}

void run_in_parallel(work work, void *arguments, int64_t items, int64_t at_a_time) {
    struct region r = {work, arguments, items, at_a_time, 0};
    int64_t shares = (items + at_a_time - 1) / at_a_time;
    unsigned threads = shares < most_threads ? (unsigned)shares : most_threads;
    if (start == NULL || threads < 2)
        take_items(&r);
    else
        start(take_items, &r, threads, 0);
}
