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
// `sources` in float32 and rounded once; slots before `from` have no sources. The first blocks merge, as theirs is the
// long work: each a run of columns of one row, whose sources it lists first, so that several of their rows are on the
// way at a time. The other blocks copy the rows that nothing can join, a warp per row. MANY: more than CHUNK sources,
// whose list would not fit every GPU's shared memory; a loop over chunks costs registers, so only where it is needed.
template <class T, int V, bool MANY>
struct MergeRows {
  static constexpr int THREADS = 128, CHUNK = 32768;
  static constexpr int AT_ONCE = 4, PART = 4, RUN = 512;  // words of V on the way; rows and words of a copying block
  const T* x;
  T* out;
  Layout layout;
  int dim, from;
  Positions sources, slots;
  const float* size;
  float* new_size;

  struct Shared {
    int found[SCRATCH];
    TC_DEVICE uint16_t* groups() { return reinterpret_cast<uint16_t*>(this + 1); }  // one per source of a chunk
  };
  size_t shared() const { return sizeof(Shared) + sizeof(uint16_t) * chunk(); }
  TC_BOTH int removed() const { return layout.n - layout.k; }
  TC_BOTH int chunk() const { return MANY && removed() > CHUNK ? CHUNK : removed(); }
  TC_BOTH int merging() const { return removed() ? (layout.k - from) * layout.unit : 0; }  // rows, from `left` on
  TC_BOTH int left() const { return layout.start + from * layout.unit; }
  TC_BOTH int across(int words) const { return (dim + words * V - 1) / (words * V); }
  int64_t parts() const {
    const int64_t copied = layout.length - int64_t(removed()) * layout.unit - merging();
    return int64_t(merging()) * across(THREADS) + (copied + PART - 1) / PART * across(RUN);
  }

  TC_DEVICE void operator()(const Block& t) const {
    const int merges = merging() * across(THREADS), i = t.x - merges;
    if (i < 0) {
      merge(t, left() + t.x / across(THREADS), t.x % across(THREADS) * THREADS);
    } else {
      copy(t, i / across(RUN) * PART, i % across(RUN) * RUN);
    }
  }

  TC_DEVICE float weight(int image, int group) const { return size ? size[size_t(image) * layout.n + group] : 1.0f; }

  TC_DEVICE void copy(const Block& t, int begin, int first) const {
    const int rows = layout.rows(), end = Min()(begin + PART, rows - merging()), until = Min()(first + RUN, dim / V);
    for (int i = begin + t.warp(); i < end; i += t.warps()) {
      const int row = i < left() ? i : i + merging(), source = layout.source(t.y, row);
      const T* own = x + (size_t(t.y) * layout.length + source) * dim;
      T* to = out + (size_t(t.y) * rows + row) * dim;
      for (int v = first + t.lane(); v < until; v += AT_ONCE * WARP) {
        T some[AT_ONCE][V];
        TC_UNROLL for (int a = 0; a < AT_ONCE; ++a)
          if (v + a * WARP < until) load<T, V>(own + size_t(v + a * WARP) * V, some[a]);
        TC_UNROLL for (int a = 0; a < AT_ONCE; ++a)
          if (v + a * WARP < until) store<T, V>(to + size_t(v + a * WARP) * V, some[a]);
      }
      if (first == 0 && t.lane() == 0 && layout.inside(row))
        write_size(t.y, row, weight(t.y, (source - layout.start) / layout.unit));
    }
  }

  TC_DEVICE void write_size(int image, int row, float total) const {
    const int j = layout.slot(row);
    if (new_size && row == layout.start + j * layout.unit) new_size[size_t(image) * layout.k + j] = total;
  }

