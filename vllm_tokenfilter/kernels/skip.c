/* The CPU kernels of attention skipping, called once per layer of a step: decide which of the step's tokens are skipped,
   and compute what stands for a skipped attention. docs/skipping.md has the formulas; tests/reference.py follows them.

   A step's tokens are in the cache before any of this runs. What a decision needs of earlier tokens is read from the
   cache and from `kept`, which holds a score and a debt per physical slot: nothing belongs to a request.

   Shapes: D = cache->dims, H = cache->heads (KV heads), T tokens of the step. */

#include "cache.h"

struct skip_rule {
  int64_t terms, fusion, history, warmup, sinks, window, units, patience;
  float decay, dropped; /* dropped = decay to the power of terms */
};

/* The step's rows, arrays of num_rows. Row r's tokens are starts[r] .. starts[r + 1] - 1; the first has position
   positions[r], lies in slot slots[r], and behind the raw tokens from slot raw[r] on. */
struct skip_rows {
  const int32_t *block_tables;
  int64_t table_stride, num_rows;
  const int64_t *starts, *slots, *raw, *positions;
};

/* What a raw token leaves for its successors. */
struct kept {
  float score;
  int32_t debt; /* in 1 / units of a token: skips owed since the warm-up */
};

static int64_t physical(const struct cache *cache, const int32_t *blocks, int64_t slot) {
  return blocks[slot / cache->block_size] * cache->block_size + slot % cache->block_size;
}

/* Cosine of x[before .. before + count) to the anchor of the last `terms` tokens before each, into out [count].
   x [before + count, D]; before <= terms; anchor [D] is scratch. */
static void running_cosines(const float *x, int64_t before, int64_t count, const struct skip_rule *rule, int64_t dims,
                            float *anchor, float *out) {
  for (int64_t d = 0; d < dims; d++) anchor[d] = 0;
  for (int64_t t = 0; t < before + count; t++, x += dims) {
    if (t >= before) {
      float dot = 0, own = 0, other = 0;
      for (int64_t d = 0; d < dims; d++) {
        dot += x[d] * anchor[d];
        own += x[d] * x[d];
        other += anchor[d] * anchor[d];
      }
      float norms = own * other;
      out[t - before] = norms > 0 ? dot / sqrtf(norms) : 0;
    }
    const float *leaving = x - rule->terms * dims;
    if (t >= rule->terms)
      for (int64_t d = 0; d < dims; d++) anchor[d] = rule->decay * anchor[d] + x[d] - rule->dropped * leaving[d];
    else
      for (int64_t d = 0; d < dims; d++) anchor[d] = rule->decay * anchor[d] + x[d];
  }
}

/* Redundancy of the row's new tokens, into out [count]. */
static void score_row(const struct cache *cache, const struct skip_rule *rule, const int32_t *blocks, int64_t start,
                      int64_t first, int64_t before, int64_t count, float *out) {
  int64_t dims = cache->dims, heads = cache->heads, block_size = cache->block_size;
  float *x = floats((before + count) * dims), *anchor = floats(dims);
  float *key_scores = floats(heads * count), *value_scores = floats(heads * count);
  for (int64_t head = 0; head < heads; head++)
    for (int values = 0; values < 2; values++) {
      const int64_t *tokens = values ? cache->value_tokens : cache->key_tokens;
      for (int64_t i = 0; i < before + count; i++) {
        int64_t slot = first - before + i;
        widen(cache, element(cache, blocks, start, head, slot) + tokens[slot % block_size], values, x + i * dims);
      }
      running_cosines(x, before, count, rule, dims, anchor, (values ? value_scores : key_scores) + head * count);
    }
  fuse(key_scores, value_scores, heads, count, rule->fusion, out);
  free(x);
  free(anchor);
  free(key_scores);
  free(value_scores);
}

