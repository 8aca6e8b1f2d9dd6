/* The CPU sealing kernel: score, select and compact in place, over every layer and request of a step at once.

   One task is one (layer, request). It reads each raw token once, widens it to float, carries the anchors along as a
   recurrence instead of a sum, and moves the surviving tokens to their slots. The number of operations does not depend
   on the anchor's length. The recurrence starts afresh in every chunk, so a chunk's redundancies are the same bits
   whether it is sealed alone or with others. kernels/reference.py is the readable form; tests hold the two together.

   Shapes: C = rule->size tokens of a chunk, K = rule->keep kept, D = cache->dims, H = cache->heads. */

#include "cache.h"

/* The codes of kernels/rules.py. */
enum { ANCHOR, RANDOM, KEYDIFF, KEY_NORM, VALUE_KEY_NORM, LAGKV, RECENCY };

struct seal_rule {
  int64_t size, keep, sinks, terms, selector, fusion, seed;
  float decay, dropped; /* dropped = decay to the power of terms */
};

/* The rows that have chunks to seal; arrays of num_rows. */
struct seal_rows {
  const int32_t *block_tables;
  int64_t block_tables_stride, num_rows;
  const int64_t *num_tokens, *first_chunk, *last_chunk, *shared_chunks, *ends;
};

/* What a call does. With KV heads split over ranks the scores of all heads come between SCORE and SEAL. */
enum { WHOLE, SCORE, SEAL };

/* The heads' scores of every chunk that a call scores, [num_chunks, 2 (key, value), heads, C]; a row's chunks are its
   due ones and the one behind them. */
struct scores {
  float *values;
  int64_t heads, phase;
};

struct ranked {
  float redundancy;
  int32_t offset;
};

static float norm(const float *x, int64_t dims) {
  float total = 0;
  for (int64_t d = 0; d < dims; d++) total += x[d] * x[d];
  return sqrtf(total);
}

static void normalise(float *x, int64_t size, int64_t dims) {
  for (int64_t t = 0; t < size; t++, x += dims) {
    float length = norm(x, dims);
    if (length > 0)
      for (int64_t d = 0; d < dims; d++) x[d] /= length;
  }
}

/* Cosine of each token of current [C, D] to the anchor of its last `terms` predecessors, into out [C].
   previous [C, D] is the chunk before it, or null. anchor [D] is scratch. */
static void cosines(const float *previous, const float *current, int64_t size, int64_t dims, int64_t terms, float decay,
                    float dropped, float *anchor, float *out) {
  for (int64_t d = 0; d < dims; d++) anchor[d] = 0;
  if (previous)
    for (int64_t t = size - terms; t < size; t++) advance(anchor, previous + t * dims, NULL, dims, decay, dropped);
  for (int64_t t = 0; t < size; t++) {
    const float *x = current + t * dims;
    out[t] = cosine(x, anchor, dims);
    const float *leaving = t >= terms ? x - terms * dims : previous ? previous + (size + t - terms) * dims : NULL;
    advance(anchor, x, leaving, dims, decay, dropped);
  }
}

/* LagKV's score of each token of current [C, D] against the next chunk, negated, into out [C]; scratch [3, D]. */
static void negated_lag_scores(const float *current, const float *following, int64_t size, int64_t dims, float *scratch,
                               float *out) {
  float *low = scratch, *high = scratch + dims, *scaled = scratch + 2 * dims, largest = -INFINITY, total = 0;
  memcpy(low, following, dims * sizeof(float));
  memcpy(high, following, dims * sizeof(float));
  for (int64_t t = 1; t < size; t++)
    for (int64_t d = 0; d < dims; d++) {
      low[d] = fminf(low[d], following[t * dims + d]);
      high[d] = fmaxf(high[d], following[t * dims + d]);
    }
  for (int64_t t = 0; t < size; t++) {
    float mean = 0, spread = 0;
    for (int64_t d = 0; d < dims; d++) {
      float width = high[d] - low[d];
      scaled[d] = width > 0 ? (current[t * dims + d] - low[d]) / width : 0;
      mean += scaled[d];
    }
    mean /= dims;
    for (int64_t d = 0; d < dims; d++) spread += (scaled[d] - mean) * (scaled[d] - mean);
    out[t] = sqrtf(spread / dims);
    largest = fmaxf(largest, out[t]);
  }
  for (int64_t t = 0; t < size; t++) total += out[t] = expf(out[t] - largest);
  for (int64_t t = 0; t < size; t++) out[t] = -out[t] / total;
}

