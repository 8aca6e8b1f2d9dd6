/* What replaces a skipped attention on the CPU, in one layer: nothing, the mean of earlier outputs, or attention to the
   sinks and the newest tokens. docs/skipping.md has the formulas. */

#include "skip.h"

/* The substitute "none": the skipped tokens' rows of out, `size` bytes each, become zero. */
void clear_skipped(const struct skip_state *state, char *out, int64_t size) {
  for (int64_t t = 0; t < state->rows->starts[state->rows->num_rows]; t++)
    if (state->skipped[t]) memset(out + t * size, 0, size);
}

/* The substitute "running_output": the decayed mean of a layer's outputs that were not skipped, carried with the block of
   the request's newest token. means [num_blocks, width + 1], the weights' sum last; out [T, width] in place. */
void average_outputs(const struct skip_state *state, float *means, int64_t width, float *out) {
  const struct skip_rule *rule = state->rule;
  const struct skip_rows *rows = state->rows;
  const uint8_t *skipped = state->skipped;
#pragma omp parallel for schedule(dynamic) num_threads(state->num_threads)
  for (int64_t row = 0; row < rows->num_rows; row++) {
    const int32_t *blocks = rows->block_tables + row * rows->block_tables_stride;
    int64_t count = rows->starts[row + 1] - rows->starts[row], first = rows->slots[row], size = state->cache->block_size;
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

/* e to the power of x <= 0 within 2 units in the last place; libm's is not vectorised. */
static float exponential(float x) {
  float y = x > -87 ? x : -87, whole = rintf(y * 1.44269504f);
  float rest = y - whole * 0.693359375f + whole * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * rest * rest + rest + 1;
  int32_t power = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &power, sizeof scale);
  return x > -87 ? series * scale : 0;
}

/* One row per token: query heads of a step, or what they put out. encoding is FLOAT32 or BFLOAT16. */
struct tensor {
  void *elements;
  int64_t stride, encoding;
};

static void read_row(const struct tensor *tensor, int64_t row, int64_t from, int64_t count, float *out) {
  int64_t place = row * tensor->stride + from;
  if (tensor->encoding == FLOAT32) memcpy(out, (const float *)tensor->elements + place, count * sizeof(float));
  else
    for (int64_t d = 0; d < count; d++) out[d] = bfloat16(((const uint16_t *)tensor->elements)[place + d]);
}

static void write_row(const struct tensor *tensor, int64_t row, int64_t from, int64_t count, const float *x) {
  int64_t place = row * tensor->stride + from;
  if (tensor->encoding == FLOAT32) memcpy((float *)tensor->elements + place, x, count * sizeof(float));
  else
    for (int64_t d = 0; d < count; d++) { /* to the nearest, ties to even */
      uint32_t bits;
      memcpy(&bits, x + d, sizeof bits);
      ((uint16_t *)tensor->elements)[place + d] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}

/* What one token attends to in one head: the slots [0, sinks) and [from, slot], sinks <= from, in tiles. */
struct near {
  const int32_t *blocks;
  int64_t start, head, sinks, from, slot, sink_tiles, num_tiles;
};

static struct near near_of(const struct skip_state *state, int64_t layer, int64_t row, int64_t token, int64_t head) {
  const struct skip_rows *rows = state->rows;
  int64_t slot = rows->slots[row] + token - rows->starts[row], window = state->rule->window, sinks = state->rule->sinks;
  int64_t from = slot + 1 > window ? slot + 1 - window : 0;
  if (sinks > from) sinks = from;
  int64_t sink_tiles = (sinks + TILE - 1) / TILE, num_tiles = sink_tiles + slot / TILE - from / TILE + 1;
  return (struct near){rows->block_tables + row * rows->block_tables_stride, state->cache->layer_starts[layer], head, sinks,
                       from, slot, sink_tiles, num_tiles};
}

/* First slot of tile n. */
static int64_t tile_slot(const struct near *near, int64_t n) {
  return (n < near->sink_tiles ? n : near->from / TILE + n - near->sink_tiles) * TILE;
}

/* The tokens of tile n that are attended to are [low, high) of its own. */
static int64_t tile_low(const struct near *near, int64_t n) {
  int64_t place = tile_slot(near, n);
  return n < near->sink_tiles || near->from < place ? 0 : near->from - place;
}

static int64_t tile_high(const struct near *near, int64_t n) {
  int64_t count = (n < near->sink_tiles ? near->sinks : near->slot + 1) - tile_slot(near, n);
  return count < TILE ? count : TILE;
}

static int64_t tile_base(const struct cache *cache, const struct near *near, int64_t n) {
  return element(cache, near->blocks, near->start, near->head, tile_slot(near, n));
}

static void prefetch_near(const struct cache *cache, const struct near *near, int64_t n, int values) {
  prefetch_tile(cache, tile_base(cache, near, n), tile_slot(near, n) % cache->block_size, values);
}

/* Scores of `group` (at most GROUP) query heads [group, D] with a tile's keys, into out, `width` floats apart. */
static inline __attribute__((always_inline)) void score_tile(const lanes *keys, const float *query, int64_t dims,
                                                             int64_t group, float scale, float *out, int64_t width) {
  lanes even[GROUP], odd[GROUP];
  for (int64_t g = 0; g < group; g++) even[g] = odd[g] = (lanes){0};
  for (int64_t d = 0; d < dims; d += 2)
    for (int64_t g = 0; g < group; g++) {
      even[g] += query[g * dims + d] * keys[d];
      odd[g] += query[g * dims + d + 1] * keys[d + 1];
    }
  for (int64_t g = 0; g < group; g++) *(unaligned_lanes *)(out + g * width) = (even[g] + odd[g]) * scale;
}

/* Add the values [low, high) of a tile [TILE, D] to the outputs of `group` query heads [group, D]; each head's weights lie
   `width` floats behind the one's before. */
static inline __attribute__((always_inline)) void add_tile(const float *values, const float *weights, int64_t width,
                                                           int64_t low, int64_t high, int64_t dims, int64_t group,
                                                           float *restrict out) {
  int64_t d = 0;
  for (; d + TILE <= dims; d += TILE) {
    lanes sums[GROUP];
    for (int64_t g = 0; g < group; g++) sums[g] = *(unaligned_lanes *)(out + g * dims + d);
    for (int64_t i = low; i < high; i++) {
      lanes row = *(const unaligned_lanes *)(values + i * dims + d);
      for (int64_t g = 0; g < group; g++) sums[g] += weights[g * width + i] * row;
    }
    for (int64_t g = 0; g < group; g++) *(unaligned_lanes *)(out + g * dims + d) = sums[g];
  }
  for (; d < dims; d++)
    for (int64_t g = 0; g < group; g++)
      for (int64_t i = low; i < high; i++) out[g * dims + d] += weights[g * width + i] * values[i * dims + d];
}

/* Attention of one token's query heads of one KV head. query, out [group, D]. scratch [TILE, D], weights
   [group, TILE * num_tiles]. `next`, unless null, is what this thread attends to after it. */
static void attend_near(const struct cache *cache, const struct near *near, const struct near *next, int64_t group,
                        float scale, float softcap, const float *query, float *restrict out, float *scratch,
                        float *weights) {
  int64_t dims = cache->dims, size = cache->block_size, width = near->num_tiles * TILE;
  for (int64_t n = 0; n < near->num_tiles; n++) {
    int64_t low = tile_low(near, n), high = tile_high(near, n), g = 0;
    float *own = weights + n * TILE;
    if (next && n < next->num_tiles) prefetch_near(cache, next, n, 0);
    widen_keys(cache, tile_base(cache, near, n), tile_slot(near, n) % size, (lanes *)scratch);
    for (; g + 4 <= group; g += 4)
      score_tile((lanes *)scratch, query + g * dims, dims, 4, scale, own + g * width, width);
    if (group - g == 3) score_tile((lanes *)scratch, query + g * dims, dims, 3, scale, own + g * width, width);
    if (group - g == 2) score_tile((lanes *)scratch, query + g * dims, dims, 2, scale, own + g * width, width);
    if (group - g == 1) score_tile((lanes *)scratch, query + g * dims, dims, 1, scale, own + g * width, width);
    for (g = 0; g < group; g++) {
      if (softcap > 0)
        for (int64_t i = 0; i < TILE; i++) own[g * width + i] = softcap * tanhf(own[g * width + i] / softcap);
      for (int64_t i = 0; i < low; i++) own[g * width + i] = -INFINITY;
      for (int64_t i = high; i < TILE; i++) own[g * width + i] = -INFINITY;
    }
  }
  for (int64_t g = 0; g < group; g++) {
    float *own = weights + g * width, most[TILE], largest = -INFINITY, total = 0;
    memcpy(most, own, sizeof most);
    for (int64_t n = TILE; n < width; n += TILE)
      for (int64_t i = 0; i < TILE; i++) most[i] = own[n + i] > most[i] ? own[n + i] : most[i];
    for (int64_t i = 0; i < TILE; i++) largest = most[i] > largest ? most[i] : largest;
    for (int64_t i = 0; i < width; i++) own[i] = exponential(own[i] - largest);
    for (int64_t i = 0; i < width; i++) total += own[i];
    for (int64_t i = 0; i < width; i++) own[i] /= total;
  }
  memset(out, 0, group * dims * sizeof(float));
  for (int64_t n = 0; n < near->num_tiles; n++) {
    /* Outside the window the values may be anything. */
    int64_t low = tile_low(near, n), high = tile_high(near, n), g = 0;
    const float *own = weights + n * TILE;
    if (next && n < next->num_tiles) prefetch_near(cache, next, n, 1);
    widen_values(cache, tile_base(cache, near, n), tile_slot(near, n) % size, scratch);
    for (; g + 4 <= group; g += 4) add_tile(scratch, own + g * width, width, low, high, dims, 4, out + g * dims);
    if (group - g == 3) add_tile(scratch, own + g * width, width, low, high, dims, 3, out + g * dims);
    if (group - g == 2) add_tile(scratch, own + g * width, width, low, high, dims, 2, out + g * dims);
    if (group - g == 1) add_tile(scratch, own + g * width, width, low, high, dims, 1, out + g * dims);
  }
}

/* The step's skipped tokens in order, with their rows, as pairs into out; returns their number. */
static int64_t list_skipped(const struct skip_state *state, int64_t *out) {
  const struct skip_rows *rows = state->rows;
  int64_t count = 0;
  for (int64_t row = 0; row < rows->num_rows; row++)
    for (int64_t token = rows->starts[row]; token < rows->starts[row + 1]; token++)
      if (state->skipped[token]) {
        out[2 * count] = token;
        out[2 * count++ + 1] = row;
      }
  return count;
}

/* The substitute "window" for the skipped tokens of a step in one layer. query, out: a token's row holds
   [H, group, D] and lies query_stride or out_stride elements behind the one before; the skipped tokens' of out are
   written. */
void attend_window(const struct skip_state *state, int64_t layer, int64_t group, float scale, float softcap, void *query,
                   int64_t query_stride, void *out, int64_t out_stride, int64_t encoding) {
  const struct cache *cache = state->cache;
  struct tensor queries = {query, query_stride, encoding}, outputs = {out, out_stride, encoding};
  int64_t width = group * cache->dims, heads = cache->heads, threads = state->num_threads;
  int64_t most_tiles = state->rule->sinks / TILE + state->rule->window / TILE + 3;
  int64_t *skipped = malloc(2 * state->rows->starts[state->rows->num_rows] * sizeof(int64_t) + 1);
  if (!skipped) abort();
  int64_t num_tasks = list_skipped(state, skipped) * heads;
#pragma omp parallel num_threads(threads)
  {
    float *scratch = floats(TILE * cache->dims + group * most_tiles * TILE + 2 * width);
    float *weights = scratch + TILE * cache->dims, *own = weights + group * most_tiles * TILE;
    /* A decoded token finds its window in no cache: while one is worked on, the next one travels. */
#pragma omp for schedule(static, 1)
    for (int64_t task = 0; task < num_tasks; task++) {
      const int64_t *pair = skipped + task / heads * 2, *after = skipped + (task + threads) / heads * 2;
      int64_t head = task % heads, more = task + threads < num_tasks;
      struct near near = near_of(state, layer, pair[1], pair[0], head), next;
      if (more) next = near_of(state, layer, after[1], after[0], (task + threads) % heads);
      if (task < threads)
        for (int64_t n = 0; n < 2 * near.num_tiles; n++) prefetch_near(cache, &near, n / 2, n % 2);
      read_row(&queries, pair[0], head * width, width, own);
      attend_near(cache, &near, more ? &next : NULL, group, scale, softcap, own, own + width, scratch, weights);
      write_row(&outputs, pair[0], head * width, width, own + width);
    }
    free(scratch);
  }
  free(skipped);
}
