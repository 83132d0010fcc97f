// Attention of a few new positions over a cache of keys and values, each read once for all the heads that share it.
//
// Shape legend: Q queries that share a key head, S cached positions, D head width.
#pragma once

#include "product.h"

constexpr long kBlock = 64;  // positions between two looks at the largest score

// The state of a softmax that is taken block by block: the largest score, the sum of weights, the weighted sum of values.
struct Partial {
  float largest, total;
};

// values[q] = sum_j p[q][j] v[j] added on, two queries and 128 features at a time.
template <class T>
inline void add_values(const T* v, long D, const float* p, long Q, long count, float* out) {
  for (long q = 0; q < Q; q += 2) {
    const bool two = q + 1 < Q;
    const float *p0 = p + q * kBlock, *p1 = two ? p0 + kBlock : p0;
    long d = 0;
    for (; d + 128 <= D; d += 128) {
      f32x16 a0[8], a1[8];
      for (int i = 0; i < 8; i++) a0[i] = load16(out + q * D + d + 16 * i), a1[i] = load16(out + (q + two) * D + d + 16 * i);
      for (long j = 0; j < count; j++) {
        const T* row = v + j * D + d;
        for (long line = 0; line < 128 * long(sizeof(T)); line += 64) __builtin_prefetch((const char*)(row + kBlock * D) + line, 0, 2);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
          const f32x16 x = load16(row + 16 * i);
          a0[i] += p0[j] * x;
          a1[i] += p1[j] * x;
        }
      }
      for (int i = 0; i < 8; i++) {
        store16(out + q * D + d + 16 * i, a0[i]);
        if (two) store16(out + (q + 1) * D + d + 16 * i, a1[i]);
      }
    }
    for (; d < D; d++)
      for (long j = 0; j < count; j++) {
        out[q * D + d] += p0[j] * widen(v[j * D + d]);
        if (two) out[(q + 1) * D + d] += p1[j] * widen(v[j * D + d]);
      }
  }
}

// Q packed queries over positions begin .. end of one row's keys and values [S, D]: `out` [Q, D] and `partials` [Q] are this
// stretch's share of the softmax. `scores`: Q * kBlock floats.
template <class T>
inline void attend(const Packed<T>& q, const T* k, const T* v, long D, long begin, long end, float scale, float* scores, float* out,
                   Partial* partials) {
  const long Q = q.M;
  std::fill(out, out + Q * D, 0.0f);
  std::fill(partials, partials + Q, Partial{-INFINITY, 0});
  for (long s = begin; s < end; s += kBlock) {
    const long count = std::min(kBlock, end - s);
    some_rows(k, s, s + count, q, scores, kBlock, kBlock * D * long(sizeof(T)));
    for (long i = 0; i < Q; i++) {
      float* p = scores + i * kBlock;
      std::fill(p + count, p + kBlock, -INFINITY);
      f32x16 highest = load16(p);
      for (long j = 16; j < kBlock; j += 16) {
        const f32x16 next = load16(p + j);
        highest = next > highest ? next : highest;
      }
      float largest = partials[i].largest;
      for (int j = 0; j < 16; j++) largest = std::max(largest, highest[j] * scale);
      const float shrink = std::exp(partials[i].largest - largest);
      f32x16 total = {};
      for (long j = 0; j < kBlock; j += 16) {
        const f32x16 weight = exp16(load16(p + j) * scale - largest);
        store16(p + j, weight);
        total += weight;
      }
      partials[i] = {largest, partials[i].total * shrink + sum16(total)};
      if (shrink != 1)
        for (long d = 0; d < D; d++) out[i * D + d] *= shrink;
    }
    add_values(v + s * D, D, scores, Q, count, out);
  }
}