/* Uniform in [0, 1): the hash of selectors.random_scores. */
static float random_score(int64_t position, int64_t layer_index, int64_t seed) {
  uint64_t x = ((uint64_t)position * 2654435761u + (uint64_t)(layer_index + 1) * 40503u + (uint64_t)seed * 97u);
  x &= 0xFFFFFFFFu;
  for (int i = 0; i < 2; i++) x = ((x ^ (x >> 16)) * 0x45D9F3Bu) & 0xFFFFFFFFu;
  x ^= x >> 16;
  return (float)(x >> 8) / 16777216.0f;
}

/* Score chunk c of a head; for LagKV the chunk before it, whose scores need this one. tiles [4, C, D]: keys of even and
   odd chunks, then values. key_scores, value_scores: of chunk c, chunks lie `stride` apart. scratch [3, D]. */
static void score_head(const struct seal_rule *rule, int64_t dims, int64_t c, const float *tiles, float *scratch,
                       float *key_scores, float *value_scores, int64_t stride) {
  int64_t size = rule->size, tile = size * dims, parity = c & 1;
  const float *keys = tiles + parity * tile, *values = tiles + (2 + parity) * tile;
  const float *keys_before = tiles + (1 - parity) * tile, *values_before = tiles + (3 - parity) * tile;
  switch (rule->selector) {
    case ANCHOR:
      cosines(c ? keys_before : 0, keys, size, dims, rule->terms, rule->decay, rule->dropped, scratch, key_scores);
      cosines(c ? values_before : 0, values, size, dims, rule->terms, rule->decay, rule->dropped, scratch, value_scores);
      break;
    case KEYDIFF:
      cosines(c ? keys_before : 0, keys, size, dims, rule->terms, 1, 1, scratch, key_scores);
      break;
    case KEY_NORM:
      for (int64_t t = 0; t < size; t++) key_scores[t] = norm(keys + t * dims, dims);
      break;
    case VALUE_KEY_NORM:
      for (int64_t t = 0; t < size; t++)
        key_scores[t] = -norm(values + t * dims, dims) / fmaxf(norm(keys + t * dims, dims), 1e-20f);
      break;
    case LAGKV:
      if (c) {
        negated_lag_scores(keys_before, keys, size, dims, scratch, key_scores - stride);
        negated_lag_scores(values_before, values, size, dims, scratch, value_scores - stride);
      }
      break;
  }
}

static void copy(const struct cache *cache, int64_t from, int64_t to, const int64_t *dims) {
  if (cache->encoding == FLOAT32) {
    uint32_t *elements = cache->elements;
    for (int64_t d = 0; d < cache->dims; d++) elements[to + dims[d]] = elements[from + dims[d]];
  } else {
    uint16_t *elements = cache->elements;
    for (int64_t d = 0; d < cache->dims; d++) elements[to + dims[d]] = elements[from + dims[d]];
  }
}

/* Copy the token in slot `source` of a request to slot `target`, in one head. */
static void move(const struct cache *cache, const int32_t *blocks, int64_t start, int64_t head, int64_t source,
                 int64_t target) {
  int64_t from = element(cache, blocks, start, head, source), to = element(cache, blocks, start, head, target);
  int64_t inside_from = source % cache->block_size, inside_to = target % cache->block_size;
  copy(cache, from + cache->key_tokens[inside_from], to + cache->key_tokens[inside_to], cache->key_dims);
  copy(cache, from + cache->value_tokens[inside_from], to + cache->value_tokens[inside_to], cache->value_dims);
}

