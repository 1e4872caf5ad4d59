// Linear layers of integer matrices for several rows, on AMX: tiles of 16 rows x 64 int8 digits.
//
// The sums are integers, and the floating-point operations are those of integer_tile in the same order, so results
// have the same bits. The digits of the activations are in tiles too: quantize in rows.c writes them.
//
// A turn computes 16 rows of activations with a group of columns of 32 rows of the matrix. What the units of AMX do in
// a turn overlaps with what vectors do for the turn before, and with the unpacking of the next group.
#if defined(__AMX_INT8__)

enum { PANEL = 128, MOST_GROUP = 128 };
typedef int32_t sums_of_rows[3][DIGIT_ROWS][16]; // [digit][row][row of the matrix]

typedef struct {
  uint8_t palette, start_row, zero[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} tile_config;

// Tiles of sums: [rows][16]. Tiles of digits: [rows][step]. Tiles of codes: [step / 4][16][4].
// One digit: sums 0 and 1, digits 4 and 5, codes 6 and 7. Three: sums 0 to 5, digits 6, codes 7.
static void configure(int digits, int rows, int step) {
  tile_config c = {.palette = 1};
  const int first_digits = digits == 1 ? 4 : 6, first_codes = digits == 1 ? 6 : 7;
  for (int t = 0; t < 8; t++) {
    c.row_bytes[t] = (uint16_t)(t >= first_digits && t < first_codes ? step : 64);
    c.rows[t] = (uint8_t)(t < first_codes ? rows : step / 4);
  }
  _tile_loadconfig(&c);
}

// The low or the high four bits of every byte, minus 8: bits 0 to 2 stay, the others are the opposite of bit 3.
INLINE bytes64 nibbles(bytes64 x, const int HIGH) {
  const int64_t rows_of_bits = HIGH ? 0x1020408080808080 : 0x0102040808080808;
  return (bytes64)_mm512_gf2p8affine_epi64_epi8((__m512i)x, _mm512_set1_epi64(rows_of_bits), 0xf8);
}

// Twice the value of each E2M1 code, for bytes below 16.
INLINE bytes64 fp4_values(bytes64 x) {
  return (bytes64)lookup(twice_fp4, (vi)x) - 12;
}

// Unpacks pieces of 128 bytes of a group's codes to signed bytes: [column / 4][32 rows][4].
INLINE void unpack(int kind, const uint8_t *w, int pieces, uint8_t *out) {
  for (; pieces > 0; pieces--, w += 128) {
    const bytes64 u0 = *(const bytes64 *)w, u1 = *(const bytes64 *)(w + 64);
    READ_AHEAD(w), READ_AHEAD(w + 64);
    if (kind == E2M1) {
      *(bytes64 *)out = fp4_values(u0 & 15), *(bytes64 *)(out + 64) = fp4_values(u1 & 15);
      *(bytes64 *)(out + 128) = fp4_values(u0 >> 4), *(bytes64 *)(out + 192) = fp4_values(u1 >> 4);
      out += 256;
    } else if (kind == I4) {
      *(bytes64 *)out = nibbles(u0, 0), *(bytes64 *)(out + 64) = nibbles(u1, 0);
      *(bytes64 *)(out + 128) = nibbles(u0, 1), *(bytes64 *)(out + 192) = nibbles(u1, 1);
      out += 256;
    } else {
      *(bytes64 *)out = u0 ^ 128, *(bytes64 *)(out + 64) = u1 ^ 128;
      out += 128;
    }
  }
}

// Starts the integer sums of 16 rows of activations with the first or second 16 rows of the matrix, in a group of
// columns. q: the digits. For one digit, SECOND uses the digits that the first half loaded, if two tiles hold them.
INLINE void start_sums(const int DIGITS, const int SECOND, const int8_t *q, const uint8_t *codes, int group, int step) {
  const int64_t tile = DIGIT_ROWS * step, digit = DIGIT_ROWS * group;
  codes += 64 * SECOND;
  if (DIGITS == 1) {
    if (SECOND) _tile_zero(1);
    else _tile_zero(0);
    const int loaded = SECOND && group <= 2 * step;
    for (int k = 0; k < group; k += 2 * step, q += 2 * tile, codes += 2 * TILE * step) {
      if (!loaded) _tile_loadd(4, q, step);
      _tile_loadd(6, codes, 128);
      if (SECOND) _tile_dpbssd(1, 4, 6);
      else _tile_dpbssd(0, 4, 6);
      if (k + step == group) break;
      if (!loaded) _tile_loadd(5, q + tile, step);
      _tile_loadd(7, codes + TILE * step, 128);
      if (SECOND) _tile_dpbssd(1, 5, 7);
      else _tile_dpbssd(0, 5, 7);
    }
  } else {
    if (SECOND) _tile_zero(3), _tile_zero(4), _tile_zero(5);
    else _tile_zero(0), _tile_zero(1), _tile_zero(2);
    for (int k = 0; k < group; k += step, q += tile, codes += TILE * step) {
      _tile_loadd(7, codes, 128);
      _tile_loadd(6, q, step);
      if (SECOND) _tile_dpbssd(3, 6, 7);
      else _tile_dpbssd(0, 6, 7);
      _tile_loadd(6, q + digit, step);
      if (SECOND) _tile_dpbssd(4, 6, 7);
      else _tile_dpbssd(1, 6, 7);
      _tile_loadd(6, q + 2 * digit, step);
      if (SECOND) _tile_dpbssd(5, 6, 7);
      else _tile_dpbssd(2, 6, 7);
    }
  }
}
INLINE void store_sums(const int DIGITS, const int SECOND, sums_of_rows sums) {
  if (DIGITS == 1 && SECOND) _tile_stored(1, sums[0], 64);
  else if (DIGITS == 1) _tile_stored(0, sums[0], 64);
  else if (SECOND) _tile_stored(3, sums[0], 64), _tile_stored(4, sums[1], 64), _tile_stored(5, sums[2], 64);
  else _tile_stored(0, sums[0], 64), _tile_stored(1, sums[1], 64), _tile_stored(2, sums[2], 64);
}

// A group of columns, for the rows of a panel. The digits and codes of `next` are those of the group that follows.
typedef struct {
  int rows, group, step, kind, has_next;
  const int8_t *q, *next_q;
  const uint8_t *codes, *next_codes;
  const uint8_t *packed; // the packed codes of the next group, and where they go
  uint8_t *unpacked;
  int pieces;
  const float *factors;            // [rows]: scales of the activations
  const float *from;               // sums of the blocks before
  float *part, *to;                // [rows][32]: sums within the block; where the sums with this block go
  int64_t from_stride, to_stride;
  float *result;                   // null, or rows of the result that are written after the next group
  int64_t result_stride;
} pass;

// Adds the sums of a group to those of its block, and the sums of a block to those of the row. FIRST, LAST: of a block.
INLINE void add_rows(const int DIGITS, const int FIRST, const int LAST, const sums_of_rows sums, int rows, vf scale, const float *factors,
                     const float *from, int64_t from_stride, float *part, float *to, int64_t to_stride) {
#define ROW(m)                                                                                             \
  {                                                                                                        \
    vf t = tofloat(*(const vi *)sums[0][m]);                                                               \
    UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(*(const vi *)sums[d][m]));       \
    t = FIRST ? t * allf(factors[m]) : fma(t, allf(factors[m]), loadf(part + TILE * (m)));                 \
    if (LAST) storef(to + (m) * to_stride, fma(t, scale, loadf(from + (m) * from_stride)));                \
    else storef(part + TILE * (m), t);                                                                     \
  }
  if (rows >= DIGIT_ROWS) UNROLL for (int m = 0; m < DIGIT_ROWS; m++) ROW(m)
  else for (int m = 0; m < rows; m++) ROW(m)
#undef ROW
}

