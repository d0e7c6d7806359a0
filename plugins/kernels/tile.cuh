// All products of two sets of float32 rows, tile by tile in shared memory; only what is asked of them is written.
#ifndef TOKCOMPILE_TILE_CUH
#define TOKCOMPILE_TILE_CUH

#include "select.cuh"

namespace tc {

// Which row of the n of an image is the i-th of a set: first + i * step of the positions, through `map` (B, mapped).
struct Subset {
  int count, first, step;
  const int32_t* map;
  int mapped;
  TC_DEVICE int at(int b, int i) const {
    const int j = first + i * step;
    return map ? map[size_t(b) * mapped + j] : j;
  }
};

// What becomes of the products.
enum class Use { BEST, ENERGY, DISTANCE };

// BEST: best: (B, rows), the key of the most similar column; maxima of integers do not depend on the blocks' order.
// ENERGY: sums: (B, column tiles, rows) of ELU(product - margin), to be added in order.
// DISTANCE: distance: (B, n, n), 1 - product; tiles below the diagonal are mirrored.
// A block computes one tile of 16 M by 16 M, M by M products at each of 256 places.
template <Use USE, int M>
struct Tile {
  static constexpr int THREADS = 256, PLACES = 256, SIDE = 16 * M, DEEP = 16, PITCH = SIDE + 4;
  static constexpr int OWN = HOST ? PLACES : 1;
  static constexpr int RUNS = SIDE * DEEP / 4, SHARE = HOST ? RUNS : RUNS / THREADS;  // of 4 columns
  const float* rows;  // (B, n, dim)
  int n, dim;
  Subset a, b;
  uint64_t* best;
  float *sums, *distance;
  float margin, alpha;

  struct Shared {
    union {
      struct {
        float a[DEEP][PITCH], b[DEEP][PITCH];
      } in;
      uint64_t keys[SIDE][16];
      float sums[SIDE][17];
    };
  };
  static size_t shared() { return sizeof(Shared); }
  TC_BOTH static int64_t tiles(int count) { return (count + SIDE - 1) / SIDE; }
  int64_t parts() const { return tiles(a.count) * tiles(b.count); }

  // A micro tile's rows are in groups of 4, so that a half warp reads shared memory in 16-byte runs.
  TC_DEVICE static int at(int place, int i) { return i / 4 * 64 + place * 4 + i % 4; }

  // A thread's share of DEEP columns of one set, on its way from the rows to shared memory.
  struct Slab {
    int from[SHARE];  // the rows; -1 beyond the set
    float some[SHARE][4];
  };

  TC_DEVICE void find(const Block& t, const Subset& set, int first, Slab& slab) const {
    TC_UNROLL for (int f = 0; f < SHARE; ++f) {
      const int r = first + (t.thread + f * t.threads) / (DEEP / 4);
      slab.from[f] = r < set.count ? set.at(t.y, r) : -1;
    }
  }

  TC_DEVICE void read(const Block& t, int depth, Slab& slab) const {
    const bool wide = dim % 4 == 0;
    TC_UNROLL for (int f = 0; f < SHARE; ++f) {
      const int c = depth + (t.thread + f * t.threads) % (DEEP / 4) * 4;
      TC_UNROLL for (int e = 0; e < 4; ++e) slab.some[f][e] = 0;
      if (slab.from[f] < 0 || c >= dim) continue;
      const float* p = rows + (size_t(t.y) * n + slab.from[f]) * dim + c;
      if (wide) {
        load<float, 4>(p, slab.some[f]);
      } else {
        TC_UNROLL for (int e = 0; e < 4; ++e)
          if (c + e < dim) slab.some[f][e] = p[e];
      }
    }
  }

  TC_DEVICE void put(const Block& t, const Slab& slab, float (&to)[DEEP][PITCH]) const {
    TC_UNROLL for (int f = 0; f < SHARE; ++f) {
      const int v = t.thread + f * t.threads;
      if (v >= RUNS) break;
      TC_UNROLL for (int e = 0; e < 4; ++e) to[v % (DEEP / 4) * 4 + e][v / (DEEP / 4)] = slab.some[f][e];
    }
  }

