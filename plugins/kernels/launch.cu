// The functions of launch.h: check the arguments, carve the workspace, enqueue the kernels.
#include "launch.h"

#include "dart.cuh"
#include "diverse.cuh"
#include "gather.cuh"
#include "merge.cuh"
#include "topk.cuh"

namespace tc {
namespace {

constexpr int32_t INVALID = 1;  // cudaErrorInvalidValue
constexpr int MOST = 16384, MOST_SELECT = 65536, MOST_DIVERSE = 8192, MOST_PIVOTS = 1024, MOST_BATCH = 65535;
constexpr int MOST_DIM = 8192, MOST_UNIT = 4096, MOST_LENGTH = 1 << 24, MOST_WIDTH = 1 << 20;

#define TC_TRY(call)                \
  do {                              \
    const int32_t error_ = (call);  \
    if (error_ != 0) return error_; \
  } while (0)

// Hands out parts of the workspace, or with no base only counts them; all are aligned to 256 bytes.
struct Carve {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(size_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (count * sizeof(T) + 255) / 256 * 256;
    return p;
  }
};

bool in(int64_t v, int64_t least, int64_t most) { return v >= least && v <= most; }

bool shape_fits(const tc_shape* s, int most) {
  return s && in(s->dtype, TC_F32, TC_BF16) && in(s->batch, 1, MOST_BATCH) && in(s->dim, 1, MOST_DIM) &&
         in(s->n, 1, most) && in(s->k, 1, s->n) && in(s->unit, 1, MOST_UNIT) && s->start >= 0 &&
         s->length <= MOST_LENGTH && s->start + int64_t(s->n) * s->unit <= s->length;
}

bool taps_fit(const tc_shape* s) {
  return s->tap_start >= 0 && s->tap_length <= MOST_LENGTH &&
         s->tap_start + int64_t(s->n) * s->unit <= s->tap_length;
}

bool heads_fit(const tc_shape* s) { return in(s->heads, 1, 1024) && in(s->head_dim, 1, MOST_DIM); }

bool merge_fits(const tc_shape* s) {
  return shape_fits(s, MOST) && taps_fit(s) && heads_fit(s) && s->n - s->k <= s->n / 2;
}

bool wide(const void* p, int64_t elements, size_t size) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && elements * int64_t(size) % 16 == 0;
}

// Calls f with an element of the dtype's type; the code is chosen once, here.
template <class F>
int32_t by_type(int dtype, const F& f) {
  if (dtype == TC_F32) return f(float());
  if (dtype == TC_F16) return f(F16());
  return f(BF16());
}

// Likewise with the number of elements per load, 16 bytes of them or one where rows are not aligned, and with whether
// groups are single rows (one at a time takes any groups).
template <int V, bool ONE>
struct Form {
  static constexpr int WIDTH = V;
  static constexpr bool SINGLE = ONE;
};
template <class T, class F>
int32_t by_form(bool vectors, int unit, const F& f) {
  if (!vectors) return f(Form<1, false>());
  if (unit == 1) return f(Form<int(16 / sizeof(T)), true>());
  return f(Form<int(16 / sizeof(T)), false>());
}
template <class T, class F>
int32_t by_width(bool vectors, const F& f) {
  if (vectors) return f(Form<int(16 / sizeof(T)), true>());
  return f(Form<1, true>());
}
template <class F>
int32_t by_unit(int unit, const F& f) {
  if (unit == 1) return f(Form<1, true>());
  return f(Form<1, false>());
}

template <class T>
Rows<T> rows_of(const tc_shape* s, const void* x) {
  return {static_cast<const T*>(x), s->length, s->dim, s->start, s->n, s->unit};
}

template <class T>
KeyRows<T> key_rows(const tc_shape* s, const void* keys) {
  return {static_cast<const T*>(keys), s->heads, s->tap_length, s->head_dim, s->tap_start, s->n, s->unit};
}

Layout layout_of(const tc_shape* s, const int32_t* list) {
  return {s->length, s->start, s->n, s->k, s->unit, {list, nullptr}};
}

int32_t copy_rows(const void* x, void* out, const Layout& layout, int64_t bytes, int batch, int until,
                  tc_stream stream) {
  const auto go = [&](auto copy) { return launch(copy, copy.parts(), batch, 0, stream); };
  const uintptr_t odd = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) | uintptr_t(bytes);
  if (odd % 16 == 0) return go(CopyRows<16>{x, out, layout, int(bytes / 16), until});
  if (odd % 4 == 0) return go(CopyRows<4>{x, out, layout, int(bytes / 4), until});
  return go(CopyRows<2>{x, out, layout, int(bytes / 2), until});
}

