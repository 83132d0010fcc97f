// Decoder layers over a few new positions of every row, and products of few rows; called through ctypes (`pipo.kernels.cpu`).
//
// A layer is norm -> queries, keys, values -> norms of heads -> rotary embedding -> cache -> attention -> output, added on;
// norm -> gate and up -> SiLU -> down, added on. Threads are started once for all layers and take the work in small pieces. What
// is stored between two steps is rounded to the model's type T, where the stock modules round too; sums are float32.
//
// Shape legend: B rows, T new positions each, M = B T, H width, I inner width, D head width, S cached positions.

#ifdef _OPENMP
#include <omp.h>
#endif

#include <memory>

#include "attention.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// What a layer is; weights row-major, absent ones null. Mirrored by `pipo.kernels.cpu._Layer`.
struct Layer {
  const void *norm1, *q, *k, *v, *o, *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm, *norm2, *gate, *up, *down;
  int64_t width, inner, heads, kv_heads, head_dim;
  double eps1, head_eps, eps2, scale;
};

// One step of `num_layers` layers, from x [M, H] to x. Mirrored by `pipo.kernels.cpu._Step`.
struct Step {
  void* x;
  const void *cos, *sin;          // [1 or B, T, rotary]
  void *const *keys, *const *values;  // of each layer [rows, heads, capacity, D]: a row and a head lie so many elements apart
  const int64_t* positions;       // [B, T]
  const Layer* const* layers;
  const void* norm;               // of the last layer's output, or null
  double eps;
  int64_t num_layers, batch, new_positions, rotary, angles_stride, row_stride, head_stride, threads;
  float* scratch;
  int64_t scratch_floats;
};