  TC_DEVICE void operator()(const Block& t) const {
    auto* s = reinterpret_cast<Shared*>(t.shared);
    const int across = int(tiles(b.count)), row0 = t.x / across * SIDE, col0 = t.x % across * SIDE;
    if (USE == Use::DISTANCE && col0 < row0) return;
    float acc[OWN][M][M] = {};
    Slab from_a, from_b;
    find(t, a, row0, from_a);
    find(t, b, col0, from_b);
    read(t, 0, from_a);
    read(t, 0, from_b);
    for (int depth = 0; depth < dim; depth += DEEP) {
      put(t, from_a, s->in.a);
      put(t, from_b, s->in.b);
      t.sync();
      if (depth + DEEP < dim) {  // arrives while the products are taken
        read(t, depth + DEEP, from_a);
        read(t, depth + DEEP, from_b);
      }
      TC_UNROLL for (int o = 0; o < OWN; ++o) {
        const int place = t.thread + o * t.threads;
        if (OWN > 1 && place >= PLACES) break;
#pragma unroll 2
        for (int c = 0; c < DEEP; ++c) {
          float x[M], y[M];
          TC_UNROLL for (int i = 0; i < M; ++i) {
            x[i] = s->in.a[c][at(place / 16, i)];
            y[i] = s->in.b[c][at(place % 16, i)];
          }
          TC_UNROLL for (int i = 0; i < M; ++i)
            TC_UNROLL for (int j = 0; j < M; ++j) acc[o][i][j] += x[i] * y[j];
        }
      }
      t.sync();
    }
    TC_UNROLL for (int o = 0; o < OWN; ++o) {
      const int place = t.thread + o * t.threads;
      if (OWN > 1 && place >= PLACES) break;
      TC_UNROLL for (int i = 0; i < M; ++i) {
        const int r = at(place / 16, i);
        if constexpr (USE == Use::BEST) s->keys[r][place % 16] = best_of(acc[o][i], col0, place % 16);
        if constexpr (USE == Use::ENERGY) s->sums[r][place % 16] = energy_of(acc[o][i], col0, place % 16);
        if constexpr (USE == Use::DISTANCE) write(t.y, acc[o][i], row0 + r, col0, place % 16);
      }
    }
    if constexpr (USE == Use::DISTANCE) return;
    t.sync();
    for (int r = t.thread; r < SIDE && row0 + r < a.count; r += t.threads) {
      if constexpr (USE == Use::BEST) {
        uint64_t key = 0;
        for (int p = 0; p < 16; ++p) key = Max()(key, s->keys[r][p]);
        atomic_max(best + size_t(t.y) * a.count + row0 + r, key);
      } else {
        float sum = 0;
        for (int p = 0; p < 16; ++p) sum += s->sums[r][p];
        sums[(size_t(t.y) * across + t.x % across) * a.count + row0 + r] = sum;
      }
    }
  }

  TC_DEVICE uint64_t best_of(const float (&acc)[M], int col0, int place) const {
    uint64_t key = 0;
    TC_UNROLL for (int j = 0; j < M; ++j) {
      const int col = col0 + at(place, j);
      if (col < b.count) key = Max()(key, key_of(ordered(acc[j]), col));
    }
    return key;
  }

  TC_DEVICE float energy_of(const float (&acc)[M], int col0, int place) const {
    float sum = 0;
    TC_UNROLL for (int j = 0; j < M; ++j) {
      const float v = acc[j] - margin;
      if (col0 + at(place, j) < b.count) sum += v > 0 ? v : alpha * expm1f(v);
    }
    return sum;
  }

  TC_DEVICE void write(int image, const float (&acc)[M], int row, int col0, int place) const {
    float* d = distance + size_t(image) * n * n;
    TC_UNROLL for (int j = 0; j < M; ++j) {
      const int col = col0 + at(place, j);
      if (row >= n || col >= n || col < row) continue;  // a tile on the diagonal mirrors its upper half
      const float v = 1.0f - acc[j];
      d[size_t(row) * n + col] = v;
      if (col != row) d[size_t(col) * n + row] = v;
    }
  }
};

}  // namespace tc

#endif
