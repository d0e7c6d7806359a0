// DivPrune, after the distances: they are computed once (n^2 / 2 * D multiplications on all of the GPU) and kept, 4 n^2
// bytes per image, which is why n is limited to 8,192. The picks then need no barrier over the grid: one block per
// image walks k steps, each the read of one row of distances and one maximum, about 1.5 us a step up to n = 4,096 or
// so. Computing distances to the last pick alone would read all of x at every one of the k steps, and with a grid-wide
// barrier each.
#ifndef TOKCOMPILE_DIVERSE_CUH
#define TOKCOMPILE_DIVERSE_CUH

#include "select.cuh"

namespace tc {

// second: (B, n), the second smallest number of each row of distance: (B, n, n), NaN the largest. A warp per row.
struct SecondSmallest {
  static constexpr int THREADS = 256;
  const float* distance;
  int n;
  uint64_t* second;  // as a key: its order, and the lower row among equals
  int64_t parts() const { return (n + THREADS / WARP - 1) / (THREADS / WARP); }

  TC_DEVICE void operator()(const Block& t) const {
    constexpr int PART = THREADS / WARP;
    for (int i = t.x * PART + t.warp(); i < Min()(n, (t.x + 1) * PART); i += t.warps()) {
      const float* row = distance + (size_t(t.y) * n + i) * n;
      uint32_t one = ~0u, two = ~0u;
      for (int j = t.lane(); j < n; j += WARP) {
        const uint32_t v = ordered(row[j]);
        two = Min()(two, Max()(one, v));
        one = Min()(one, v);
      }
      TC_UNROLL for (int mask = WARP / 2; mask > 0; mask /= 2) {
        const uint32_t other = warp_xor(one, mask), next = warp_xor(two, mask);
        two = Min()(Min()(two, next), Max()(one, other));
        one = Min()(one, other);
      }
      if (t.lane() == 0) second[size_t(t.y) * n + i] = key_of(two, i);
    }
  }
};

// list: (B, k) ascending, slot: (B, n) or NULL. A thread stays with its own groups, so a step needs the barriers of its
// maximum alone. A group once taken leaves the race; a NaN distance makes a group the farthest.
struct FarthestPicks {
  static constexpr int THREADS = 1024;
  const float* distance;
  const uint64_t* second;
  int n, k;
  int32_t *list, *slot;
  int64_t* index;
  size_t shared() const { return sizeof(SelectShared) + size_t(n) * 5; }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<SelectShared*>(t.shared);
    auto* nearest = reinterpret_cast<float*>(s + 1);
    auto* kept = reinterpret_cast<uint8_t*>(nearest + n);
    uint64_t best = 0;
    for (int i = t.thread; i < n; i += t.threads) {
      nearest[i] = HUGE_VALF;
      kept[i] = 0;
      best = Max()(best, second[size_t(t.y) * n + i]);
    }
    for (int step = 1;; ++step) {
      const int last = key_index(block_all(t, best, uint64_t(0), Max(), s->keys));
      if (last % t.threads == t.thread) kept[last] = 1;
      if (step == k) break;
      const float* row = distance + (size_t(t.y) * n + last) * n;
      best = 0;
      for (int i = t.thread; i < n; i += t.threads) {
        if (kept[i]) continue;
        const float now = nearest[i], d = row[i];
        const float low = now != now || !(d < now || d != d) ? now : d;
        nearest[i] = low;
        best = Max()(best, key_of(ordered(low), i));
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
};

}  // namespace tc

#endif
