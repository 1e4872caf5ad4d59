// Vectors of 16 lanes for every instruction set.
//
// Clang's vector extensions split 16 lanes into the registers that the CPU has: one of AVX-512, two of AVX2, four of
// NEON. Every operation is exact or rounds once, and none is contracted, so results have the same bits everywhere.
// Only the dot product of bytes needs intrinsics.
#pragma once
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#pragma clang fp contract(off)

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("clang loop unroll(full)")
#define PREFETCH(p) __builtin_prefetch((p), 0, 2) // into the second-level cache
enum { LANES = 16 };
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef float vf_loose __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2)));
typedef _Float16 vhf __attribute__((vector_size(32), aligned(2)));
typedef int8_t vb __attribute__((vector_size(16), aligned(1)));
typedef uint8_t vub __attribute__((vector_size(16), aligned(1)));
typedef uint8_t bytes64 __attribute__((vector_size(64), aligned(1)));

INLINE int upto(int x, int most) { return x < 1 ? 1 : x > most ? most : x; }
INLINE vf loadf(const float *p) { return *(const vf_loose *)p; }
INLINE void storef(float *p, vf x) { *(vf_loose *)p = x; }
INLINE vf allf(float x) { return x - (vf){}; } // x - 0 is x, also for -0, so compilers only broadcast
INLINE vi alli(int32_t x) { return (vi){} + x; }
INLINE vf fma(vf a, vf b, vf c) { return __builtin_elementwise_fma(a, b, c); }
INLINE vf maxf(vf a, vf b) { return __builtin_elementwise_max(a, b); }
INLINE vf minf(vf a, vf b) { return __builtin_elementwise_min(a, b); }
INLINE vf absf(vf a) { return __builtin_elementwise_abs(a); }
INLINE vf roundf_even(vf a) { return __builtin_elementwise_roundeven(a); }
INLINE vf tofloat(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi toint(vf x) { return __builtin_convertvector(x, vi); } // x is a whole number
INLINE vf load_fp16(const uint16_t *p) { return __builtin_convertvector(*(const vhf *)p, vf); }
INLINE vf load_bf16(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16); }
// E4M3 as fp16 has another exponent bias, which is a factor of 256; NaN does not occur.
INLINE vf load_e4m3(const uint8_t *p) {
  const vh x = __builtin_convertvector(*(const vub *)p, vh);
  return __builtin_convertvector((vhf)((x & 0x80) << 8 | (x & 0x7f) << 7), vf) * 256.0f;
}
INLINE void store_bytes(int8_t *p, vi x) { *(vb *)p = __builtin_convertvector(x, vb); }
// a * b. It wraps, because sums of digits are arbitrary where a number is NaN or infinite.
INLINE int32_t product(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }
INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
// The larger number, or b if a is NaN. One instruction, unlike maxf.
INLINE vf larger(vf a, vf b) { return select(a > b, a, b); }

// Sums and maxima over the lanes, always in the same order: 16 -> 8 -> 4 -> 2 -> 1.
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
typedef float vf2 __attribute__((vector_size(8)));
#define HALVES(combine)                                                                           \
  vf8 a = combine(vf8, __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),                     \
                  __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));                   \
  vf4 b = combine(vf4, __builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(a, a, 4, 5, 6, 7)); \
  vf2 c = combine(vf2, __builtin_shufflevector(b, b, 0, 1), __builtin_shufflevector(b, b, 2, 3));
#define PLUS(type, x, y) ((x) + (y))
#define LARGER(type, x, y) __builtin_elementwise_max((x), (y))
INLINE float sum(vf x) {
  HALVES(PLUS)
  return c[0] + c[1];
}
INLINE float largest(vf x) {
  HALVES(LARGER)
  return c[0] > c[1] ? c[0] : c[1];
}
INLINE int32_t sumi(vi x) { return __builtin_reduce_add(x); } // integers: any order