// Before a pass, the sums of its first 16 rows are started, and those of the first half are stored. It does this for
// the next one.
INLINE void run_pass(const int DIGITS, const int FIRST, const int LAST, const pass *p, vf scale0, vf scale1, sums_of_rows sums[2]) {
  const int blocks = (p->rows + DIGIT_ROWS - 1) / DIGIT_ROWS, each = (p->pieces + blocks - 1) / blocks;
  const int group = p->group, step = p->step;
  const int8_t *q = p->q;
  const uint8_t *packed = p->packed, *codes = p->codes;
  uint8_t *unpacked = p->unpacked;
  const float *factors = p->factors, *from = p->from;
  float *part = p->part, *to = p->to, *result = p->result;
  for (int left = p->rows, pieces = p->pieces; left > 0; left -= DIGIT_ROWS) {
    const int now = each < pieces ? each : pieces, more = left > DIGIT_ROWS, start = more || p->has_next;
    unpack(p->kind, packed, now, unpacked);
    pieces -= now, packed += now * 128, unpacked += now * (p->kind == I8 ? 128 : 256);
    if (result) {
      for (int m = 0; m < DIGIT_ROWS && m < left; m++, result += p->result_stride)
        __builtin_prefetch(result, 1, 3), __builtin_prefetch(result + 16, 1, 3);
    }
    q = more ? q + DIGITS * DIGIT_ROWS * group : p->next_q;
    codes = more ? codes : p->next_codes;
    if (start) start_sums(DIGITS, 0, q, codes, group, step);
    store_sums(DIGITS, 1, sums[1]);
    add_rows(DIGITS, FIRST, LAST, sums[0], left, scale0, factors, from, p->from_stride, part, to, p->to_stride);
    if (start) {
      start_sums(DIGITS, 1, q, codes, group, step);
      store_sums(DIGITS, 0, sums[0]);
    }
    add_rows(DIGITS, FIRST, LAST, sums[1], left, scale1, factors, from + 16, p->from_stride, part + 16, to + 16, p->to_stride);
    factors += DIGIT_ROWS, from += DIGIT_ROWS * p->from_stride, part += DIGIT_ROWS * TILE, to += DIGIT_ROWS * p->to_stride;
  }
}
#define PASS(D, F, L)                                                                                              \
  static __attribute__((noinline)) void pass_##D##_##F##_##L(const pass *p, vf scale0, vf scale1, sums_of_rows sums[2]) { \
    run_pass(D, F, L, p, scale0, scale1, sums);                                                                    \
  }
