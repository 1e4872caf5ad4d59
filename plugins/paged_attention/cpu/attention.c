// Paged attention: a tile of queries of one sequence and one KV head against the sequence's cache.
//
// The context is cut into parts of 256 keys, at multiples of 256. Each part has its own softmax; the parts are merged in
// their order. A row (a query of one head) gets the same bits wherever it is computed: alone or in a tile, with all parts
// in one item or each in another thread.
//
// The values of latent attention are the first numbers of its keys. Such a cache has one array, which is laid out as
// values are: keys and values are at the same address.
//
// A cache of floats is multiplied as floats. A cache of 8 bits has one scale for each token and head. Its keys are
// multiplied as integers with queries in int8 digits, and its values with the weights of the softmax in three digits,
// which are as exact as fp32.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

enum { BLOCK = 32, PART = 256, PART_BLOCKS = PART / BLOCK, MAX_ROWS = 32, MAX_WIDTH = 576, MAX_VALUE_WIDTH = 512 };
enum { AHEAD_BLOCKS = 2, WEIGHT_DIGITS = 3 };
enum { ROW = PART + 16 }; // from one row of weights to the next: not a power of two, so that rows share no sets of the L1 cache
// Rows at once, as many as the registers can hold.
#if defined(__AVX512F__)
enum { AT_ONCE = 8, CODED_AT_ONCE = 2, SOFTMAX_AT_ONCE = 4, SUMS = 24 };
#else
enum { AT_ONCE = 2, CODED_AT_ONCE = 1, SOFTMAX_AT_ONCE = 1, SUMS = 6 };
#endif

// Query heads of one item, which share a KV head: all of them, or as large a part as makes at most MAX_ROWS rows.
static int item_heads(const instruction *i) {
  const int shared = i->n[0] / i->n[1];
  int parts = (shared + MAX_ROWS - 1) / MAX_ROWS;
  while (shared % parts) parts++;
  return shared / parts;
}
// Query tokens of one item. Their heads make at most MAX_ROWS rows.
static int attention_tokens(const instruction *i) { return MAX_ROWS / item_heads(i); }
static int is_latent(const instruction *i) { return i->keys == i->values; }
static int padded_values(const instruction *i) { return (i->n[3] + LANES - 1) / LANES * LANES; }
// Numbers of the cache from the value of one token to that of the next.
static int value_stride(const instruction *i) { return is_latent(i) ? i->n[2] : padded_values(i); }
// The first key that the query at `position` sees.
static int first_key(const instruction *i, int position) {
  const int window = i->n[4], chunk = i->n[7];
  const int first = window > 0 && position - window + 1 > 0 ? position - window + 1 : 0, begin = chunk > 0 ? position / chunk * chunk : 0;
  return first > begin ? first : begin;
}

// The items of a step: tiles of queries, or parts of the context if there are few tiles of few queries.
typedef struct {
  int items;
  int each;            // parts of an item; 0: an item is a tile with all its parts
  int64_t part_floats; // of what is kept of a part
} attention_work;
// The parts of the context that the queries of a sequence see.
static int parts_of(const instruction *i, const step *s, int sequence) {
  const int count = s->query_start[sequence + 1] - s->query_start[sequence], position = s->past_lengths[sequence];
  return count ? (position + count - 1) / PART - first_key(i, position) / PART + 1 : 0;
}
static attention_work attention_items(const instruction *i, const step *s, int wanted) {
  const int tokens = attention_tokens(i), shared = item_heads(i), heads = i->n[0] / shared;
  int tiles = 0, most = 0;
  int64_t parts = 0;
  for (int q = 0; q < s->sequences; q++) {
    const int count = s->query_start[q + 1] - s->query_start[q];
    tiles += (count + tokens - 1) / tokens * heads;
    most = count > most ? count : most;
    parts += (int64_t)parts_of(i, s, q) * heads;
  }
  const int64_t part_floats = most * shared * (2 + (int64_t)padded_values(i));
  if (s->threads == 1 || tiles >= wanted || most > tokens || parts * part_floats > s->part_floats) return (attention_work){tiles, 0, 0};
  const int each = upto((int)((parts + wanted - 1) / wanted), 1 << 30);
  int items = 0;
  for (int q = 0; q < s->sequences; q++) items += (parts_of(i, s, q) + each - 1) / each * heads;
  return (attention_work){items, each, part_floats};
}

