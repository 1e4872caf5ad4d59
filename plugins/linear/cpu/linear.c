// A linear layer: rows of activations times a packed matrix.
//
// The matrix [N, K] is stored in tiles of 32 rows, which gives 32 lanes of sums without horizontal additions.
//   integers   For every block of columns: 32 scales (fp16 or fp32), then for every 8 columns (of 4 bits) or 4 (int8) 64
//              bytes of rows 0-15 and 64 bytes of rows 16-31. A lane of 4 bytes belongs to a row. Of 4 bits, its low
//              nibbles are columns 0-3 and its high nibbles columns 4-7. Codes of int4 and int8 are unsigned: the weight
//              plus 8 or 128. Codes of fp4 are E2M1, which stand for the integers of twice_fp4 below.
//   floats     For every column 32 numbers: fp32, fp16 or bf16.
#include "../../cpu/program.h"
#include "../../cpu/vec.h"

enum { TILE = 32, FLOAT_BLOCK = 64, FLOAT_PANEL = 192 };
// Weights are read once, in order: 3 KiB ahead into the second-level cache, and 1 KiB ahead into the first.
#define READ_AHEAD(p) (PREFETCH((p) + 3072), __builtin_prefetch((p) + 1024, 0, 3))
// Rows at once, as many as the registers can hold.
#if defined(__AVX512F__)
enum { MOST_FLOAT = 12, BLOCK_ROWS = 12, BLOCK_VECTORS = 2 };
#else
enum { MOST_FLOAT = 2, BLOCK_ROWS = 6, BLOCK_VECTORS = 1 };
#endif
enum { MOST = 6, MOST_SUMS = 12 }; // of any kernel for integers

typedef struct {
  const int8_t *q;
  const float *scales;
  const int32_t *sums;
  int64_t q_row, scales_row, sums_row; // elements from one row to the next
} digits_of_rows;

// Twice the value of each E2M1 code, plus 12.
static const uint8_t twice_fp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// Loads the scales of a block. Returns where its codes begin.
INLINE const uint8_t *load_scales(const int HALF, const uint8_t *w, vf scale[2]) {
  READ_AHEAD(w);
  if (HALF) {
    scale[0] = load_fp16((const uint16_t *)w), scale[1] = load_fp16((const uint16_t *)w + 16);
    return w + 64;
  }
  READ_AHEAD(w + 64);
  scale[0] = loadf((const float *)w), scale[1] = loadf((const float *)w + 16);
  return w + 128;
}

// Computes out[m][0..31] for M rows whose numbers have DIGITS int8 digits each. HALF: the scales are fp16.
INLINE void integer_tile(const int M, const int DIGITS, const int CODES, const int HALF, const uint8_t *w, int columns,
                         int block, int group, digits_of_rows x, float *out, int64_t out_stride) {
  const int STEP = CODES == I8 ? 4 : 8, ZERO = CODES == I8 ? 128 : CODES == I4 ? 8 : 12, groups = columns / group;
  vf f[MOST][2];
  UNROLL for (int m = 0; m < M; m++) f[m][0] = f[m][1] = allf(0);
  for (int column = 0, g = 0; column < columns;) {
    vf scale[2];
    w = load_scales(HALF, w, scale);
    vf of_block[MOST][2];
    UNROLL for (int m = 0; m < M; m++) of_block[m][0] = of_block[m][1] = allf(0);
    for (const int end = column + block; column < end; column += group, g++) {
      vi c[MOST_SUMS][2];
      UNROLL for (int m = 0; m < M; m++) UNROLL for (int d = 0; d < DIGITS; d++)
          c[m * DIGITS + d][0] = c[m * DIGITS + d][1] = alli(product(-ZERO, x.sums[m * x.sums_row + d * groups + g]));
      const int8_t *q = x.q + column;
      for (int k = 0; k < group; k += STEP, w += 128) {
        const vi u0 = (vi) * (const bytes64 *)w, u1 = (vi) * (const bytes64 *)(w + 64);
        READ_AHEAD(w), READ_AHEAD(w + 64);
        if (CODES != I8) {
          vi l0 = u0 & 0x0f0f0f0f, l1 = u1 & 0x0f0f0f0f, h0 = (u0 >> 4) & 0x0f0f0f0f, h1 = (u1 >> 4) & 0x0f0f0f0f;
          if (CODES == E2M1) {
            l0 = lookup(twice_fp4, l0), l1 = lookup(twice_fp4, l1), h0 = lookup(twice_fp4, h0), h1 = lookup(twice_fp4, h1);
          }
          UNROLL for (int m = 0; m < M; m++) UNROLL for (int d = 0; d < DIGITS; d++) {
            const int8_t *p = q + m * x.q_row + (int64_t)d * columns + k;
            int32_t low, high;
            __builtin_memcpy(&low, p, 4), __builtin_memcpy(&high, p + 4, 4);
            vi *s = c[m * DIGITS + d];
            s[0] = dot4(s[0], l0, alli(low), 1), s[1] = dot4(s[1], l1, alli(low), 1);
            s[0] = dot4(s[0], h0, alli(high), 1), s[1] = dot4(s[1], h1, alli(high), 1);
          }
        } else {
          UNROLL for (int m = 0; m < M; m++) UNROLL for (int d = 0; d < DIGITS; d++) {
            int32_t four;
            __builtin_memcpy(&four, q + m * x.q_row + (int64_t)d * columns + k, 4);
            vi *s = c[m * DIGITS + d];
            s[0] = dot4(s[0], u0, alli(four), 0), s[1] = dot4(s[1], u1, alli(four), 0);
          }
        }
      }
      UNROLL for (int m = 0; m < M; m++) UNROLL for (int half = 0; half < 2; half++) {
        vf t = tofloat(c[m * DIGITS][half]);
        UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(c[m * DIGITS + d][half]));
        of_block[m][half] = fma(t, allf(x.scales[m * x.scales_row + g]), of_block[m][half]);
      }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int half = 0; half < 2; half++)
        f[m][half] = fma(of_block[m][half], scale[half], f[m][half]);
  }
  UNROLL for (int m = 0; m < M; m++) storef(out + m * out_stride, f[m][0]), storef(out + m * out_stride + 16, f[m][1]);
}

