// The machine of ../kernels/portable.h on the host: a block's threads are std::threads, __syncthreads is a
// std::barrier.
//
// Blocks run one after another, threads of a block at the same time: what ThreadSanitizer sees as a race is one on the
// GPU too. Shared memory is a heap block of the exact size, filled with NaN before every block.
#ifndef TOKCOMPILE_EMULATE_H
#define TOKCOMPILE_EMULATE_H

#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#define TC_DEVICE inline
#define TC_UNROLL
#define TC_ALIAS [[gnu::may_alias]]
#define TC_BOTH inline

namespace tc {

constexpr int WARP = 1;
constexpr bool HOST = true;
constexpr int MOST_THREADS = 64;

inline int& host_threads() {
  static int threads = 4;
  return threads;
}

using Barrier = std::barrier<>;

struct Block {
  int thread, threads, x, y;
  char* shared;
  Barrier* barrier;
  void sync() const {
#ifndef TC_BREAK_BARRIER  // defined only to see that ThreadSanitizer then finds races
    barrier->arrive_and_wait();
#endif
  }
  int lane() const { return 0; }
  int warp() const { return thread; }
  int warps() const { return threads; }
};

using Run = void (*)(const void* body, const Block& block);

inline void run_blocks(Run run, const void* body, int64_t parts, int batch, size_t shared) {
  const int threads = host_threads();
  Barrier barrier(threads);
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(16)); }
  };
  std::unique_ptr<char, Free> memory(static_cast<char*>(::operator new(shared, std::align_val_t(16))));
  const auto work = [&](int thread) {
    for (int y = 0; y < batch; ++y)
      for (int64_t x = 0; x < parts; ++x) {
        if (shared) {  // bodies without shared memory have no barriers either
          if (thread == 0) std::memset(memory.get(), 0xff, shared);
          barrier.arrive_and_wait();
        }
        run(body, Block{thread, threads, int(x), y, memory.get(), &barrier});
        if (shared) barrier.arrive_and_wait();
      }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
  work(0);
  for (auto& t : others) t.join();
}

template <class Body>
int launch(const Body& body, int64_t parts, int batch, size_t shared, tc_stream) {
  const Run run = [](const void* b, const Block& block) { (*static_cast<const Body*>(b))(block); };
  run_blocks(run, &body, parts, batch, shared);
  return 0;
}

template <class T>
T warp_xor(T v, int) {
  return v;
}
template <class T>
T warp_up(T v, int) {
  return v;
}
inline uint32_t warp_least(uint32_t v) { return v; }
inline uint32_t warp_most(uint32_t v) { return v; }
inline uint32_t ballot(bool v) { return v; }
inline int lowest(uint32_t mask) { return __builtin_ctz(mask); }
inline int leading_zeros(uint64_t v) { return v ? __builtin_clzll(v) : 64; }
inline int32_t atomic_add(int32_t* to, int32_t v) { return std::atomic_ref(*to).fetch_add(v); }
inline void atomic_max(uint64_t* to, uint64_t v) {
  std::atomic_ref at(*to);
  for (uint64_t old = at.load(); old < v && !at.compare_exchange_weak(old, v);) {
  }
}

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float to_float(float v) { return v; }
inline float to_float(F16 v) {
  _Float16 half;
  std::memcpy(&half, &v, 2);
  return float(half);
}
inline float to_float(BF16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float to;
  std::memcpy(&to, &bits, 4);
  return to;
}
inline void from_float(float v, float& to) { to = v; }
inline void from_float(float v, F16& to) {
  const _Float16 half = _Float16(v);
  std::memcpy(&to, &half, 2);
}
inline void from_float(float v, BF16& to) {
  const uint32_t bits = float_bits(v);
  to.bits = v != v ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace tc

extern "C" {
// How many threads a block has from the next launch on: 1 to 64.
TC_API int32_t tc_host_threads(int32_t threads);
}

#endif
