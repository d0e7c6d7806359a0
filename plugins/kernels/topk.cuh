// Top-K and EViT: scores from the attention rows, and EViT's fused token.
#ifndef TOKCOMPILE_TOPK_CUH
#define TOKCOMPILE_TOPK_CUH

#include "rows.cuh"

namespace tc {

// scores: (B, n), the mean over heads of attention: (B, heads, length) of which n groups of unit from `start` on are
// meant.
template <class T, bool ONE>
struct HeadMeans {
  static constexpr int THREADS = 256;
  const T* attention;
  int heads, length, start, n, unit;
  float* scores;
  int64_t parts() const { return (n + THREADS - 1) / THREADS; }

  TC_DEVICE void operator()(const Block& t) const {
    for (int i = t.x * THREADS + t.thread; i < Min()(n, (t.x + 1) * THREADS); i += t.threads) {
      const T* row = attention + size_t(t.y) * heads * length + start + size_t(i) * unit;
      float sum = 0;
#pragma unroll 4
      for (int h = 0; h < heads; ++h) {
        float v[1];
        load_group<T, 1, ONE>(row + h * size_t(length), unit, 1, v);
        sum += v[0];
      }
      scores[size_t(t.y) * n + i] = sum / float(heads);
    }
  }
};

// The fused token in two steps that fix the order of its sums: `partial`: (B, chunks, unit * dim), each of AT groups.
// The first `kept` slots are left out, so a kept NaN does not spread. Weights are rounded to T as in PyTorch.
template <class T, int V>
struct FuseSums {
  static constexpr int THREADS = 128, AT = 64;
  Rows<T> x;
  const float* scores;
  const int32_t* slot;
  float* partial;
  TC_DEVICE int columns() const { return x.unit * x.dim; }
  int64_t across() const { return (int64_t(x.unit) * x.dim + THREADS * V - 1) / (THREADS * V); }
  static int64_t chunks(int n) { return (n + AT - 1) / AT; }
  int64_t parts() const { return across() * chunks(x.n); }

  TC_DEVICE void operator()(const Block& t) const {
    const int tiles = (columns() + THREADS * V - 1) / (THREADS * V), chunk = t.x / tiles, first = t.x % tiles * THREADS;
    for (int v = first + t.thread; v < Min()(first + THREADS, columns() / V); v += t.threads) {
      float sum[V] = {};
#pragma unroll 4
      for (int i = chunk * AT; i < Min()(x.n, (chunk + 1) * AT); ++i) {
        if (slot[size_t(t.y) * x.n + i] >= 0) continue;
        const float weight = to_float(rounded<T>(scores[size_t(t.y) * x.n + i]));
        T some[V];
        load<T, V>(x.group(t.y, i) + size_t(v) * V, some);
        TC_UNROLL for (int e = 0; e < V; ++e) sum[e] += weight * to_float(some[e]);
      }
      float* to = partial + (size_t(t.y) * ((x.n + AT - 1) / AT) + chunk) * columns() + size_t(v) * V;
      constexpr int W = V > 4 ? 4 : V;
      TC_UNROLL for (int e = 0; e < V; e += W) {
        float part[W];
        TC_UNROLL for (int f = 0; f < W; ++f) part[f] = sum[e + f];
        store<float, W>(to + e, part);
      }
    }
  }
};

// Adds the chunks up into out: (B, length, dim) from row `row` on; also gives the fused token's slot to its group.
template <class T>
struct FuseWrite {
  static constexpr int THREADS = 256;
  const float* partial;
  int chunks, columns, dim, length, row, n, k;
  const int32_t* list;
  int32_t* slot;
  T* out;
  int64_t parts() const { return (columns + THREADS - 1) / THREADS; }

  TC_DEVICE void operator()(const Block& t) const {
    for (int c = t.x * THREADS + t.thread; c < Min()(columns, (t.x + 1) * THREADS); c += t.threads) {
      float sum = 0;
      for (int i = 0; i < chunks; ++i) sum += partial[(size_t(t.y) * chunks + i) * columns + c];
      out[(size_t(t.y) * length + row) * dim + c] = rounded<T>(sum);
      if (c == 0) slot[size_t(t.y) * n + list[size_t(t.y) * k + k - 1]] = k - 1;
    }
  }
};

}  // namespace tc

#endif
