// Reductions and scans over a warp and a block, in a fixed order.
#ifndef TOKCOMPILE_BLOCK_CUH
#define TOKCOMPILE_BLOCK_CUH

#include "portable.h"

namespace tc {

constexpr int SCRATCH = 64;  // one per warp: up to 32 on a GPU, up to 64 threads on the host

struct Sum {
  template <class T>
  TC_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  TC_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Min {
  template <class T>
  TC_DEVICE T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// All lanes get the result.
template <class T, class Op>
TC_DEVICE T warp_all(T v, Op op) {
  TC_UNROLL for (int mask = WARP / 2; mask > 0; mask /= 2) v = op(v, warp_xor(v, mask));
  return v;
}

// All threads get the result; scratch: SCRATCH of T in shared memory, free for use again on return.
template <class T, class Op>
TC_DEVICE T block_all(const Block& t, T v, T zero, Op op, T* scratch) {
  v = warp_all(v, op);
  if (t.lane() == 0) scratch[t.warp()] = v;
  t.sync();
  T all = zero;
  for (int w = t.lane(); w < t.warps(); w += WARP) all = op(all, scratch[w]);
  all = warp_all(all, op);
  t.sync();
  return all;
}

// The sum of v over the threads before this one. scratch: SCRATCH of int, free again behind the next barrier.
TC_DEVICE int block_before(const Block& t, int v, int* scratch) {
  int upto = v;
  TC_UNROLL for (int by = 1; by < WARP; by *= 2) {
    const int other = warp_up(upto, by);
    if (t.lane() >= by) upto += other;
  }
  if (t.lane() == WARP - 1) scratch[t.warp()] = upto;
  t.sync();
  int before = 0;
  for (int w = t.lane(); w < t.warp(); w += WARP) before += scratch[w];
  return warp_all(before, Sum()) + upto - v;
}

}  // namespace tc

#endif
