// Linear layers of integer matrices for several rows, on AMX: tiles of 16 rows x 64 int8 digits.
//
// The sums are integers, and the floating-point operations are those of integer_tile in the same order, so results
// have the same bits. The digits of the activations are in tiles too: quantize in rows.c writes them.
#if defined(__AMX_INT8__)

enum { PANEL = 128, MOST_GROUP = 128 };
typedef int32_t sums_of_rows[3][2][DIGIT_ROWS][16]; // [digit][half of the tile][row][row of the matrix]

typedef struct {
  uint8_t palette, start_row, zero[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} tile_config;

// Tiles 0 to 5: sums [rows][16]. Tile 6: digits [rows][step]. Tile 7: codes [step / 4][16][4].
static void configure(int rows, int step) {
  tile_config c = {.palette = 1};
  for (int t = 0; t < 6; t++) c.row_bytes[t] = 64, c.rows[t] = (uint8_t)rows;
  c.row_bytes[6] = (uint16_t)step, c.rows[6] = (uint8_t)rows;
  c.row_bytes[7] = 64, c.rows[7] = (uint8_t)(step / 4);
  _tile_loadconfig(&c);
}

// The codes of a group of columns as signed bytes: [column / 4][32 rows][4].
INLINE void unpack_group(const int BITS, const uint8_t *w, int group, uint8_t *out) {
  for (int k = 0; k < group; k += 32 / BITS, w += 128) {
    const bytes64 u0 = *(const bytes64 *)w, u1 = *(const bytes64 *)(w + 64);
    PREFETCH(w + AHEAD), PREFETCH(w + AHEAD + 64);
    if (BITS == 4) {
      *(bytes64 *)out = (u0 & 15) - 8, *(bytes64 *)(out + 64) = (u1 & 15) - 8;
      *(bytes64 *)(out + 128) = (u0 >> 4) - 8, *(bytes64 *)(out + 192) = (u1 >> 4) - 8;
      out += 256;
    } else {
      *(bytes64 *)out = u0 ^ 128, *(bytes64 *)(out + 64) = u1 ^ 128;
      out += 128;
    }
  }
}

// Integer sums of up to 16 rows of activations with a group of 32 rows of the matrix. digit: bytes between digits.
INLINE void amx_sums(const int DIGITS, const int8_t *q, int64_t digit, const uint8_t *codes, int group, int step, sums_of_rows sums) {
  _tile_zero(0), _tile_zero(1);
  if (DIGITS == 3) _tile_zero(2), _tile_zero(3), _tile_zero(4), _tile_zero(5);
  for (int k = 0; k < group; k += step, codes += TILE * step, q += DIGIT_ROWS * step) {
    _tile_loadd(7, codes, 128);
    _tile_loadd(6, q, step);
    _tile_dpbssd(0, 6, 7);
    if (DIGITS == 3) {
      _tile_loadd(6, q + digit, step);
      _tile_dpbssd(2, 6, 7);
      _tile_loadd(6, q + 2 * digit, step);
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(7, codes + 64, 128);
      _tile_dpbssd(5, 6, 7);
      _tile_loadd(6, q + digit, step);
      _tile_dpbssd(3, 6, 7);
      _tile_loadd(6, q, step);
    } else _tile_loadd(7, codes + 64, 128);
    _tile_dpbssd(1, 6, 7);
  }
  _tile_stored(0, sums[0][0], 64), _tile_stored(1, sums[0][1], 64);
  if (DIGITS == 3) {
    _tile_stored(2, sums[1][0], 64), _tile_stored(3, sums[1][1], 64);
    _tile_stored(4, sums[2][0], 64), _tile_stored(5, sums[2][1], 64);
  }
}

// Adds the sums of a group to those of its block, and the sums of a block to those of the row. FIRST, LAST: of a block.
INLINE void add_group(const int DIGITS, const int FIRST, const int LAST, const sums_of_rows sums, int rows, const float *factors,
                      int64_t factors_row, const vf scale[2], float (*of_block)[TILE], float (*f)[TILE]) {
  for (int m = 0; m < rows; m++, factors += factors_row) {
    const vf factor = allf(*factors);
    UNROLL for (int half = 0; half < 2; half++) {
      vf t = tofloat(*(const vi *)sums[0][half][m]);
      UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(*(const vi *)sums[d][half][m]));
      float *part = of_block[m] + 16 * half, *to = f[m] + 16 * half;
      t = FIRST ? t * factor : fma(t, factor, loadf(part));
      if (LAST) storef(to, fma(t, scale[half], loadf(to)));
      else storef(part, t);
    }
  }
}

