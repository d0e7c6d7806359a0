// Reading groups of rows, and their float32 directions: rows of x scaled to length one, or of the keys' mean over
// heads.
#ifndef TOKCOMPILE_ROWS_CUH
#define TOKCOMPILE_ROWS_CUH

#include "block.cuh"

namespace tc {

// V columns of a group of `unit` rows that lie `stride` elements apart: their mean, rounded to T as PyTorch does, which
// takes it before the scores become float32. ONE: unit is 1; known in advance, so that no branch comes between loads.
template <class T, int V, bool ONE>
TC_DEVICE void load_group(const T* p, int unit, size_t stride, float (&v)[V]) {
  T raw[V];
  load<T, V>(p, raw);
  TC_UNROLL for (int e = 0; e < V; ++e) v[e] = to_float(raw[e]);
  if constexpr (!ONE) {
#pragma unroll 4
    for (int r = 1; r < unit; ++r) {
      load<T, V>(p + r * stride, raw);
      TC_UNROLL for (int e = 0; e < V; ++e) v[e] += to_float(raw[e]);
    }
    TC_UNROLL for (int e = 0; e < V; ++e) v[e] = to_float(rounded<T>(v[e] / float(unit)));
  }
}

// (B, length, dim) of which n groups of unit rows from `start` on are meant.
template <class T>
struct Rows {
  const T* data;
  int length, dim, start, n, unit;
  TC_DEVICE const T* row(int b, size_t j) const { return data + (size_t(b) * length + j) * dim; }
  TC_DEVICE const T* group(int b, int i) const { return row(b, start + size_t(i) * unit); }
};

constexpr float EPSILON = 1e-12f;
TC_DEVICE float at_least_epsilon(float norm) { return norm < EPSILON ? EPSILON : norm; }  // NaN stays

// to: (B, n, dim) float32, each group's row scaled to length one; best: (B, n) or NULL is cleared. A warp per group.
template <class T, int V, bool ONE>
struct UnitRows {
  static constexpr int THREADS = 256;
  Rows<T> x;
  float* to;
  uint64_t* best;
  int64_t parts() const { return (x.n + THREADS / WARP - 1) / (THREADS / WARP); }

  TC_DEVICE void operator()(const Block& t) const {
    constexpr int PART = THREADS / WARP;
    for (int i = t.x * PART + t.warp(); i < Min()(x.n, (t.x + 1) * PART); i += t.warps()) {
      const T* row = x.group(t.y, i);
      float* out = to + (size_t(t.y) * x.n + i) * x.dim;
      float squares = 0;
      for (int c = t.lane() * V; c < x.dim; c += WARP * V) {
        float v[V];
        load_group<T, V, ONE>(row + c, x.unit, x.dim, v);
        TC_UNROLL for (int e = 0; e < V; ++e) squares += v[e] * v[e];
      }
      const float norm = at_least_epsilon(sqrtf(warp_all(squares, Sum())));
      for (int c = t.lane() * V; c < x.dim; c += WARP * V) {
        float v[V];
        load_group<T, V, ONE>(row + c, x.unit, x.dim, v);
        TC_UNROLL for (int e = 0; e < V; ++e) v[e] /= norm;
        constexpr int W = V > 4 ? 4 : V;
        TC_UNROLL for (int e = 0; e < V; e += W) {
          float part[W];
          TC_UNROLL for (int f = 0; f < W; ++f) part[f] = v[e + f];
          store<float, W>(out + c + e, part);
        }
      }
      if (best && t.lane() == 0) best[size_t(t.y) * x.n + i] = 0;
    }
  }
};

// keys: (B, heads, length, dim): one head's rows are `Rows` of their own.
template <class T>
struct KeyRows {
  const T* data;
  int heads, length, dim, start, n, unit;
  TC_DEVICE const T* row(int b, int h, size_t j) const {
    return data + ((size_t(b) * heads + h) * length + j) * dim;
  }
  TC_DEVICE const T* group(int b, int h, int i) const { return row(b, h, start + size_t(i) * unit); }
};

// to: (B, n, dim) float32: the mean over heads, scaled to length one; best: (B, clear) is cleared. A warp per group.
template <class T, bool ONE>
struct Metric {
  static constexpr int THREADS = 256;
  KeyRows<T> keys;
  float* to;
  uint64_t* best;
  int clear;
  int64_t parts() const { return (keys.n + THREADS / WARP - 1) / (THREADS / WARP); }

  TC_DEVICE void operator()(const Block& t) const {
    constexpr int PART = THREADS / WARP, COLUMNS = 2, HEADS = ONE ? 6 : 4;  // on the way at a time
    const size_t head = size_t(keys.length) * keys.dim;
    for (int i = t.x * PART + t.warp(); i < Min()(keys.n, (t.x + 1) * PART); i += t.warps()) {
      float* out = to + (size_t(t.y) * keys.n + i) * keys.dim;
      float squares = 0;
      for (int c = t.lane(); c < keys.dim; c += COLUMNS * WARP) {
        const T* row = keys.group(t.y, 0, i);
        float sum[COLUMNS] = {};
        for (int h = 0; h < keys.heads; h += HEADS) {
          float v[HEADS][COLUMNS][1];
          // beyond the last head or column the last one is read again: no branch comes between loads
          TC_UNROLL for (int a = 0; a < HEADS; ++a) {
            TC_UNROLL for (int b = 0; b < COLUMNS; ++b)
              load_group<T, 1, ONE>(row + Min()(c + b * WARP, keys.dim - 1), keys.unit, keys.dim, v[a][b]);
            row += h + a + 1 < keys.heads ? head : 0;
          }
          TC_UNROLL for (int a = 0; a < HEADS; ++a)
            TC_UNROLL for (int b = 0; b < COLUMNS; ++b)
              if (h + a < keys.heads) sum[b] += v[a][b][0];
        }
        TC_UNROLL for (int b = 0; b < COLUMNS; ++b)
          if (c + b * WARP < keys.dim) {
            const float mean = sum[b] / float(keys.heads);
            out[c + b * WARP] = mean;
            squares += mean * mean;
          }
      }
      const float norm = at_least_epsilon(sqrtf(warp_all(squares, Sum())));
      for (int c = t.lane(); c < keys.dim; c += WARP) out[c] /= norm;  // a lane's own columns
      if (i < clear && t.lane() == 0) best[size_t(t.y) * clear + i] = 0;
    }
  }
};

}  // namespace tc

#endif
