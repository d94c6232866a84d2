/* Products with packed weights: how the work is cut. A panel of the weight's rows is multiplied with a tile of rows, whose
 * sums are in registers; an item of a thread is a block of rows by some panels. */
#pragma once
#include "vector_cpu.h"

#define PANEL 16   /* rows of the weight in a panel */
#define PANELS 8   /* panels of an item */
#define BLOCK 48   /* rows of an item */
#define DEPTH 2048 /* columns that are multiplied before the next ones: long runs of weights, rows that stay in a near cache */
#define AHEAD 4096 /* bytes: weights are called from memory so long before they are multiplied */

/* Four neighbouring bytes. */
INLINE int32_t load_four(const void *p) {
    int32_t four;
    memcpy(&four, p, 4);
    return four;
}
