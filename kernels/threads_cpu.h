/* Runs a kernel's items on the threads that torch's products run on, so that no second pool of threads competes. */
#pragma once
#include <stdint.h>

typedef void (*work)(void *arguments, int64_t begin, int64_t end); /* computes the items [begin, end) */

/* Call `work` for all items, a few at a time. Which thread takes which items changes no result. */
void run_in_parallel(work work, void *arguments, int64_t items, int64_t at_a_time);
