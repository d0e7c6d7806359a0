// Every launcher once or more, small, for the sanitizers: what they find ends the program. Exact results are compared
// in tests/plugins/test_kernels.py; here only that indices are in range and all different, also for NaN and infinity.
#include "../kernels/launch.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <vector>

extern "C" int32_t tc_host_threads(int32_t threads);

namespace {

void require(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Memory of the exact size, at the alignment that a GPU allocation has.
struct Buffer {
  void* data;
  explicit Buffer(size_t bytes) : data(std::aligned_alloc(256, (bytes + 255) / 256 * 256)) {
    std::memset(data, 0xff, bytes);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// Numbers of a dtype; every `odd`-th is NaN or infinite.
std::vector<uint8_t> numbers(int dtype, size_t count, unsigned seed, size_t odd) {
  std::vector<uint8_t> bytes(count * (dtype == TC_F32 ? 4 : 2));
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    float v = float(int(seed >> 16) % 200 - 100) / 64;
    if (odd && i % odd == odd - 1) v = i % 2 ? std::nanf("") : std::numeric_limits<float>::infinity();
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (dtype == TC_F32) std::memcpy(&bytes[i * 4], &v, 4);
    const uint16_t half = dtype == TC_F16 ? uint16_t(seed >> 17 & 0xbfff) : uint16_t(bits >> 16);
    if (dtype != TC_F32) std::memcpy(&bytes[i * 2], &half, 2);
  }
  return bytes;
}

void check(const std::vector<int64_t>& index, int batch, int k, int n) {
  for (int b = 0; b < batch; ++b) {
    std::set<int64_t> seen(index.begin() + size_t(b) * k, index.begin() + size_t(b + 1) * k);
    require(int(seen.size()) == k && *seen.begin() >= 0 && *seen.rbegin() < n, "indices");
  }
}

void methods(const tc_shape& s, size_t odd, bool parts) {
  const auto x = numbers(s.dtype, size_t(s.batch) * s.length * s.dim, 1, odd);
  const auto normed = numbers(s.dtype, size_t(s.batch) * s.tap_length * s.dim, 2, odd);
  const auto keys = numbers(s.dtype, size_t(s.batch) * s.heads * s.tap_length * s.head_dim, 3, odd);
  const auto attention = numbers(s.dtype, size_t(s.batch) * s.heads * s.tap_length, 4, odd);
  const std::vector<float> size(size_t(s.batch) * s.n, 2.0f);
  std::vector<uint8_t> out(size_t(s.batch) * (s.length - (s.n - s.k) * s.unit) * s.dim * (s.dtype == TC_F32 ? 4 : 2));
  std::vector<int64_t> index(size_t(s.batch) * s.k), assign(size_t(s.batch) * s.n);
  std::vector<float> new_size(size_t(s.batch) * s.k);
  const auto done = [&](int32_t code, const char* name) {
    require(code == 0, name);
    check(index, s.batch, s.k, s.n);
    for (int64_t to : assign) require(to >= 0 && to < s.k, "assign");
    assign.assign(assign.size(), -1);
  };
  int64_t *i = index.data(), *a = assign.data();
  const int after = s.tap_start + s.n * s.unit;
  const tc_text text{5, 2, {0, s.tap_start, after, s.tap_length}};
  const bool has_text = s.unit == 1 && s.tap_start > 0 && s.tap_length > after;
  for (const tc_text* given : {static_cast<const tc_text*>(nullptr), has_text ? &text : nullptr})
    for (int pivots : {1, 3}) {
      Buffer w(tc_dart_workspace(&s, pivots, given));
      done(tc_dart(&s, pivots, given, x.data(), normed.data(), keys.data(), out.data(), i, a, w.data, nullptr), "dart");
    }
  for (int fuse : {0, 1}) {
    Buffer w(tc_topk_workspace(&s, fuse));
    done(tc_topk(&s, fuse, x.data(), size.data(), attention.data(), out.data(), i, new_size.data(), a, w.data, nullptr),
         "topk");
  }
  if (s.n - s.k <= s.n / 2) {
    {
      Buffer w(tc_tome_workspace(&s));
      done(tc_tome(&s, x.data(), size.data(), keys.data(), out.data(), i, new_size.data(), a, w.data, nullptr), "tome");
    }
    for (int all : {0, 1}) {
      Buffer w(tc_pitome_workspace(&s, all));
      done(tc_pitome(&s, all, 0.5f, 1.0f, x.data(), nullptr, keys.data(), out.data(), i, new_size.data(), a, w.data,
                     nullptr),
           "pitome");
    }
  }
  {
    Buffer w(tc_divprune_workspace(&s));
    done(tc_divprune(&s, x.data(), out.data(), i, a, w.data, nullptr), "divprune");
  }
  if (!parts) return;
  const int32_t dtype = s.dtype, width = s.dim;
  const void* from = x.data();
  void* to = out.data();
  require(tc_gather(1, s.batch, s.n, s.k, &dtype, &width, &from, i, &to, nullptr) == 0, "gather");
  std::vector<int64_t> sources, slots;
  for (int b = 0; b < s.batch; ++b) {
    std::vector<bool> kept(s.n);
    for (int j = 0; j < s.k; ++j) kept[index[size_t(b) * s.k + j]] = true;
    for (int j = 0; j < s.n; ++j)
      if (!kept[j]) {
        sources.push_back(j);
        slots.push_back(j % s.k);
      }
  }
  require(tc_merge(1, s.batch, s.n, s.k, &dtype, &width, &from, size.data(), i, sources.data(), slots.data(), &to,
                   new_size.data(), nullptr) == 0,
          "merge");
}

void select(int n, int k, bool same) {
  std::vector<float> scores(size_t(2) * n);
  unsigned seed = 5;
  for (auto& v : scores) v = same ? 1.0f : float((seed = seed * 1664525u + 1013904223u) >> 8);
  std::vector<int64_t> index(size_t(2) * k);
  Buffer w(tc_select_workspace(2, n, k));
  for (int sorted : {0, 1}) {
    require(tc_select(2, n, k, sorted, scores.data(), index.data(), w.data, nullptr) == 0, "select");
    check(index, 2, k, n);
  }
}

}  // namespace

int main() {
  for (int threads : {4, 3}) {
    require(tc_host_threads(threads) == 0, "threads");
    for (int dtype : {TC_F32, TC_F16, TC_BF16}) {
      // dtype, batch, length, dim, start, n, k, unit, tap_length, tap_start, heads, head_dim
      methods({dtype, 2, 23, 8, 1, 20, 11, 1, 23, 1, 2, 8}, 0, false);
      methods({dtype, 1, 21, 5, 0, 21, 12, 1, 21, 0, 1, 3}, 7, false);
      methods({dtype, 1, 29, 16, 4, 5, 3, 4, 33, 8, 2, 16}, 0, false);
      methods({dtype, 1, 9, 8, 0, 9, 9, 1, 9, 0, 1, 4}, 0, true);
      methods({dtype, 2, 9, 4, 0, 9, 5, 1, 9, 0, 1, 4}, 3, true);
    }
    select(300, 17, false);
    select(70, 70, true);
  }
  select(5000, 33, false);
  methods({TC_F32, 1, 1030, 2, 0, 1030, 1026, 1, 1030, 0, 1, 2}, 0, false);  // large tiles
  std::puts("fine");
  return 0;
}