INLINE vf load_kind(const int KIND, const uint8_t *p) {
  if (KIND == E4M3) return load_e4m3(p);
  return KIND == F32 ? loadf((const float *)p) : KIND == F16 ? load_fp16((const uint16_t *)p) : load_bf16((const uint16_t *)p);
}

// Partial sums of 64 columns are added up, which is more accurate than one long sum.
INLINE void float_tile(const int M, const int KIND, const uint8_t *w, int columns, const float *x, int64_t x_stride,
                       float *out, int64_t out_stride) {
  const int SIZE = KIND == F32 ? 64 : KIND == E4M3 ? 16 : 32; // bytes of 16 numbers
  const vf one = allf(1), scale0 = KIND == E4M3 ? loadf((const float *)w) : one, scale1 = KIND == E4M3 ? loadf((const float *)w + 16) : one;
  if (KIND == E4M3) w += 128;
  _Alignas(64) float f[MOST_FLOAT][TILE];
  UNROLL for (int m = 0; m < M; m++) storef(f[m], allf(0)), storef(f[m] + 16, allf(0));
  for (int column = 0; column < columns;) {
    vf c[MOST_FLOAT][2];
    UNROLL for (int m = 0; m < M; m++) c[m][0] = c[m][1] = allf(0);
    const int end = column + FLOAT_BLOCK < columns ? column + FLOAT_BLOCK : columns;
    for (; column < end; column++, w += 2 * SIZE) {
      const vf w0 = load_kind(KIND, w), w1 = load_kind(KIND, w + SIZE);
      READ_AHEAD(w);
      if (KIND == F32) READ_AHEAD(w + 64);
      UNROLL for (int m = 0; m < M; m++) {
        const vf a = allf(x[m * x_stride + column]);
        c[m][0] = fma(w0, a, c[m][0]), c[m][1] = fma(w1, a, c[m][1]);
      }
    }
    UNROLL for (int m = 0; m < M; m++) storef(f[m], loadf(f[m]) + c[m][0]), storef(f[m] + 16, loadf(f[m] + 16) + c[m][1]);
  }
  UNROLL for (int m = 0; m < M; m++)
    storef(out + m * out_stride, loadf(f[m]) * scale0), storef(out + m * out_stride + 16, loadf(f[m] + 16) * scale1);
}

// Adds the products of `columns` columns, already fp32, to sums[m][0..16 * V - 1].
INLINE void block_tile(const int M, const int V, const float *w, int columns, const float *x, int64_t x_stride, float *sums) {
  vf c[BLOCK_ROWS][BLOCK_VECTORS];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) c[m][v] = allf(0);
  for (int column = 0; column < columns; column++, w += TILE) {
    vf of_w[BLOCK_VECTORS];
    UNROLL for (int v = 0; v < V; v++) of_w[v] = loadf(w + LANES * v);
    UNROLL for (int m = 0; m < M; m++) {
      const vf a = allf(x[m * x_stride + column]);
      UNROLL for (int v = 0; v < V; v++) c[m][v] = fma(of_w[v], a, c[m][v]);
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < V; v++) {
    float *to = sums + m * TILE + LANES * v;
    storef(to, loadf(to) + c[m][v]);
  }
}
typedef void (*block_kernel)(const float *, int, const float *, int64_t, float *);
#define BLOCK(M)                                                                                                  \
  static __attribute__((noinline)) void block_##M(const float *w, int columns, const float *x, int64_t x_stride,  \
                                                  float *sums) {                                                  \
    block_tile(M, BLOCK_VECTORS, w, columns, x, x_stride, sums);                                                  \
  }