int32_t copy_kept(const tc_shape* s, const void* x, void* out, const int32_t* list, int until, tc_stream stream) {
  const int64_t bytes = int64_t(s->dim) * (s->dtype == TC_F32 ? 4 : 2);
  return copy_rows(x, out, layout_of(s, list), bytes, s->batch, until, stream);
}

int32_t identity(const tc_shape* s, const void* x, const float* size, void* out, int64_t* index, float* new_size,
                 int64_t* assign, tc_stream stream) {
  if (index || new_size || assign) {
    const Finish finish{s->n, s->k, nullptr, nullptr, nullptr, size, index, new_size, assign};
    TC_TRY(launch(finish, finish.parts(), s->batch, 0, stream));
  }
  return copy_kept(s, x, out, nullptr, s->k, stream);
}

// Large tiles where there are enough of them to fill a GPU; products do not depend on it.
template <Use USE, int M>
int32_t tile(const float* rows, const tc_shape* s, int dim, const Subset& a, const Subset& b, uint64_t* best,
             float* sums, float* distance, float margin, float alpha, tc_stream stream) {
  const Tile<USE, M> t{rows, s->n, dim, a, b, best, sums, distance, margin, alpha};
  return launch(t, t.parts(), s->batch, t.shared(), stream);
}

bool large(int a, int b) { return int64_t(a) * b >= 1 << 20; }
int64_t energy_tiles(int n) { return large(n, n) ? Tile<Use::ENERGY, 8>::tiles(n) : Tile<Use::ENERGY, 4>::tiles(n); }

int32_t most_similar(const float* rows, const tc_shape* s, int dim, const Subset& a, const Subset& b, uint64_t* best,
                     tc_stream stream) {
  const auto go = large(a.count, b.count) ? tile<Use::BEST, 8> : tile<Use::BEST, 4>;
  return go(rows, s, dim, a, b, best, nullptr, nullptr, 0, 0, stream);
}

Subset everything(const tc_shape* s) { return {s->n, 0, 1, nullptr, 0}; }

int32_t unit_rows(const tc_shape* s, const void* x, float* to, uint64_t* best, tc_stream stream) {
  return by_type(s->dtype, [&](auto type) {
    using T = decltype(type);
    return by_form<T>(wide(x, s->dim, sizeof(T)), s->unit, [&](auto form) {
      const UnitRows<T, form.WIDTH, form.SINGLE> body{rows_of<T>(s, x), to, best};
      return launch(body, body.parts(), s->batch, 0, stream);
    });
  });
}

// Where dropped groups go: room for every group's direction and best kept one.
struct Nearest {
  float* rows;
  uint64_t* best;
  Nearest(const tc_shape* s, Carve* c)
      : rows(c->take<float>(size_t(s->batch) * s->n * s->dim)), best(c->take<uint64_t>(size_t(s->batch) * s->n)) {}
};

// index, new_size and assign after pruning; the list's directions are made here unless they are there already.
int32_t finish_pruning(const tc_shape* s, const void* x, const Nearest& nearest, bool ready, const int32_t* list,
                       const int32_t* slot, const float* size, int64_t* index, float* new_size, int64_t* assign,
                       tc_stream stream) {
  if (assign) {
    if (!ready) TC_TRY(unit_rows(s, x, nearest.rows, nearest.best, stream));
    const Subset kept{s->k, 0, 1, list, s->k};
    TC_TRY(most_similar(nearest.rows, s, s->dim, everything(s), kept, nearest.best, stream));
  }
  if (!assign && !new_size && !index) return 0;
  const Finish finish{s->n, s->k, list, slot, nearest.best, size, index, new_size, assign};
  return launch(finish, finish.parts(), s->batch, 0, stream);
}

