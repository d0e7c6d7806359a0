// Selecting the best of n scores without sorting them all.
//
// A score becomes a 64-bit key, the ordered bits of the float above the inverted position: keys all differ, a larger
// key means a better score or, among equals, a lower position. Key 0 stands for "not in the race".
#ifndef TOKCOMPILE_SELECT_CUH
#define TOKCOMPILE_SELECT_CUH

#include "block.cuh"

namespace tc {

// Unsigned order equals float order, -0 equals +0, NaN is above all; never 0 and never all ones.
TC_DEVICE uint32_t ordered(float v) {
  if (v != v) return 0xfffffffeu;
  const uint32_t bits = float_bits(v + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
TC_DEVICE uint64_t key_of(uint32_t order, int i) { return uint64_t(order) << 32 | (0xffffffffu - uint32_t(i)); }
TC_DEVICE int key_index(uint64_t key) { return int(0xffffffffu - uint32_t(key)); }

constexpr int BITS = 10, BINS = 1 << BITS, FEW = 128;

struct SelectShared {
  uint64_t keys[SCRATCH], few[FEW], found;
  uint32_t low[SCRATCH], high[SCRATCH];
  int counts[SCRATCH];
  int histogram[2][BINS];
  int bin, before, inside, length;
};

// The key that `need` of those from low to high reach; they are FEW at most.
template <class Key>
TC_DEVICE uint64_t among_few(const Block& t, int n, int need, uint64_t low, uint64_t high, const Key& key,
                             SelectShared* s) {
  for (int i = t.thread; i < n; i += t.threads) {
    const uint64_t v = key(i);
    if (v && v >= low && v <= high) s->few[atomic_add(&s->length, 1)] = v;
  }
  t.sync();
  const int count = s->length;
  for (int i = t.thread; i < count; i += t.threads) {
    const uint64_t own = s->few[i];
    int above = 1;
#pragma unroll 8
    for (int j = 0; j < count; ++j) above += s->few[j] > own;
    if (above == need) s->found = own;
  }
  t.sync();
  return s->found;
}

// The key that exactly `need` of the keys reach, 1 <= need <= how many keys are not 0. `key(i)` gives the i-th key, always
// to the same thread. Each round counts the keys in BINS parts of the range that is left and goes on in the one where the
// threshold lies, until it holds FEW of them, which are compared one by one: one or two rounds for scores that differ,
// seven at most. Barriers are most of the cost: three a round, as each clears the histogram of the next and what it
// writes is written again only behind another round's first barrier.
template <class Key>
TC_DEVICE uint64_t threshold(const Block& t, int n, int need, const Key& key, SelectShared* s) {
  uint32_t least = ~uint32_t(0), most = 0;  // of the scores alone
  for (int i = t.thread; i < n; i += t.threads) {
    const uint64_t v = key(i);
    if (v) {
      least = Min()(least, uint32_t(v >> 32));
      most = Max()(most, uint32_t(v >> 32));
    }
  }
  least = warp_least(least);
  most = warp_most(most);
  if (t.lane() == 0) {
    s->low[t.warp()] = least;
    s->high[t.warp()] = most;
  }
  for (int i = t.thread; i < BINS; i += t.threads) s->histogram[0][i] = 0;
  t.sync();
  for (int w = t.lane(); w < t.warps(); w += WARP) {
    least = Min()(least, s->low[w]);
    most = Max()(most, s->high[w]);
  }
  uint64_t low = uint64_t(warp_least(least)) << 32, high = uint64_t(warp_most(most)) << 32 | 0xffffffffu;
  for (int round = 0; round < 8; ++round) {
    int* histogram = s->histogram[round % 2];
    const int bits = 64 - leading_zeros(high - low), shift = bits > BITS ? bits - BITS : 0;
    for (int i = t.thread; i < n; i += t.threads) {
      const uint64_t v = key(i);
      if (v && v >= low && v <= high) atomic_add(&histogram[(v - low) >> shift], 1);
    }
    t.sync();
    for (int i = t.thread; i < BINS; i += t.threads) s->histogram[1 - round % 2][i] = 0;
    if (t.thread == 0) s->length = 0;
    const int own = (BINS + t.threads - 1) / t.threads, top = BINS - 1 - t.thread * own;  // from the best bin down
    int sum = 0;
    for (int b = top; b > top - own && b >= 0; --b) sum += histogram[b];
    int before = block_before(t, sum, s->counts);
    for (int b = top; b > top - own && b >= 0; --b) {
      const int inside = histogram[b];
      if (before < need && need <= before + inside) {
        s->bin = b;
        s->before = before;
        s->inside = inside;
      }
      before += inside;
    }
    t.sync();
    need -= s->before;
    low += uint64_t(s->bin) << shift;
    high = low + Min()(high - low, (uint64_t(1) << shift) - 1);  // the other way round it would overflow
    if (need == s->inside) break;
    if (s->inside <= FEW) return among_few(t, n, need, low, high, key, s);
  }
  return low;
}

// Calls put(i, taken?, how many before i were taken) for every i, each i by one thread.
template <class Take, class Put>
TC_DEVICE void compact(const Block& t, int n, const Take& take, const Put& put, int* scratch) {
  const int own = (n + t.threads - 1) / t.threads, begin = t.thread * own, end = Min()(n, begin + own);
  int taken = 0;
  for (int i = begin; i < end; ++i) taken += take(i);
  int before = block_before(t, taken, scratch);
  for (int i = begin; i < end; ++i) {
    const bool is = take(i);
    put(i, is, before);
    before += is;
  }
}

// Where keys come from: float scores (of the groups that `map` lists, if given), or best partners' keys, whose score is
// kept and whose position is this one's.
struct Keys {
  const float* scores;
  const uint64_t* best;
  const int32_t* map;
  int n, mapped;
  TC_DEVICE uint64_t at(int b, int i) const {
    if (best) return key_of(uint32_t(best[size_t(b) * n + i] >> 32), i);
    const int j = map ? map[size_t(b) * mapped + i] : i;
    return key_of(ordered(scores[size_t(b) * n + j]), j);
  }
};

// One block per image. order: (B, n) or NULL: the `take` best in their order, then the others in theirs. index: (B, k)
// or NULL, list likewise: the best in their order and, where k is take + 1 (EViT), the best one of the others. slot:
// (B, n) or NULL, the place in the list or -1.
struct SelectBest {
  static constexpr int THREADS = 1024;
  Keys keys;
  int n, take, k;
  int32_t *order, *list, *slot;
  int64_t* index;
  static size_t shared() { return sizeof(SelectShared); }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<SelectShared*>(t.shared);
    const size_t row = size_t(t.y) * n, out = size_t(t.y) * k;
    const auto key = [&](int i) { return keys.at(t.y, i); };
    const uint64_t least = take > 0 ? threshold(t, n, take, key, s) : ~uint64_t(0);
    if (k > take) {
      uint64_t next = 0;
      for (int i = t.thread; i < n; i += t.threads) {
        const uint64_t v = key(i);
        if (v < least) next = Max()(next, v);
      }
      next = block_all(t, next, uint64_t(0), Max(), s->keys);
      if (t.thread == 0) {
        if (list) list[out + take] = key_index(next);
        if (index) index[out + take] = key_index(next);
      }
    }
    const auto chosen = [&](int i) { return key(i) >= least; };
    const auto put = [&](int i, bool is, int before) {
      if (is && list) list[out + before] = i;
      if (is && index) index[out + before] = i;
      if (order) order[row + (is ? before : take + i - before)] = i;
      if (slot) slot[row + i] = is ? before : -1;
    };
    compact(t, n, chosen, put, s->counts);
  }
};

// order: (B, k): the k best of n keys, best first, each found by counting the keys above it: O(n^2) comparisons, but
// over the whole grid in one launch, which beats a sort in one block up to tens of thousands.
struct RankBest {
  static constexpr int THREADS = 256;
  static constexpr int ROWS = 32, PARTS = 8, TILE = 1024;
  Keys keys;
  int n, k;
  int32_t* order;
  int64_t* index;
  struct Shared {
    uint64_t tile[TILE];
    uint64_t own[ROWS];
    int counts[ROWS * PARTS];
  };
  static size_t shared() { return sizeof(Shared); }
  int64_t parts() const { return (n + ROWS - 1) / ROWS; }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<Shared*>(t.shared);
    const int first = t.x * ROWS, rows = Min()(ROWS, n - first);
    for (int r = t.thread; r < rows; r += t.threads) s->own[r] = keys.at(t.y, first + r);
    for (int v = t.thread; v < ROWS * PARTS; v += t.threads) s->counts[v] = 0;
    for (int base = 0; base < n; base += TILE) {
      for (int j = t.thread; j < TILE; j += t.threads) s->tile[j] = base + j < n ? keys.at(t.y, base + j) : 0;
      t.sync();
      for (int v = t.thread; v < ROWS * PARTS; v += t.threads) {
        const int r = v % ROWS, part = v / ROWS;
        if (r >= rows) continue;
        const uint64_t own = s->own[r];
        int above = 0;
        for (int j = part * (TILE / PARTS); j < (part + 1) * (TILE / PARTS); ++j) above += s->tile[j] > own;
        s->counts[v] += above;
      }
      t.sync();
    }
    for (int r = t.thread; r < rows; r += t.threads) {
      int rank = 0;
      for (int part = 0; part < PARTS; ++part) rank += s->counts[part * ROWS + r];
      if (rank >= k) continue;
      const int chosen = key_index(s->own[r]);
      if (order) order[size_t(t.y) * k + rank] = chosen;
      if (index) index[size_t(t.y) * k + rank] = chosen;
    }
  }
};

}  // namespace tc

#endif
