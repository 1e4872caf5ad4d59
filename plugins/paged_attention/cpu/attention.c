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

// Scores of R rows with the 32 keys of a block. Even and odd elements have separate sums.
INLINE void scores(const int R, int width, const float *keys, const float *queries, int64_t stride, float out[][BLOCK]) {
  vf s[4][2][2];
  for (int r = 0; r < R; r++) s[r][0][0] = s[r][0][1] = s[r][1][0] = s[r][1][1] = allf(0);
  for (int d = 0; d < width; d += 2, keys += 2 * BLOCK)
    for (int e = 0; e < 2; e++) {
      const vf k0 = loadf(keys + e * BLOCK), k1 = loadf(keys + e * BLOCK + 16);
      for (int r = 0; r < R; r++) {
        const vf q = allf(queries[r * stride + d + e]);
        s[r][e][0] = fma(k0, q, s[r][e][0]), s[r][e][1] = fma(k1, q, s[r][e][1]);
      }
    }
  for (int r = 0; r < R; r++) storef(out[r], s[r][0][0] + s[r][1][0]), storef(out[r] + 16, s[r][0][1] + s[r][1][1]);
}

// out += weights x values, for V vectors of the row
INLINE void weigh(const int V, int first, int last, const float *weights, const float *values, int64_t stride, float *out) {
  vf o[4];
  for (int v = 0; v < V; v++) o[v] = loadf(out + 16 * v);
  for (int t = first; t < last; t++) {
    const vf p = allf(weights[t]);
    for (int v = 0; v < V; v++) o[v] = fma(loadf(values + t * stride + 16 * v), p, o[v]);
  }
  for (int v = 0; v < V; v++) storef(out + 16 * v, o[v]);
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

  float q[MAX_ROWS][MAX_WIDTH], out[MAX_ROWS][MAX_VALUE_WIDTH], score[MAX_ROWS][BLOCK], maximum[MAX_ROWS], total[MAX_ROWS];
  for (int r = 0; r < rows; r++) {
    const float *from = i->a + (begin + r / shared) * i->a_stride + (int64_t)(head * shared + r % shared) * width;
    for (int d = 0; d < width; d++) q[r][d] = from[d] * scale;
    for (int d = 0; d < padded; d += LANES) storef(out[r] + d, allf(0));
    maximum[r] = -__builtin_inff(), total[r] = 0;
  }
  const int seen = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0; // the first key that any query sees
  for (int b = seen / BLOCK; b * BLOCK < position + tokens; b++) {
    const int64_t at = (int64_t)table[b] * kv_heads + head;
    const float *keys = i->keys + at * width * BLOCK, *values = i->values + at * BLOCK * padded;
    int r = 0;
    for (; r + 4 <= rows; r += 4) scores(4, width, keys, q[r], MAX_WIDTH, score + r);
    for (; r + 2 <= rows; r += 2) scores(2, width, keys, q[r], MAX_WIDTH, score + r);
    for (; r < rows; r++) scores(1, width, keys, q[r], MAX_WIDTH, score + r);
    for (r = 0; r < rows; r++) {
      const int p = position + r / shared; // this query's position
      int first = window > 0 && p - window + 1 > b * BLOCK ? p - window + 1 - b * BLOCK : 0;
      int last = p - b * BLOCK + 1;
      first = first > BLOCK ? BLOCK : first, last = last > BLOCK ? BLOCK : last;
      if (first >= last) continue;
      vf x[2];
      for (int h = 0; h < 2; h++) {
        const vi lane = (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + 16 * h;
        x[h] = loadf(score[r] + 16 * h);
        if (softcap > 0) x[h] = softcap * tanh_each(x[h] / softcap);
        x[h] = select((lane >= first) & (lane < last), x[h], allf(-__builtin_inff()));
      }
      const float top = largest(maxf(x[0], x[1]));
      if (top > maximum[r]) {
        const float shrink = expf_fast(allf(maximum[r] - top))[0];
        total[r] *= shrink, maximum[r] = top;
        for (int d = 0; d < padded; d += LANES) storef(out[r] + d, loadf(out[r] + d) * shrink);
      }
      for (int h = 0; h < 2; h++) storef(score[r] + 16 * h, x[h] = expf_fast(x[h] - maximum[r]));
      total[r] += sum(x[0] + x[1]);
      int d = 0;
      for (; d + 64 <= padded; d += 64) weigh(4, first, last, score[r], values + d, padded, out[r] + d);
      for (; d < padded; d += 16) weigh(1, first, last, score[r], values + d, padded, out[r] + d);
    }
  }
  for (int r = 0; r < rows; r++) {
    float *to = i->out + (begin + r / shared) * i->out_stride + (int64_t)(head * shared + r % shared) * value_width;
    const float factor = 1 / total[r];
    for (int d = 0; d < value_width; d++) to[d] = out[r][d] * factor;
  }
}