/* Less redundant first; of equals the older. NaN is the most redundant. */
static int by_redundancy(const void *a, const void *b) {
  const struct ranked *x = a, *y = b;
  float left = isnan(x->redundancy) ? INFINITY : x->redundancy, right = isnan(y->redundancy) ? INFINITY : y->redundancy;
  if (left != right) return left < right ? -1 : 1;
  return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int by_offset(const void *a, const void *b) {
  return ((const struct ranked *)a)->offset - ((const struct ranked *)b)->offset;
}

/* Let what the skipping kernel carries for raw tokens (skip.c) follow them from slots behind `gone` to `gone` slots lower.
   carried: by physical slot, or null. */
static void carry(int64_t *carried, const struct cache *cache, const int32_t *blocks, int64_t first_target,
                  int64_t end_target, int64_t gone) {
  if (!carried) return;
  for (int64_t target = first_target; target < end_target; target++)
    carried[physical(cache, blocks, target)] = carried[physical(cache, blocks, target + gone)];
}

static void seal_row(const struct cache *cache, const struct seal_rule *rule, const struct seal_rows *rows, int64_t layer,
                     int64_t layer_index, int64_t row, float *saved, int64_t *carried, int32_t *chosen,
                     struct scores scores) {
  int64_t size = rule->size, keep = rule->keep, dims = cache->dims, heads = cache->heads;
  int64_t first = rows->first_chunk[row], last = rows->last_chunk[row], num_tokens = rows->num_tokens[row];
  int64_t start = cache->layer_starts[layer], block_size = cache->block_size;
  const int32_t *blocks = rows->block_tables + row * rows->block_tables_stride;
  /* Before the seal the raw token at position p lies in slot p - removed; after it, in p - removed_after. */
  int64_t removed = first * (size - keep), removed_after = last * (size - keep);
  chosen += (rows->ends[row] - (last - first)) * keep;
  if (scores.phase != SCORE)
    carry(carried, cache, blocks, last * keep, num_tokens - removed_after, removed_after - removed);

  if (rule->selector == RECENCY) {
    /* Nothing is scored: the oldest tokens behind the sinks leave, all others move up. */
    for (int64_t i = 0; i < (last - first) * keep; i++) chosen[i] = -1;
    for (int64_t head = 0; head < heads; head++)
      for (int64_t target = rule->sinks; target < num_tokens - removed_after; target++)
        move(cache, blocks, start, head, target + removed_after - removed, target);
    return;
  }

  /* 1. Score: every chunk from the first unscored one to the one after the last due, all of them raw. The first chunk a
        request seals itself has no predecessors: its sequence starts there, or what came before was taken over sealed.
        LagKV's score needs the chunk that follows, so there nothing is known from before and the last of them stays
        unknown. */
  int64_t count = last - first + 1, unscored = first > rows->shared_chunks[row] && rule->selector != LAGKV;
  int64_t score_heads = scores.phase == WHOLE ? heads : scores.heads, stride = 2 * score_heads * size;
  float *own_scores = scores.phase == WHOLE ? floats(count * stride) : 0;
  float *key_scores = own_scores ? own_scores : scores.values + (rows->ends[row] - (last - first) + row) * stride;
  float *value_scores = key_scores + score_heads * size;
  float *redundancy = floats(count * size), *tiles = floats(4 * size * dims), *scratch = floats(3 * dims);
  if (unscored)
    for (int64_t i = 0; i < size; i++) redundancy[i] = saved[physical(cache, blocks, first * size + i - removed)];
  for (int64_t head = 0; head < heads && rule->selector != RANDOM && scores.phase != SEAL; head++)
    for (int64_t c = 0; c < count; c++) {
      float *keys = tiles + (c & 1) * size * dims, *values = tiles + (2 + (c & 1)) * size * dims;
      for (int64_t i = 0; i < size; i++) {
        int64_t slot = (first + c) * size + i - removed, base = element(cache, blocks, start, head, slot);
        widen(cache, base + cache->key_tokens[slot % block_size], 0, keys + i * dims);
        widen(cache, base + cache->value_tokens[slot % block_size], 1, values + i * dims);
      }
      if (rule->selector == KEYDIFF) normalise(keys, size, dims);
      int64_t place = c * stride + head * size;
      if (c >= unscored) score_head(rule, dims, c, tiles, scratch, key_scores + place, value_scores + place, stride);
    }
  if (scores.phase == SCORE) goto done;
  for (int64_t c = unscored; c < count; c++)
    if (rule->selector == RANDOM)
      for (int64_t i = 0; i < size; i++)
        redundancy[c * size + i] = random_score((first + c) * size + i, layer_index, rule->seed);
    else
      fuse(key_scores + c * stride, value_scores + c * stride, score_heads, size, rule->fusion, redundancy + c * size);

  /* 2. Select: the least redundant stay; the first tokens of the sequence always do. */
  struct ranked *order = malloc(size * sizeof *order);
  if (!order) abort();
  for (int64_t c = 0; c < last - first; c++) {
    for (int64_t i = 0; i < size; i++) {
      int is_sink = (first + c) * size + i < rule->sinks;
      order[i] = (struct ranked){is_sink ? -INFINITY : redundancy[c * size + i], (int32_t)i};
    }
    qsort(order, size, sizeof *order, by_redundancy);
    qsort(order, keep, sizeof *order, by_offset);
    for (int64_t i = 0; i < keep; i++) chosen[c * keep + i] = order[i].offset;
  }

  /* 3. Compact: no token moves to a higher slot, so moving them in order overwrites nothing still needed. */
  int64_t num_kept = (last - first) * keep, num_rest = num_tokens - last * size;
  for (int64_t head = 0; head < heads; head++)
    for (int64_t i = 0; i < num_kept + num_rest; i++) {
      int64_t target = first * keep + i;
      int64_t source = i < num_kept ? (first + i / keep) * size + chosen[i] - removed
                                    : last * size + (i - num_kept) - removed;
      if (source != target) move(cache, blocks, start, head, source, target);
    }

  /* 4. Save the redundancies of the next chunk: its predecessors are about to be packed. */
  for (int64_t i = 0; i < size; i++)
    saved[physical(cache, blocks, last * size + i - removed_after)] = redundancy[(count - 1) * size + i];
  free(order);
done:
  free(redundancy);
  free(tiles);
  free(scratch);
  free(own_scores);
}

/* Seal the due chunks of every row in every layer. layer_indices [num_layers]; saved [num_layers, saved_stride];
   carried [num_layers, saved_stride] or null; chosen [num_layers, num_due_chunks, K]. scores [num_layers,
   num_due_chunks + num_rows, 2, score_heads, C]: filled by SCORE, read by SEAL, null for WHOLE. */
void seal_chunks(const struct cache *cache, const struct seal_rule *rule, const struct seal_rows *rows, int64_t num_layers,
                 const int64_t *layer_indices, float *saved, int64_t saved_stride, int64_t *carried, int32_t *chosen,
                 int64_t num_threads, int64_t phase, float *scores, int64_t score_heads) {
  int64_t num_chunks = rows->ends[rows->num_rows - 1] + rows->num_rows;
  int64_t num_tasks = num_layers * rows->num_rows, per_layer = rows->ends[rows->num_rows - 1] * rule->keep;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t task = 0; task < num_tasks; task++) {
    int64_t layer = task / rows->num_rows;
    seal_row(cache, rule, rows, layer, layer_indices[layer], task % rows->num_rows, saved + layer * saved_stride,
             carried ? carried + layer * saved_stride : 0, chosen + layer * per_layer,
             (struct scores){scores ? scores + layer * num_chunks * 2 * score_heads * rule->size : 0, score_heads, phase});
  }
}
