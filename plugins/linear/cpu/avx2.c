// int4 on AVX2 without VNNI.
//
// A product of codes and digits is a sum of two numbers in 16 bits, and several of them add up before they become 32 bits.
// The sums of a group are in memory, because the registers hold codes. They are integers, and the floating-point
// operations are those of integer_tile in the same order, so results have the same bits.
#if defined(__AVX2__) && !defined(__AVXVNNI__) && !defined(__AVX512F__)
#define SHORT_SUMS 1

enum { SHORT_COLUMNS = 32 }; // 8 products of at most 2 * 15 * 128 fit in 16 bits

INLINE __m256i four_digits(const int8_t *q) {
  int32_t four;
  __builtin_memcpy(&four, q, 4);
  return _mm256_set1_epi32(four);
}

// Adds the products of `columns` columns, up to SHORT_COLUMNS, with 8 rows of the matrix to sums[m * DIGITS + d][0..7].
INLINE void short_sums(const int M, const int DIGITS, const int COLUMNS, const uint8_t *w, const int8_t *q, int64_t q_row,
                       int64_t q_digit, int32_t (*sums)[TILE]) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i codes[SHORT_COLUMNS / 4];
  UNROLL for (int k = 0; k < COLUMNS / 8; k++) {
    const __m256i u = _mm256_loadu_si256((const __m256i *)(w + 128 * k));
    codes[2 * k] = _mm256_and_si256(u, low), codes[2 * k + 1] = _mm256_and_si256(_mm256_srli_epi16(u, 4), low);
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int d = 0; d < DIGITS; d++) {
    const int8_t *digits = q + m * q_row + d * q_digit;
    __m256i pairs = _mm256_maddubs_epi16(codes[0], four_digits(digits));
    UNROLL for (int k = 1; k < COLUMNS / 4; k++)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes[k], four_digits(digits + 4 * k)));
    __m256i *to = (__m256i *)sums[m * DIGITS + d];
    *to = _mm256_add_epi32(*to, _mm256_madd_epi16(pairs, ones));
  }
}

// See integer_tile.
INLINE void short_tile(const int M, const int DIGITS, const int HALF, const uint8_t *w, int columns, int block, int group,
                       digits_of_rows x, float *out, int64_t out_stride) {
  const int groups = columns / group;
  _Alignas(64) int32_t sums[MOST_SUMS][TILE];
  _Alignas(64) float f[MOST][TILE], of_block[MOST][TILE];
  UNROLL for (int m = 0; m < M; m++) storef(f[m], allf(0)), storef(f[m] + 16, allf(0));
  for (int column = 0, g = 0; column < columns;) {
    vf scale[2];
    w = load_scales(HALF, w, scale);
    UNROLL for (int m = 0; m < M; m++) storef(of_block[m], allf(0)), storef(of_block[m] + 16, allf(0));
    for (const int end = column + block; column < end; column += group, g++) {
      UNROLL for (int m = 0; m < M; m++) UNROLL for (int d = 0; d < DIGITS; d++) {
        const vi zero = alli(product(-8, x.sums[m * x.sums_row + d * groups + g]));
        *(vi *)sums[m * DIGITS + d] = *(vi *)(sums[m * DIGITS + d] + 16) = zero;
      }
      const int8_t *q = x.q + column;
      int k = 0;
      for (; k + SHORT_COLUMNS <= group; k += SHORT_COLUMNS, w += 16 * SHORT_COLUMNS) {
        UNROLL for (int ahead = 0; ahead < 16 * SHORT_COLUMNS; ahead += 64) READ_AHEAD(w + ahead);
        UNROLL for (int row = 0; row < TILE; row += 8)
          short_sums(M, DIGITS, SHORT_COLUMNS, w + 4 * row, q + k, x.q_row, columns, (int32_t (*)[TILE])(sums[0] + row));
      }
      for (; k < group; k += 8, w += 128) {
        READ_AHEAD(w), READ_AHEAD(w + 64);
        UNROLL for (int row = 0; row < TILE; row += 8)
          short_sums(M, DIGITS, 8, w + 4 * row, q + k, x.q_row, columns, (int32_t (*)[TILE])(sums[0] + row));
      }
      UNROLL for (int m = 0; m < M; m++) UNROLL for (int half = 0; half < TILE; half += 16) {
        vf t = tofloat(*(const vi *)(sums[m * DIGITS] + half));
        UNROLL for (int d = 1; d < DIGITS; d++) t = fma(t, allf(256), tofloat(*(const vi *)(sums[m * DIGITS + d] + half)));
        storef(of_block[m] + half, fma(t, allf(x.scales[m * x.scales_row + g]), loadf(of_block[m] + half)));
      }
    }
    UNROLL for (int m = 0; m < M; m++) UNROLL for (int half = 0; half < 2; half++)
      storef(f[m] + 16 * half, fma(loadf(of_block[m] + 16 * half), scale[half], loadf(f[m] + 16 * half)));
  }
  UNROLL for (int m = 0; m < M; m++) storef(out + m * out_stride, loadf(f[m])), storef(out + m * out_stride + 16, loadf(f[m] + 16));
}
#else
#define SHORT_SUMS 0
#endif
