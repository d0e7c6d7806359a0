// The launchers on the host: the same sources, compiled by g++ against emulate.h.
#include "../kernels/launch.cu"

int32_t tc_host_threads(int32_t threads) {
  if (threads < 1 || threads > tc::MOST_THREADS) return 1;
  tc::host_threads() = threads;
  return 0;
}
