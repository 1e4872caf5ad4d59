// Writing keys and values into the paged cache.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

// The nearest fp16 number, at most 65504.
INLINE _Float16 to_fp16(float x) { return (_Float16)(x > 65504 ? 65504.0f : x < -65504 ? -65504.0f : x); }

// The elements of a key are 32 numbers apart, so that the scores of a block's 32 tokens are vectors. Tokens that follow
// each other in a block are written together, because they share cache lines.
INLINE void write_floats(const int CACHE, const instruction *i, int64_t block, int at, int count, const float *key, const float *value) {
  const int heads = i->n[0], width = i->n[1], value_width = i->n[2], padded = (value_width + LANES - 1) / LANES * LANES;
  uint8_t *keys = i->keys + block * i->block_stride, *values = i->values + block * i->block_stride;
  for (int h = 0; h < heads; h++, key += width, value += value_width) {
    const int64_t k = (int64_t)h * width * 32 + at, v = ((int64_t)h * 32 + at) * padded;
    for (int d = 0; d < width; d++)
      for (int t = 0; t < count; t++) {
        const float x = key[t * i->a_stride + d];
        if (CACHE == FP16_CACHE) ((_Float16 *)keys)[k + d * 32 + t] = to_fp16(x);
        else ((float *)keys)[k + d * 32 + t] = x;
      }
    for (int t = 0; t < count; t++)
      for (int d = 0; d < value_width; d++) {
        const float x = value[t * i->b_stride + d];
        if (CACHE == FP16_CACHE) ((_Float16 *)values)[v + t * padded + d] = to_fp16(x);
        else ((float *)values)[v + t * padded + d] = x;
      }
  }
}
// The codes of 4 neighbouring elements of a key lie together, and those of 4 tokens of an element of values. Scales follow.
static void write_codes(const instruction *i, int64_t block, int at, int count, const float *key, const float *value) {
  const int heads = i->n[0], width = i->n[1], value_width = i->n[2], padded = (value_width + LANES - 1) / LANES * LANES;
  const int64_t key_bytes = (int64_t)(width + 3) / 4 * 4 * 32, value_bytes = (int64_t)32 * padded;
  uint8_t *keys = i->keys + block * i->block_stride, *values = i->values + block * i->block_stride;
  float *key_scales = (float *)(keys + heads * key_bytes) + at, *value_scales = (float *)(values + heads * value_bytes) + at;
  int8_t codes[1024];
  int32_t sums;
  for (int h = 0; h < heads; h++, key += width, value += value_width)
    for (int t = 0; t < count; t++) {
      key_scales[h * 32 + t] = to_digits(1, width, key + t * i->a_stride, codes, 0, &sums);
      for (int d = 0; d < width; d++) keys[h * key_bytes + d / 4 * 128 + (at + t) * 4 + d % 4] = (uint8_t)(codes[d] + 128);
      value_scales[h * 32 + t] = to_digits(1, value_width, value + t * i->b_stride, codes, 0, &sums);
      uint8_t *to = values + h * value_bytes + (int64_t)((at + t) / 4 * padded) * 4 + (at + t) % 4;
      for (int d = 0; d < value_width; d++) to[4 * d] = (uint8_t)(codes[d] + 128);
    }
}

static void write_kv(const instruction *i, const step *s, int begin, int end) {
  for (int row = begin, count; row < end; row += count) {
    const int slot = s->slot[row], block = slot / 32, at = slot % 32;
    for (count = 1; row + count < end && at + count < 32 && s->slot[row + count] == slot + count;) count++;
    const float *key = i->a + row * i->a_stride, *value = i->b + row * i->b_stride;
    if (i->n[3] == INT8_CACHE) write_codes(i, block, at, count, key, value);
    else if (i->n[3] == FP16_CACHE) write_floats(FP16_CACHE, i, block, at, count, key, value);
    else write_floats(FP32_CACHE, i, block, at, count, key, value);
  }
}
