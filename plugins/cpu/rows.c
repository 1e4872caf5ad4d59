// Instructions that work on one row of a buffer. Buffers have room for whole vectors: a width is rounded up to 16.
#include "program.h"
#include "vec.h"

enum unary { SIGMOID, SILU, GELU, GELU_TANH, TANH, RELU, EXP, ERF, NEG, ABS, SQRT, RECIPROCAL, SQUARE };
enum binary { ADD, SUB, MUL, DIV, MIN, MAX };

INLINE vf sqrt_each(vf x) { return __builtin_elementwise_sqrt(x); }

// Below 0.4 the Taylor series, whose next term is 4e-9 of the result. Above 0.4, 1 - 2 / (e^2x + 1).
INLINE vf tanh_each(vf x) {
  const vf z = x * x;
  vf p = allf(21844.0f / 6081075);
  p = fma(p, z, allf(-1382.0f / 155925));
  p = fma(p, z, allf(62.0f / 2835));
  p = fma(p, z, allf(-17.0f / 315));
  p = fma(p, z, allf(2.0f / 15));
  p = fma(p, z, allf(-1.0f / 3));
  const vf small = fma(x * z, p, x);
  const vf a = minf(absf(x), allf(20.0f));
  const vf large_abs = 1.0f - 2.0f / (expf_fast(2.0f * a) + 1.0f);
  const vf large = select(x < 0.0f, -large_abs, large_abs);
  return select(a < 0.4f, small, large);
}

// Below 1 the Taylor series. Above 1, Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26 (error 1.5e-7).
INLINE vf erf_each(vf x) {
  const vf z = x * x, a = absf(x);
  vf p = allf(-1.0f / 6894720); // (-1)^n / (n! (2n + 1)), n = 9 .. 1
  p = fma(p, z, allf(1.0f / 685440));
  p = fma(p, z, allf(-1.0f / 75600));
  p = fma(p, z, allf(1.0f / 9360));
  p = fma(p, z, allf(-1.0f / 1320));
  p = fma(p, z, allf(1.0f / 216));
  p = fma(p, z, allf(-1.0f / 42));
  p = fma(p, z, allf(0.1f));
  p = fma(p, z, allf(-1.0f / 3));
  const vf small = 1.128379167f * fma(x * z, p, x);
  const vf t = 1.0f / fma(a, allf(0.3275911f), allf(1.0f));
  vf q = allf(1.061405429f);
  q = fma(q, t, allf(-1.453152027f));
  q = fma(q, t, allf(1.421413741f));
  q = fma(q, t, allf(-0.284496736f));
  q = fma(q, t, allf(0.254829592f));
  const vf large_abs = 1.0f - q * t * expf_fast(-z);
  const vf large = select(x < 0.0f, -large_abs, large_abs);
  return select(a < 1.0f, small, large);
}

INLINE vf sigmoid_each(vf x) { return 1.0f / (1.0f + expf_fast(-x)); }