// The keys and values of one block and head.
typedef struct {
  const uint8_t *keys, *values;
  const float *key_scales, *value_scales; // of a cache of 8 bits
} kv_block;
INLINE kv_block block_of(const int CACHE, const instruction *i, int block, int head) {
  const int kv_heads = i->n[1], width = i->n[2], padded = value_stride(i);
  const uint8_t *keys = i->keys + block * i->block_stride, *values = i->values + block * i->block_stride;
  const int size = CACHE == INT8_CACHE ? 1 : CACHE == FP16_CACHE ? 2 : 4;
  const int64_t key_bytes = (int64_t)(CACHE == INT8_CACHE ? (width + 3) / 4 * 4 : width) * BLOCK * size, value_bytes = (int64_t)BLOCK * padded * size;
  return (kv_block){keys + head * key_bytes, values + head * value_bytes, (const float *)(keys + kv_heads * key_bytes) + head * BLOCK,
                    (const float *)(values + kv_heads * value_bytes) + head * BLOCK};
}

// A tile of queries, and what attention makes of it. Rows lie `width` or `padded` numbers apart.
typedef struct {
  int rows, width, padded, position, shared; // position: of the first query; shared: rows with the same position
  int value_stride;                          // of the cache
  int stride;                                // of digits
  int step;                                  // numbers of a query that a tile of AMX holds; 0: AMX is not used
  union {
    float x[MAX_ROWS * MAX_WIDTH];
    struct {
      int8_t digits[MAX_ROWS * 3 * MAX_WIDTH]; // [row][digit][stride]
      int32_t sums[MAX_ROWS][3];
      float scales[MAX_ROWS];
    };
  };
} query_tile;
// Sums of weights x values, not yet divided by the sums of weights, which are relative to exp(maximum).
typedef struct {
  float *values, *maximum, *total;
} partial;
// The weights of a part in digits.
typedef struct {
  int8_t digits[MAX_ROWS][WEIGHT_DIGITS][PART];
  int32_t sums[MAX_ROWS][WEIGHT_DIGITS];
  float scales[MAX_ROWS];
} coded_weights;

INLINE vf load_number(const int CACHE, const uint8_t *p, int64_t at) {
  return CACHE == FP16_CACHE ? load_fp16((const uint16_t *)p + at) : loadf((const float *)p + at);
}

