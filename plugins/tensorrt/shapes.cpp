#include "shapes.h"

#include <algorithm>

namespace tokcompile {
namespace {

using nvinfer1::DataType;

// How an input of the contract is laid out: its rank, and which axis is what; -1 where it has none.
struct Layout {
  char const* name;
  int32_t rank, length, heads, width;
};
constexpr Layout LAYOUTS[] = {
    {"x", 3, 1, -1, 2},
    {"size", 2, -1, -1, -1},
    {"normed", 3, 1, -1, 2},
    {"k", 4, 2, 1, 3},
    {"rotated_k", 4, 2, 1, 3},
    {"cls_attention", 3, 2, 1, -1},
    {"last_attention", 3, 2, 1, -1},
    {"received_attention", 3, 2, 1, -1},
};

Layout const& layout(std::string const& name) {
  for (auto const& l : LAYOUTS) {
    if (name == l.name) {
      return l;
    }
  }
  throw Refusal(text("input ", name, " is not known"));
}

// Whether two sizes are known and not the same.
bool differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }

}  // namespace

Extent extent(nvinfer1::Dims const& dims) {
  Extent out;
  out.rank = std::max(dims.nbDims, 0);
  std::copy_n(dims.d, out.rank, out.sizes.begin());
  return out;
}

Extent extent(nvinfer1::DimsExprs const& dims) {
  Extent out;
  out.rank = std::max(dims.nbDims, 0);
  for (int32_t i = 0; i < out.rank; ++i) {
    out.sizes[i] = dims.d[i]->isConstant() ? dims.d[i]->getConstantValue() : -1;
  }
  return out;
}

std::string shown(Extent const& e) {
  std::string out;
  for (int32_t i = 0; i < e.rank; ++i) {
    out += (i ? "x" : "") + (e.sizes[i] < 0 ? "?" : std::to_string(e.sizes[i]));
  }
  return out.empty() ? "a scalar" : out;
}

void checkShapes(Attributes const& a, std::vector<std::string> const& names, std::vector<Extent> const& in) {
  auto const& x = in.front().sizes;
  int64_t tap_length = -1;
  for (size_t i = 0; i < in.size(); ++i) {
    auto const& l = layout(names[i]);
    auto const& size = in[i].sizes;
    auto refuse = [&](auto const&... why) {
      throw Refusal(text("input ", names[i], " is ", shown(in[i]), "; it must ", why...));
    };
    if (in[i].rank != l.rank) {
      refuse("have ", l.rank, " dimensions");
    }
    if (differ(size[0], x[0])) {
      refuse("have the batch of x, ", x[0]);
    }
    if (names[i] == "size" && differ(size[1], a.n)) {
      refuse("hold n = ", a.n, " sizes");
    }
    if (names[i] == "normed" && differ(size[2], x[2])) {
      refuse("be as wide as x, ", x[2]);
    }
    bool const tap = i > 0 && l.length >= 0;
    if (tap && differ(size[l.length], tap_length)) {
      refuse("be as long as the tap before it, ", tap_length);
    }
    int32_t const first = tap ? a.tap_start : a.start;
    if (l.length >= 0 && size[l.length] >= 0 && size[l.length] < first + int64_t(a.n) * a.unit) {
      refuse("hold n = ", a.n, " groups of unit = ", a.unit, " from ", tap ? "tap_start" : "start", " = ", first);
    }
    if (tap && size[l.length] >= 0 && size[l.length] < a.text.back()) {
      refuse("hold the text up to ", a.text.back());
    }
    tap_length = tap ? size[l.length] : tap_length;
  }
}

tc_shape kernelShape(Attributes const& a, std::vector<std::string> const& names, std::vector<Extent> const& in,
                     DataType type) {
  auto at = [](Extent const& e, int32_t axis) { return axis < 0 ? 0 : static_cast<int32_t>(e.sizes[axis]); };
  tc_shape s{};
  s.dtype = kernelType(type);
  s.batch = at(in[0], 0), s.length = at(in[0], 1), s.dim = at(in[0], 2);
  s.start = a.start, s.n = a.n, s.k = a.k, s.unit = a.unit, s.tap_start = a.tap_start;
  for (size_t i = 1; i < in.size(); ++i) {
    auto const& l = layout(names[i]);
    if (l.length >= 0) {
      s.tap_length = at(in[i], l.length);
    }
    if (l.heads >= 0) {
      s.heads = at(in[i], l.heads), s.head_dim = at(in[i], l.width);
    }
  }
  return s;
}

int32_t kernelType(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return TC_F32;
    case DataType::kHALF: return TC_F16;
    case DataType::kBF16: return TC_BF16;
    default: return -1;
  }
}

}  // namespace tokcompile