struct DartSpace {
  int count, all;
  float *norms, *dots, *inverse;
  int32_t *pivots, *list, *slot;
  Nearest nearest;
  DartSpace(const tc_shape* s, int32_t most, const Text& text, Carve* c)
      : count(most < s->k ? most : s->k),
        all(count + text.pivots),
        norms(c->take<float>(size_t(s->batch) * (size_t(s->n) + text.total))),
        dots(c->take<float>(size_t(s->batch) * s->n * all)),
        inverse(c->take<float>(size_t(s->batch) * (s->n + text.pivots))),
        pivots(c->take<int32_t>(size_t(s->batch) * all)),
        list(c->take<int32_t>(size_t(s->batch) * s->k)),
        slot(c->take<int32_t>(size_t(s->batch) * s->n)),
        nearest(s, c) {}
};

bool text_fits(const tc_shape* s, const tc_text* text) {
  if (!text) return true;
  if (!in(text->pivots, 0, MOST_PIVOTS) || !in(text->spans, 0, TC_TEXT_SPANS)) return false;
  if (text->pivots == 0 || text->spans == 0) return true;
  if (s->unit != 1) return false;
  int32_t end = 0;
  for (int i = 0; i < text->spans; ++i) {
    if (text->edges[2 * i] < end || text->edges[2 * i + 1] <= text->edges[2 * i]) return false;
    end = text->edges[2 * i + 1];
  }
  return end <= s->tap_length;
}

Text text_of(const tc_text* given) {
  Text text{};
  for (int i = 0; given && given->pivots && i < 2 * given->spans; i += 2) {
    text.edges[i] = given->edges[i];
    text.edges[i + 1] = given->edges[i + 1];
    text.total += given->edges[i + 1] - given->edges[i];
  }
  text.pivots = text.total == 0 ? 0 : given->pivots < text.total ? given->pivots : text.total;
  return text;
}

bool dart_fits(const tc_shape* s, int32_t pivots, const tc_text* text) {
  return shape_fits(s, MOST) && taps_fit(s) && heads_fit(s) && pivots >= 1 &&
         (pivots <= MOST_PIVOTS || s->k <= MOST_PIVOTS) && text_fits(s, text);
}

struct TopkSpace {
  int64_t chunks;
  float *scores, *partial;
  int32_t *list, *slot;
  Nearest nearest;
  TopkSpace(const tc_shape* s, bool fuse, Carve* c)
      : chunks(FuseSums<float, 1>::chunks(s->n)),
        scores(c->take<float>(size_t(s->batch) * s->n)),
        partial(c->take<float>(fuse ? size_t(s->batch) * chunks * s->unit * s->dim : 0)),
        list(c->take<int32_t>(size_t(s->batch) * s->k)),
        slot(c->take<int32_t>(size_t(s->batch) * s->n)),
        nearest(s, c) {}
};

bool topk_fits(const tc_shape* s) {
  return shape_fits(s, MOST_SELECT) && taps_fit(s) && in(s->heads, 1, 1024);
}

struct MergeSpace {
  float *metric, *sums, *energy;
  uint64_t* best;
  int32_t *order, *ranked, *list, *sources, *slots;
  MergeSpace(const tc_shape* s, bool energies, Carve* c)
      : metric(c->take<float>(size_t(s->batch) * s->n * s->head_dim)),
        sums(c->take<float>(energies ? size_t(s->batch) * s->n * energy_tiles(s->n) : 0)),
        energy(c->take<float>(energies ? size_t(s->batch) * s->n : 0)),
        best(c->take<uint64_t>(size_t(s->batch) * s->n)),
        order(c->take<int32_t>(size_t(s->batch) * s->n)),
        ranked(c->take<int32_t>(size_t(s->batch) * s->n)),
        list(c->take<int32_t>(size_t(s->batch) * s->k)),
        sources(c->take<int32_t>(size_t(s->batch) * (s->n - s->k))),
        slots(c->take<int32_t>(size_t(s->batch) * (s->n - s->k))) {}
};

struct DiverseSpace {
  float* distance;
  uint64_t* second;
  int32_t *list, *slot;
  Nearest nearest;
  DiverseSpace(const tc_shape* s, Carve* c)
      : distance(c->take<float>(size_t(s->batch) * s->n * s->n)),
        second(c->take<uint64_t>(size_t(s->batch) * s->n)),
        list(c->take<int32_t>(size_t(s->batch) * s->k)),
        slot(c->take<int32_t>(size_t(s->batch) * s->n)),
        nearest(s, c) {}
};