INLINE vf unary_each(const int f, vf x) {
  switch (f) {
    case SIGMOID: return sigmoid_each(x);
    case SILU: return x * sigmoid_each(x);
    case GELU: return 0.5f * x * (1.0f + erf_each(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanh_each(0.79788456f * fma(0.044715f * x, x * x, x)));
    case TANH: return tanh_each(x);
    case RELU: return maxf(x, allf(0));
    case EXP: return expf_fast(x);
    case ERF: return erf_each(x);
    case NEG: return -x;
    case ABS: return absf(x);
    case SQRT: return sqrt_each(x);
    case RECIPROCAL: return 1.0f / x;
    case SQUARE: return x * x;
    default: return x;
  }
}
INLINE vf binary_each(const int f, vf x, vf y) {
  switch (f) {
    case ADD: return x + y;
    case SUB: return x - y;
    case MUL: return x * y;
    case DIV: return x / y;
    case MIN: return minf(x, y);
    default: return maxf(x, y);
  }
}
#define LOOP(width) for (int k = 0; k < (width); k += LANES)
#define UNARIES(EACH) \
  EACH(SIGMOID) EACH(SILU) EACH(GELU) EACH(GELU_TANH) EACH(TANH) EACH(RELU) EACH(EXP) EACH(ERF) EACH(NEG) EACH(ABS) \
  EACH(SQRT) EACH(RECIPROCAL) EACH(SQUARE)
#define EACH_UNARY(F) case F: LOOP(width) storef(out + k, unary_each(F, loadf(a + k))); break;
static void unary(int f, int width, const float *a, float *out) {
  switch (f) { UNARIES(EACH_UNARY) }
}
#define EACH_GLU(F) case F: LOOP(width) storef(out + k, unary_each(F, loadf(a + k)) * loadf(b + k)); break;
static void glu(int f, int width, const float *a, const float *b, float *out) {
  switch (f) { UNARIES(EACH_GLU) }
}
// Columns 2k of `a` are gates, columns 2k + 1 are ups.
static void clamped_swiglu(int pairs, float limit, float alpha, const float *a, float *out) {
  for (int k = 0; k < pairs; k += LANES) {
    const vf x = loadf(a + 2 * k), y = loadf(a + 2 * k + LANES);
    const vf gate = minf(__builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), allf(limit));
    const vf up = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    storef(out + k, (minf(maxf(up, allf(-limit)), allf(limit)) + 1.0f) * gate * sigmoid_each(alpha * gate));
  }
}
#define EACH_BINARY(F) case F: LOOP(width) storef(out + k, binary_each(F, loadf(a + k), loadf(b + k))); break;
static void binary(int f, int width, const float *a, const float *b, float *out) {
  switch (f) { EACH_BINARY(ADD) EACH_BINARY(SUB) EACH_BINARY(MUL) EACH_BINARY(DIV) EACH_BINARY(MIN) EACH_BINARY(MAX) }
}
#define EACH_SCALAR(F) case F: LOOP(width) storef(out + k, binary_each(F, loadf(a + k), allf(x))); break;
static void scalar(int f, int width, const float *a, float x, float *out) {
  switch (f) { EACH_SCALAR(ADD) EACH_SCALAR(SUB) EACH_SCALAR(MUL) EACH_SCALAR(DIV) EACH_SCALAR(MIN) EACH_SCALAR(MAX) }
}

// x with zeros in the lanes from `from` on, for the tail of a row whose width is not a multiple of 16.
INLINE vf head_of(vf x, int from) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane < from, x, allf(0));
}
INLINE vf load_tail(const float *p, int k, int width) {
  return width - k >= LANES ? loadf(p + k) : head_of(loadf(p + k), width - k);
}