// exp to within 2 units in the last place, for x <= 88; 0 below -87.
INLINE vf expf_fast(vf x) {
  const vi tiny = x < -87.0f;
  x = minf(maxf(x, allf(-87.0f)), allf(88.0f));
  const vf n = roundf_even(x * 1.44269504f);
  vf r = fma(n, allf(-0.693145752f), x);
  r = fma(n, allf(-1.42860677e-6f), r);
  vf p = allf(1.0f / 5040);
  p = fma(p, r, allf(1.0f / 720));
  p = fma(p, r, allf(1.0f / 120));
  p = fma(p, r, allf(1.0f / 24));
  p = fma(p, r, allf(1.0f / 6));
  p = fma(p, r, allf(0.5f));
  p = fma(p, r, allf(1.0f));
  p = fma(p, r, allf(1.0f));
  const vf power = (vf)((toint(n) + 127) << 23);
  return select(tiny, allf(0.0f), p * power);
}

// c plus the dot products of four unsigned bytes of u with four signed bytes of s, lane by lane. small: all u < 128.
#if defined(__AVX512VNNI__)
INLINE vi dot4(vi c, vi u, vi s, int small) {
  (void)small;
  return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)u, (__m512i)s);
}
#elif defined(__AVX2__)
INLINE __m256i dot4_half(__m256i c, __m256i u, __m256i s, int small) {
#if defined(__AVXVNNI__)
  (void)small;
  return _mm256_dpbusd_avx_epi32(c, u, s);
#else
  const __m256i ones = _mm256_set1_epi16(1);
  if (small) return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones));
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(c, _mm256_add_epi32(even, odd));
#endif
}
INLINE vi dot4(vi c, vi u, vi s, int small) {
  union { vi v; __m256i half[2]; } a = {c}, x = {u}, y = {s};
  for (int i = 0; i < 2; i++) a.half[i] = dot4_half(a.half[i], x.half[i], y.half[i], small);
  return a.v;
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
INLINE vi dot4(vi c, vi u, vi s, int small) {
  (void)small;
  union { vi v; int32x4_t q[4]; uint8x16_t u[4]; int8x16_t s[4]; } a = {c}, x = {u}, y = {s};
  for (int i = 0; i < 4; i++) a.q[i] = vusdotq_s32(a.q[i], x.u[i], y.s[i]);
  return a.v;
}
#elif defined(__ARM_FEATURE_DOTPROD)
INLINE vi dot4(vi c, vi u, vi s, int small) { // u - 128 is signed; 128 times the sum of s is added back
  union { vi v; int32x4_t q[4]; int8x16_t s[4]; } a = {c}, x = {u}, y = {s};
  const int8x16_t flip = vdupq_n_s8(-128), all128 = vdupq_n_s8(64);
  for (int i = 0; i < 4; i++) {
    if (small) {
      a.q[i] = vdotq_s32(a.q[i], x.s[i], y.s[i]);
      continue;
    }
    a.q[i] = vdotq_s32(a.q[i], veorq_s8(x.s[i], flip), y.s[i]);
    a.q[i] = vdotq_s32(vdotq_s32(a.q[i], all128, y.s[i]), all128, y.s[i]);
  }
  return a.v;
}
#else // plain loops, for sanitizers and other CPUs
INLINE vi dot4(vi c, vi u, vi s, int small) {
  (void)small;
  union { vi v; uint8_t u[64]; int8_t s[64]; } x = {u}, y = {s};
  for (int i = 0; i < 64; i++) c[i / 4] += x.u[i] * y.s[i];
  return c;
}
#endif

// The bytes of a table that the bytes of x, all below 16, are the numbers of.
#if defined(__AVX512BW__)
INLINE vi lookup(const uint8_t table[16], vi x) {
  return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table)), (__m512i)x);
}
#elif defined(__AVX2__)
INLINE vi lookup(const uint8_t table[16], vi x) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
  union { vi v; __m256i half[2]; } a = {x};
  for (int i = 0; i < 2; i++) a.half[i] = _mm256_shuffle_epi8(bytes, a.half[i]);
  return a.v;
}
#elif defined(__aarch64__)
INLINE vi lookup(const uint8_t table[16], vi x) {
  const uint8x16_t bytes = vld1q_u8(table);
  union { vi v; uint8x16_t q[4]; } a = {x};
  for (int i = 0; i < 4; i++) a.q[i] = vqtbl1q_u8(bytes, a.q[i]);
  return a.v;
}
#else
INLINE vi lookup(const uint8_t table[16], vi x) {
  union { vi v; uint8_t u[64]; } a = {x};
  for (int i = 0; i < 64; i++) a.u[i] = table[a.u[i]];
  return a.v;
}
#endif
