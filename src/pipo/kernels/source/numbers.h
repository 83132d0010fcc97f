// Numbers and vectors of 16 of them. `PIPO_PORTABLE` leaves out what only some processors have, for tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512F__) && !defined(PIPO_PORTABLE)
#include <immintrin.h>
#define PIPO_AVX512BF16 1
#else
#define PIPO_AVX512BF16 0
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

struct bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

template <class T> T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
// What is left of a number that was stored as T.
template <class T> float stored(float x) { return widen(narrow<T>(x)); }

inline f32x16 all16(float x) { return x - f32x16{}; }

inline f32x16 load16(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, 64);
  return v;
}
inline f32x16 load16(const bf16* p) {
  u16x16 half;
  std::memcpy(&half, p, 32);
  const u32x16 bits = __builtin_convertvector(half, u32x16) << 16;
  return (f32x16)bits;
}
inline void store16(float* p, f32x16 v) { std::memcpy(p, &v, 64); }

inline float sum16(f32x16 v) {
#if PIPO_AVX512BF16
  return _mm512_reduce_add_ps((__m512)v);
#else
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}

// The sums of 16 vectors, as one vector.
inline f32x16 sums16(const f32x16* v) {
#if PIPO_AVX512BF16
  __m512 a[16];
  for (int i = 0; i < 8; i++)  // pairs of vectors: even lanes hold sums of the first, odd ones of the second
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]),
                         _mm512_unpackhi_ps((__m512)v[2 * i], (__m512)v[2 * i + 1]));
  for (int i = 0; i < 4; i++)  // each 128-bit lane: four vectors
    a[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  for (int i = 0; i < 2; i++)
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  return (f32x16)_mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
#else
  f32x16 s;
  for (int i = 0; i < 16; i++) s[i] = sum16(v[i]);
  return s;
#endif
}

// e to the power of each, for arguments up to 80; relative error below 1e-6. Below -87 it is 0.
inline f32x16 exp16(f32x16 x) {
  const f32x16 lowest = all16(-87.0f);
  const i32x16 vanishes = x < lowest;
  x = (f32x16)(((i32x16)lowest & vanishes) | ((i32x16)x & ~vanishes));
  const f32x16 magic = all16(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const f32x16 n = (x * 1.44269504f + magic) - magic;
  const f32x16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = all16(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const i32x16 power = __builtin_convertvector(n, i32x16) + 127;
  const f32x16 scaled = p * (f32x16)(power << 23);
  return (f32x16)((i32x16)scaled & ~vanishes);
}
