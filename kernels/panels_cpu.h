/* Products with packed weights: how the work is cut. A panel of the weight's rows is multiplied with a tile of rows, whose
 * sums are in registers; an item of a thread is a block of rows by some panels. */
#pragma once
#include "vector_cpu.h"

#define PANEL 16   /* rows of the weight in a panel */
#define PANELS 8   /* panels of an item */
#define BLOCK 48   /* rows of an item */
#define DEPTH 2048 /* columns that are multiplied before the next ones: long runs of weights, rows that stay in a near cache */
#define AHEAD 4096 /* bytes of weights that are multiplied between calling some from memory and using them */

/* Four neighbouring bytes. */
INLINE int32_t load_four(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return four;
}

/* How far behind byte `at` of a run of `run` bytes the weights lie that are multiplied AHEAD bytes later. Panels that are
 * multiplied together, `apart` bytes from each other, run beside each other, and then the next ones do. */
INLINE int64_t ahead(int64_t at, int64_t run, int panels, int64_t apart) {
    int64_t later = AHEAD / panels;
    return at + later < run ? later : later - run + panels * apart;
}
