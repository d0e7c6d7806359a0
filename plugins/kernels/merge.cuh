// ToMe and PiToMe once the similarities are known: who joins whom, and the mean weighted by size.
#ifndef TOKCOMPILE_MERGE_CUH
#define TOKCOMPILE_MERGE_CUH

#include "gather.cuh"
#include "tile.cuh"

namespace tc {

// energy: (B, n), the mean from the sums of each column tile.
struct EnergyMeans {
  static constexpr int THREADS = 256;
  const float* sums;
  int n, tiles;
  float* energy;
  int64_t parts() const { return (n + THREADS - 1) / THREADS; }

  TC_DEVICE void operator()(const Block& t) const {
    for (int i = t.x * THREADS + t.thread; i < Min()(n, (t.x + 1) * THREADS); i += t.threads) {
      float sum = 0;
      for (int c = 0; c < tiles; ++c) sum += sums[(size_t(t.y) * tiles + c) * n + i];
      energy[size_t(t.y) * n + i] = sum / float(n);
    }
  }
};

// Slots: the groups of `a` that stay, then those of `order` that were not paired, then `b`. The first `removed` of `a`
// in the order `ranked` (or their own) join the group of `b` that their best key names.
struct MergePlan {
  static constexpr int THREADS = 256;
  int n, k, removed;
  Subset a, b;
  const int32_t* ranked;  // (B, a.count) or NULL
  const uint64_t* best;   // (B, a.count)
  Subset rest;            // neither a nor b
  int32_t *list, *sources, *slots;
  int64_t *index, *assign;
  int64_t parts() const { return (n + THREADS - 1) / THREADS; }

  TC_DEVICE void keep(int image, int j, int token) const {
    list[size_t(image) * k + j] = token;
    if (index) index[size_t(image) * k + j] = token;
    if (assign) assign[size_t(image) * n + token] = j;
  }

  TC_DEVICE void operator()(const Block& t) const {
    const int kept = a.count - removed, left = kept + rest.count, end = Min()(n, (t.x + 1) * THREADS);
    for (int i = t.x * THREADS + t.thread; i < end; i += t.threads) {
      if (i < a.count) {
        const int place = ranked ? ranked[size_t(t.y) * a.count + i] : i, token = a.at(t.y, place);
        if (i < removed) {
          const int to = left + key_index(best[size_t(t.y) * a.count + place]);
          sources[size_t(t.y) * removed + i] = token;
          slots[size_t(t.y) * removed + i] = to;
          if (assign) assign[size_t(t.y) * n + token] = to;
        } else {
          keep(t.y, i - removed, token);
        }
      }
      if (i < rest.count) keep(t.y, kept + i, rest.at(t.y, i));
      if (i < b.count) keep(t.y, left + i, b.at(t.y, i));
    }
  }
};

// out: (B, length - (n - k) * unit, dim). A slot is x_b + sum s_a (x_a - x_b) / (s_b + sum s_a), added in the order of
// `sources` in float32 and rounded once; slots before `from` have no sources. A block takes a run of columns of one
// row, and each of its warps looks through all sources: their number times k words from the caches, small beside the
// rows.
template <class T, int V>
struct MergeRows {
  static constexpr int THREADS = 128;
  const T* x;
  T* out;
  Layout layout;
  int dim, from;
  Positions sources, slots;
  const float* size;
  float* new_size;
  int across() const { return (dim + THREADS * V - 1) / (THREADS * V); }
  int64_t parts() const { return int64_t(layout.length - (layout.n - layout.k) * layout.unit) * across(); }

  TC_DEVICE void operator()(const Block& t) const {
    const int tiles = (dim + THREADS * V - 1) / (THREADS * V), row = t.x / tiles, first = t.x % tiles * THREADS;
    const bool inside = layout.inside(row);
    const int j = inside ? layout.slot(row) : 0;
    const size_t image = size_t(t.y) * layout.length, source = layout.source(t.y, row);
    const T* own = x + (image + source) * dim;
    T* to = out + (size_t(t.y) * layout.rows() + row) * dim;
    const bool merges = inside && j >= from && layout.n > layout.k;
    // all lanes of a warp stay in step for the ballots, also those beyond the last column
    for (int v = first + t.thread; v - t.lane() < first + THREADS && (v - t.lane()) * V < dim; v += t.threads) {
      const bool real = v < first + THREADS && v * V < dim;
      T raw[V] = {};
      if (real) load<T, V>(own + size_t(v) * V, raw);
      float base[V], sum[V] = {}, total = 0;
      TC_UNROLL for (int e = 0; e < V; ++e) base[e] = to_float(raw[e]);
      if (inside) total = weight(t.y, (int(source) - layout.start) / layout.unit);
      if (merges) join(t, j, row, real ? v : 0, base, sum, total);
      TC_UNROLL for (int e = 0; e < V; ++e)
        if (sum[e] != 0) from_float(base[e] + sum[e] / total, raw[e]);  // a row that nothing joins is copied bit by bit
      if (real) store<T, V>(to + size_t(v) * V, raw);
      if (v == 0 && inside && new_size && (row - layout.start) % layout.unit == 0)
        new_size[size_t(t.y) * layout.k + j] = total;
    }
  }

  TC_DEVICE float weight(int image, int group) const { return size ? size[size_t(image) * layout.n + group] : 1.0f; }

  TC_DEVICE void join(const Block& t, int j, int row, int v, const float (&base)[V], float (&sum)[V],
                      float& total) const {
    const int removed = layout.n - layout.k, within = (row - layout.start) % layout.unit;
    const size_t list = size_t(t.y) * removed;
    for (int i = 0; i < removed; i += WARP) {
      const int at = i + t.lane();
      uint32_t hits = ballot(at < removed && slots.at(list + Min()(at, removed - 1), 0, layout.k) == j);
      for (; hits; hits &= hits - 1) {
        const int group = sources.at(list + i + lowest(hits), 0, layout.n);
        const float w = weight(t.y, group);
        const size_t other = size_t(t.y) * layout.length + layout.start + size_t(group) * layout.unit + within;
        T raw[V];
        load<T, V>(x + other * dim + size_t(v) * V, raw);
        TC_UNROLL for (int e = 0; e < V; ++e) sum[e] += w * (to_float(raw[e]) - base[e]);
        total += w;
      }
    }
  }
};

}  // namespace tc

#endif
