/* Attention skipping on the CPU: decide, once per layer of a step, which of the step's tokens are skipped.
   docs/skipping.md has the formulas; tests/reference.py follows them. */

#include "skip.h"

/* The carried scores of `count` slots from `slot` on, into out [count]. */
static void read_scores(const struct cache *cache, const int32_t *blocks, const struct carried *carried, int64_t slot,
                        int64_t count, float *out) {
  for (int64_t i = 0; i < count;) {
    const struct carried *own = carried + physical(cache, blocks, slot + i);
    int64_t end = i + cache->block_size - (slot + i) % cache->block_size;
    for (; i < count && i < end; i++) out[i] = own++->score;
  }
}

/* Scores of the row's new tokens in one head, into out [count]. The anchor of the last `terms` raw tokens is carried from
   token to token: each that comes in decays the others, and the oldest leaves.
   anchors: of this head in block 0, block_width apart; written for the newest token of each block. x [count, D], anchor [D]
   and gone [D] are scratch. */
static void score_head(const struct cache *cache, const struct skip_rule *rule, const int32_t *blocks, int64_t start,
                       int64_t head, int64_t first, int64_t raw, int64_t count, int values, float *anchors,
                       int64_t block_width, float *x, float *anchor, float *gone, float *out) {
  const int64_t *tokens = values ? cache->value_tokens : cache->key_tokens;
  int64_t size = cache->block_size, dims = cache->dims;
  if (raw) memcpy(anchor, anchors + blocks[(first - 1) / size] * block_width, dims * sizeof(float));
  else memset(anchor, 0, dims * sizeof(float));
  for (int64_t t = 0; t < count; t++, x += dims) {
    int64_t slot = first + t, oldest = slot - rule->terms;
    widen(cache, element(cache, blocks, start, head, slot) + tokens[slot % size], values, x);
    out[t] = cosine(x, anchor, dims);
    const float *leaving = raw + t < rule->terms ? NULL : t < rule->terms ? gone : x - rule->terms * dims;
    if (leaving == gone) widen(cache, element(cache, blocks, start, head, oldest) + tokens[oldest % size], values, gone);
    advance(anchor, x, leaving, dims, rule->decay, rule->dropped);
    /* A full block may be taken over by another request, which goes on from its end. */
    if (t + 1 == count || (slot + 1) % size == 0)
      memcpy(anchors + blocks[slot / size] * block_width, anchor, dims * sizeof(float));
  }
}

/* Redundancy of the row's new tokens, into out [count]; `raw` tokens lie before them. */
static void score_row(const struct cache *cache, const struct skip_rule *rule, const int32_t *blocks, int64_t start,
                      int64_t first, int64_t raw, int64_t count, float *anchors, float *out) {
  int64_t dims = cache->dims, heads = cache->heads, block_width = 2 * heads * dims;
  float *scratch = floats((count + 2) * dims), *scores = floats(2 * heads * count);
  for (int values = 0; values < 2; values++)
    for (int64_t head = 0; head < heads; head++) {
      int64_t place = values * heads + head;
      score_head(cache, rule, blocks, start, head, first, raw, count, values, anchors + place * dims, block_width,
                 scratch, scratch + count * dims, scratch + (count + 1) * dims, scores + place * count);
    }
  fuse(scores, scores + heads * count, heads, count, rule->fusion, out);
  free(scratch);
  free(scores);
}

/* Ask for what the row's first token is scored with: decoding finds it in no cache. */
static void prefetch_row(const struct cache *cache, const struct skip_rule *rule, const int32_t *blocks, int64_t start,
                         int64_t first, int64_t raw, const float *anchors) {
  int64_t size = cache->block_size, block_width = 2 * cache->heads * cache->dims, leaving = first - rule->terms;
  if (raw)
    for (int64_t i = 0; i < block_width; i += 16)
      __builtin_prefetch(anchors + blocks[(first - 1) / size] * block_width + i, 1, 3);
  for (int64_t head = 0; head < cache->heads && raw >= rule->terms; head++)
    prefetch_token(cache, element(cache, blocks, start, head, leaving), leaving % size);
}

static void decide_row(const struct cache *cache, const struct skip_rule *rule, const struct skip_rows *rows,
                       int64_t start, int64_t ratio, int64_t row, struct carried *carried, float *anchors, uint8_t *skipped) {
  const int32_t *blocks = rows->block_tables + row * rows->block_tables_stride;
  int64_t count = rows->starts[row + 1] - rows->starts[row], first = rows->slots[row], raw = first - rows->raw[row];
  if (!count) return;
  int64_t known = raw < rule->history ? raw : rule->history;
  prefetch_row(cache, rule, blocks, start, first, raw, anchors);
  float *scores = floats(known + count);
  read_scores(cache, blocks, carried, first - known, known, scores);
  score_row(cache, rule, blocks, start, first, raw, count, anchors, scores + known);
  int64_t debt = raw ? carried[physical(cache, blocks, first - 1)].debt : 0;
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
    carried[physical(cache, blocks, first + t)] = (struct carried){*own, (int32_t)debt};
  }
  free(scores);
}

/* Decide for every token of the step in one layer. ratio in 1 / units. */
void decide_skips(const struct skip_state *state, int64_t layer, int64_t ratio) {
  const struct skip_rows *rows = state->rows;
  const uint8_t *skipped = state->skipped;
#pragma omp parallel for schedule(dynamic) num_threads(state->num_threads)
  for (int64_t row = 0; row < rows->num_rows; row++)
    decide_row(state->cache, state->rule, rows, state->cache->layer_starts[layer], ratio, row,
               state->carried + layer * state->carried_stride, state->anchors + layer * state->anchors_stride, state->skipped);
  int64_t *totals = state->totals;
  totals[0] = totals[1] = totals[2] = 0;
  for (int64_t row = 0; row < rows->num_rows; row++) {
    int64_t start = rows->starts[row], end = rows->starts[row + 1], stored = state->stored_lens[row];
    int idle = end - start == 1 && skipped[start];
    state->read_lens[row] = idle ? 1 : stored;
    totals[1] += idle;
    if (end - start == 1) totals[2] += idle && state->skipped_reads < stored ? state->skipped_reads : stored;
    for (int64_t t = start; t < end; t++) totals[0] += skipped[t];
  }
}