static void rmsnorm(int groups, int width, float epsilon, const float *a, const float *v, float *out) {
  for (int g = 0; g < groups; g++, a += width, out += width) {
    vf s[2] = {allf(0), allf(0)};
    for (int k = 0, j = 0; k < width; k += LANES, j ^= 1) {
      const vf x = load_tail(a, k, width);
      s[j] = fma(x, x, s[j]);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(s[0] + s[1]) / (float)width + epsilon);
    int k = 0;
    for (; k + LANES <= width; k += LANES) storef(out + k, loadf(a + k) * factor * loadf(v + k));
    for (; k < width; k++) out[k] = a[k] * factor * v[k];
  }
}
// step: the number of weights from one group to the next, 0 if all groups have the same.
static void layernorm(int groups, int width, int step, float epsilon, const float *a, const float *v, const float *v2, float *out) {
  for (int g = 0; g < groups; g++, a += width, out += width, v += step, v2 = v2 ? v2 + step : 0) {
    vf s = allf(0);
    LOOP(width) s += load_tail(a, k, width);
    const float mean = sum(s) / (float)width;
    s = allf(0);
    LOOP(width) {
      const vf x = loadf(a + k) - mean, y = width - k >= LANES ? x : head_of(x, width - k);
      s = fma(y, y, s);
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(s) / (float)width + epsilon);
    int k = 0;
    for (; k + LANES <= width; k += LANES) {
      const vf x = (loadf(a + k) - mean) * factor * loadf(v + k);
      storef(out + k, v2 ? x + loadf(v2 + k) : x);
    }
    for (; k < width; k++) {
      const float x = (a[k] - mean) * factor * v[k];
      out[k] = v2 ? x + v2[k] : x;
    }
  }
}
static void rope(const int32_t *n, const float *cosine, const float *sine, const float *a, float *out) {
  const int heads = n[0], width = n[1], rotated = n[2], interleaved = n[3], half = rotated / 2;
  for (int h = 0; h < heads; h++, a += width, out += width) {
    if (interleaved) {
      for (int k = 0; k < half; k++) {
        const float x = a[2 * k], y = a[2 * k + 1];
        out[2 * k] = __builtin_fmaf(-y, sine[k], x * cosine[k]);
        out[2 * k + 1] = __builtin_fmaf(x, sine[k], y * cosine[k]);
      }
    } else {
      int k = 0;
      for (; k + LANES <= half; k += LANES) {
        const vf x = loadf(a + k), y = loadf(a + half + k), c = loadf(cosine + k), s = loadf(sine + k);
        storef(out + k, fma(-y, s, x * c)), storef(out + half + k, fma(x, s, y * c));
      }
      for (; k < half; k++) {
        const float x = a[k], y = a[half + k];
        out[k] = __builtin_fmaf(-y, sine[k], x * cosine[k]);
        out[half + k] = __builtin_fmaf(x, sine[k], y * cosine[k]);
      }
    }
    for (int k = rotated; k < width; k++) out[k] = a[k];
  }
}

enum format { FP8, FP4, INT8 };

// The nearest E4M3 number, ties to even, at most 448: multiples of an eighth of the power of two below, at least 2^-9.
INLINE vf to_e4m3(vf x) {
  const vf size = minf(absf(x), allf(448));
  const vf power = maxf((vf)((vi)size & 0x7f800000), allf(0x1p-6f)), step = power * 0.125f;
  const vf rounded = roundf_even(size / step) * step;
  return (vf)((vi)rounded | ((vi)x & (vi)allf(-0.0f)));
}
static void round_to(int format, int width, float scale, const float *a, float *out) {
  if (format == FP8) LOOP(width) storef(out + k, to_e4m3(loadf(a + k) / scale) * scale);
  if (format == INT8)
    LOOP(width) storef(out + k, minf(maxf(roundf_even(loadf(a + k) / scale), allf(-128)), allf(127)) * scale);
  if (format != FP4) return;
  LOOP(width) { // blocks of 16, as llmc.RoundFP4
    const vf x = loadf(a + k);
    const float of_block = to_e4m3(allf(largest(absf(x)) / 6.0f / scale))[0] * scale;
    const vf value = x / (of_block == 0 ? 1.0f : of_block), size = minf(absf(value), allf(6));
    const vf small = roundf_even(size * 2.0f) * 0.5f, middle = roundf_even(size), large = roundf_even(size * 0.5f) * 2.0f;
    const vf rounded = select(size < 2.0f, small, select(size < 4.0f, middle, large));
    storef(out + k, (vf)((vi)rounded | ((vi)value & (vi)allf(-0.0f))) * of_block);
  }
}

INLINE float largest_of(int width, const float *a) {
  vf m = allf(0);
  LOOP(width) m = larger(absf(load_tail(a, k, width)), m);
  return largest(m);
}

