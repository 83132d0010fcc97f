// Products of a few rows with a matrix of weights that is stored row-major, [N outputs, K inputs], and read once, in order.
//
// Rows of inputs are *packed* in groups of up to eight: [K / step][rows of the group][step], so that what one step of a product
// reads lies together. Unpacked, rows a power of two apart would push each other out of the first cache.
#pragma once

#include <algorithm>
#include <atomic>

#include "numbers.h"

template <class T> struct Dot {  // how many elements one multiply-add takes, and what it does
  static constexpr long step = 16;
  typedef f32x16 Vec;
  static Vec load(const T* p) { return load16(p); }
  static f32x16 add(f32x16 acc, Vec a, Vec b) { return acc + a * b; }
};
#if PIPO_AVX512BF16
template <> struct Dot<bf16> {
  static constexpr long step = 32;
  typedef __m512bh Vec;
  static Vec load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static f32x16 add(f32x16 acc, Vec a, Vec b) { return (f32x16)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#endif

constexpr long kGroup = 8;             // rows of inputs that are multiplied together
constexpr long kDepth = 1024;          // inputs that are multiplied before the next: a group's of them fit into the first cache
constexpr long kLeastRows = 8;         // of weights, that a thread takes on
constexpr long kStreams = 4;           // places at which weights are read at once for a single row of inputs: memory likes that best

// Weights that a thread takes on at most: long streams for a single row; for more rows, what its second cache holds.
inline long chunk_bytes(long M) { return M == 1 ? 1 << 20 : 1 << 18; }

// Packed rows: element k of row m. `K` of the rows is padded with zeros to whole steps.
template <class T> struct Packed {
  T* data;
  long M, K;

  static long padded(long K) { return (K + Dot<T>::step - 1) / Dot<T>::step * Dot<T>::step; }
  static long size(long M, long K) { return M * padded(K); }
  long width(long group) const { return std::min(kGroup, M - group * kGroup); }
  const T* group(long g) const { return data + g * kGroup * padded(K); }
  T* run(long m, long k) const {  // where the run of `step` elements from k on lies
    const long g = m / kGroup;
    return data + g * kGroup * padded(K) + (k / Dot<T>::step * width(g) + m % kGroup) * Dot<T>::step;
  }
  T& at(long m, long k) const { return run(m, k)[k % Dot<T>::step]; }
  void put(long m, const T* row) const {
    for (long k = 0; k < K; k += Dot<T>::step) {
      T* to = run(m, k);
      const long count = std::min(Dot<T>::step, K - k);
      std::memcpy(to, row + k, count * sizeof(T));
      std::memset((void*)(to + count), 0, (Dot<T>::step - count) * sizeof(T));
    }
  }
  void clear_padding() const {
    for (long m = 0; m < M; m++)
      for (long k = K; k < padded(K); k++) at(m, k) = narrow<T>(0);
  }
};

// out[r * M + m] = w[r] . x[m], for R rows of w, `ldw` apart, and a packed group of M rows. Weights are fetched `ahead` bytes of
// their use; 0: the processor sees by itself what comes.
template <class T, int R, int M> inline void dots(const T* w, long ldw, long K, const T* x, float* out, long ahead) {
  typedef Dot<T> D;
  constexpr int U = R * M == 1 ? 4 : R * M <= 3 ? 2 : 1;  // chains of sums: one would wait for itself
  f32x16 acc[U][R * M];
  for (int u = 0; u < U; u++)
    for (int i = 0; i < R * M; i++) acc[u][i] = f32x16{};
  long k = 0;
  for (; k + U * D::step <= K; k += U * D::step)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const long at = k + u * D::step;
      typename D::Vec ws[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const T* row = w + r * ldw + at;
        if (ahead) __builtin_prefetch((const char*)row + ahead, 0, 2);
        ws[r] = D::load(row);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const typename D::Vec xs = D::load(x + at * M + m * D::step);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[u][r * M + m] = D::add(acc[u][r * M + m], xs, ws[r]);
      }
    }
  for (; k < K; k += D::step) {
    T last[R][D::step];
    const long count = std::min(D::step, K - k);
    for (int r = 0; r < R; r++)
      for (long i = 0; i < D::step; i++) last[r][i] = i < count ? w[r * ldw + k + i] : narrow<T>(0);
    for (int m = 0; m < M; m++)
      for (int r = 0; r < R; r++)
        acc[0][r * M + m] = D::add(acc[0][r * M + m], D::load(x + k * M + m * D::step), D::load(last[r]));
  }
  for (int u = 1; u < U; u++)
    for (int i = 0; i < R * M; i++) acc[0][i] += acc[u][i];
  int i = 0;
  for (; i + 16 <= R * M; i += 16) store16(out + i, sums16(acc[0] + i));
  for (; i < R * M; i++) out[i] = sum16(acc[0][i]);
}

// Rows `begin` to `end` of the weights with one group: y[m * ldy + n - begin].
template <class T, int R, int M>
inline void group_rows(const T* w, long K, long begin, long end, const T* x, float* y, long ldy, long ahead) {
  float out[R * M];
  for (long k = 0; k < K; k += kDepth) {
    const long count = std::min(kDepth, K - k);
    const auto add = [&](long n, int rows) {
      for (int m = 0; m < M; m++)
        for (int r = 0; r < rows; r++) {
          float& to = y[m * ldy + n - begin + r];
          to = k ? to + out[r * M + m] : out[r * M + m];
        }
    };
    long n = begin;
    for (; n + R <= end; n += R) dots<T, R, M>(w + n * K + k, K, count, x + k * M, out, ahead), add(n, R);
    for (; n < end; n++) dots<T, 1, M>(w + n * K + k, K, count, x + k * M, out, ahead), add(n, 1);
  }
}

// The same for a single row of inputs.
template <class T> inline void streams(const T* w, long K, long begin, long end, const T* x, float* y) {
  const long each = (end - begin) / kStreams;
  float out[kStreams];
  for (long i = 0; i < each; i++) {
    dots<T, kStreams, 1>(w + (begin + i) * K, each * K, K, x, out, 0);
    for (long r = 0; r < kStreams; r++) y[r * each + i] = out[r];
  }
  for (long i = kStreams * each; i < end - begin; i++) dots<T, 1, 1>(w + (begin + i) * K, K, K, x, y + i, 0);
}

// Rows of weights with any number of inputs. `ahead`: as `dots` takes it; 0: as suits weights.
template <class T>
inline void some_rows(const T* w, long begin, long end, const Packed<T>& x, float* y, long ldy, long ahead = 0) {
  for (long g = 0; g * kGroup < x.M; g++) {
    const T* group = x.group(g);
    float* to = y + g * kGroup * ldy;
    const auto next = [&](long rows) { return ahead ? ahead : rows * x.K * long(sizeof(T)); };
    switch (x.width(g)) {  // so many rows of weights at a time that about 16 sums are kept
      case 1:
        if (ahead)
          group_rows<T, 16, 1>(w, x.K, begin, end, group, to, ldy, ahead);
        else
          streams(w, x.K, begin, end, group, to);
        break;
      case 2: group_rows<T, 8, 2>(w, x.K, begin, end, group, to, ldy, next(8)); break;
      case 3: group_rows<T, 4, 3>(w, x.K, begin, end, group, to, ldy, next(4)); break;
      case 4: group_rows<T, 4, 4>(w, x.K, begin, end, group, to, ldy, next(4)); break;
      case 5: group_rows<T, 2, 5>(w, x.K, begin, end, group, to, ldy, next(2)); break;
      case 6: group_rows<T, 2, 6>(w, x.K, begin, end, group, to, ldy, next(2)); break;
      case 7: group_rows<T, 2, 7>(w, x.K, begin, end, group, to, ldy, next(2)); break;
      default: group_rows<T, 2, 8>(w, x.K, begin, end, group, to, ldy, next(2));
    }
  }
}

// Rows of weights that a thread takes on at most.
inline long chunk_rows(long N, long row_bytes, long M, long threads) {
  const long rows = std::min(chunk_bytes(M) / std::max(row_bytes, 1L), N / (4 * threads));
  return std::max(kLeastRows, rows / kLeastRows * kLeastRows);
}

// The next rows of N that nobody has taken, at most `most`; fewer towards the end, so that all threads end together.
struct Share {
  long begin, end;
};
inline Share take(std::atomic<long>& next, long N, long most, long threads) {
  long begin = next.load(std::memory_order_relaxed), size = 0;
  do {
    const long part = (N - begin) / (2 * threads) / kLeastRows * kLeastRows;
    size = std::min(most, std::max(kLeastRows, part));
  } while (begin < N && !next.compare_exchange_weak(begin, begin + size));
  return {begin, std::min(N, begin + size)};
}

// y = x wᵀ + bias by whichever threads call this with the same counter; `put(n, m, value)` takes each output.
template <class T, class Put>
inline void product(std::atomic<long>& next, long threads, const T* w, const T* bias, long N, const Packed<T>& x, float* scratch,
                    Put put) {
  const long most = chunk_rows(N, x.K * sizeof(T), x.M, threads);
  for (Share s; (s = take(next, N, most, threads)).begin < N;) {
    some_rows(w, s.begin, s.end, x, scratch, most);
    for (long m = 0; m < x.M; m++)
      for (long n = s.begin; n < s.end; n++) put(n, m, scratch[m * most + n - s.begin] + (bias ? widen(bias[n]) : 0.0f));
  }
}