  TC_DEVICE void merge(const Block& t, int row, int first) const {
    auto* s = reinterpret_cast<Shared*>(t.shared);
    const int j = layout.slot(row), own = layout.index.at(size_t(t.y) * layout.k + j, j, layout.n);
    // the row at the same place in group 0
    const T* rows = x + (size_t(t.y) * layout.length + row - j * layout.unit) * dim;
    T* to = out + (size_t(t.y) * layout.rows() + row) * dim;
    const int run = (chunk() + t.threads - 1) / t.threads * WARP;  // of sources, for each warp
    // all threads take every turn for the barriers, also those beyond the last column
    for (int c = 0; c < THREADS && (first + c) * V < dim; c += t.threads) {
      const int v = first + c + t.thread;
      const bool real = c + t.thread < THREADS && v * V < dim;
      T raw[V] = {};
      if (real) load<T, V>(rows + size_t(own) * layout.unit * dim + size_t(v) * V, raw);
      float sum[V] = {}, total = weight(t.y, own);
      for (int begin = 0; begin == 0 || (MANY && begin < removed()); begin += CHUNK) {
        if (MANY || c == 0) collect(t, j, begin, run, s);
        if (real) join(t, rows + size_t(v) * V, run, s, raw, sum, total);
      }
      TC_UNROLL for (int e = 0; e < V; ++e)  // a row that nothing joins is copied bit by bit
        if (sum[e] != 0) from_float(to_float(raw[e]) + sum[e] / total, raw[e]);
      if (real) store<T, V>(to + size_t(v) * V, raw);
      if (v == 0) write_size(t.y, row, total);
    }
  }

  // Each warp looks through `run` sources of the chunk from `begin` on and lists the groups that join slot j: list and
  // length are in s. One list after the other they are in the order of `sources`.
  TC_DEVICE void collect(const Block& t, int j, int begin, int run, Shared* s) const {
    const size_t all = size_t(t.y) * removed() + begin;
    const int first = t.warp() * run, end = Min()(Min()(chunk(), removed() - begin), first + run);
    uint16_t* own = s->groups() + first;
    if constexpr (MANY) t.sync();  // the lists of the chunk before have been read
    const int found = slots.narrow ? find(t, slots.narrow + all, j, first, end, own)
                                   : find(t, slots.wide + all, j, first, end, own);
    if (t.lane() == 0) s->found[t.warp()] = found;
    t.sync();
    for (int i = t.lane(); i < found; i += WARP) own[i] = uint16_t(sources.at(all + own[i], 0, layout.n));
    t.sync();
  }

  template <class P>
  TC_DEVICE int find(const Block& t, const P* list, int j, int first, int end, uint16_t* places) const {
    constexpr int STEPS = 4;
    int found = 0;
    for (int i = first + t.lane(); i - t.lane() < end; i += STEPS * WARP) {
      P slot[STEPS];
      TC_UNROLL for (int a = 0; a < STEPS; ++a) slot[a] = list[Min()(i + a * WARP, end - 1)];
      TC_UNROLL for (int a = 0; a < STEPS; ++a) {
        const int at = i + a * WARP;
        const P inside = Max()(P(0), Min()(slot[a], P(layout.k - 1)));
        for (uint32_t hits = ballot(at < end && inside == P(j)); hits; hits &= hits - 1, ++found)
          if (t.lane() == lowest(hits)) places[found] = uint16_t(at);
      }
    }
    return found;
  }

  // rows: the columns in group 0
  TC_DEVICE void join(const Block& t, const T* rows, int run, Shared* s, const T (&own)[V], float (&sum)[V],
                      float& total) const {
    int warp = 0, i = 0;
    const auto next = [&] {
      for (; warp < t.warps(); ++warp, i = 0)
        if (i < s->found[warp]) return int(s->groups()[warp * run + i++]);
      return -1;
    };
    for (bool more = true; more;) {
      T raw[AT_ONCE][V];
      float w[AT_ONCE];
      int group[AT_ONCE];
      TC_UNROLL for (int a = 0; a < AT_ONCE; ++a) {
        group[a] = next();
        if (group[a] >= 0) {
          load<T, V>(rows + size_t(group[a]) * layout.unit * dim, raw[a]);
          w[a] = weight(t.y, group[a]);
        }
      }
      TC_UNROLL for (int a = 0; a < AT_ONCE; ++a)
        if (group[a] >= 0) {
          TC_UNROLL for (int e = 0; e < V; ++e) sum[e] += w[a] * (to_float(raw[a][e]) - to_float(own[e]));
          total += w[a];
        }
      more = group[AT_ONCE - 1] >= 0;
    }
  }
};

}  // namespace tc

#endif
