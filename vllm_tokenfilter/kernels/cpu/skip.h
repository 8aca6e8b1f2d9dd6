/* What the CPU kernels of attention skipping share: the rule, a step's rows, and what a layer decided about them.

   A step's tokens are in the cache before any of this runs. What a decision needs of earlier tokens is carried by physical
   slot (a score and a debt) or block (the anchors behind its newest token): nothing belongs to a request.

   Shapes: D = cache->dims, H = cache->heads (KV heads), T tokens of the step. */

#ifndef TOKENFILTER_SKIP_H
#define TOKENFILTER_SKIP_H

#include "cache.h"

struct skip_rule {
  int64_t terms, fusion, history, warmup, sinks, window, units, patience;
  float decay, dropped; /* dropped = decay to the power of terms */
};

/* The step's rows, arrays of num_rows. Row r's tokens are starts[r] .. starts[r + 1] - 1; the first has position
   positions[r], lies in slot slots[r], and behind the raw tokens from slot raw[r] on. */
struct skip_rows {
  const int32_t *block_tables;
  int64_t block_tables_stride, num_rows;
  const int64_t *starts, *slots, *raw, *positions;
};

/* A step of the layers of one layout, and what the layer at hand decided. carried [num_layers, carried_stride], by slot.
   anchors [num_layers, anchors_stride], by block [2, H, D]: of keys and values, for the token behind the block's newest.
   skipped [T]. Row r attends to stored_lens[r] tokens, and to read_lens[r] once its skips are decided: 1 in a skipped row
   of one token, which reads at most skipped_reads all the same.
   totals: tokens skipped; skipped rows of one token; what all rows of one token read. */
struct skip_state {
  const struct cache *cache;
  const struct skip_rule *rule;
  const struct skip_rows *rows;
  struct carried *carried;
  float *anchors;
  const int32_t *stored_lens;
  uint8_t *skipped;
  int32_t *read_lens;
  int64_t *totals;
  int64_t carried_stride, anchors_stride, skipped_reads, num_threads;
};

/* What a raw token leaves for its successors. */
struct carried {
  float score;
  int32_t debt; /* in 1 / units of a token: skips owed since the warm-up */
};

#endif
