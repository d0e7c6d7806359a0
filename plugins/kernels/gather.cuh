// Copying rows, and the outputs that say where every token went.
#ifndef TOKCOMPILE_GATHER_CUH
#define TOKCOMPILE_GATHER_CUH

#include "select.cuh"

namespace tc {

// Positions as the launchers make them (32 bits) or as a caller gives them (64 bits, kept inside [0, n)); none:
// identity.
struct Positions {
  const int32_t* narrow;
  const int64_t* wide;
  TC_DEVICE int at(size_t i, int otherwise, int n) const {
    if (narrow) return narrow[i];
    if (wide) return int(wide[i] < 0 ? 0 : wide[i] < n ? wide[i] : n - 1);
    return otherwise;
  }
};

// Which row of x: (B, length, .) each row of the shorter out: (B, length - (n - k) * unit, .) comes from.
struct Layout {
  int length, start, n, k, unit;
  Positions index;
  TC_DEVICE int rows() const { return length - (n - k) * unit; }
  TC_DEVICE bool inside(int row) const { return row >= start && row < start + k * unit; }
  TC_DEVICE int slot(int row) const { return (row - start) / unit; }
  TC_DEVICE int source(int b, int row) const {
    if (row < start) return row;
    if (!inside(row)) return row + (n - k) * unit;
    const int j = slot(row);
    return start + index.at(size_t(b) * k + j, j, n) * unit + (row - start - j * unit);
  }
};

// A warp per row of `words` words of SIZE bytes. Slots from `until` on are left for another kernel.
template <int SIZE>
struct CopyRows {
  static constexpr int THREADS = 256;
  static constexpr int AT_ONCE = 4, PART = THREADS / WARP;
  const void* x;
  void* out;
  Layout layout;
  int words, until;
  int64_t parts() const { return (layout.length - (layout.n - layout.k) * layout.unit + PART - 1) / PART; }

  TC_DEVICE void operator()(const Block& t) const {
    const int rows = layout.rows();
    for (int row = t.x * PART + t.warp(); row < Min()(rows, (t.x + 1) * PART); row += t.warps()) {
      if (layout.inside(row) && layout.slot(row) >= until) continue;
      const size_t source = size_t(t.y) * layout.length + layout.source(t.y, row);
      const auto* from = static_cast<const Word<SIZE>*>(x) + source * words;
      auto* to = static_cast<Word<SIZE>*>(out) + (size_t(t.y) * rows + row) * words;
      int w = t.lane();
      for (; w + (AT_ONCE - 1) * WARP < words; w += AT_ONCE * WARP) {
        Word<SIZE> some[AT_ONCE];
        TC_UNROLL for (int a = 0; a < AT_ONCE; ++a) some[a] = from[w + a * WARP];
        TC_UNROLL for (int a = 0; a < AT_ONCE; ++a) to[w + a * WARP] = some[a];
      }
      for (; w < words; w += WARP) to[w] = from[w];
    }
  }
};

// index: (B, k), new_size: (B, k), assign: (B, n), each if not NULL. list NULL: the identity. A dropped group (slot <
// 0) goes where its best key points.
struct Finish {
  static constexpr int THREADS = 256;
  int n, k;
  const int32_t *list, *slot;
  const uint64_t* best;
  const float* size;
  int64_t* index;
  float* new_size;
  int64_t* assign;
  int64_t parts() const { return (n + THREADS - 1) / THREADS; }

  TC_DEVICE void operator()(const Block& t) const {
    for (int i = t.x * THREADS + t.thread; i < Min()(n, (t.x + 1) * THREADS); i += t.threads) {
      const size_t old = size_t(t.y) * n, now = size_t(t.y) * k;
      if (i < k) {
        const int from = list ? list[now + i] : i;
        if (index) index[now + i] = from;
        if (new_size) new_size[now + i] = size ? size[old + from] : 1.0f;
      }
      if (assign) {
        const int own = slot ? slot[old + i] : i;
        assign[old + i] = own >= 0 ? own : key_index(best[old + i]);
      }
    }
  }
};

}  // namespace tc

#endif