BLOCK(1) BLOCK(2) BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6)
#if defined(__AVX512F__)
BLOCK(7) BLOCK(8) BLOCK(9) BLOCK(10) BLOCK(11) BLOCK(12)
#endif
static const block_kernel block_kernels[BLOCK_ROWS + 1] = {
    0, block_1, block_2, block_3, block_4, block_5, block_6,
#if defined(__AVX512F__)
    block_7, block_8, block_9, block_10, block_11, block_12,
#endif
};

#include "avx2.c"

// The kernels below compute one tile for M rows; run_integer and run_float compute tiles first .. last - 1 for all rows.
// out has room for whole tiles: its stride is at least 32 * tiles.
#if SHORT_SUMS
#define INTEGER_TILE(M, D, C, H, ...) (C == I4 ? short_tile(M, D, H, __VA_ARGS__) : integer_tile(M, D, C, H, __VA_ARGS__))
#else
#define INTEGER_TILE integer_tile
#endif
#define INTEGER(M, D, C, H)                                                                                        \
  static __attribute__((noinline)) void integer_##M##_##D##_##C##_##H(const uint8_t *w, int columns, int block,   \
      int group, const digits_of_rows *x, float *out, int64_t out_stride) {                                       \
    INTEGER_TILE(M, D, C, H, w, columns, block, group, *x, out, out_stride);                                      \
  }
// Kernels for four and six rows, or null where the registers do not hold their sums.
#if defined(__AVX512F__)
#define FOUR(D, C, H) (D == 1 ? integer_4_##D##_##C##_##H : 0)
#define SIX(D, C, H) (D == 1 ? integer_6_1_##C##_##H : 0)
#else
#define FOUR(D, C, H) (SHORT_SUMS && C == I4 ? integer_4_##D##_##C##_##H : 0)
#define SIX(D, C, H) 0
#endif
#define INTEGERS(C, H) \
  INTEGER(1, 1, C, H) INTEGER(2, 1, C, H) INTEGER(4, 1, C, H) INTEGER(6, 1, C, H) INTEGER(1, 3, C, H) INTEGER(2, 3, C, H) INTEGER(4, 3, C, H)
INTEGERS(I8, 0) INTEGERS(I8, 1) INTEGERS(I4, 0) INTEGERS(I4, 1) INTEGERS(E2M1, 0) INTEGERS(E2M1, 1)
typedef void (*integer_kernel)(const uint8_t *, int, int, int, const digits_of_rows *, float *, int64_t);

static int linear_tiles(const instruction *i) { return (i->n[0] + TILE - 1) / TILE; }

INLINE int64_t integer_tile_bytes(const instruction *i) {
  const int columns = i->n[1], codes = i->n[2], block = i->n[3], half = i->n[6];
  return (int64_t)columns / block * (half ? 64 : 128) + (int64_t)columns / (codes == I8 ? 4 : 8) * 128;
}
#include "amx.c"
INLINE digits_of_rows digits_from(const instruction *i, int64_t row) {
  const int columns = i->n[1], groups = columns / i->n[4];
  const int64_t digits = i->n[5];
  return (digits_of_rows){i->q + row * digits * columns, i->scales + row * groups, i->sums + row * digits * groups,
                          digits * columns, groups, digits * groups};
}

INLINE void run_integer(const instruction *i, int first, int last, int rows, integer_kernel one, integer_kernel two,
                        integer_kernel four, integer_kernel six) {
  const int64_t tile = integer_tile_bytes(i);
  for (int t = first; t < last; t++) {
    for (int r = 0; r < rows;) {
      const digits_of_rows x = digits_from(i, r);
      float *out = i->out + r * i->out_stride + t * TILE;
      const int left = rows - r;
      const int m = six && left >= 6 ? 6 : four && left >= 4 ? 4 : left >= 2 ? 2 : 1;
      (m == 6 ? six : m == 4 ? four : m == 2 ? two : one)(i->w + t * tile, i->n[1], i->n[3], i->n[4], &x, out, i->out_stride);
      r += m;
    }
  }
}

