// What a kernel body needs from the machine, for nvcc here and for a g++ host build in ../host_test/emulate.h.
//
// A body is a struct of plain arguments with `THREADS` and `operator()(const Block&)`. It takes block-stride loops
// only, so any number of threads gives the right result; sums may differ in the last bits between block sizes, never
// between runs. On the host a warp has one thread, so whatever crosses warps goes through shared memory and barriers in
// both builds.
#ifndef TOKCOMPILE_PORTABLE_H
#define TOKCOMPILE_PORTABLE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "launch.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define TC_BOTH __host__ __device__ __forceinline__
#define TC_DEVICE __device__ __forceinline__
#define TC_UNROLL _Pragma("unroll")
#define TC_ALIAS

namespace tc {

constexpr int WARP = 32;
constexpr bool HOST = false;

struct Block {
  int thread, threads, x, y;  // x: which part of the work, y: which image of the batch
  char* shared;
  TC_DEVICE void sync() const { __syncthreads(); }
  TC_DEVICE int lane() const { return thread % WARP; }
  TC_DEVICE int warp() const { return thread / WARP; }
  TC_DEVICE int warps() const { return threads / WARP; }
};

// __grid_constant__: a body that is indexed by a variable is else copied to every thread's own memory.
// Registers are to leave room for a second block on an SM, but for the largest blocks.
template <class Body>
__global__ void __launch_bounds__(Body::THREADS, Body::THREADS > 256 ? 1 : 2) run(const __grid_constant__ Body body) {
  extern __shared__ uint4 shared[];
  body(Block{int(threadIdx.x), Body::THREADS, int(blockIdx.x), int(blockIdx.y), reinterpret_cast<char*>(shared)});
}

// The error of this launch alone: cudaGetLastError would also give, and clear, one that the caller has yet to see.
template <class Body>
int launch(const Body& body, int64_t parts, int batch, size_t shared, tc_stream stream) {
  const void* kernel = reinterpret_cast<const void*>(run<Body>);
  if (shared > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Body*>(&body)};
  const dim3 grid(unsigned(parts), unsigned(batch), 1), block(Body::THREADS, 1, 1);
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, static_cast<cudaStream_t>(stream));
}

template <class T>
TC_DEVICE T warp_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
TC_DEVICE T warp_up(T v, int by) {
  return __shfl_up_sync(0xffffffffu, v, by);
}
// One instruction from Ampere on, where shuffles take five steps.
TC_DEVICE uint32_t warp_least(uint32_t v) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xffffffffu, v);
#else
  for (int mask = WARP / 2; mask > 0; mask /= 2) v = min(v, warp_xor(v, mask));
  return v;
#endif
}
TC_DEVICE uint32_t warp_most(uint32_t v) { return ~warp_least(~v); }
TC_DEVICE uint32_t ballot(bool v) { return __ballot_sync(0xffffffffu, v); }
TC_DEVICE int lowest(uint32_t mask) { return __ffs(int(mask)) - 1; }
TC_DEVICE int leading_zeros(uint64_t v) { return __clzll(static_cast<long long>(v)); }
TC_DEVICE int32_t atomic_add(int32_t* to, int32_t v) { return atomicAdd(to, v); }
TC_DEVICE void atomic_max(uint64_t* to, uint64_t v) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(v));
}

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};
TC_DEVICE float to_float(float v) { return v; }
TC_DEVICE float to_float(F16 v) { return __half2float(__ushort_as_half(v.bits)); }
TC_DEVICE float to_float(BF16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
TC_DEVICE void from_float(float v, float& to) { to = v; }
TC_DEVICE void from_float(float v, F16& to) { to.bits = __half_as_ushort(__float2half_rn(v)); }
TC_DEVICE void from_float(float v, BF16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
TC_DEVICE uint32_t float_bits(float v) { return __float_as_uint(v); }

}  // namespace tc

#else
#include "../host_test/emulate.h"
#endif

namespace tc {

// SIZE bytes that move as one load or store.
template <int SIZE>
struct alignas(SIZE) Word;
template <>
struct alignas(16) TC_ALIAS Word<16> {
  uint32_t v[4];
};
template <>
struct alignas(8) TC_ALIAS Word<8> {
  uint32_t v[2];
};
template <>
struct alignas(4) TC_ALIAS Word<4> {
  uint32_t v[1];
};
template <>
struct alignas(2) TC_ALIAS Word<2> {
  uint16_t v[1];
};

// V elements at p, aligned to their V * sizeof(T) bytes.
template <class T, int V>
TC_DEVICE void load(const T* p, T (&v)[V]) {
  union {
    Word<V * sizeof(T)> word;
    T v[V];
  } u;
  u.word = *reinterpret_cast<const Word<V * sizeof(T)>*>(p);
  TC_UNROLL for (int e = 0; e < V; ++e) v[e] = u.v[e];
}

template <class T, int V>
TC_DEVICE void store(T* p, const T (&v)[V]) {
  union {
    Word<V * sizeof(T)> word;
    T v[V];
  } u;
  TC_UNROLL for (int e = 0; e < V; ++e) u.v[e] = v[e];
  *reinterpret_cast<Word<V * sizeof(T)>*>(p) = u.word;
}

template <class T>
TC_DEVICE T rounded(float v) {
  T to;
  from_float(v, to);
  return to;
}

}  // namespace tc

#endif
