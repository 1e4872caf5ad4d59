// Paged attention: a block of queries of one sequence and one KV head against the sequence's cache, block by block.
//
// Softmax is computed online: a new maximum rescales the previous sums. The order of all additions depends on the
// sequence alone, not on the other sequences of the step, the threads or the size of query blocks.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

enum { BLOCK = 32, MAX_ROWS = 32, MAX_WIDTH = 576, MAX_VALUE_WIDTH = 512 };

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

#if defined(__AVX512F__)
enum { AT_ONCE = 8 }; // rows, as many as the registers can hold
#else
enum { AT_ONCE = 2 };
#endif

// Scores of R rows with the 32 keys of a block.
INLINE void scores(const int R, int width, const float *keys, const float (*queries)[MAX_WIDTH], float (*out)[BLOCK]) {
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

// out = out * shrink + weights x values, for R rows and V vectors of a value
INLINE void weigh(const int R, const int V, int first, int last, const float (*weights)[BLOCK], const float *values, int64_t stride,
                  const float *shrink, float (*out)[MAX_VALUE_WIDTH], int d) {
  vf o[AT_ONCE][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) o[r][v] = loadf(out[r] + d + 16 * v) * shrink[r];
  for (int t = first; t < last; t++) {
    vf x[2];
    UNROLL for (int v = 0; v < V; v++) x[v] = loadf(values + t * stride + d + 16 * v);
    UNROLL for (int r = 0; r < R; r++) {
      const vf p = allf(weights[r][t]);
      UNROLL for (int v = 0; v < V; v++) o[r][v] = fma(x[v], p, o[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) storef(out[r] + d + 16 * v, o[r][v]);
}
INLINE void weigh_rows(const int R, int first, int last, const float (*weights)[BLOCK], const float *values, int padded,
                       const float *shrink, float (*out)[MAX_VALUE_WIDTH]) {
  int d = 0;
  for (; d + 32 <= padded; d += 32) weigh(R, 2, first, last, weights, values, padded, shrink, out, d);
  if (d < padded) weigh(R, 1, first, last, weights, values, padded, shrink, out, d);
}
#define EACH_ROWS(do_rows)                                                                       \
  for (int r = 0; r < rows;) {                                                                   \
    if (rows - r >= AT_ONCE) { do_rows(AT_ONCE) r += AT_ONCE; }                                  \
    else if (rows - r >= 2) { do_rows(2) r += 2; }                                               \
    else { do_rows(1) r += 1; }                                                                  \
  }

static void attention(const instruction *i, const step *s, int item) {
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

  float q[MAX_ROWS][MAX_WIDTH], out[MAX_ROWS][MAX_VALUE_WIDTH], weight[MAX_ROWS][BLOCK];
  float maximum[MAX_ROWS], total[MAX_ROWS], shrink[MAX_ROWS];
  for (int r = 0; r < rows; r++) {
    const float *from = i->a + (begin + r / shared) * i->a_stride + (int64_t)(head * shared + r % shared) * width;
    for (int d = 0; d < width; d++) q[r][d] = from[d] * scale;
    for (int d = 0; d < padded; d += LANES) storef(out[r] + d, allf(0));
    maximum[r] = -__builtin_inff(), total[r] = 0;
  }
  const int seen = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0; // the first key that any query sees
  for (int b = seen / BLOCK; b * BLOCK < position + tokens; b++) {
    const float *keys = i->keys + table[b] * i->block_stride + (int64_t)head * width * BLOCK;
    const float *values = i->values + table[b] * i->block_stride + (int64_t)head * BLOCK * padded;
#define SCORES(R) scores(R, width, keys, q + r, weight + r);
    EACH_ROWS(SCORES)
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
      for (int h = 0; h < 2; h++) storef(weight[r] + 16 * h, x[h] = expf_fast(x[h] - maximum[r]));
      total[r] += sum(x[0] + x[1]);
    }
#define WEIGH(R) weigh_rows(R, begins, ends, weight + r, values, padded, shrink + r, out + r);
    EACH_ROWS(WEIGH)
  }
  for (int r = 0; r < rows; r++) {
    float *to = i->out + (begin + r / shared) * i->out_stride + (int64_t)(head * shared + r % shared) * value_width;
    const float factor = 1 / total[r];
    for (int d = 0; d < value_width; d++) to[d] = out[r][d] * factor;
  }
}
