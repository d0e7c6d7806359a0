// One kernel that cannot do without its barriers: with TC_BREAK_BARRIER ThreadSanitizer has to complain, else its silence
// about the others would mean nothing. Wrong values in shared memory lead this one to no wrong address, so nothing else
// ends the program first.
#include "../kernels/tile.cuh"

#include <cstdio>
#include <vector>

int main() {
  constexpr int n = 40, dim = 24;
  std::vector<float> rows(n * dim);
  for (int i = 0; i < n * dim; ++i) rows[i] = float(i * 37 % 101);
  std::vector<uint64_t> best(n);
  const tc::Subset all{n, 0, 1, nullptr, 0};
  using Tile = tc::Tile<tc::Use::BEST, 4>;
  const Tile body{rows.data(), n, dim, all, all, best.data(), nullptr, nullptr, 0, 0};
  for (int i = 0; i < 5; ++i) tc::launch(body, body.parts(), 1, body.shared(), nullptr);
  std::puts("done");
  return 0;
}