namespace {

struct Team {  // how far the work of a layer's phases has been taken
  std::atomic<long> next[8];
  Team() {
    for (auto& counter : next) counter = 0;
  }
};

// One thread of those that came: the system may give fewer than were asked for.
struct Member {
  long index, count;
};
inline Member member() {
#ifdef _OPENMP
  return {omp_get_thread_num(), omp_get_num_threads()};
#else
  return {0, 1};
#endif
}

inline void meet() {
#pragma omp barrier
}

// Weighted as the stock modules do: normalised, rounded, times the weight, rounded.
template <class T> inline void rms_norm(const T* x, const T* weight, long n, float eps, T* y) {
  f32x16 squares = {};
  long i = 0;
  for (; i + 16 <= n; i += 16) {
    const f32x16 v = load16(x + i);
    squares += v * v;
  }
  float total = sum16(squares);
  for (; i < n; i++) total += widen(x[i]) * widen(x[i]);
  const float factor = 1.0f / std::sqrt(total / n + eps);
  for (i = 0; i < n; i++) y[i] = narrow<T>(widen(weight[i]) * stored<T>(widen(x[i]) * factor));
}

template <class T> inline void rotate(T* x, const T* cos, const T* sin, long rotary) {
  const long half = rotary / 2;
  for (long i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    x[i] = narrow<T>(stored<T>(a * widen(cos[i])) - stored<T>(b * widen(sin[i])));
    x[i + half] = narrow<T>(stored<T>(b * widen(cos[i + half])) + stored<T>(a * widen(sin[i + half])));
  }
}

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline f32x16 silu16(f32x16 x) {
  const f32x16 highest = all16(80.0f);  // beyond it, x / (1 + e^80) is 0
  const f32x16 y = -x;
  const i32x16 above = y > highest;
  return x / (1.0f + exp16((f32x16)(((i32x16)highest & above) | ((i32x16)y & ~above))));
}

// Where the work of a step lies: what is T between the phases, and what is float32 of each thread's own.
template <class T> struct Space {
  Packed<T> normed, mixed, inner;
  T *q, *k, *v;
  float *partial_out, *own;
  Partial* partials;
  long own_floats;
};

constexpr long kStretch = 1024;  // positions of a row and key head that one thread takes at a time

inline long own_floats(const Layer& l, long M, long Q) {
  const long narrowest = std::min(std::min(l.width, l.inner), l.heads * l.head_dim);
  const long rows = std::max(kLeastRows, chunk_bytes(M) / long(sizeof(bf16)) / narrowest);
  const long row = std::max(l.width, l.head_dim);  // of numbers of at most four bytes
  return std::max(2 * rows * M, std::max(row, Q * kBlock + Packed<float>::size(Q, l.head_dim + 16))) + 64;
}

inline long num_stretches(long longest) { return (longest + kStretch - 1) / kStretch; }

template <class T> long space(const Layer& l, const Step& s, long longest, Space<T>* out) {
  const long M = s.batch * s.new_positions, Q = l.heads / l.kv_heads;
  const long items = M * l.kv_heads * num_stretches(longest);
  char* p = (char*)s.scratch;
  const auto take = [&p](long bytes) { char* at = p; p += (bytes + 63) / 64 * 64; return at; };
  Space<T> made;
  const auto packed = [&](long K) { return Packed<T>{(T*)take(Packed<T>::size(M, K) * sizeof(T)), M, K}; };
  made.normed = packed(l.width);
  made.mixed = packed(l.heads * l.head_dim);
  made.inner = packed(l.inner);
  made.q = (T*)take(M * l.heads * l.head_dim * sizeof(T));
  made.k = (T*)take(M * l.kv_heads * l.head_dim * sizeof(T));
  made.v = (T*)take(M * l.kv_heads * l.head_dim * sizeof(T));
  made.partial_out = (float*)take(items * Q * l.head_dim * sizeof(float));
  made.partials = (Partial*)take(items * Q * sizeof(Partial));
  made.own_floats = own_floats(l, M, Q);
  made.own = (float*)take(s.threads * made.own_floats * sizeof(float));
  if (out) *out = made;
  return p - (char*)s.scratch;
}

// Norms and rotary embedding of a position's heads, its keys and values to the cache.
template <class T> void place(const Layer& l, const Step& s, long layer, const Space<T>& w, long m) {
  const long D = l.head_dim, b = m / s.new_positions, t = m % s.new_positions;
  const T* cos = (const T*)s.cos + b * s.angles_stride + t * s.rotary;
  const T* sin = (const T*)s.sin + b * s.angles_stride + t * s.rotary;
  const auto finish = [&](T* x, const T* norm) {
    if (norm) rms_norm(x, norm, D, float(l.head_eps), x);
    rotate(x, cos, sin, s.rotary);
  };
  for (long h = 0; h < l.heads; h++) finish(w.q + (m * l.heads + h) * D, (const T*)l.q_norm);
  for (long h = 0; h < l.kv_heads; h++) {
    const long from = (m * l.kv_heads + h) * D, to = b * s.row_stride + h * s.head_stride + s.positions[m] * D;
    finish(w.k + from, (const T*)l.k_norm);
    std::memcpy((T*)s.keys[layer] + to, w.k + from, D * sizeof(T));
    std::memcpy((T*)s.values[layer] + to, w.v + from, D * sizeof(T));
  }
}

// One stretch of one row and key head.
template <class T>
void attend_item(const Layer& l, const Step& s, long layer, const Space<T>& w, long stretches, long item, float* own) {
  const long D = l.head_dim, G = l.heads / l.kv_heads, n = s.new_positions;
  const long b = item / (l.kv_heads * stretches), h = item / stretches % l.kv_heads, stretch = item % stretches;
  const long at = b * s.row_stride + h * s.head_stride;
  const T *k = (const T*)s.keys[layer] + at, *v = (const T*)s.values[layer] + at;
  const Packed<T> q{(T*)(own + G * kBlock), G, D};
  for (long t = 0; t < n; t++) {
    const long limit = s.positions[b * n + t] + 1, begin = stretch * kStretch, end = std::min(limit, begin + kStretch);
    const long first = (item * n + t) * G;
    for (long i = 0; i < G; i++) q.put(i, w.q + ((b * n + t) * l.heads + h * G + i) * D);
    attend(q, k, v, D, begin, end, float(l.scale), own, w.partial_out + first * D,
           w.partials + first);
  }
}

// The stretches of one query together.
template <class T> void merge(const Layer& l, const Step& s, const Space<T>& w, long stretches, long m) {
  const long D = l.head_dim, G = l.heads / l.kv_heads, n = s.new_positions, b = m / n, t = m % n;
  for (long h = 0; h < l.heads; h++) {
    const auto query = [&](long i) { return (((b * l.kv_heads + h / G) * stretches + i) * n + t) * G + h % G; };
    float* sum = w.partial_out + query(0) * D;  // the first stretch always holds something
    Partial whole = w.partials[query(0)];
    for (long i = 1; i < stretches; i++) {
      const Partial& p = w.partials[query(i)];
      if (p.total == 0) continue;
      const float largest = std::max(whole.largest, p.largest);
      const float mine = std::exp(whole.largest - largest), other = std::exp(p.largest - largest);
      const float* part = w.partial_out + query(i) * D;
      for (long d = 0; d < D; d++) sum[d] = sum[d] * mine + part[d] * other;
      whole = {largest, whole.total * mine + p.total * other};
    }
    for (long d = 0; d < D; d++) w.mixed.at(m, h * D + d) = narrow<T>(sum[d] / whole.total);
  }
}

// silu(gate) * up of some rows of the weights.
template <class T> void gated(const Layer& l, const Step& s, Team& team, const Space<T>& w, long M, float* own) {
  const long K = l.width, size = chunk_rows(l.inner, 2 * K * sizeof(T), M, s.threads);
  float* up = own + size * M;
  for (Share part; (part = take(team.next[4], l.inner, size, s.threads)).begin < l.inner;) {
    const long begin = part.begin, end = part.end;
    some_rows((const T*)l.gate, begin, end, w.normed, own, size);
    some_rows((const T*)l.up, begin, end, w.normed, up, size);
    for (long m = 0; m < M; m++) {
      float *g = own + m * size, *u = up + m * size;
      long i = 0;
      const long count = end - begin;
      for (long j = 0; j < count; j++) g[j] = stored<T>(g[j]);
      for (; i + 16 <= count; i += 16) store16(g + i, silu16(load16(g + i)));
      for (; i < count; i++) g[i] = silu(g[i]);
      for (long j = 0; j < count; j++) w.inner.at(m, begin + j) = narrow<T>(stored<T>(g[j]) * stored<T>(u[j]));
    }
  }
}

template <class T> void run(const Step& s, long layer, Team& team, const Space<T>& w, long stretches, Member my) {
  const Layer& l = *s.layers[layer];
  const long M = s.batch * s.new_positions, H = l.width, D = l.head_dim, wide = l.heads * D, narrow_ = l.kv_heads * D;
  float* own = w.own + my.index * w.own_floats;
  T* x = (T*)s.x;
  const auto norm = [&](const void* weight, double eps) {
    T* row = (T*)own;
    for (long m = my.index; m < M; m += my.count) {
      rms_norm(x + m * H, (const T*)weight, H, float(eps), row);
      w.normed.put(m, row);
    }
  };
  if (my.index == 0) w.mixed.clear_padding(), w.inner.clear_padding();
  norm(l.norm1, l.eps1);
  meet();
  const auto to = [](T* y, long ld) { return [y, ld](long n, long m, float value) { y[m * ld + n] = narrow<T>(value); }; };
  product(team.next[0], s.threads, (const T*)l.q, (const T*)l.q_bias, wide, w.normed, own, to(w.q, wide));
  product(team.next[1], s.threads, (const T*)l.k, (const T*)l.k_bias, narrow_, w.normed, own, to(w.k, narrow_));
  product(team.next[2], s.threads, (const T*)l.v, (const T*)l.v_bias, narrow_, w.normed, own, to(w.v, narrow_));
  meet();
  for (long m = my.index; m < M; m += my.count) place(l, s, layer, w, m);
  meet();
  const long items = s.batch * l.kv_heads * stretches;
  for (long item; (item = team.next[3].fetch_add(1)) < items;) attend_item(l, s, layer, w, stretches, item, own);
  meet();
  for (long m = my.index; m < M; m += my.count) merge(l, s, w, stretches, m);
  meet();
  const auto add = [x, H](long n, long m, float value) { x[m * H + n] = narrow<T>(widen(x[m * H + n]) + stored<T>(value)); };
  product(team.next[5], s.threads, (const T*)l.o, (const T*)l.o_bias, H, w.mixed, own, add);
  meet();
  norm(l.norm2, l.eps2);
  meet();
  gated(l, s, team, w, M, own);
  meet();
  product(team.next[6], s.threads, (const T*)l.down, (const T*)nullptr, H, w.inner, own, add);
}

long longest_of(const Step& s) {
  long longest = 0;
  for (long i = 0; i < s.batch * s.new_positions; i++) longest = std::max(longest, long(s.positions[i]) + 1);
  return longest;
}

// Bytes of scratch that the step needs; nothing is done where it has less.
template <class T> long layers(const Step& s) {
  const long longest = longest_of(s), stretches = num_stretches(longest);
  long needed = 0;
  for (long i = 0; i < s.num_layers; i++) needed = std::max(needed, space<T>(*s.layers[i], s, longest, nullptr));
  if (needed > s.scratch_floats * long(sizeof(float))) return needed;
  std::unique_ptr<Team[]> teams(new Team[s.num_layers]);
#pragma omp parallel num_threads(int(s.threads))
  {
    const Member my = member();
    Space<T> w;
    for (long i = 0; i < s.num_layers; i++) {
      space<T>(*s.layers[i], s, longest, &w);
      run<T>(s, i, teams[i], w, stretches, my);
      meet();
    }
    if (s.norm) {
      const long H = s.layers[0]->width;
      for (long m = my.index; m < s.batch * s.new_positions; m += my.count)
        rms_norm((T*)s.x + m * H, (const T*)s.norm, H, float(s.eps), (T*)s.x + m * H);
    }
  }
  return 0;
}

template <class T, class Out>
void linear(const T* x, const T* w, const T* bias, Out* y, long M, long N, long K, long threads, float* scratch) {
  std::atomic<long> next{0};
  const Packed<T> packed{(T*)scratch, M, K};
  for (long m = 0; m < M; m++) packed.put(m, x + m * K);
  scratch += (Packed<T>::size(M, K) * sizeof(T) + 63) / 64 * 16;
  const long own = chunk_rows(N, K * sizeof(T), M, threads) * M;
#pragma omp parallel num_threads(int(threads))
  {
    float* mine = scratch + member().index * own;
    product(next, threads, w, bias, N, packed, mine, [&](long n, long m, float value) { y[m * N + n] = narrow<Out>(value); });
  }
}

}  // namespace

