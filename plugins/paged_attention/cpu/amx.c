// Products of an 8-bit cache on AMX, for tiles of many queries. The integer sums are those of vectors, and what follows
// them is the same, so results have the same bits.
//
// Tiles 0 to 2: sums, [16 rows][16 keys or columns], of three digits or of one digit of two times 16 rows. Tiles 3 to 5:
// the digits, [16 rows][step]. Tiles 6 and 7 in turns: keys, [step / 4][16 keys][4], or values, [step / 4][16 columns][4 keys].
#if defined(__AMX_INT8__)

enum { TILE_ROWS = 16, AMX_FROM = 9 }; // with fewer rows more than half of a tile is empty
typedef int32_t tile_sums[3 * TILE_ROWS][LANES];

static void configure_attention(int step) {
  tile_config c = {.palette = 1};
  for (int t = 0; t < 3; t++) c.row_bytes[t] = 64, c.rows[t] = TILE_ROWS;
  for (int t = 3; t < 6; t++) c.row_bytes[t] = (uint16_t)step, c.rows[t] = TILE_ROWS;
  for (int t = 6; t < 8; t++) c.row_bytes[t] = 64, c.rows[t] = (uint8_t)(step / 4);
  _tile_loadconfig(&c);
}
INLINE void zero_tiles(const int TILES) {
  _tile_zero(0);
  if (TILES > 1) _tile_zero(1);
  if (TILES > 2) _tile_zero(2);
}
INLINE void store_tiles(const int TILES, tile_sums sums) {
  _tile_stored(0, sums, 64);
  if (TILES > 1) _tile_stored(1, sums + TILE_ROWS, 64);
  if (TILES > 2) _tile_stored(2, sums + 2 * TILE_ROWS, 64);
}
#define PREFETCH_TILE(p, row, rows) \
  UNROLL for (int t = 0; t < (rows); t++) __builtin_prefetch((p) + t * (row), 0, 3)
// digits: of the first tile; those of the next one are `next` bytes further.
#define ADD_PRODUCTS(B, TILES, digits, next, row, b, b_row)                                          \
  _tile_loadd(B, b, b_row);                                                                          \
  _tile_loadd(3, digits, row), _tile_dpbsud(0, 3, B);                                                \
  if (TILES > 1) _tile_loadd(4, (digits) + (next), row), _tile_dpbsud(1, 4, B);                      \
  if (TILES > 2) _tile_loadd(5, (digits) + 2 * (next), row), _tile_dpbsud(2, 5, B)
// A sum as a number. of_digits: the sum of the row's digits, because keys and values are code + 128.
INLINE vf number(const int32_t *sums, int32_t of_digits) { return tofloat(*(const vi *)sums + product(-128, of_digits)); }
INLINE vf joined(tile_sums sums, int r, const int32_t *of_digits) {
  const vf high = fma(number(sums[r], of_digits[0]), allf(256), number(sums[TILE_ROWS + r], of_digits[1]));
  return fma(high, allf(256), number(sums[2 * TILE_ROWS + r], of_digits[2]));
}

// As digit_scores, for a block and up to 16 rows, or 32 of one digit. TILES: of sums.
INLINE void amx_scores(const int DIGITS, const int TILES, const kv_block *kv, const uint8_t *next_keys, const query_tile *q, int first,
                       float *out) {
  const int most = DIGITS == 1 ? TILES * TILE_ROWS : TILE_ROWS, rows = q->rows - first < most ? q->rows - first : most;
  const int64_t row = 3 * q->stride, next = DIGITS == 1 ? TILE_ROWS * row : q->stride;
  _Alignas(64) tile_sums sums[2];
  for (int half = 0; half < 2; half++) {
    const int8_t *digits = q->digits + first * row;
    const uint8_t *keys = kv->keys + 64 * half;
    zero_tiles(TILES);
    for (int k = 0; k < q->width; k += 2 * q->step, digits += 2 * q->step, keys += 2 * q->step * BLOCK) {
      ADD_PRODUCTS(6, TILES, digits, next, row, keys, 4 * BLOCK);
      if (k + q->step == q->width) break;
      ADD_PRODUCTS(7, TILES, digits + q->step, next, row, keys + q->step * BLOCK, 4 * BLOCK);
    }
    store_tiles(TILES, sums[half]);
  }
  for (int k = 0; k < q->width / 2; k++) __builtin_prefetch(next_keys + 64 * k, 0, 3);
  const vf scales0 = loadf(kv->key_scales), scales1 = loadf(kv->key_scales + 16);
  for (int r = 0; r < rows; r++) {
    const int32_t *of_digits = q->sums[first + r];
    const vf score0 = DIGITS == 1 ? number(sums[0][r], of_digits[0]) : joined(sums[0], r, of_digits);
    const vf score1 = DIGITS == 1 ? number(sums[1][r], of_digits[0]) : joined(sums[1], r, of_digits);
    storef(out + r * ROW, score0 * q->scales[first + r] * scales0);
    storef(out + r * ROW + 16, score1 * q->scales[first + r] * scales1);
  }
}

// As weigh_coded_rows, for up to 16 rows.
INLINE void amx_weigh(const coded_weights *weights, int first, int rows, int begin, int blocks, const uint8_t *const *stream, int padded,
                      float *out) {
  const int64_t row = WEIGHT_DIGITS * PART;
  _Alignas(64) tile_sums sums;
  rows = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
  for (int d = 0; d < padded; d += LANES) {
    const int8_t *digits = weights->digits[first][0] + begin;
    zero_tiles(WEIGHT_DIGITS);
    for (int b = 0; b < blocks; b += 2, digits += 2 * BLOCK) {
      ADD_PRODUCTS(6, WEIGHT_DIGITS, digits, PART, row, stream[b] + 4 * d, 4 * padded);
      PREFETCH_TILE(stream[b] + 4 * d + 64, 4 * padded, BLOCK / 4);
      if (b + 1 == blocks) break;
      ADD_PRODUCTS(7, WEIGHT_DIGITS, digits + BLOCK, PART, row, stream[b + 1] + 4 * d, 4 * padded);
      PREFETCH_TILE(stream[b + 1] + 4 * d + 64, 4 * padded, BLOCK / 4);
    }
    store_tiles(WEIGHT_DIGITS, sums);
    for (int r = 0; r < rows; r++) storef(out + r * padded + d, joined(sums, r, weights->sums[first + r]) * weights->scales[first + r]);
  }
}
#undef ADD_PRODUCTS
#endif