static void decide_row(const struct cache *cache, const struct skip_rule *rule, const struct skip_rows *rows,
                       int64_t start, int64_t ratio, int64_t row, struct kept *kept, uint8_t *skipped) {
  const int32_t *blocks = rows->block_tables + row * rows->table_stride;
  int64_t count = rows->starts[row + 1] - rows->starts[row], first = rows->slots[row], raw = first - rows->raw[row];
  if (!count) return;
  int64_t known = raw < rule->history ? raw : rule->history, before = raw < rule->terms ? raw : rule->terms;
  float *scores = floats(known + count);
  for (int64_t i = 0; i < known; i++) scores[i] = kept[physical(cache, blocks, first - known + i)].score;
  score_row(cache, rule, blocks, start, first, before, count, scores + known);
  int64_t debt = raw ? kept[physical(cache, blocks, first - 1)].debt : 0;
  skipped += rows->starts[row];
  for (int64_t t = 0; t < count; t++) {
    const float *own = scores + known + t;
    int64_t seen = known + t < rule->history ? known + t : rule->history, below = 0;
    for (int64_t j = 1; j <= seen; j++) below += own[-j] < *own;
    /* Skipped are the tokens above the quantile 1 - level of the scores just before; the level leans against the debt. */
    int64_t whole = rule->units * rule->patience, level = ratio * rule->patience + debt;
    int warm = rows->positions[row] + t >= rule->warmup;
    int skip = warm && seen && level > 0 && below * whole >= seen * (whole - level);
    debt = warm ? debt + ratio - skip * rule->units : 0;
    skipped[t] = (uint8_t)skip;
    kept[physical(cache, blocks, first + t)] = (struct kept){*own, (int32_t)debt};
  }
  free(scores);
}

/* Decide for every token of the step in one layer. ratio in 1 / units; kept [num_slots]; skipped [T].
   whole [num_rows] is what each row attends to, lengths what is left of it: 1 in a skipped row of one token.
   near is how much a skipped row of one token still reads, at most.
   totals: tokens skipped; skipped rows of one token; what all rows of one token read. */
void decide_skips(const struct cache *cache, const struct skip_rule *rule, const struct skip_rows *rows, int64_t layer,
                  int64_t ratio, struct kept *kept, const int32_t *whole, uint8_t *skipped, int32_t *lengths,
                  int64_t *totals, int64_t near, int64_t num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t row = 0; row < rows->num_rows; row++)
    decide_row(cache, rule, rows, cache->layer_starts[layer], ratio, row, kept, skipped);
  totals[0] = totals[1] = totals[2] = 0;
  for (int64_t row = 0; row < rows->num_rows; row++) {
    int64_t start = rows->starts[row], end = rows->starts[row + 1];
    int idle = end - start == 1 && skipped[start];
    lengths[row] = idle ? 1 : whole[row];
    totals[1] += idle;
    if (end - start == 1) totals[2] += idle && near < whole[row] ? near : whole[row];
    for (int64_t t = start; t < end; t++) totals[0] += skipped[t];
  }
}