int32_t metric_of(const tc_shape* s, const void* keys, float* to, uint64_t* best, int clear, tc_stream stream) {
  return by_type(s->dtype, [&](auto type) {
    using T = decltype(type);
    return by_unit(s->unit, [&](auto form) {
      const Metric<T, form.SINGLE> body{key_rows<T>(s, keys), to, best, clear};
      return launch(body, body.parts(), s->batch, 0, stream);
    });
  });
}

int32_t merge_rows(int dtype, int dim, int batch, const void* x, void* out, const Layout& layout, int from,
                   const Positions& sources, const Positions& slots, const float* size, float* new_size,
                   tc_stream stream) {
  return by_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto go = [&](auto body) { return launch(body, body.parts(), batch, body.shared(), stream); };
    const auto* from_x = static_cast<const T*>(x);
    auto* to = static_cast<T*>(out);
    using Many = MergeRows<T, 1, true>;
    if (layout.n - layout.k > Many::CHUNK)
      return go(Many{from_x, to, layout, dim, from, sources, slots, size, new_size});
    return by_width<T>(wide(x, dim, sizeof(T)) && wide(out, dim, sizeof(T)), [&](auto form) {
      return go(MergeRows<T, form.WIDTH, false>{from_x, to, layout, dim, from, sources, slots, size, new_size});
    });
  });
}

// The common end of ToMe and PiToMe.
int32_t merge_by(const tc_shape* s, const MergeSpace& w, const Subset& a, const Subset& b, const Subset& rest,
                 const int32_t* ranked, const void* x, const float* size, void* out, int64_t* index, float* new_size,
                 int64_t* assign, tc_stream stream) {
  const int removed = s->n - s->k, left = a.count - removed + rest.count;
  const MergePlan plan{s->n,   s->k,    removed,   a,       b,     ranked, w.best,
                       rest,   w.list,  w.sources, w.slots, index, assign};
  TC_TRY(launch(plan, plan.parts(), s->batch, 0, stream));
  return merge_rows(s->dtype, s->dim, s->batch, x, out, layout_of(s, w.list), left, {w.sources, nullptr},
                    {w.slots, nullptr}, size, new_size, stream);
}

int32_t rank(const Keys& keys, int n, int k, int batch, int32_t* order, int64_t* index, tc_stream stream) {
  const RankBest body{keys, n, k, order, index};
  return launch(body, body.parts(), batch, body.shared(), stream);
}

int32_t select(const Keys& keys, int n, int take, int k, int batch, int32_t* order, int32_t* list, int32_t* slot,
               int64_t* index, tc_stream stream) {
  const SelectBest body{keys, n, take, k, order, list, slot, index};
  return launch(body, 1, batch, body.shared(), stream);
}

constexpr int RANK_ALL = 4096;  // up to here ranking all scores is quicker than selecting some first

}  // namespace
}  // namespace tc

using namespace tc;

size_t tc_dart_workspace(const tc_shape* s, int32_t pivots, const tc_text* text) {
  if (!dart_fits(s, pivots, text)) return 0;
  Carve c{nullptr};
  DartSpace(s, pivots, text_of(text), &c);
  return c.used;
}

