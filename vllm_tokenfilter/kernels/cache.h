/* What the CPU kernels share: where an element of vLLM's paged cache lies, how it is widened to float, and the fusion of
   key and value similarity over heads. */

#ifndef TOKENFILTER_CACHE_H
#define TOKENFILTER_CACHE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The codes of kernels/cpu.py. */
enum { FLOAT32, BFLOAT16, TABLE16 };
enum { VARIANCE_AWARE, MEAN, KEY, VALUE };

/* Where every element lies; see PagedCache. */
struct cache {
  void *elements;
  const float *table;
  const int64_t *layer_starts, *key_tokens, *key_dims, *value_tokens, *value_dims;
  int64_t block_stride, head_stride;
  int64_t encoding, heads, block_size, dims;
  int64_t key_run, key_step, value_run, value_step; /* see order */
};

static float *floats(int64_t count) {
  /* Aligned, so that sums over vector registers group alike in every call. */
  int64_t bytes = (count * (int64_t)sizeof(float) + 63) / 64 * 64;
  float *memory = aligned_alloc(64, bytes > 0 ? bytes : 64);
  if (!memory) abort();
  memset(memory, 0, bytes);
  return memory;
}

/* How a token's elements follow each other: element d at d / run * step + d % run; run 0 where only the table knows. */
struct order {
  const int64_t *dims;
  int64_t run, step;
};

static float bfloat16(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* The orders of vLLM's instruction sets get loops of their own, which the compiler can vectorise. */
static void widen_bfloat16(const uint16_t *elements, struct order order, int64_t count, float *out) {
  if (order.run == 1 && order.step == 2) { /* values of AMX: two tokens side by side */
    for (int64_t d = 0; d < count; d++) out[d] = bfloat16((uint32_t)elements[2 * d] << 16);
  } else if (order.run == 2) { /* keys of AMX: pairs of one token */
    for (int64_t pair = 0; pair < count / 2; pair++)
      for (int64_t i = 0; i < 2; i++) out[2 * pair + i] = bfloat16((uint32_t)elements[pair * order.step + i] << 16);
  } else if (order.run == count) {
    for (int64_t d = 0; d < count; d++) out[d] = bfloat16((uint32_t)elements[d] << 16);
  } else {
    for (int64_t d = 0; d < count; d++) out[d] = bfloat16((uint32_t)elements[order.dims[d]] << 16);
  }
}

static void widen(const struct cache *cache, int64_t base, int values, float *out) {
  int64_t count = cache->dims;
  struct order order = values ? (struct order){cache->value_dims, cache->value_run, cache->value_step}
                              : (struct order){cache->key_dims, cache->key_run, cache->key_step};
  if (cache->encoding == FLOAT32) {
    const float *elements = (const float *)cache->elements + base;
    if (order.run == count) memcpy(out, elements, count * sizeof(float));
    else
      for (int64_t d = 0; d < count; d++) out[d] = elements[order.dims[d]];
  } else if (cache->encoding == BFLOAT16) {
    widen_bfloat16((const uint16_t *)cache->elements + base, order, count, out);
  } else {
    const uint16_t *elements = (const uint16_t *)cache->elements + base;
    for (int64_t d = 0; d < count; d++) out[d] = cache->table[elements[order.dims[d]]];
  }
}

/* Redundancy of each token, into out [C], from the heads' scores key, value [H, C]. */
static void fuse(const float *key, const float *value, int64_t heads, int64_t size, int64_t fusion, float *out) {
  for (int64_t t = 0; t < size; t++) {
    float key_mean = 0, value_mean = 0, weight = 0.5f;
    for (int64_t h = 0; h < heads; h++) {
      key_mean += key[h * size + t];
      value_mean += value[h * size + t];
    }
    key_mean /= heads;
    value_mean /= heads;
    if (fusion == VARIANCE_AWARE) {
      float key_variance = 0, value_variance = 0;
      for (int64_t h = 0; h < heads; h++) {
        key_variance += (key[h * size + t] - key_mean) * (key[h * size + t] - key_mean);
        value_variance += (value[h * size + t] - value_mean) * (value[h * size + t] - value_mean);
      }
      float sum = key_variance + value_variance;
      if (sum > 0) weight = value_variance / sum;
    } else if (fusion == KEY) {
      weight = 1;
    } else if (fusion == VALUE) {
      weight = 0;
    }
    out[t] = weight * key_mean + (1 - weight) * value_mean;
  }
}

static int64_t element(const struct cache *cache, const int32_t *blocks, int64_t start, int64_t head, int64_t slot) {
  return start + blocks[slot / cache->block_size] * cache->block_stride + head * cache->head_stride;
}

#endif
