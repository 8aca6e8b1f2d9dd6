/* What the CPU kernels share: where an element of vLLM's paged cache lies, how it is widened to float, and the fusion of
   key and value similarity over heads. */

#ifndef TOKENFILTER_CACHE_H
#define TOKENFILTER_CACHE_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The codes of cache.py and of kernels/rules.py. */
enum { FLOAT32, BFLOAT16, TABLE16 };
enum { VARIANCE_AWARE, MEAN, KEY, VALUE };
/* How the elements of a head's tokens lie in a block, from row-major to whatever the tables say; see element_order. */
enum { BY_TABLE, BY_TOKEN, BY_DIM, DIM_PAIRS, TOKEN_PAIRS };

/* Tokens read together where a block's order allows; a multiple of it makes up every block then. */
#define TILE 16
/* Query heads of a KV head worked on together. */
#define GROUP 4

/* One number for each token of a tile. */
typedef float lanes __attribute__((vector_size(TILE * sizeof(float))));
typedef float unaligned_lanes __attribute__((vector_size(TILE * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t lane_bits __attribute__((vector_size(TILE * sizeof(float))));
typedef uint16_t half_lane_bits __attribute__((vector_size(TILE * sizeof(uint16_t))));

/* Where every element lies; see PagedCache. */
struct cache {
  void *elements;
  const float *table;
  const int64_t *layer_starts, *key_tokens, *key_dims, *value_tokens, *value_dims;
  int64_t block_stride, head_stride;
  int64_t encoding, heads, block_size, dims;
  int64_t key_order, value_order;
};

static float *floats(int64_t count) {
  /* Aligned, so that sums over vector registers group alike in every call. */
  int64_t bytes = (count * (int64_t)sizeof(float) + 63) / 64 * 64;
  float *memory = aligned_alloc(64, bytes > 0 ? bytes : 64);
  if (!memory) abort();
  memset(memory, 0, bytes);
  return memory;
}

static float bfloat16(uint32_t bits) {
  float x;
  bits <<= 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static float element_of(const struct cache *cache, int64_t place) {
  if (cache->encoding == FLOAT32) return ((const float *)cache->elements)[place];
  uint16_t bits = ((const uint16_t *)cache->elements)[place];
  return cache->encoding == BFLOAT16 ? bfloat16(bits) : cache->table[bits];
}

/* One token's elements, into out [D]. The orders of vLLM's instruction sets get loops that the compiler can vectorise. */
static void widen(const struct cache *cache, int64_t base, int values, float *out) {
  const int64_t *dims = values ? cache->value_dims : cache->key_dims;
  int64_t count = cache->dims, order = values ? cache->value_order : cache->key_order;
  const uint16_t *bits = (const uint16_t *)cache->elements + base;
  if (order == BY_TOKEN && cache->encoding == FLOAT32) {
    memcpy(out, (const float *)cache->elements + base, count * sizeof(float));
  } else if (cache->encoding != BFLOAT16) {
    for (int64_t d = 0; d < count; d++) out[d] = element_of(cache, base + dims[d]);
  } else if (order == BY_TOKEN) {
    for (int64_t d = 0; d < count; d++) out[d] = bfloat16(bits[d]);
  } else if (order == DIM_PAIRS) {
    int64_t step = dims[2];
    for (int64_t pair = 0; pair < count / 2; pair++)
      for (int64_t i = 0; i < 2; i++) out[2 * pair + i] = bfloat16(bits[pair * step + i]);
  } else if (order == TOKEN_PAIRS) {
    for (int64_t first = 0; first < count; first += TILE)
      for (int64_t d = 0; d < TILE; d++) out[first + d] = bfloat16(bits[dims[first] + 2 * d]);
  } else {
    for (int64_t d = 0; d < count; d++) out[d] = bfloat16(bits[dims[d]]);
  }
}

/* The keys of a tile, from a block's token `first` on (a multiple of TILE), into out [D]; base is where the head's block
   starts. */
static void widen_keys(const struct cache *cache, int64_t base, int64_t first, lanes *out) {
  int64_t count = cache->dims, place = base + cache->key_tokens[first];
  const uint16_t *bits = (const uint16_t *)cache->elements + place;
  if (cache->encoding == BFLOAT16 && cache->key_order == DIM_PAIRS) {
    for (int64_t d = 0; d < count; d += 2) {
      lane_bits pair;
      memcpy(&pair, bits + cache->key_dims[d], sizeof pair);
      out[d] = (lanes)(pair << 16);
      out[d + 1] = (lanes)(pair & 0xFFFF0000);
    }
  } else if (cache->encoding == BFLOAT16 && cache->key_order == BY_DIM) {
    for (int64_t d = 0; d < count; d++) {
      half_lane_bits own;
      memcpy(&own, bits + cache->key_dims[d], sizeof own);
      out[d] = (lanes)(__builtin_convertvector(own, lane_bits) << 16);
    }
  } else if (cache->encoding == FLOAT32 && cache->key_order == BY_DIM) {
    for (int64_t d = 0; d < count; d++)
      memcpy(out + d, (const float *)cache->elements + place + cache->key_dims[d], sizeof *out);
  } else {
    for (int64_t d = 0; d < count; d++)
      for (int64_t i = 0; i < TILE; i++)
        out[d][i] = element_of(cache, base + cache->key_tokens[first + i] + cache->key_dims[d]);
  }
}

/* The values of such a tile, into out [TILE, D]. */
static void widen_values(const struct cache *cache, int64_t base, int64_t first, float *out) {
  int64_t count = cache->dims;
  const int64_t *tokens = cache->value_tokens + first;
  if (cache->encoding != BFLOAT16 || cache->value_order != TOKEN_PAIRS) {
    for (int64_t i = 0; i < TILE; i++) widen(cache, base + tokens[i], 1, out + i * count);
    return;
  }
  for (int64_t i = 0; i < TILE; i += 2)
    for (int64_t d = 0; d < count; d += TILE) {
      lane_bits pair;
      memcpy(&pair, (const uint16_t *)cache->elements + base + tokens[i] + cache->value_dims[d], sizeof pair);
      lanes even = (lanes)(pair << 16), odd = (lanes)(pair & 0xFFFF0000);
      memcpy(out + i * count + d, &even, sizeof even);
      memcpy(out + (i + 1) * count + d, &odd, sizeof odd);
    }
}

/* Ask for a tile of a head's keys or values before it is needed; `base` and `first` as in widen_keys. */
static void prefetch_tile(const struct cache *cache, int64_t base, int64_t first, int values) {
  int64_t size = cache->encoding == FLOAT32 ? sizeof(float) : sizeof(uint16_t), line = 64 / size;
  const char *start = (const char *)cache->elements + base * size;
  if (values && cache->value_order >= BY_TOKEN) {
    int64_t pairs = cache->value_order == TOKEN_PAIRS;
    for (int64_t i = 0; i < TILE; i += 1 + pairs)
      for (int64_t d = 0; d < cache->dims; d += pairs ? TILE : line)
        __builtin_prefetch(start + (cache->value_tokens[first + i] + cache->value_dims[d]) * size, 0, 3);
  } else if (!values && cache->key_order >= BY_DIM) {
    for (int64_t d = 0; d < cache->dims; d += cache->key_order == DIM_PAIRS ? 2 : 1)
      __builtin_prefetch(start + (cache->key_tokens[first] + cache->key_dims[d]) * size, 0, 3);
  }
}

/* Ask for a token's keys and values before they are needed. */
static void prefetch_token(const struct cache *cache, int64_t base, int64_t token) {
  int64_t size = cache->encoding == FLOAT32 ? sizeof(float) : sizeof(uint16_t), line = 64 / size;
  const char *start = (const char *)cache->elements + base * size;
  int64_t key_step = cache->key_order == BY_TOKEN ? line : cache->key_order == DIM_PAIRS ? 2 : 1;
  int64_t value_step = cache->value_order == BY_TOKEN ? line : cache->value_order == TOKEN_PAIRS ? TILE : 1;
  for (int64_t d = 0; d < cache->dims; d += key_step)
    __builtin_prefetch(start + (cache->key_tokens[token] + cache->key_dims[d]) * size, 0, 3);
  for (int64_t d = 0; d < cache->dims; d += value_step)
    __builtin_prefetch(start + (cache->value_tokens[token] + cache->value_dims[d]) * size, 0, 3);
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
    } else if (fusion != MEAN) {
      abort();
    }
    out[t] = weight * key_mean + (1 - weight) * value_mean;
  }
}

static int64_t element(const struct cache *cache, const int32_t *blocks, int64_t start, int64_t head, int64_t slot) {
  return start + blocks[slot / cache->block_size] * cache->block_stride + head * cache->head_stride;
}

/* The place of a slot in arrays by physical slot. */
static int64_t physical(const struct cache *cache, const int32_t *blocks, int64_t slot) {
  return blocks[slot / cache->block_size] * cache->block_size + slot % cache->block_size;
}

static float cosine(const float *x, const float *y, int64_t dims) {
  float dot = 0, own = 0, other = 0;
  for (int64_t d = 0; d < dims; d++) {
    dot += x[d] * y[d];
    own += x[d] * x[d];
    other += y[d] * y[d];
  }
  float norms = own * other;
  return norms > 0 ? dot / sqrtf(norms) : 0;
}

/* Let a decaying anchor [D] take in x and, unless it is null, lose `leaving`, which is among its last terms no more. */
static void advance(float *anchor, const float *x, const float *leaving, int64_t dims, float decay, float dropped) {
  if (leaving)
    for (int64_t d = 0; d < dims; d++) anchor[d] = decay * anchor[d] + x[d] - dropped * leaving[d];
  else
    for (int64_t d = 0; d < dims; d++) anchor[d] = decay * anchor[d] + x[d];
}

#endif