int32_t tc_dart(const tc_shape* s, int32_t pivots, const tc_text* given, const void* x, const void* normed,
                const void* keys, void* out, int64_t* index, int64_t* assign, void* workspace, tc_stream stream) {
  if (!dart_fits(s, pivots, given) || !x || !normed || !keys || !out || !workspace) return INVALID;
  if (s->k == s->n) return identity(s, x, nullptr, out, index, nullptr, assign, stream);
  const Text text = text_of(given);
  Carve c{static_cast<char*>(workspace)};
  const DartSpace w(s, pivots, text, &c);
  TC_TRY(by_type(s->dtype, [&](auto type) {
    using T = decltype(type);
    return by_form<T>(wide(keys, s->head_dim, sizeof(T)), s->unit, [&](auto form) {
      const KeyNorms<T, form.WIDTH, form.SINGLE> body{key_rows<T>(s, keys), text, w.norms};
      return launch(body, body.parts(), s->batch, 0, stream);
    });
  }));
  const Pivots pick{w.norms, s->n, w.count, text, w.pivots};
  TC_TRY(launch(pick, 1, s->batch, pick.shared(), stream));
  TC_TRY(by_type(s->dtype, [&](auto type) {
    using T = decltype(type);
    return by_form<T>(wide(normed, s->dim, sizeof(T)), s->unit, [&](auto form) {
      const Rows<T> rows{static_cast<const T*>(normed), s->tap_length, s->dim, s->tap_start, s->n, s->unit};
      const auto go = [&](auto body) { return launch(body, body.parts(), s->batch, 0, stream); };
      constexpr int V = form.WIDTH;
      constexpr bool ONE = form.SINGLE;
      if (w.all > 4) return go(PivotDots<T, V, ONE, 8>{rows, w.count, text.pivots, w.pivots, w.dots, w.inverse});
      return go(PivotDots<T, V, ONE, 4>{rows, w.count, text.pivots, w.pivots, w.dots, w.inverse});
    });
  }));
  const DartPicks picks{s->n,      s->k,     w.count, text.pivots,              w.pivots, w.dots,
                        w.inverse, w.list,   assign ? w.slot : nullptr, index};
  TC_TRY(launch(picks, 1, s->batch, picks.shared(), stream));
  TC_TRY(copy_kept(s, x, out, w.list, s->k, stream));
  return finish_pruning(s, x, w.nearest, false, w.list, w.slot, nullptr, nullptr, nullptr, assign, stream);
}

size_t tc_topk_workspace(const tc_shape* s, int32_t fuse) {
  if (!topk_fits(s)) return 0;
  Carve c{nullptr};
  TopkSpace(s, fuse != 0, &c);
  return c.used;
}

int32_t tc_topk(const tc_shape* s, int32_t fuse, const void* x, const float* size, const void* attention, void* out,
                int64_t* index, float* new_size, int64_t* assign, void* workspace, tc_stream stream) {
  if (!topk_fits(s) || !x || !attention || !out || !workspace) return INVALID;
  if (s->k == s->n) return identity(s, x, size, out, index, new_size, assign, stream);
  Carve c{static_cast<char*>(workspace)};
  const TopkSpace w(s, fuse != 0, &c);
  const int take = fuse ? s->k - 1 : s->k;
  int32_t* slot = fuse || assign ? w.slot : nullptr;
  TC_TRY(by_type(s->dtype, [&](auto type) {
    using T = decltype(type);
    return by_unit(s->unit, [&](auto form) {
      const auto* rows = static_cast<const T*>(attention);
      const HeadMeans<T, form.SINGLE> body{rows, s->heads, s->tap_length, s->tap_start, s->n, s->unit, w.scores};
      return launch(body, body.parts(), s->batch, 0, stream);
    });
  }));
  const Keys keys{w.scores, nullptr, nullptr, s->n, 0};
  TC_TRY(select(keys, s->n, take, s->k, s->batch, nullptr, w.list, slot, index, stream));
  TC_TRY(copy_kept(s, x, out, w.list, take, stream));
  if (fuse) {
    TC_TRY(by_type(s->dtype, [&](auto type) {
      using T = decltype(type);
      TC_TRY(by_width<T>(wide(x, s->dim, sizeof(T)), [&](auto form) {
        const FuseSums<T, form.WIDTH> body{rows_of<T>(s, x), w.scores, w.slot, w.partial};
        return launch(body, body.parts(), s->batch, 0, stream);
      }));
      const int length = s->length - (s->n - s->k) * s->unit, row = s->start + take * s->unit;
      const FuseWrite<T> body{w.partial, int(w.chunks), s->unit * s->dim, s->dim, length,
                              row,       s->n,          s->k,             w.list, w.slot, static_cast<T*>(out)};
      return launch(body, body.parts(), s->batch, 0, stream);
    }));
  }
  return finish_pruning(s, x, w.nearest, false, w.list, w.slot, size, nullptr, new_size, assign, stream);
}

size_t tc_tome_workspace(const tc_shape* s) {
  if (!merge_fits(s)) return 0;
  Carve c{nullptr};
  MergeSpace(s, false, &c);
  return c.used;
}