EXPORT int64_t pipo_layers_bf16(const Step* s) { return layers<bf16>(*s); }
EXPORT int64_t pipo_layers_f32(const Step* s) { return layers<float>(*s); }

// y [M, N] = x [M, K] wᵀ + bias, with so many bytes of scratch for numbers of `size` bytes.
EXPORT int64_t pipo_linear_bytes(int64_t M, int64_t N, int64_t K, int64_t size, int64_t threads) {
  return M * ((K + 64) * size + 4 * threads * chunk_rows(N, K * size, M, threads)) + 128;
}
EXPORT void pipo_linear_bf16(const bf16* x, const bf16* w, const bf16* b, bf16* y, int64_t M, int64_t N, int64_t K, int64_t threads,
                             float* scratch) {
  linear(x, w, b, y, M, N, K, threads, scratch);
}
EXPORT void pipo_linear_bf16_f32(const bf16* x, const bf16* w, const bf16* b, float* y, int64_t M, int64_t N, int64_t K,
                                 int64_t threads, float* scratch) {
  linear(x, w, b, y, M, N, K, threads, scratch);
}
EXPORT void pipo_linear_f32(const float* x, const float* w, const float* b, float* y, int64_t M, int64_t N, int64_t K, int64_t threads,
                            float* scratch) {
  linear(x, w, b, y, M, N, K, threads, scratch);
}