/* Attention of one token's query heads of one KV head to the slots [0, sinks) and [from, slot]. query, out [group, D]. */
static void attend_near(const struct cache *cache, const int32_t *blocks, int64_t start, int64_t head, int64_t sinks,
                        int64_t from, int64_t slot, int64_t group, float scale, float softcap, const float *query,
                        float *out) {
  int64_t dims = cache->dims, size = cache->block_size, count = sinks + slot - from + 1;
  float *key = floats(dims), *value = floats(dims), *weights = floats(group * count), *largest = floats(group);
  for (int64_t g = 0; g < group; g++) largest[g] = -INFINITY;
  for (int64_t i = 0; i < count; i++) {
    int64_t place = i < sinks ? i : from + i - sinks;
    widen(cache, element(cache, blocks, start, head, place) + cache->key_tokens[place % size], 0, key);
    for (int64_t g = 0; g < group; g++) {
      float dot = 0;
      for (int64_t d = 0; d < dims; d++) dot += query[g * dims + d] * key[d];
      dot *= scale;
      if (softcap > 0) dot = softcap * tanhf(dot / softcap);
      weights[g * count + i] = dot;
      largest[g] = fmaxf(largest[g], dot);
    }
  }
  for (int64_t g = 0; g < group; g++) {
    float total = 0;
    for (int64_t i = 0; i < count; i++) total += weights[g * count + i] = expf(weights[g * count + i] - largest[g]);
    for (int64_t i = 0; i < count; i++) weights[g * count + i] /= total;
  }
  memset(out, 0, group * dims * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    int64_t place = i < sinks ? i : from + i - sinks;
    widen(cache, element(cache, blocks, start, head, place) + cache->value_tokens[place % size], 1, value);
    for (int64_t g = 0; g < group; g++)
      for (int64_t d = 0; d < dims; d++) out[g * dims + d] += weights[g * count + i] * value[d];
  }
  free(key);
  free(value);
  free(weights);
  free(largest);
}

/* The substitute "window" for the skipped tokens of a step in one layer.
   skipped [T]; query, out [T, H * group, D], of which the skipped tokens' are written. */
void attend_window(const struct cache *cache, const struct skip_rule *rule, const struct skip_rows *rows, int64_t layer,
                   const uint8_t *skipped, int64_t group, float scale, float softcap, const float *query, float *out,
                   int64_t num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t task = 0; task < rows->starts[rows->num_rows] * cache->heads; task++) {
    int64_t token = task / cache->heads, head = task % cache->heads, row = 0, end = rows->num_rows;
    if (!skipped[token]) continue;
    while (row + 1 < end) { /* the last row that starts at or before the token */
      int64_t middle = (row + end) / 2;
      if (rows->starts[middle] <= token) row = middle;
      else end = middle;
    }
    int64_t slot = rows->slots[row] + token - rows->starts[row];
    int64_t from = slot + 1 > rule->window ? slot + 1 - rule->window : 0, sinks = rule->sinks < from ? rule->sinks : from;
    attend_near(cache, rows->block_tables + row * rows->table_stride, cache->layer_starts[layer], head, sinks, from, slot,
                group, scale, softcap, query + task * group * cache->dims, out + task * group * cache->dims);
  }
}

/* The substitute "running_output": the decayed mean of a layer's outputs that were not skipped, kept with the block of
   the request's newest token. means [num_blocks, width + 1], the weights' sum last; out [T, width] in place. */
void average_outputs(const struct cache *cache, const struct skip_rule *rule, const struct skip_rows *rows,
                     const uint8_t *skipped, float *means, int64_t width, float *out, int64_t num_threads) {
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
  for (int64_t row = 0; row < rows->num_rows; row++) {
    const int32_t *blocks = rows->block_tables + row * rows->table_stride;
    int64_t count = rows->starts[row + 1] - rows->starts[row], first = rows->slots[row], size = cache->block_size;
    float *mean = floats(width + 1);
    if (first > rows->raw[row])
      memcpy(mean, means + blocks[(first - 1) / size] * (width + 1), (width + 1) * sizeof(float));
    for (int64_t t = 0; t < count; t++) {
      float *own = out + (rows->starts[row] + t) * width;
      if (skipped[rows->starts[row] + t]) {
        for (int64_t d = 0; d < width; d++) own[d] = mean[width] > 0 ? mean[d] / mean[width] : 0;
      } else {
        for (int64_t d = 0; d < width; d++) mean[d] = rule->decay * mean[d] + (1 - rule->decay) * own[d];
        mean[width] = rule->decay * mean[width] + 1 - rule->decay;
      }
      /* A full block may be taken over by another request, which goes on from its end. */
      if (t + 1 == count || (first + t + 1) % size == 0)
        memcpy(means + blocks[(first + t) / size] * (width + 1), mean, (width + 1) * sizeof(float));
    }
    free(mean);
  }
}
