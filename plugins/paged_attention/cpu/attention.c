// Paged attention: a block of queries of one sequence and one KV head against the sequence's cache, block by block.
//
// Softmax is computed online: a new maximum rescales the previous sums. The order of all additions depends on the
// sequence alone, not on the other sequences of the step, the threads or the size of query blocks.
//
// A cache of 8 bits has one scale for each token and head. Its keys are multiplied as integers with queries in int8
// digits (three are as exact as fp32), its values as fp32.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

enum { BLOCK = 32, MAX_ROWS = 32, MAX_WIDTH = 576, MAX_VALUE_WIDTH = 512 };
// Rows at once, as many as the registers can hold.
#if defined(__AVX512F__)
enum { AT_ONCE = 8 };
#else
enum { AT_ONCE = 2 };
#endif

// Query tokens of one item. Their heads make at most MAX_ROWS rows.
static int attention_tokens(const instruction *i) {
  const int shared = i->n[0] / i->n[1];
  return shared >= 16 ? 1 : 16 / shared;
}
static int attention_items(const instruction *i, const step *s) {
  const int tokens = attention_tokens(i);
  int items = 0;
  for (int q = 0; q < s->sequences; q++) {
    const int count = s->query_start[q + 1] - s->query_start[q];
    items += (count + tokens - 1) / tokens * i->n[1];
  }
  return items;
}

// The queries of an item: fp32, or int8 digits with their sums and scales.
typedef struct {
  float x[MAX_ROWS][MAX_WIDTH];
} float_queries;
typedef struct {
  int8_t x[MAX_ROWS][3][MAX_WIDTH];
  int32_t sums[MAX_ROWS][3];
  float scales[MAX_ROWS];
} digit_queries;

// The keys and values of one block and head.
typedef struct {
  const void *keys, *values;
  const float *key_scales, *value_scales; // of a cache of 8 bits
} kv_block;