// The numbers become integer multiples of the result, of 8 bits in one digit or 24 bits in three, the highest digit first.
// Every `step` numbers of a digit are `next` bytes after those before. digit: bytes between digits. most: the largest
// magnitude. sums: null, or of each digit, `sums_row` apart.
INLINE float digits_of(const int DIGITS, float most, int width, const float *a, int8_t *q, int64_t digit, int step, int next,
                       int32_t *sums, int sums_row) {
  const float top = DIGITS == 1 ? 127.0f : 127.0f * 65536.0f, inverse = most > 0 ? top / most : 0;
  vi total[3] = {alli(0), alli(0), alli(0)};
  for (int begin = 0; begin < width; begin += step, q += next)
    for (int k = begin, at = 0; at < step && k < width; k += LANES, at += LANES) {
      vi x = toint(roundf_even(load_tail(a, k, width) * inverse));
      UNROLL for (int d = DIGITS - 1; d >= 0; d--) {
        const vi low = d ? (x << 24) >> 24 : x;
        store_bytes(q + d * digit + at, low);
        total[d] += low;
        x = (x - low) >> 8;
      }
    }
  if (sums) UNROLL for (int d = 0; d < DIGITS; d++) sums[d * sums_row] = sumi(total[d]);
  return most / top;
}
INLINE float to_digits(const int DIGITS, int width, const float *a, int8_t *q, int64_t digit, int32_t *sums) {
  return digits_of(DIGITS, largest_of(width, a), width, a, q, digit, width, 0, sums, 1);
}

// i->v: null, or the scale of all groups, whose numbers are multiples of it. rows: 0: the digits are not in tiles.
static void quantize(const instruction *i, int row, int rows, const float *a) {
  const int width = i->n[0], group = i->n[1], digits = i->n[2], groups = width / group, tiled_rows = tiled(rows);
  const int step = tiled_rows ? digit_step(group) : group;
  const int64_t digit = tiled_rows ? DIGIT_ROWS * group : width;
  for (int g = 0; g < groups; g++, a += group) {
    const float most = i->v ? *i->v * 127.0f : largest_of(group, a);
    int8_t *q = tiled_rows ? i->q + ((int64_t)g * tiled_rows + row / DIGIT_ROWS * DIGIT_ROWS) * digits * group + row % DIGIT_ROWS * step
                           : i->q + (int64_t)row * digits * width + g * group;
    int32_t *sums = tiled_rows ? 0 : i->sums + (int64_t)row * digits * groups + g;
    const float scale = digits == 1 ? digits_of(1, most, group, a, q, digit, step, DIGIT_ROWS * step, sums, groups)
                                    : digits_of(3, most, group, a, q, digit, step, DIGIT_ROWS * step, sums, groups);
    i->scales[tiled_rows ? (int64_t)g * tiled_rows + row : (int64_t)row * groups + g] = i->v ? *i->v : scale;
  }
}

static void softmax_row(int width, const float *a, float *out) {
  float most = a[0];
  for (int k = 1; k < width; k++) most = a[k] > most ? a[k] : most;
  vf s = allf(0);
  LOOP(width) {
    const vf power = expf_fast(loadf(a + k) - most), x = width - k >= LANES ? power : head_of(power, width - k);
    storef(out + k, x);
    s += x;
  }
  const float total = sum(s);
  LOOP(width) storef(out + k, loadf(out + k) / total);
}
static float sum_of(int width, const float *a) {
  vf s = allf(0);
  LOOP(width) s += load_tail(a, k, width);
  return sum(s);
}
// Of equal numbers, the one in the lowest column comes first.
static void top_k(int width, int k, const float *a, float *out) {
  for (int column = 0, found = 0; column < width; column++) {
    const float x = a[column];
    if (found == k && !(x > out[k - 1])) continue;
    int at = found < k ? found++ : k - 1;
    for (; at > 0 && x > out[at - 1]; at--) out[at] = out[at - 1], out[k + at] = out[k + at - 1];
    out[at] = x, out[k + at] = (float)column;
  }
}

