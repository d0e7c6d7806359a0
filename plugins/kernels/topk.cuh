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
  static constexpr int THREADS = 128, AT = 32, AT_ONCE = 8;
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
    const size_t begin = size_t(t.y) * x.n + chunk * AT;
    uint32_t dropped = 0;  // known before any row is read, so that AT_ONCE of them are on the way at a time
    for (int i = 0; i < AT; i += WARP) {
      const int at = i + t.lane();
      dropped |= ballot(chunk * AT + at < x.n && slot[begin + at] < 0) << i;
    }
    for (int v = first + t.thread; v < Min()(first + THREADS, columns() / V); v += t.threads) {
      const T* rows = x.group(t.y, chunk * AT) + size_t(v) * V;
      float sum[V] = {};
      for (uint32_t left = dropped; left;) {
        T some[AT_ONCE][V];
        float weight[AT_ONCE];
        int count = 0;
        TC_UNROLL for (int a = 0; a < AT_ONCE; ++a)
          if (left) {
            const int i = lowest(left);
            load<T, V>(rows + size_t(i) * columns(), some[a]);
            weight[a] = scores[begin + i];
            left &= left - 1;
            ++count;
          }
        TC_UNROLL for (int a = 0; a < AT_ONCE; ++a)
          if (a < count) {
            const float w = to_float(rounded<T>(weight[a]));
            TC_UNROLL for (int e = 0; e < V; ++e) sum[e] += w * to_float(some[a][e]);
          }
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
#pragma unroll 8
      for (int i = 0; i < chunks; ++i) sum += partial[(size_t(t.y) * chunks + i) * columns + c];
      out[(size_t(t.y) * length + row) * dim + c] = rounded<T>(sum);
      if (c == 0) slot[size_t(t.y) * n + list[size_t(t.y) * k + k - 1]] = k - 1;
    }
  }
};

}  // namespace tc

#endif