// One tile of 32 rows of the matrix for `rows` rows of activations: a multiple of 16, or fewer than 16.
// The next integer sums are started before the previous ones are added, because AMX is slow to answer.
INLINE void amx_tile(const int DIGITS, const int BITS, const int HALF, const uint8_t *weights, int columns, int block, int group,
                     digits_of_rows x, int rows, float *out, int64_t out_stride) {
  const int SCALES = HALF ? 64 : 128, groups = columns / group, in_block = block / group;
  const int step = digit_step(group), high = rows < DIGIT_ROWS ? rows : DIGIT_ROWS;
  const int64_t group_bytes = (int64_t)group * TILE * BITS / 8, block_bytes = SCALES + in_block * group_bytes;
  const int64_t digit = (int64_t)columns * DIGIT_ROWS;
  _Alignas(64) float f[PANEL][TILE], of_block[PANEL][TILE];
  _Alignas(64) sums_of_rows sums[2];
  _Alignas(64) uint8_t codes[MOST_GROUP * TILE];
  for (int panel = 0; panel < rows; panel += PANEL) {
    const int count = rows - panel < PANEL ? rows - panel : PANEL, high_blocks = (count + DIGIT_ROWS - 1) / DIGIT_ROWS;
    for (int m = 0; m < count; m++) storef(f[m], allf(0)), storef(f[m] + 16, allf(0));
    for (int turn = 0, g = 0, m = 0, added_g = 0, added_m = 0; turn <= groups * high_blocks; turn++) {
      if (turn < groups * high_blocks) {
        if (m == 0) unpack_group(BITS, weights + g / in_block * block_bytes + SCALES + g % in_block * group_bytes, group, codes);
        const int8_t *q = x.q + (panel + m * DIGIT_ROWS) * x.q_row + (int64_t)g * group * DIGIT_ROWS;
        amx_sums(DIGITS, q, digit, codes, group, step, sums[turn % 2]);
        if (++m == high_blocks) m = 0, g++;
      }
      if (turn == 0) continue;
      const uint8_t *s = weights + added_g / in_block * block_bytes;
      vf scale[2];
      if (HALF) scale[0] = load_fp16((const uint16_t *)s), scale[1] = load_fp16((const uint16_t *)s + 16);
      else scale[0] = loadf((const float *)s), scale[1] = loadf((const float *)s + 16);
      const int row = added_m * DIGIT_ROWS, first = added_g % in_block == 0, last = (added_g + 1) % in_block == 0;
      const float *factors = x.scales + (panel + row) * x.scales_row + added_g;
#define ADD(FIRST, LAST)         \
  if (first == FIRST && last == LAST) \
    add_group(DIGITS, FIRST, LAST, sums[(turn - 1) % 2], high, factors, x.scales_row, scale, of_block + row, f + row);
      ADD(0, 0) ADD(0, 1) ADD(1, 0) ADD(1, 1)
#undef ADD
      if (++added_m == high_blocks) added_m = 0, added_g++;
    }
    for (int m = 0; m < count; m++)
      storef(out + (panel + m) * out_stride, loadf(f[m])), storef(out + (panel + m) * out_stride + 16, loadf(f[m] + 16));
  }
}

#define AMX(D, B, H)                                                                                              \
  static __attribute__((noinline)) void amx_##D##_##B##_##H(const uint8_t *w, int columns, int block, int group, \
      const digits_of_rows *x, int rows, float *out, int64_t out_stride) {                                       \
    amx_tile(D, B, H, w, columns, block, group, *x, rows, out, out_stride);                                      \
  }
AMX(1, 4, 0) AMX(1, 4, 1) AMX(1, 8, 0) AMX(1, 8, 1) AMX(3, 4, 0) AMX(3, 4, 1) AMX(3, 8, 0) AMX(3, 8, 1)
#endif