int32_t tc_tome(const tc_shape* s, const void* x, const float* size, const void* keys, void* out, int64_t* index,
                float* new_size, int64_t* assign, void* workspace, tc_stream stream) {
  if (!merge_fits(s) || !x || !keys || !out || !workspace) return INVALID;
  if (s->k == s->n) return identity(s, x, size, out, index, new_size, assign, stream);
  Carve c{static_cast<char*>(workspace)};
  const MergeSpace w(s, false, &c);
  const int prefix = s->tap_start / s->unit, even = prefix % 2;
  const Subset a{(s->n + 1 - even) / 2, even, 2, nullptr, 0}, b{s->n - a.count, 1 - even, 2, nullptr, 0};
  TC_TRY(metric_of(s, keys, w.metric, w.best, a.count, stream));
  TC_TRY(most_similar(w.metric, s, s->head_dim, a, b, w.best, stream));
  const Keys by_best{nullptr, w.best, nullptr, a.count, 0};
  const int removed = s->n - s->k;
  if (prefix) {
    TC_TRY(select(by_best, a.count, removed, removed, s->batch, w.order, nullptr, nullptr, nullptr, stream));
  } else {  // the published order without a class token: the kept ones by similarity too
    TC_TRY(rank(by_best, a.count, a.count, s->batch, w.order, nullptr, stream));
  }
  return merge_by(s, w, a, b, Subset{}, w.order, x, size, out, index, new_size, assign, stream);
}

size_t tc_pitome_workspace(const tc_shape* s, int32_t) {
  if (!merge_fits(s)) return 0;
  Carve c{nullptr};
  MergeSpace(s, true, &c);
  return c.used;
}

int32_t tc_pitome(const tc_shape* s, int32_t all, float margin, float alpha, const void* x, const float* size,
                  const void* keys, void* out, int64_t* index, float* new_size, int64_t* assign, void* workspace,
                  tc_stream stream) {
  if (!merge_fits(s) || !x || !keys || !out || !workspace) return INVALID;
  if (s->k == s->n) return identity(s, x, size, out, index, new_size, assign, stream);
  Carve c{static_cast<char*>(workspace)};
  const MergeSpace w(s, true, &c);
  const int removed = s->n - s->k, paired = all ? s->n : 2 * removed;
  const Subset a{(paired + 1) / 2, 0, 2, w.order, s->n}, b{paired / 2, 1, 2, w.order, s->n};
  TC_TRY(metric_of(s, keys, w.metric, w.best, a.count, stream));
  const auto energies = large(s->n, s->n) ? tile<Use::ENERGY, 8> : tile<Use::ENERGY, 4>;
  TC_TRY(energies(w.metric, s, s->head_dim, everything(s), everything(s), nullptr, w.sums, nullptr, margin, alpha,
                  stream));
  const EnergyMeans means{w.sums, s->n, int(energy_tiles(s->n)), w.energy};
  TC_TRY(launch(means, means.parts(), s->batch, 0, stream));
  TC_TRY(rank(Keys{w.energy, nullptr, nullptr, s->n, 0}, s->n, s->n, s->batch, w.order, nullptr, stream));
  TC_TRY(most_similar(w.metric, s, s->head_dim, a, b, w.best, stream));
  if (all)
    TC_TRY(rank(Keys{nullptr, w.best, nullptr, a.count, 0}, a.count, a.count, s->batch, w.ranked, nullptr, stream));
  const Subset rest{s->n - paired, paired, 1, w.order, s->n};
  return merge_by(s, w, a, b, rest, all ? w.ranked : nullptr, x, size, out, index, new_size, assign, stream);
}

size_t tc_divprune_workspace(const tc_shape* s) {
  if (!shape_fits(s, MOST_DIVERSE)) return 0;
  Carve c{nullptr};
  DiverseSpace(s, &c);
  return c.used;
}

