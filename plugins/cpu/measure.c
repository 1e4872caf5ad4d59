// Measures the machine's peak read bandwidth and its peak rates of multiply-adds, for `llmc bench --layers`.
#include "vec.h"

// Reads `bytes` bytes (a multiple of 256). Returns a checksum, so that the compiler keeps the reads.
static int32_t read_all(const uint8_t *p, int64_t bytes) {
  vi s[4] = {alli(0), alli(0), alli(0), alli(0)};
  for (int64_t at = 0; at < bytes; at += 256) {
    for (int k = 0; k < 4; k++) {
      PREFETCH(p + at + 8192 + 64 * k);
      s[k] += (vi) * (const bytes64 *)(p + at + 64 * k);
    }
  }
  return sumi(s[0] + s[1] + s[2] + s[3]);
}

// Independent sums, which hide the latency of an operation. The registers hold them all.
#if defined(__AVX512F__)
enum { CHAINS = 10 };
#else
enum { CHAINS = 6 };
#endif

#define KEEP(x) __asm__ volatile("" : "+m"(x))

// Computes multiply-adds of floats, CHAINS x 16 in each turn. Returns their number.
static int64_t float_products(int64_t turns) {
  vf s[CHAINS], a = allf(0.5f), b = allf(0.25f);
  UNROLL for (int k = 0; k < CHAINS; k++) s[k] = allf((float)k);
  KEEP(a);
  KEEP(b);
  for (int64_t t = 0; t < turns; t++) UNROLL for (int k = 0; k < CHAINS; k++) s[k] = fma(s[k], a, b);
  UNROLL for (int k = 0; k < CHAINS; k++) KEEP(s[k]);
  return turns * CHAINS * LANES;
}

// Computes dot products of int8 vectors, CHAINS in each turn, or of tiles with AMX. Returns the number of multiply-adds.
static int64_t integer_products(int64_t turns) {
#if defined(__AMX_INT8__)
  configure(1, DIGIT_ROWS, 64);
  _tile_zero(0), _tile_zero(1), _tile_zero(2), _tile_zero(3), _tile_zero(4), _tile_zero(6), _tile_zero(7);
  for (int64_t t = 0; t < 2 * turns; t++)
    _tile_dpbssd(0, 6, 7), _tile_dpbssd(1, 6, 7), _tile_dpbssd(2, 6, 7), _tile_dpbssd(3, 6, 7), _tile_dpbssd(4, 6, 7);
  _tile_release();
  return turns * CHAINS * 16 * 16 * 64;
#elif SHORT_SUMS
  __m256i s[2 * CHAINS], u = _mm256_set1_epi8(1), x = _mm256_set1_epi8(2);
  UNROLL for (int k = 0; k < 2 * CHAINS; k++) s[k] = _mm256_set1_epi16(0);
  for (int64_t t = 0; t < turns; t++) UNROLL for (int k = 0; k < 2 * CHAINS; k++) {
    __asm__ volatile("" : "+x"(x)); // or the products would be computed once
    s[k] = _mm256_add_epi16(s[k], _mm256_maddubs_epi16(u, x));
  }
  UNROLL for (int k = 0; k < 2 * CHAINS; k++) KEEP(s[k]);
  return turns * CHAINS * LANES * 4;
#else
  vi s[CHAINS], u = alli(0x01010101), x = alli(0x02020202);
  UNROLL for (int k = 0; k < CHAINS; k++) s[k] = alli(k);
  KEEP(u);
  KEEP(x);
  for (int64_t t = 0; t < turns; t++) UNROLL for (int k = 0; k < CHAINS; k++) s[k] = dot4(s[k], u, x, 0);
  UNROLL for (int k = 0; k < CHAINS; k++) KEEP(s[k]);
  return turns * CHAINS * LANES * 4;
#endif
}