// The digits are not in tiles.
static void linear_rows(const instruction *i, int first, int last, int rows) {
  const int codes = i->n[2], digits = i->n[5], half = i->n[6];
#define CASE(D, C, H)                              \
  if (digits == D && codes == C && half == H)      \
    return run_integer(i, first, last, rows, integer_1_##D##_##C##_##H, integer_2_##D##_##C##_##H, FOUR(D, C, H), SIX(D, C, H));
#define CASES(C, H) CASE(1, C, H) CASE(3, C, H)
  CASES(I8, 0) CASES(I8, 1) CASES(I4, 0) CASES(I4, 1) CASES(E2M1, 0) CASES(E2M1, 1)
#undef CASES
#undef CASE
}
static void linear_int(const instruction *i, int first, int last, int rows) {
#if defined(__AMX_INT8__)
  if (tiled(rows)) return run_amx(i, first, last, rows);
#endif
  linear_rows(i, first, last, rows);
}

INLINE int64_t float_tile_bytes(const int KIND, int columns) {
  return KIND == E4M3 ? 128 + (int64_t)columns * 32 : (int64_t)columns * (KIND == F32 ? 128 : 64);
}
// The tiles that read the same columns of the rows: a head's, or all.
INLINE int tiles_of_a_head(const instruction *i) { return i->n[3] > 1 ? linear_tiles(i) / i->n[3] : linear_tiles(i); }

// More rows than float_tile takes at once, in panels that stay in the cache. The weights of a block become fp32 once for
// all rows of a panel, and those of the next block are read ahead meanwhile. The sums are those of float_tile, in the same
// order.
INLINE void run_float_blocks(const int KIND, const instruction *i, int first, int last, int rows) {
  const int columns = i->n[1], tiles_of_head = tiles_of_a_head(i), SIZE = KIND == F32 ? 64 : KIND == E4M3 ? 16 : 32;
  const int64_t tile = float_tile_bytes(KIND, columns);
  _Alignas(64) float unpacked[FLOAT_BLOCK * TILE], sums[FLOAT_PANEL][TILE];
  for (int panel = 0; panel < rows; panel += FLOAT_PANEL) {
    const int count = rows - panel < FLOAT_PANEL ? rows - panel : FLOAT_PANEL, parts = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int t = first; t < last; t++) {
      const uint8_t *w = i->w + t * tile, *ahead = w;
      vf scale[2] = {allf(1), allf(1)};
      if (KIND == E4M3) w = load_scales(0, w, scale);
      const float *x = i->a + panel * i->a_stride + t / tiles_of_head * columns;
      for (int r = 0; r < count; r++) storef(sums[r], allf(0)), storef(sums[r] + 16, allf(0));
      for (int column = 0; column < columns; column += FLOAT_BLOCK) {
        const int width = columns - column < FLOAT_BLOCK ? columns - column : FLOAT_BLOCK;
        for (int k = 0; k < width; k++, w += 2 * SIZE)
          storef(unpacked + k * TILE, load_kind(KIND, w)), storef(unpacked + k * TILE + 16, load_kind(KIND, w + SIZE));
        for (int r = 0, part = 1; part <= parts; part++) {
          const int m = count * part / parts - r; // as equal as possible
          for (const uint8_t *end = w + FLOAT_BLOCK * 2 * SIZE * part / parts; ahead < end; ahead += 64) PREFETCH(ahead);
          for (int lane = 0; lane < TILE; lane += LANES * BLOCK_VECTORS)
            block_kernels[m](unpacked + lane, width, x + r * i->a_stride + column, i->a_stride, sums[r] + lane);
          r += m;
        }
      }
      float *out = i->out + panel * i->out_stride + t * TILE;
      for (int r = 0; r < count; r++, out += i->out_stride)
        storef(out, loadf(sums[r]) * scale[0]), storef(out + 16, loadf(sums[r] + 16) * scale[1]);
    }
  }
}

INLINE void run_float(const int KIND, const instruction *i, int first, int last, int rows) {
  if (rows > MOST_FLOAT) return run_float_blocks(KIND, i, first, last, rows);
  const int columns = i->n[1], tiles_of_head = tiles_of_a_head(i);
  const int64_t tile = float_tile_bytes(KIND, columns);
  for (int t = first; t < last; t++) {
    const uint8_t *w = i->w + t * tile;
    for (int r = 0; r < rows;) {
      const float *x = i->a + r * i->a_stride + t / tiles_of_head * columns;
      float *out = i->out + r * i->out_stride + t * TILE;
      const int left = rows - r;
#define ROWS(M) float_tile(M, KIND, w, columns, x, i->a_stride, out, i->out_stride), r += M
#if defined(__AVX512F__)
      if (left >= 12) ROWS(12);
      else if (left >= 8) ROWS(8);
      else if (left >= 4) ROWS(4);
      else
#endif
      if (left >= 2) ROWS(2);
      else ROWS(1);
#undef ROWS
    }
  }
}

static void linear_float(const instruction *i, int first, int last, int rows) {
  if (i->n[2] == F32) run_float(F32, i, first, last, rows);
  else if (i->n[2] == F16) run_float(F16, i, first, last, rows);
  else if (i->n[2] == BF16) run_float(BF16, i, first, last, rows);
  else run_float(E4M3, i, first, last, rows);
}