// Scores of R rows with the 32 keys of a block. next: memory that is read soon.
INLINE void float_scores(const int R, const int CACHE, int width, const uint8_t *keys, const uint8_t *next, const float *queries, float *out) {
  vf s[AT_ONCE][2];
  UNROLL for (int r = 0; r < R; r++) s[r][0] = s[r][1] = allf(0);
  for (int d = 0; d < width; d++) {
    const vf k0 = load_number(CACHE, keys, d * BLOCK), k1 = load_number(CACHE, keys, d * BLOCK + 16);
    if (CACHE == FP16_CACHE) PREFETCH(next + 64 * (int64_t)d);
    else PREFETCH(next + 128 * (int64_t)d), PREFETCH(next + 128 * (int64_t)d + 64);
    UNROLL for (int r = 0; r < R; r++) {
      const vf q = allf(queries[r * width + d]);
      s[r][0] = fma(k0, q, s[r][0]), s[r][1] = fma(k1, q, s[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) storef(out + r * ROW, s[r][0]), storef(out + r * ROW + 16, s[r][1]);
}
// The same with latent keys, whose numbers lie side by side: the sum over the lanes is the last step.
INLINE void latent_scores(const int R, const int CACHE, int width, const uint8_t *keys, const uint8_t *next, const float *queries, float *out) {
  enum { KEYS = 2 };
  const int SIZE = CACHE == FP16_CACHE ? 2 : 4;
  for (int t = 0; t < BLOCK; t += KEYS) {
    vf s[AT_ONCE][KEYS];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int k = 0; k < KEYS; k++) s[r][k] = allf(0);
    for (int d = 0; d < width; d += LANES) {
      vf x[KEYS];
      UNROLL for (int k = 0; k < KEYS; k++) {
        const int64_t at = (int64_t)(t + k) * width + d;
        x[k] = load_number(CACHE, keys, at), PREFETCH(next + at * SIZE);
      }
      UNROLL for (int r = 0; r < R; r++) {
        const vf q = loadf(queries + r * width + d);
        UNROLL for (int k = 0; k < KEYS; k++) s[r][k] = fma(x[k], q, s[r][k]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int k = 0; k < KEYS; k++) out[r * ROW + t + k] = sum(s[r][k]);
  }
}
INLINE void digit_scores(const int R, const int DIGITS, const kv_block *kv, const uint8_t *next, const query_tile *q, int first, float *out) {
  const int8_t *digits = q->digits + first * 3 * q->stride;
  vi s[6][2];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int d = 0; d < DIGITS; d++)
      s[r * DIGITS + d][0] = s[r * DIGITS + d][1] = alli(product(-128, q->sums[first + r][d]));
  const uint8_t *keys = kv->keys;
  for (int k = 0; k < q->width; k += 4, keys += 4 * BLOCK, next += 4 * BLOCK) {
    const vi u0 = (vi) * (const bytes64 *)keys, u1 = (vi) * (const bytes64 *)(keys + 64);
    PREFETCH(next), PREFETCH(next + 64);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int d = 0; d < DIGITS; d++) {
      int32_t four;
      __builtin_memcpy(&four, digits + (r * 3 + d) * q->stride + k, 4);
      vi *to = s[r * DIGITS + d];
      to[0] = dot4(to[0], u0, alli(four), 0), to[1] = dot4(to[1], u1, alli(four), 0);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int half = 0; half < 2; half++) {
    vf t = tofloat(s[r * DIGITS][half]);
    UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(s[r * DIGITS + d][half]));
    storef(out + r * ROW + 16 * half, t * q->scales[first + r] * loadf(kv->key_scales + 16 * half));
  }
}

// Hides a score of `x` from a row that sees the keys first .. last - 1.
INLINE void hide(int first, int last, int k, float *x) {
  const vi key = (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + k;
  storef(x + k, select((key >= first) & (key < last), loadf(x + k), allf(-__builtin_inff())));
}
// Turns the scores of R rows into weights, for the keys begin .. end - 1 of the part that begins at key `from`. Keys that
// a row does not see have the weight 0. With a cache of 8 bits the weights times the scales of the values become digits.
INLINE void softmax(const int R, const int CACHE, const instruction *i, const query_tile *q, int from, const kv_block *kv, int begin, int end,
                    int row, float *x, partial out, coded_weights *coded) {
  const float softcap = i->x[1], top = 127.0f * 65536.0f;
  float shift[SOFTMAX_AT_ONCE], inverse[SOFTMAX_AT_ONCE];
  vf most[SOFTMAX_AT_ONCE], sums[SOFTMAX_AT_ONCE];
  for (int r = 0; r < R; r++) {
    const int position = q->position + (row + r) / q->shared, first = first_key(i, position) - from, last = position + 1 - from;
    float *scores = x + r * ROW;
    if (softcap > 0)
      for (int k = begin; k < end; k += LANES) storef(scores + k, softcap * tanh_each(loadf(scores + k) / softcap));
    for (int k = begin; k < first && k < end; k += LANES) hide(first, last, k, scores);
    for (int k = last > begin ? last / LANES * LANES : begin; k < end; k += LANES) hide(first, last, k, scores);
  }
  UNROLL for (int r = 0; r < R; r++) most[r] = allf(-__builtin_inff());
  for (int k = begin; k < end; k += LANES)
    UNROLL for (int r = 0; r < R; r++) most[r] = larger(loadf(x + r * ROW + k), most[r]);
  UNROLL for (int r = 0; r < R; r++) {
    out.maximum[row + r] = largest(most[r]);
    shift[r] = out.maximum[row + r] == -__builtin_inff() ? 0 : out.maximum[row + r]; // the row may see nothing
    most[r] = sums[r] = allf(0);
  }
  for (int k = begin; k < end; k += LANES) {
    const float *scales = kv[(k - begin) / BLOCK].value_scales + k % BLOCK;
    UNROLL for (int r = 0; r < R; r++) {
      vf weight = expf_fast(loadf(x + r * ROW + k) - shift[r]);
      sums[r] += weight;
      if (CACHE == INT8_CACHE) { // the scale of a key that nobody sees may be anything
        weight = select(weight > 0.0f, weight * loadf(scales), allf(0));
        most[r] = larger(weight, most[r]);
      }
      storef(x + r * ROW + k, weight);
    }
  }
  UNROLL for (int r = 0; r < R; r++) out.total[row + r] = sum(sums[r]);
  if (CACHE != INT8_CACHE) return;
  vi of_digits[SOFTMAX_AT_ONCE][WEIGHT_DIGITS];
  UNROLL for (int r = 0; r < R; r++) {
    const float largest_weight = largest(most[r]);
    coded->scales[row + r] = largest_weight / top, inverse[r] = largest_weight > 0 ? top / largest_weight : 0;
    UNROLL for (int d = 0; d < WEIGHT_DIGITS; d++) of_digits[r][d] = alli(0);
  }
  // The low 24 bits of 2^23 + x are x, a multiple of the scale. Those of x + 0x8080, with the high bits of two bytes
  // flipped, are its digits.
  for (int k = begin; k < end; k += LANES)
    UNROLL for (int r = 0; r < R; r++) {
      const vi bytes = (vi)fma(loadf(x + r * ROW + k), allf(inverse[r]), allf(0x1p23f + 0x8080)) ^ 0x8080;
      UNROLL for (int d = 0; d < WEIGHT_DIGITS; d++) {
        const int bit = 8 * (WEIGHT_DIGITS - 1 - d);
        store_bytes(coded->digits[row + r][d] + k, bytes >> bit);
        of_digits[r][d] = dot4(of_digits[r][d], alli(1 << bit), bytes, 1);
      }
    }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int d = 0; d < WEIGHT_DIGITS; d++) coded->sums[row + r][d] = sumi(of_digits[r][d]);
}

// out += weights x values, for R rows and V vectors of a value, over the keys first .. last - 1 of a block.
INLINE void weigh(const int R, const int V, const int CACHE, int first, int last, const float *weights, const uint8_t *values,
                  const uint8_t *next, int stride, int padded, float *out, int d) {
  const int SIZE = CACHE == FP16_CACHE ? 2 : 4;
  vf o[AT_ONCE][2 * AT_ONCE];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) o[r][v] = loadf(out + r * padded + d + 16 * v);
  for (int t = first; t < last; t++) {
    const int64_t at = (int64_t)t * stride + d;
    vf x[2 * AT_ONCE];
    UNROLL for (int v = 0; v < V; v++) x[v] = load_number(CACHE, values, at + 16 * v);
    UNROLL for (int v = 0; v < V; v += 4 / SIZE) PREFETCH(next + (at + 16 * v) * SIZE);
    UNROLL for (int r = 0; r < R; r++) {
      const vf p = allf(weights[r * ROW + t]);
      UNROLL for (int v = 0; v < V; v++) o[r][v] = fma(x[v], p, o[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) storef(out + r * padded + d + 16 * v, o[r][v]);
}
INLINE void weigh_rows(const int R, const int CACHE, int first, int last, const float *weights, const uint8_t *values, const uint8_t *next,
                       int stride, int padded, float *out) {
  const int V = 2 * AT_ONCE / R; // independent sums hide the latency of additions
  int d = 0;
  for (; d + 16 * V <= padded; d += 16 * V) weigh(R, V, CACHE, first, last, weights, values, next, stride, padded, out, d);
  for (; d < padded; d += 16) weigh(R, 1, CACHE, first, last, weights, values, next, stride, padded, out, d);
}
// out = weights x values of a part, for R rows and V vectors. stream: the values of its blocks, and memory that is read soon.
INLINE void weigh_codes(const int R, const int V, const coded_weights *weights, int first, int begin, int blocks, const uint8_t *const *stream,
                        int padded, float *out, int d) {
  enum { D = WEIGHT_DIGITS };
  vi s[SUMS];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < D; n++) UNROLL for (int v = 0; v < V; v++)
      s[(r * D + n) * V + v] = alli(product(-128, weights->sums[first + r][n]));
  for (int b = 0; b < blocks; b++) {
    const uint8_t *values = stream[b] + 4 * d, *next = stream[b + AHEAD_BLOCKS] + 4 * d;
    for (int t = 0; t < BLOCK; t += 4, values += 4 * padded, next += 4 * padded) {
      vi u[SUMS];
      UNROLL for (int v = 0; v < V; v++) u[v] = (vi) * (const bytes64 *)(values + 64 * v), PREFETCH(next + 64 * v);
      UNROLL for (int r = 0; r < R; r++) UNROLL for (int n = 0; n < D; n++) {
        int32_t four;
        __builtin_memcpy(&four, weights->digits[first + r][n] + begin + BLOCK * b + t, 4);
        UNROLL for (int v = 0; v < V; v++) s[(r * D + n) * V + v] = dot4(s[(r * D + n) * V + v], u[v], alli(four), 0);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
    vf t = tofloat(s[r * D * V + v]);
    UNROLL for (int n = 1; n < D; n++) t = fma(t, allf(256), tofloat(s[(r * D + n) * V + v]));
    storef(out + r * padded + d + 16 * v, t * weights->scales[first + r]);
  }
}
INLINE void weigh_coded_rows(const int R, const coded_weights *weights, int first, int begin, int blocks, const uint8_t *const *stream,
                             int padded, float *out) {
  const int V = SUMS / WEIGHT_DIGITS / R;
  int d = 0;
  for (; d + 16 * V <= padded; d += 16 * V) weigh_codes(R, V, weights, first, begin, blocks, stream, padded, out, d);
  for (; d < padded; d += 16) weigh_codes(R, 1, weights, first, begin, blocks, stream, padded, out, d);
}

#include "amx.c"

// Calls DO(R) for the rows from r on, with R a constant that is at most MOST.
#define EACH_ROWS(MOST, DO)                                   \
  for (int r = 0; r < rows;) {                                \
    if (rows - r >= MOST) { DO(MOST) r += MOST; }             \
    else if (MOST > 2 && rows - r >= 2) { DO(2) r += 2; }     \
    else { DO(1) r += 1; }                                    \
  }

// Attention of a tile to the part of the context that begins at key `from`. DIGITS: of the queries, for a cache of 8 bits.
INLINE void attend(const int CACHE, const int DIGITS, const instruction *i, const int32_t *table, int head, const query_tile *q, int from, partial out) {
  const int rows = q->rows, padded = q->padded, tokens = rows / q->shared, end_key = q->position + tokens; // keys that the last query sees
  const int seen = first_key(i, q->position), first_block = (seen > from ? seen - from : 0) / BLOCK;
  const int blocks = ((end_key - from < PART ? end_key - from : PART) + BLOCK - 1) / BLOCK - first_block;
  const int begin = first_block * BLOCK, end = begin + blocks * BLOCK;
  kv_block kv[PART_BLOCKS];
  const uint8_t *stream[2 * PART_BLOCKS + AHEAD_BLOCKS]; // in the order in which memory is read
  for (int b = 0; b < blocks; b++) {
    kv[b] = block_of(CACHE, i, table[from / BLOCK + first_block + b], head);
    stream[b] = kv[b].keys, stream[blocks + b] = kv[b].values;
  }
  for (int b = 0; b < AHEAD_BLOCKS; b++) {
    const int key = from + end + b * BLOCK;
    stream[2 * blocks + b] = key < end_key ? block_of(CACHE, i, table[key / BLOCK], head).keys : kv[blocks - 1].values;
  }
  _Alignas(64) float weights[MAX_ROWS * ROW];
  for (int b = 0; b < blocks; b++) {
#define NEXT (r ? kv[b].keys : stream[b + AHEAD_BLOCKS])
#define FLOATS(R) float_scores(R, CACHE, q->width, kv[b].keys, NEXT, q->x + r * q->width, weights + r * ROW + begin + b * BLOCK);
#define LATENT(R) latent_scores(R, CACHE, q->width, kv[b].keys, NEXT, q->x + r * q->width, weights + r * ROW + begin + b * BLOCK);
#if defined(__AMX_INT8__)
    if (CACHE == INT8_CACHE && q->step) {
      if (b == 0) configure_attention(q->step);
      float *scores = weights + begin + b * BLOCK;
      if (DIGITS == 1 && rows > TILE_ROWS) amx_scores(1, 2, kv + b, stream[b + 1], q, 0, scores);
      else
        for (int r = 0; r < rows; r += TILE_ROWS) amx_scores(DIGITS, DIGITS, kv + b, stream[b + 1], q, r, scores + r * ROW);
      continue;
    }
#endif
#define CODES(R) digit_scores(R, DIGITS, kv + b, NEXT, q, r, weights + r * ROW + begin + b * BLOCK);
    if (CACHE != INT8_CACHE && is_latent(i)) EACH_ROWS(AT_ONCE, LATENT)
    else if (CACHE != INT8_CACHE) EACH_ROWS(AT_ONCE, FLOATS)
    else if (DIGITS == 1) EACH_ROWS(4, CODES)
    else EACH_ROWS(2, CODES)
  }
  _Alignas(64) coded_weights coded;
#define SOFTMAX(R) softmax(R, CACHE, i, q, from, kv, begin, end, r, weights + r * ROW, out, &coded);
  EACH_ROWS(SOFTMAX_AT_ONCE, SOFTMAX)
#if defined(__AMX_INT8__)
  if (CACHE == INT8_CACHE && q->step) {
    configure_attention(BLOCK);
    for (int r = 0; r < rows; r += TILE_ROWS) amx_weigh(&coded, r, rows, begin, blocks, stream + blocks, padded, out.values + r * padded);
    return;
  }
#endif
  if (CACHE == INT8_CACHE) {
#define WEIGH(R) weigh_coded_rows(R, &coded, r, begin, blocks, stream + blocks, padded, out.values + r * padded);
    EACH_ROWS(CODED_AT_ONCE, WEIGH)
#undef WEIGH
    return;
  }
  for (int k = 0; k < rows * padded; k += LANES) storef(out.values + k, allf(0));
  for (int b = 0; b < blocks; b++) {
    const int key = begin + b * BLOCK, low = seen - from > key ? seen - from - key : 0; // keys that any row sees
    const int high = end_key - from - key < BLOCK ? end_key - from - key : BLOCK;
#define WEIGH(R)                                                                                                             \
  weigh_rows(R, CACHE, low, high, weights + r * ROW + key, kv[b].values, r ? kv[b].values : stream[blocks + b + AHEAD_BLOCKS], \
             q->value_stride, padded, out.values + r * padded);
    EACH_ROWS(AT_ONCE, WEIGH)
  }
}
#undef FLOATS
#undef LATENT
#undef CODES
#undef SOFTMAX
#undef NEXT
#undef WEIGH

// Adds a part to the sums of the parts before it.
static void merge(int rows, int padded, partial part, partial all) {
  for (int r = 0; r < rows; r++) {
    const float top = part.maximum[r], before = all.maximum[r], larger = top > before ? top : before;
    if (part.total[r] == 0) continue; // the row sees nothing of it
    const float grow = expf_fast(allf(top - larger))[0], shrink = expf_fast(allf(before - larger))[0];
    all.maximum[r] = larger, all.total[r] = all.total[r] * shrink + part.total[r] * grow;
    for (int d = r * padded; d < (r + 1) * padded; d += LANES) {
      const vf values = before == -__builtin_inff() ? allf(0) : loadf(all.values + d); // the row saw nothing so far
      storef(all.values + d, fma(loadf(part.values + d), allf(grow), values * shrink));
    }
  }
}
static partial part_at(const step *s, attention_work work, int number, int rows) {
  float *at = s->parts + number * work.part_floats;
  return (partial){at + 2 * rows, at, at + rows};
}

INLINE void attention_item(const int CACHE, const int DIGITS, const instruction *i, const step *s, int item, attention_work work) {
  const int shared = item_heads(i), kv_heads = i->n[0] / shared, most = attention_tokens(i), each = work.each;
  const int parts_of_head = kv_heads / i->n[1]; // several items share a KV head that has many query heads
  item = work.items - 1 - item; // the last tiles of a prompt see most: they are first
  int sequence = 0, items = 0, number = 0, of_step = 0; // number: of the sequence's first part; of_step: its first head
  for (;; sequence++) {
    const int count = s->query_start[sequence + 1] - s->query_start[sequence], parts = each ? parts_of(i, s, sequence) : 0;
    items = each ? (parts + each - 1) / each : (count + most - 1) / most; // of a head
    if (item < items * kv_heads) break;
    item -= items * kv_heads, number += parts * kv_heads, of_step += count ? kv_heads : 0;
  }
  // The items of a head follow each other, because they read the same keys and values.
  const int head = item / items, kv_head = head / parts_of_head, begin = s->query_start[sequence] + (each ? 0 : item % items * most);
  const int end = begin + most < s->query_start[sequence + 1] ? begin + most : s->query_start[sequence + 1];
  const int32_t *table = s->block_indices + s->block_begins[sequence];

  _Alignas(64) query_tile q;
  q.rows = (end - begin) * shared, q.shared = shared, q.position = s->past_lengths[sequence] + begin - s->query_start[sequence];
  q.step = 0;
  q.width = i->n[2], q.stride = (q.width + LANES - 1) / LANES * LANES, q.padded = padded_values(i), q.value_stride = value_stride(i);
  const int ahead = begin - s->threads * most >= s->query_start[sequence] ? s->threads * most : 0; // what this thread probably does next
  for (int r = 0; r < q.rows; r++) {
    const float *from = i->a + (begin + r / shared) * i->a_stride + (int64_t)(head * shared + r % shared) * q.width;
    for (int d = 0; d < q.width; d += LANES) PREFETCH(from - ahead * i->a_stride + d);
    const float *to = i->out + (begin + r / shared) * i->out_stride + (int64_t)(head * shared + r % shared) * i->n[3];
    for (int d = 0; d < i->n[3]; d += LANES) __builtin_prefetch(to + d, 1, 2);
    if (CACHE != INT8_CACHE)
      for (int d = 0; d < q.width; d++) q.x[r * q.width + d] = from[d] * i->x[0];
    else q.scales[r] = to_digits(DIGITS, q.width, from, q.digits + r * 3 * q.stride, q.stride, q.sums[r]) * i->x[0];
  }
#if defined(__AMX_INT8__)
  if (CACHE == INT8_CACHE && q.rows >= AMX_FROM && q.width % 16 == 0) q.step = digit_step(q.width);
#endif
  _Alignas(64) float all_values[MAX_ROWS * MAX_VALUE_WIDTH], all_maximum[MAX_ROWS], all_total[MAX_ROWS];
  partial all = {all_values, all_maximum, all_total};

  const int first = first_key(i, q.position) / PART, last = (q.position + end - begin - 1) / PART;
  if (each) {
    const int parts = last - first + 1, piece = item % items;
    number += head * parts;
    for (int p = piece * each; p < (piece + 1) * each && p < parts; p++)
      attend(CACHE, DIGITS, i, table, kv_head, &q, (first + p) * PART, part_at(s, work, number + p, q.rows));
    int32_t *finished = s->merged + of_step + head;
    if (__atomic_add_fetch(finished, 1, __ATOMIC_ACQ_REL) < items) return;
    *finished = 0; // for the next instruction
    all = part_at(s, work, number, q.rows);
    for (int p = 1; p < parts; p++) merge(q.rows, q.padded, part_at(s, work, number + p, q.rows), all);
  } else {
    _Alignas(64) float part_values[MAX_ROWS * MAX_VALUE_WIDTH], part_maximum[MAX_ROWS], part_total[MAX_ROWS];
    const partial part = {part_values, part_maximum, part_total};
    for (int p = first; p <= last; p++) {
      attend(CACHE, DIGITS, i, table, kv_head, &q, p * PART, p > first ? part : all);
      if (p > first) merge(q.rows, q.padded, part, all);
    }
  }
  for (int r = 0; r < q.rows; r++) {
    const float maximum = all.maximum[r], total = all.total[r];
    float *to = i->out + (begin + r / shared) * i->out_stride + (int64_t)(head * shared + r % shared) * i->n[3], factor = 1 / total;
    if (i->v) { // a logit without a value
      const float sink = i->v[head * shared + r % shared], larger = sink > maximum ? sink : maximum;
      const float shrink = expf_fast(allf(maximum - larger))[0];
      factor = shrink / (total * shrink + expf_fast(allf(sink - larger))[0]);
    }
    for (int d = 0; d < i->n[3]; d++) to[d] = all.values[r * q.padded + d] * factor;
  }
}

#define ATTENTION(C, D)                                                                                                   \
  static __attribute__((noinline)) void attention_##C##_##D(const instruction *i, const step *s, int item, attention_work work) { \
    attention_item(C, D, i, s, item, work);                                                                                \
  }
ATTENTION(FP32_CACHE, 0) ATTENTION(FP16_CACHE, 0) ATTENTION(INT8_CACHE, 1) ATTENTION(INT8_CACHE, 3)
static void attention(const instruction *i, const step *s, int item, attention_work work) {
  const int digits = i->n[5], cache = i->n[6];
  if (cache == FP32_CACHE) attention_FP32_CACHE_0(i, s, item, work);
  else if (cache == FP16_CACHE) attention_FP16_CACHE_0(i, s, item, work);
  else if (digits == 1) attention_INT8_CACHE_1(i, s, item, work);
  else attention_INT8_CACHE_3(i, s, item, work);
#if defined(__AMX_INT8__)
  if (cache == INT8_CACHE) _tile_release();
#endif
}
