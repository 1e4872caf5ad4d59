// Products of an 8-bit cache on AMX, for tiles of many queries. The integer sums are those of vectors, and what follows
// them is the same, so results have the same bits.
//
// Tiles 0 to 2: sums of each digit, [16 rows][16 keys or columns]. Tile 4: digits of queries [16][step]. Tile 5: keys
// [step / 4][16 keys][4]. Tile 6: digits of weights [16][32 keys]. Tile 7: values [32 / 4][16 columns][4 keys].
#if defined(__AMX_INT8__)

enum { TILE_ROWS = 16, AMX_FROM = 9 }; // with fewer rows more than half of a tile is empty
typedef int32_t tile_sums[WEIGHT_DIGITS][TILE_ROWS][LANES];

static void configure_attention(int step) {
  tile_config c = {.palette = 1};
  for (int t = 0; t < WEIGHT_DIGITS; t++) c.row_bytes[t] = 64, c.rows[t] = TILE_ROWS;
  c.row_bytes[4] = (uint16_t)step, c.rows[4] = TILE_ROWS;
  c.row_bytes[5] = 64, c.rows[5] = (uint8_t)(step / 4);
  c.row_bytes[6] = BLOCK, c.rows[6] = TILE_ROWS;
  c.row_bytes[7] = 64, c.rows[7] = BLOCK / 4;
  _tile_loadconfig(&c);
}
INLINE void zero_sums(const int DIGITS) {
  _tile_zero(0);
  if (DIGITS == 3) _tile_zero(1), _tile_zero(2);
}
INLINE void store_tile_sums(const int DIGITS, tile_sums sums) {
  _tile_stored(0, sums[0], 64);
  if (DIGITS == 3) _tile_stored(1, sums[1], 64), _tile_stored(2, sums[2], 64);
}
// The sums of row r as one number each. of_digits: the sums of the row's digits, because keys and values are code + 128.
INLINE vf joined(const int DIGITS, tile_sums sums, int r, const int32_t *of_digits) {
  vf t = tofloat(*(const vi *)sums[0][r] + product(-128, of_digits[0]));
  UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(*(const vi *)sums[d][r] + product(-128, of_digits[d])));
  return t;
}

// As digit_scores, for up to 16 rows.
INLINE void amx_scores(const int DIGITS, const kv_block *kv, const query_tile *q, int first, float *out) {
  const int rows = q->rows - first < TILE_ROWS ? q->rows - first : TILE_ROWS, step = q->step;
  const int64_t row = 3 * q->stride;
  _Alignas(64) tile_sums sums;
  for (int half = 0; half < 2; half++) {
    const int8_t *digits = q->digits + first * row;
    const uint8_t *keys = kv->keys + 64 * half;
    zero_sums(DIGITS);
    for (int k = 0; k < q->width; k += step, digits += step, keys += step * BLOCK) {
      _tile_loadd(5, keys, 4 * BLOCK);
      _tile_loadd(4, digits, row);
      _tile_dpbsud(0, 4, 5);
      if (DIGITS == 1) continue;
      _tile_loadd(4, digits + q->stride, row);
      _tile_dpbsud(1, 4, 5);
      _tile_loadd(4, digits + 2 * q->stride, row);
      _tile_dpbsud(2, 4, 5);
    }
    store_tile_sums(DIGITS, sums);
    const vf scales = loadf(kv->key_scales + 16 * half);
    for (int r = 0; r < rows; r++)
      storef(out + r * ROW + 16 * half, joined(DIGITS, sums, r, q->sums[first + r]) * q->scales[first + r] * scales);
  }
}

// As weigh_coded_rows, for up to 16 rows.
INLINE void amx_weigh(const coded_weights *weights, int first, int rows, int begin, int blocks, const uint8_t *const *stream, int padded,
                      float *out) {
  _Alignas(64) tile_sums sums;
  rows = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
  for (int d = 0; d < padded; d += LANES) {
    zero_sums(WEIGHT_DIGITS);
    for (int b = 0; b < blocks; b++) {
      const int8_t *digits = weights->digits[first][0] + begin + BLOCK * b;
      _tile_loadd(7, stream[b] + 4 * d, 4 * padded);
      _tile_loadd(6, digits, WEIGHT_DIGITS * PART);
      _tile_dpbsud(0, 6, 7);
      _tile_loadd(6, digits + PART, WEIGHT_DIGITS * PART);
      _tile_dpbsud(1, 6, 7);
      _tile_loadd(6, digits + 2 * PART, WEIGHT_DIGITS * PART);
      _tile_dpbsud(2, 6, 7);
    }
    store_tile_sums(WEIGHT_DIGITS, sums);
    for (int r = 0; r < rows; r++)
      storef(out + r * padded + d, joined(WEIGHT_DIGITS, sums, r, weights->sums[first + r]) * weights->scales[first + r]);
  }
}
#endif