// Scores of R rows with the 32 keys of a block.
INLINE void float_scores(const int R, int width, const float *keys, const float (*queries)[MAX_WIDTH], float (*out)[BLOCK]) {
  vf s[AT_ONCE][2];
  UNROLL for (int r = 0; r < R; r++) s[r][0] = s[r][1] = allf(0);
  for (int d = 0; d < width; d++, keys += BLOCK) {
    const vf k0 = loadf(keys), k1 = loadf(keys + 16);
    UNROLL for (int r = 0; r < R; r++) {
      const vf q = allf(queries[r][d]);
      s[r][0] = fma(k0, q, s[r][0]), s[r][1] = fma(k1, q, s[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) storef(out[r], s[r][0]), storef(out[r] + 16, s[r][1]);
}
INLINE void digit_scores(const int R, const int DIGITS, int width, const uint8_t *keys, const float *key_scales,
                         const digit_queries *q, int first, float (*out)[BLOCK]) {
  vi s[6][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int d = 0; d < DIGITS; d++)
      s[r * DIGITS + d][0] = s[r * DIGITS + d][1] = alli(product(-128, q->sums[first + r][d]));
  for (int k = 0; k < width; k += 4, keys += 4 * BLOCK) {
    const vi u0 = (vi) * (const bytes64 *)keys, u1 = (vi) * (const bytes64 *)(keys + 64);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int d = 0; d < DIGITS; d++) {
      int32_t four;
      __builtin_memcpy(&four, q->x[first + r][d] + k, 4);
      vi *to = s[r * DIGITS + d];
      to[0] = dot4(to[0], u0, alli(four), 0), to[1] = dot4(to[1], u1, alli(four), 0);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int half = 0; half < 2; half++) {
    vf t = tofloat(s[r * DIGITS][half]);
    UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(s[r * DIGITS + d][half]));
    storef(out[r] + 16 * half, t * q->scales[first + r] * loadf(key_scales + 16 * half));
  }
}

// out = out * shrink + weights x values, for R rows and V vectors of a value
INLINE void weigh(const int R, const int V, const int CODED, int first, int last, const float (*weights)[BLOCK], const void *values,
                  int64_t stride, const float *shrink, float (*out)[MAX_VALUE_WIDTH], int d) {
  vf o[AT_ONCE][2 * AT_ONCE];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) o[r][v] = loadf(out[r] + d + 16 * v) * shrink[r];
  for (int t = first; t < last; t++) {
    vf x[2 * AT_ONCE];
    UNROLL for (int v = 0; v < V; v++) {
      const int64_t at = t * stride + d + 16 * v;
      x[v] = CODED ? tofloat(__builtin_convertvector(*(const vb *)((const int8_t *)values + at), vi)) : loadf((const float *)values + at);
    }
    UNROLL for (int r = 0; r < R; r++) {
      const vf p = allf(weights[r][t]);
      UNROLL for (int v = 0; v < V; v++) o[r][v] = fma(x[v], p, o[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) storef(out[r] + d + 16 * v, o[r][v]);
}
INLINE void weigh_rows(const int R, const int CODED, int first, int last, const float (*weights)[BLOCK], const void *values,
                       int padded, const float *shrink, float (*out)[MAX_VALUE_WIDTH]) {
  const int V = 2 * AT_ONCE / R; // independent sums hide the latency of additions
  int d = 0;
  for (; d + 16 * V <= padded; d += 16 * V) weigh(R, V, CODED, first, last, weights, values, padded, shrink, out, d);
  for (; d < padded; d += 16) weigh(R, 1, CODED, first, last, weights, values, padded, shrink, out, d);
}
// Calls DO(R) for the rows from r on, with R a constant that is at most MOST.
#define EACH_ROWS(MOST, DO)                            \
  for (int r = 0; r < rows;) {                         \
    if (rows - r >= MOST) { DO(MOST) r += MOST; }      \
    else if (rows - r >= 2) { DO(2) r += 2; }          \
    else { DO(1) r += 1; }                             \
  }

INLINE kv_block block_of(const int DIGITS, const instruction *i, int block, int head) {
  const int kv_heads = i->n[1], width = i->n[2], padded = (i->n[3] + LANES - 1) / LANES * LANES;
  const uint8_t *keys = i->keys + block * i->block_stride, *values = i->values + block * i->block_stride;
  if (!DIGITS) return (kv_block){(const float *)keys + (int64_t)head * width * BLOCK, (const float *)values + (int64_t)head * BLOCK * padded, 0, 0};
  const int64_t key_bytes = (int64_t)(width + 3) / 4 * 4 * BLOCK, value_bytes = (int64_t)BLOCK * padded;
  return (kv_block){keys + head * key_bytes, values + head * value_bytes, (const float *)(keys + kv_heads * key_bytes) + head * BLOCK,
                    (const float *)(values + kv_heads * value_bytes) + head * BLOCK};
}

// Blocks are scattered in memory, so the CPU cannot guess the next one.
INLINE void prefetch_block(const int DIGITS, const instruction *i, int block, int head) {
  const kv_block kv = block_of(DIGITS, i, block, head);
  const int size = DIGITS ? 1 : 4, key_bytes = i->n[2] * BLOCK * size, value_bytes = i->n[3] * BLOCK * size;
  for (int at = 0; at < key_bytes; at += 64) PREFETCH((const uint8_t *)kv.keys + at);
  for (int at = 0; at < value_bytes; at += 64) PREFETCH((const uint8_t *)kv.values + at);
  if (!DIGITS) return;
  for (int at = 0; at < BLOCK; at += 16) PREFETCH(kv.key_scales + at), PREFETCH(kv.value_scales + at);
}

// DIGITS: of the queries, for a cache of 8 bits; 0 for a cache of fp32.
INLINE void attention_item(const int DIGITS, const instruction *i, const step *s, int item) {
  const int heads = i->n[0], kv_heads = i->n[1], width = i->n[2], value_width = i->n[3], window = i->n[4];
  const int shared = heads / kv_heads, most = attention_tokens(i), padded = (value_width + LANES - 1) / LANES * LANES;
  const float scale = i->x[0], softcap = i->x[1];
  int sequence = 0;
  for (;; sequence++) {
    const int count = s->query_start[sequence + 1] - s->query_start[sequence];
    const int items = (count + most - 1) / most * kv_heads;
    if (item < items) break;
    item -= items;
  }
  const int head = item % kv_heads, begin = s->query_start[sequence] + item / kv_heads * most;
  const int end = begin + most < s->query_start[sequence + 1] ? begin + most : s->query_start[sequence + 1];
  const int tokens = end - begin, rows = tokens * shared;
  const int position = s->past_lengths[sequence] + begin - s->query_start[sequence]; // of the first query
  const int32_t *table = s->block_indices + s->block_begins[sequence];

  float_queries q;
  digit_queries digits;
  float out[MAX_ROWS][MAX_VALUE_WIDTH], weight[MAX_ROWS][BLOCK], maximum[MAX_ROWS], total[MAX_ROWS], shrink[MAX_ROWS];
  for (int r = 0; r < rows; r++) {
    const float *from = i->a + (begin + r / shared) * i->a_stride + (int64_t)(head * shared + r % shared) * width;
    if (!DIGITS)
      for (int d = 0; d < width; d++) q.x[r][d] = from[d] * scale;
    else digits.scales[r] = to_digits(DIGITS, width, from, digits.x[r][0], MAX_WIDTH, digits.sums[r]) * scale;
    for (int d = 0; d < padded; d += LANES) storef(out[r] + d, allf(0));
    maximum[r] = -__builtin_inff(), total[r] = 0;
  }
  const int seen = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0; // the first key that any query sees
  for (int b = seen / BLOCK; b * BLOCK < position + tokens; b++) {
    const kv_block kv = block_of(DIGITS, i, table[b], head);
    if ((b + 1) * BLOCK < position + tokens) prefetch_block(DIGITS, i, table[b + 1], head);
#define FLOATS(R) float_scores(R, width, kv.keys, q.x + r, weight + r);
#define CODES(R) digit_scores(R, DIGITS, width, kv.keys, kv.key_scales, &digits, r, weight + r);
    if (!DIGITS) EACH_ROWS(AT_ONCE, FLOATS)
    else if (DIGITS == 1) EACH_ROWS(4, CODES)
    else EACH_ROWS(2, CODES)
    int begins = BLOCK, ends = 0; // the keys that any row sees
    for (int r = 0; r < rows; r++) {
      const int p = position + r / shared; // this query's position
      int first = window > 0 && p - window + 1 > b * BLOCK ? p - window + 1 - b * BLOCK : 0;
      int last = p - b * BLOCK + 1;
      first = first > BLOCK ? BLOCK : first, last = last > BLOCK ? BLOCK : last;
      begins = first < begins ? first : begins, ends = last > ends ? last : ends;
      shrink[r] = 1;
      if (first >= last) {
        storef(weight[r], allf(0)), storef(weight[r] + 16, allf(0));
        continue;
      }
      vf x[2];
      for (int h = 0; h < 2; h++) {
        const vi lane = (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + 16 * h;
        x[h] = loadf(weight[r] + 16 * h);
        if (softcap > 0) x[h] = softcap * tanh_each(x[h] / softcap);
        x[h] = select((lane >= first) & (lane < last), x[h], allf(-__builtin_inff()));
      }
      const float top = largest(maxf(x[0], x[1]));
      if (top > maximum[r]) {
        shrink[r] = expf_fast(allf(maximum[r] - top))[0];
        total[r] *= shrink[r], maximum[r] = top;
      }
      for (int h = 0; h < 2; h++) x[h] = expf_fast(x[h] - maximum[r]);
      total[r] += sum(x[0] + x[1]);
      for (int h = 0; h < 2; h++) storef(weight[r] + 16 * h, DIGITS ? x[h] * loadf(kv.value_scales + 16 * h) : x[h]);
    }
#define WEIGH(R) weigh_rows(R, DIGITS > 0, begins, ends, weight + r, kv.values, padded, shrink + r, out + r);
    EACH_ROWS(AT_ONCE, WEIGH)
  }
  for (int r = 0; r < rows; r++) {
    float *to = i->out + (begin + r / shared) * i->out_stride + (int64_t)(head * shared + r % shared) * value_width;
    const float factor = 1 / total[r];
    for (int d = 0; d < value_width; d++) to[d] = out[r][d] * factor;
  }
}
#undef FLOATS
#undef CODES
#undef WEIGH

#define ATTENTION(D) \
  static __attribute__((noinline)) void attention_##D(const instruction *i, const step *s, int item) { attention_item(D, i, s, item); }
ATTENTION(0) ATTENTION(1) ATTENTION(3)
static void attention(const instruction *i, const step *s, int item) {
  const int digits = i->n[5];
  if (digits == 0) attention_0(i, s, item);
  else if (digits == 1) attention_1(i, s, item);
  else attention_3(i, s, item);
}
