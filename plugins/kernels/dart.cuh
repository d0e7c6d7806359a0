// DART: L1 norms of the keys, the pivots among the groups and among text tokens, all dot products with them in one pass
// over `normed`, then the picks.
#ifndef TOKCOMPILE_DART_CUH
#define TOKCOMPILE_DART_CUH

#include "rows.cuh"
#include "select.cuh"

namespace tc {

// The text tokens that may be pivots: `total` rows of the taps, in runs from edges[2 i] to edges[2 i + 1].
struct Text {
  int pivots, total;
  int32_t edges[2 * TC_TEXT_SPANS];
  TC_DEVICE int row(int i) const {
    int e = 0;
    for (; i >= edges[e + 1] - edges[e]; e += 2) i -= edges[e + 1] - edges[e];
    return edges[e] + i;
  }
};

// norms: (B, n + text.total), the groups' and then the text's. A warp per group reads H runs of d numbers.
template <class T, int V, bool ONE>
struct KeyNorms {
  static constexpr int THREADS = 256;
  KeyRows<T> keys;
  Text text;
  float* norms;
  TC_DEVICE int count() const { return keys.n + text.total; }
  int64_t parts() const { return (keys.n + text.total + THREADS / WARP - 1) / (THREADS / WARP); }

  TC_DEVICE void operator()(const Block& t) const {
    constexpr int PART = THREADS / WARP;
    const int run = keys.dim / V, all = keys.heads * run;
    const size_t head = size_t(keys.length) * keys.dim;
    for (int i = t.x * PART + t.warp(); i < Min()(count(), (t.x + 1) * PART); i += t.warps()) {
      const T* first = i < keys.n ? keys.group(t.y, 0, i) : keys.row(t.y, 0, text.row(i - keys.n));
      float sum = 0;
#pragma unroll 4
      for (int j = t.lane(); j < all; j += WARP) {
        const int h = j / run, c = (j - h * run) * V;
        float v[V];
        load_group<T, V, ONE>(first + h * head + c, keys.unit, keys.dim, v);
        TC_UNROLL for (int e = 0; e < V; ++e) sum += fabsf(v[e]);
      }
      sum = warp_all(sum, Sum());
      if (t.lane() == 0) norms[size_t(t.y) * count() + i] = sum;
    }
  }
};

// pivots: (B, count + text.pivots), the groups of largest norm, largest first, then likewise the text's rows in the
// taps. One block per image.
struct Pivots {
  static constexpr int THREADS = 1024;
  const float* norms;
  int n, count;
  Text text;
  int32_t* pivots;
  TC_BOTH int most() const { return count > text.pivots ? count : text.pivots; }
  size_t shared() const {
    return sizeof(SelectShared) + sizeof(uint64_t) * most() + sizeof(uint32_t) * (n > text.total ? n : text.total);
  }

  TC_DEVICE void operator()(const Block& t) const {
    const float* own = norms + size_t(t.y) * (n + text.total);
    int32_t* to = pivots + size_t(t.y) * (count + text.pivots);
    choose(t, own, n, count, [](int i) { return i; }, to);
    if (text.pivots == 0) return;
    t.sync();
    choose(t, own + n, text.total, text.pivots, [&](int i) { return text.row(i); }, to + count);
  }

  // to: the `need` largest of `all` scores, largest first, as what `name` calls them.
  template <class Name>
  TC_DEVICE void choose(const Block& t, const float* scores, int all, int need, const Name& name, int32_t* to) const {
    auto* s = reinterpret_cast<SelectShared*>(t.shared);
    auto* chosen = reinterpret_cast<uint64_t*>(s + 1);
    auto* order = reinterpret_cast<uint32_t*>(chosen + most());
    for (int i = t.thread; i < all; i += t.threads) order[i] = ordered(scores[i]);
    const auto key = [&](int i) { return key_of(order[i], i); };
    const uint64_t least = threshold(t, all, need, key, s);
    if (t.thread == 0) s->length = 0;
    t.sync();
    for (int i = t.thread; i < all; i += t.threads)
      if (key(i) >= least) chosen[atomic_add(&s->length, 1)] = key(i);
    t.sync();
    for (int i = t.thread; i < need; i += t.threads) {
      int rank = 0;
      for (int j = 0; j < need; ++j) rank += chosen[j] > chosen[i];
      to[rank] = name(key_index(chosen[i]));
    }
  }
};

// dots: (B, count + other, n) of each group with each pivot, of which the last `other` are rows of the text. inverse:
// (B, n + other) one over the length of each group, then of those rows. A warp takes ROWS groups and reads them once for
// up to AT pivots; the pivots' rows come from the caches.
template <class T, int V, bool ONE, int AT>
struct PivotDots {
  static constexpr int THREADS = 128;  // small blocks spread evenly over the SMs
  static constexpr int ROWS = 2, PART = THREADS / WARP * ROWS;
  Rows<T> x;
  int count, other;
  const int32_t* pivots;
  float *dots, *inverse;
  int64_t parts() const { return (x.n + other + PART - 1) / PART; }