int32_t tc_divprune(const tc_shape* s, const void* x, void* out, int64_t* index, int64_t* assign, void* workspace,
                    tc_stream stream) {
  if (!shape_fits(s, MOST_DIVERSE) || !x || !out || !workspace) return INVALID;
  if (s->k == s->n) return identity(s, x, nullptr, out, index, nullptr, assign, stream);
  Carve c{static_cast<char*>(workspace)};
  const DiverseSpace w(s, &c);
  TC_TRY(unit_rows(s, x, w.nearest.rows, w.nearest.best, stream));
  const auto distances = large(s->n, s->n) ? tile<Use::DISTANCE, 8> : tile<Use::DISTANCE, 4>;
  TC_TRY(distances(w.nearest.rows, s, s->dim, everything(s), everything(s), nullptr, nullptr, w.distance, 0, 0,
                   stream));
  const SecondSmallest second{w.distance, s->n, w.second};
  TC_TRY(launch(second, second.parts(), s->batch, 0, stream));
  const FarthestPicks picks{w.distance, w.second, s->n, s->k, w.list, assign ? w.slot : nullptr, index};
  TC_TRY(launch(picks, 1, s->batch, picks.shared(), stream));
  TC_TRY(copy_kept(s, x, out, w.list, s->k, stream));
  return finish_pruning(s, x, w.nearest, true, w.list, w.slot, nullptr, nullptr, nullptr, assign, stream);
}

namespace tc {
namespace {
bool select_fits(int32_t batch, int32_t n, int32_t k) {
  return in(batch, 1, MOST_BATCH) && in(n, 1, MOST_SELECT) && in(k, 1, n);
}
bool tensors_fit(int32_t count, int32_t batch, int32_t n, int32_t k, const int32_t* dtype, const int32_t* width,
                 const void* const* x, const void* index, void* const* out) {
  if (!in(count, 1, 1024) || !select_fits(batch, n, k) || !dtype || !width || !x || !index || !out) return false;
  for (int t = 0; t < count; ++t)
    if (!in(dtype[t], TC_F32, TC_BF16) || !in(width[t], 1, MOST_WIDTH) || !x[t] || !out[t]) return false;
  return true;
}
}  // namespace
}  // namespace tc

size_t tc_select_workspace(int32_t batch, int32_t n, int32_t k) {
  if (!select_fits(batch, n, k)) return 0;
  Carve c{nullptr};
  c.take<int32_t>(size_t(batch) * k);
  return c.used;
}

int32_t tc_select(int32_t batch, int32_t n, int32_t k, int32_t sorted, const float* scores, int64_t* index,
                  void* workspace, tc_stream stream) {
  if (!select_fits(batch, n, k) || !scores || !index || !workspace) return INVALID;
  const Keys keys{scores, nullptr, nullptr, n, 0};
  if (sorted) return select(keys, n, k, k, batch, nullptr, nullptr, nullptr, index, stream);
  if (n <= RANK_ALL || k == n) return rank(keys, n, k, batch, nullptr, index, stream);
  auto* list = static_cast<int32_t*>(workspace);
  TC_TRY(select(keys, n, k, k, batch, nullptr, list, nullptr, nullptr, stream));
  return rank(Keys{scores, nullptr, list, n, k}, k, k, batch, nullptr, index, stream);
}

int32_t tc_gather(int32_t count, int32_t batch, int32_t n, int32_t k, const int32_t* dtype, const int32_t* width,
                  const void* const* x, const int64_t* index, void* const* out, tc_stream stream) {
  if (!tensors_fit(count, batch, n, k, dtype, width, x, index, out)) return INVALID;
  for (int t = 0; t < count; ++t) {
    const int64_t bytes = int64_t(width[t]) * (dtype[t] == TC_F32 ? 4 : 2);
    TC_TRY(copy_rows(x[t], out[t], Layout{n, 0, n, k, 1, {nullptr, index}}, bytes, batch, k, stream));
  }
  return 0;
}

int32_t tc_merge(int32_t count, int32_t batch, int32_t n, int32_t k, const int32_t* dtype, const int32_t* width,
                 const void* const* x, const float* size, const int64_t* index, const int64_t* sources,
                 const int64_t* slots, void* const* out, float* new_size, tc_stream stream) {
  if (!tensors_fit(count, batch, n, k, dtype, width, x, index, out) || (n > k && (!sources || !slots))) return INVALID;
  const Layout layout{n, 0, n, k, 1, {nullptr, index}};
  for (int t = 0; t < count; ++t)
    TC_TRY(merge_rows(dtype[t], width[t], batch, x[t], out[t], layout, 0, {nullptr, sources}, {nullptr, slots}, size,
                      t == 0 ? new_size : nullptr, stream));
  return 0;
}