PASS(1, 0, 0) PASS(1, 0, 1) PASS(1, 1, 0) PASS(1, 1, 1) PASS(3, 0, 0) PASS(3, 0, 1) PASS(3, 1, 0) PASS(3, 1, 1)

// One tile of 32 rows of the matrix for all rows of activations.
INLINE void amx_tile(const int DIGITS, const instruction *i, const uint8_t *weights, int rows, float *out) {
  const int columns = i->n[1], kind = i->n[2], block = i->n[3], group = i->n[4], half = i->n[6];
  const int groups = columns / group, in_block = block / group, scales = half ? 64 : 128, pieces = group * (kind == I8 ? 8 : 4) / 32;
  const int64_t tiled_rows = tiled(rows), of_block = (int64_t)DIGITS * DIGIT_ROWS * group;
  static const float zeros[TILE];
  _Alignas(64) float f[PANEL][TILE], part[PANEL][TILE];
  _Alignas(64) sums_of_rows sums[2];
  _Alignas(64) uint8_t codes[2][MOST_GROUP * TILE];
  pass p = {.group = group, .step = digit_step(group), .kind = kind, .part = part[0], .next_q = i->q, .next_codes = codes[0]};
  unpack(kind, weights + scales, pieces, codes[0]);
  start_sums(DIGITS, 0, p.next_q, codes[0], group, p.step);
  start_sums(DIGITS, 1, p.next_q, codes[0], group, p.step);
  store_sums(DIGITS, 0, sums[0]);
  for (int panel = 0, turn = 0; panel < rows; panel += PANEL) {
    const uint8_t *w = weights;
    vf scale[2] = {allf(0), allf(0)};
    p.rows = rows - panel < PANEL ? rows - panel : PANEL;
    for (int g = 0, b = 0; g < groups; g++, turn ^= 1) {
      const int first = b == 0, last = b == in_block - 1, end = g == groups - 1;
      if (first) {
        if (half) scale[0] = load_fp16((const uint16_t *)w), scale[1] = load_fp16((const uint16_t *)w + 16);
        else scale[0] = loadf((const float *)w), scale[1] = loadf((const float *)w + 16);
        w += scales;
      }
      w += pieces * 128;
      b = last ? 0 : b + 1;
      p.q = p.next_q, p.codes = p.next_codes, p.has_next = !end || panel + PANEL < rows;
      p.next_q = end ? i->q + (panel + PANEL) / DIGIT_ROWS * of_block : p.q + tiled_rows / DIGIT_ROWS * of_block;
      p.next_codes = p.unpacked = codes[turn ^ 1], p.pieces = p.has_next ? pieces : 0;
      p.packed = (end ? weights : w) + (end || last ? scales : 0);
      p.factors = i->scales + g * tiled_rows + panel;
      p.from = g < in_block ? zeros : f[0], p.from_stride = g < in_block ? 0 : TILE;
      p.to = end ? out + panel * i->out_stride : f[0], p.to_stride = end ? i->out_stride : TILE;
      p.result = g == groups - 2 ? out + panel * i->out_stride : 0, p.result_stride = i->out_stride;
#define CHOOSE(F, L) \
  if (first == F && last == L) DIGITS == 1 ? pass_1_##F##_##L(&p, scale[0], scale[1], sums) : pass_3_##F##_##L(&p, scale[0], scale[1], sums);
      CHOOSE(0, 0) CHOOSE(0, 1) CHOOSE(1, 0) CHOOSE(1, 1)
#undef CHOOSE
    }
  }
}

static void run_amx(const instruction *i, int first, int last, int rows) {
  const int64_t tile = integer_tile_bytes(i);
  configure(i->n[5], rows < DIGIT_ROWS ? rows : DIGIT_ROWS, digit_step(i->n[4]));
  for (int t = first; t < last; t++) {
    if (i->n[5] == 1) amx_tile(1, i, i->w + t * tile, rows, i->out + t * TILE);
    else amx_tile(3, i, i->w + t * tile, rows, i->out + t * TILE);
  }
  _tile_release();
}
#endif