static void embed(const instruction *i, int token, float *out) {
  const int width = i->n[0], kind = i->n[1];
  token -= i->n[3];
  if (token < 0 || token >= i->n[4]) { // the row is in another rank's part of the table
    for (int k = 0; k < width; k++) out[k] = 0;
    return;
  }
  const int64_t size = kind == F32 ? 4 : 2;
  const uint8_t *w = i->w + (int64_t)(token / 32) * width * 32 * size + token % 32 * size; // a row of a tile
  for (int k = 0; k < width; k++, w += 32 * size) {
    if (kind == F32) out[k] = *(const float *)w;
    else if (kind == F16) out[k] = (float)*(const _Float16 *)w;
    else {
      const uint32_t bits = (uint32_t) * (const uint16_t *)w << 16;
      __builtin_memcpy(out + k, &bits, 4);
    }
  }
}

#include "../experts/cpu/rows.c"
#include "../grouped_top_k/cpu/grouped_top_k.c"

static void run_row(const instruction *i, const step *s, int row) {
  float *out = i->out + row * i->out_stride;
  const float *a = i->a + row * i->a_stride;
  switch (i->op) {
    case OP_EMBED: embed(i, (i->n[2] ? s->position_ids : s->input_ids)[row], out); break;
    case OP_GATHER: {
      const float *from = i->a + s->logits_index[row] * i->a_stride;
      LOOP(i->n[0]) storef(out + k, loadf(from + k));
      break;
    }
    case OP_COPY: for (int k = 0; k < i->n[0]; k++) out[k] = a[k]; break;
    case OP_UNARY: unary(i->n[1], i->n[0], a, out); break;
    case OP_BINARY: {
      const float *b = i->b + row * i->b_stride;
      if (i->n[2]) scalar(i->n[1], i->n[0], a, *b, out);
      else binary(i->n[1], i->n[0], a, b, out);
      break;
    }
    case OP_SOFTMAX: softmax_row(i->n[0], a, out); break;
    case OP_SUM: *out = sum_of(i->n[0], a); break;
    case OP_TOP_K: top_k(i->n[0], i->n[1], a, out); break;
    case OP_GROUPED_TOP_K: grouped_top_k(i->n, a, i->b + row * i->b_stride, out); break;
    case OP_JOIN:
      for (int g = 0; g < i->n[0]; g++) {
        for (int k = 0; k < i->n[1]; k++) *out++ = a[g * i->n[1] + k];
        for (int k = 0; k < i->n[2]; k++) *out++ = i->b[row * i->b_stride + g * i->n[2] + k];
      }
      break;
    case OP_SORTED_ROWS: sorted_row(i, row, out); break;
    case OP_SUM_CHOICES: sum_choices(i, s->tokens, row, out); break;
    case OP_EXPERT_BIAS: expert_bias(i, row, a, out); break;
    case OP_CLAMPED_SWIGLU: clamped_swiglu(i->n[0], i->x[0], i->x[1], a, out); break;
    case OP_GLU: glu(i->n[1], i->n[0], a, i->b + row * i->b_stride, out); break;
    case OP_SLICE:
      for (int g = 0; g < i->n[0]; g++, out += i->n[3])
        for (int k = 0; k < i->n[3]; k++) out[k] = a[g * i->n[1] + i->n[2] + k];
      break;
    case OP_ROUND: round_to(i->n[1], i->n[0], i->v[0], a, out); break;
    case OP_VECTOR: binary(i->n[1], i->n[0], a, i->v, out); break;
    case OP_SCALAR: scalar(i->n[1], i->n[0], a, i->x[0], out); break;
    case OP_RMSNORM: rmsnorm(i->n[0], i->n[1], i->x[0], a, i->v, out); break;
    case OP_LAYERNORM: layernorm(i->n[2], i->n[0], i->n[3], i->x[0], a, i->v, i->n[1] ? i->v2 : 0, out); break;
    case OP_ROPE: {
      const int64_t at = (int64_t)s->position_ids[row] * (i->n[2] / 2);
      rope(i->n, i->v + at, i->v2 + at, a, out);
      break;
    }
    case OP_QUANTIZE: quantize(i, row, i->choices ? 0 : i->per_logit ? s->logits : s->tokens, a); break;
  }
}
