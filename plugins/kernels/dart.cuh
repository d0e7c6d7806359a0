// DART: L1 norms of the keys, the pivots, all dot products with them in one pass over `normed`, then the picks.
#ifndef TOKCOMPILE_DART_CUH
#define TOKCOMPILE_DART_CUH

#include "rows.cuh"
#include "select.cuh"

namespace tc {

// norms: (B, n). A warp per group reads H runs of d numbers.
template <class T, int V, bool ONE>
struct KeyNorms {
  static constexpr int THREADS = 256;
  KeyRows<T> keys;
  float* norms;
  int64_t parts() const { return (keys.n + THREADS / WARP - 1) / (THREADS / WARP); }

  TC_DEVICE void operator()(const Block& t) const {
    constexpr int PART = THREADS / WARP;
    const int run = keys.dim / V, all = keys.heads * run;
    const size_t head = size_t(keys.length) * keys.dim;
    for (int i = t.x * PART + t.warp(); i < Min()(keys.n, (t.x + 1) * PART); i += t.warps()) {
      const T* first = keys.group(t.y, 0, i);
      float sum = 0;
#pragma unroll 4
      for (int j = t.lane(); j < all; j += WARP) {
        const int h = j / run, c = (j - h * run) * V;
        float v[V];
        load_group<T, V, ONE>(first + h * head + c, keys.unit, keys.dim, v);
        TC_UNROLL for (int e = 0; e < V; ++e) sum += fabsf(v[e]);
      }
      sum = warp_all(sum, Sum());
      if (t.lane() == 0) norms[size_t(t.y) * keys.n + i] = sum;
    }
  }
};

// pivots: (B, count), the groups of largest norm, largest first. One block per image.
struct Pivots {
  static constexpr int THREADS = 1024;
  const float* norms;
  int n, count;
  int32_t* pivots;
  size_t shared() const { return sizeof(SelectShared) + sizeof(uint64_t) * count; }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<SelectShared*>(t.shared);
    auto* chosen = reinterpret_cast<uint64_t*>(s + 1);
    const auto key = [&](int i) { return key_of(ordered(norms[size_t(t.y) * n + i]), i); };
    const uint64_t least = threshold(t, n, count, key, s);
    compact(
        t, n, [&](int i) { return key(i) >= least; },
        [&](int i, bool is, int before) {
          if (is) chosen[before] = key(i);
        },
        s->counts);
    t.sync();
    for (int i = t.thread; i < count; i += t.threads) {
      int rank = 0;
      for (int j = 0; j < count; ++j) rank += chosen[j] > chosen[i];
      pivots[size_t(t.y) * count + rank] = key_index(chosen[i]);
    }
  }
};

// dots: (B, count, n) of each group with each pivot, inverse: (B, n) one over its length. A warp takes ROWS groups and
// reads them once for up to AT pivots; the pivots' rows come from the caches.
template <class T, int V, bool ONE>
struct PivotDots {
  static constexpr int THREADS = 256;
  static constexpr int ROWS = 2, AT = 4, PART = THREADS / WARP * ROWS;
  Rows<T> x;
  int count;
  const int32_t* pivots;
  float *dots, *inverse;
  int64_t parts() const { return (x.n + PART - 1) / PART; }

  TC_DEVICE void operator()(const Block& t) const {
    for (int i = t.x * PART + t.warp() * ROWS; i < Min()(x.n, (t.x + 1) * PART); i += t.warps() * ROWS)
      for (int p = 0; p < count; p += AT) take(t, i, p);
  }

  TC_DEVICE void take(const Block& t, int i, int p) const {
    const T *row[ROWS], *pivot[AT];
    TC_UNROLL for (int r = 0; r < ROWS; ++r) row[r] = x.group(t.y, Min()(i + r, x.n - 1));
    TC_UNROLL for (int q = 0; q < AT; ++q)
      pivot[q] = x.group(t.y, pivots[size_t(t.y) * count + Min()(p + q, count - 1)]);
    float sum[ROWS][AT] = {}, squares[ROWS] = {};
#pragma unroll 2
    for (int c = t.lane() * V; c < x.dim; c += WARP * V) {
      float a[ROWS][V];
      TC_UNROLL for (int r = 0; r < ROWS; ++r) {
        load_group<T, V, ONE>(row[r] + c, x.unit, x.dim, a[r]);
        TC_UNROLL for (int e = 0; e < V; ++e) squares[r] += a[r][e] * a[r][e];
      }
      TC_UNROLL for (int q = 0; q < AT; ++q) {
        float b[V];
        load_group<T, V, ONE>(pivot[q] + c, x.unit, x.dim, b);
        TC_UNROLL for (int r = 0; r < ROWS; ++r)
          TC_UNROLL for (int e = 0; e < V; ++e) sum[r][q] += a[r][e] * b[e];
      }
    }
    TC_UNROLL for (int r = 0; r < ROWS; ++r) {
      const bool write = t.lane() == 0 && i + r < x.n;
      TC_UNROLL for (int q = 0; q < AT; ++q) {
        const float all = warp_all(sum[r][q], Sum());
        if (write && p + q < count) dots[(size_t(t.y) * count + p + q) * x.n + i + r] = all;
      }
      if (p == 0) {
        const float norm = at_least_epsilon(sqrtf(warp_all(squares[r], Sum())));
        if (write) inverse[size_t(t.y) * x.n + i + r] = 1.0f / norm;
      }
    }
  }
};

// Each pivot in turn picks the least similar groups that are still free; then the kept ones in their order. One block
// per image; a free group's order stands in shared memory, 0 once it is taken. list: (B, k), slot: (B, n) or NULL.
struct DartPicks {
  static constexpr int THREADS = 1024;
  int n, k, count;
  const int32_t* pivots;
  const float *dots, *inverse;
  int32_t *list, *slot;
  int64_t* index;
  size_t shared() const { return sizeof(SelectShared) + size_t(n) * 5; }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<SelectShared*>(t.shared);
    auto* order = reinterpret_cast<uint32_t*>(s + 1);
    auto* kept = reinterpret_cast<uint8_t*>(order + n);
    const int32_t* pivot = pivots + size_t(t.y) * count;
    const float* scale = inverse + size_t(t.y) * n;
    for (int i = t.thread; i < n; i += t.threads) kept[i] = 0;
    t.sync();
    for (int r = t.thread; r < count; r += t.threads) kept[pivot[r]] = 1;
    t.sync();
    int total = k - count;
    for (int r = 0; r < count; ++r) {
      const int left = count - r, quota = (total + left - 1) / left;
      total -= quota;
      if (quota == 0) continue;
      const float* dot = dots + (size_t(t.y) * count + r) * n;
      const float own = scale[pivot[r]];
      // from here to the marks a thread stays with its own groups, so no barrier is needed in between
      for (int i = t.thread; i < n; i += t.threads) order[i] = kept[i] ? 0 : ordered(-(dot[i] * own * scale[i]));
      const auto key = [&](int i) { return order[i] ? key_of(order[i], i) : uint64_t(0); };
      const uint64_t least = threshold(t, n, quota, key, s);
      for (int i = t.thread; i < n; i += t.threads)
        if (key(i) >= least) kept[i] = 1;
    }
    t.sync();
    compact(
        t, n, [&](int i) { return kept[i] != 0; },
        [&](int i, bool is, int before) {
          if (is) list[size_t(t.y) * k + before] = i;
          if (is && index) index[size_t(t.y) * k + before] = i;
          if (slot) slot[size_t(t.y) * n + i] = is ? before : -1;
        },
        s->counts);
  }
};

}  // namespace tc

#endif