  TC_DEVICE void operator()(const Block& t) const {
    const int rows = x.n + other;
    for (int i = t.x * PART + t.warp() * ROWS; i < Min()(rows, (t.x + 1) * PART); i += t.warps() * ROWS)
      for (int p = 0; p < count + other; p += AT) take(t, i, p);
  }

  TC_DEVICE const T* pivot_row(const Block& t, int p) const {
    const int at = pivots[size_t(t.y) * (count + other) + p];
    return p < count ? x.group(t.y, at) : x.row(t.y, at);
  }

  TC_DEVICE void take(const Block& t, int i, int p) const {
    const int all = count + other, rows = x.n + other;
    const T *row[ROWS], *pivot[AT];
    TC_UNROLL for (int r = 0; r < ROWS; ++r) {
      const int at = Min()(i + r, rows - 1);
      row[r] = at < x.n ? x.group(t.y, at) : pivot_row(t, count + at - x.n);
    }
    TC_UNROLL for (int q = 0; q < AT; ++q) pivot[q] = pivot_row(t, Min()(p + q, all - 1));
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
      const bool first = t.lane() == 0;
      TC_UNROLL for (int q = 0; q < AT; ++q) {
        const float dot = warp_all(sum[r][q], Sum());
        if (first && i + r < x.n && p + q < all) dots[(size_t(t.y) * all + p + q) * x.n + i + r] = dot;
      }
      if (p == 0) {
        const float norm = at_least_epsilon(sqrtf(warp_all(squares[r], Sum())));
        if (first && i + r < rows) inverse[size_t(t.y) * rows + i + r] = 1.0f / norm;
      }
    }
  }
};

// Each pivot in turn picks the least similar groups that are still free; then the kept ones in their order. The first
// `count` pivots are groups and kept themselves, the `other` ones are text. One block per image, which reads the products
// of as many pivots at once as shared memory has room for. list: (B, k), slot: (B, n) or NULL.
struct DartPicks {
  static constexpr int THREADS = 1024;
  static constexpr size_t ROOM = 64 * 1024;  // that any GPU gives a block
  int n, k, count, other;
  const int32_t* pivots;
  const float *dots, *inverse;
  int32_t *list, *slot;
  int64_t* index;
  TC_BOTH int at_once() const {
    const int fit = int((ROOM - sizeof(SelectShared) - n) / (sizeof(uint32_t) * n));
    return fit < 1 ? 1 : fit < count + other ? fit : count + other;
  }
  size_t shared() const { return sizeof(SelectShared) + size_t(n) * (sizeof(uint32_t) * at_once() + 1); }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<SelectShared*>(t.shared);
    auto* orders = reinterpret_cast<uint32_t*>(s + 1);
    auto* kept = reinterpret_cast<uint8_t*>(orders + size_t(at_once()) * n);
    const int all = count + other;
    const int32_t* pivot = pivots + size_t(t.y) * all;
    for (int i = t.thread; i < n; i += t.threads) kept[i] = 0;
    t.sync();
    for (int r = t.thread; r < count; r += t.threads) kept[pivot[r]] = 1;
    t.sync();
    int total = k - count;
    for (int first = 0; first < all && total > 0; first += at_once()) {
      const int some = Min()(at_once(), all - first);
      load_orders(t, first, some, orders);
      for (int r = first; r < first + some; ++r) {
        const int left = all - r, quota = (total + left - 1) / left;
        total -= quota;
        if (quota == 0) continue;
        // a thread stays with its own groups, so no barrier is needed between orders, keys and marks
        const uint32_t* order = orders + size_t(r - first) * n;
        const auto key = [&](int i) { return kept[i] ? uint64_t(0) : key_of(order[i], i); };
        const uint64_t least = threshold(t, n, quota, key, s);
        for (int i = t.thread; i < n; i += t.threads)
          if (key(i) >= least) kept[i] = 1;
      }
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

  // orders: (some, n), the larger the less similar to the pivots from `first` on.
  TC_DEVICE void load_orders(const Block& t, int first, int some, uint32_t* orders) const {
    const int all = count + other;
    const int32_t* pivot = pivots + size_t(t.y) * all;
    const float* scale = inverse + size_t(t.y) * (n + other);
    for (int i = t.thread; i < n; i += t.threads) {
      const float own = scale[i];
#pragma unroll 4
      for (int r = first; r < first + some; ++r) {
        const float dot = dots[(size_t(t.y) * all + r) * n + i], of_pivot = scale[r < count ? pivot[r] : n + r - count];
        orders[size_t(r - first) * n + i] = ordered(-(dot * of_pivot * own));
      }
    }
  }
};

}  // namespace tc

#endif
