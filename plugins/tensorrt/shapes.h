// The shapes of a node's inputs: what they must be, and what the kernels are told of them.
#ifndef TOKCOMPILE_SHAPES_H
#define TOKCOMPILE_SHAPES_H

#include "../kernels/launch.h"
#include "attributes.h"

#include <array>
#include <string>
#include <vector>

namespace tokcompile {

// The sizes of one tensor; -1 where not known yet.
struct Extent {
  int32_t rank = 0;
  std::array<int64_t, nvinfer1::Dims::MAX_DIMS> sizes{};
};

Extent extent(nvinfer1::Dims const& dims);
Extent extent(nvinfer1::DimsExprs const& dims);

// "3x14x16", with ? for what is not known.
std::string shown(Extent const& e);

// Throws Refusal where what is known of the shapes does not fit the attributes. names, in: of the inputs, x first.
void checkShapes(Attributes const& a, std::vector<std::string> const& names, std::vector<Extent> const& in);

// The same shapes, all known, as the kernels want them.
tc_shape kernelShape(Attributes const& a, std::vector<std::string> const& names, std::vector<Extent> const& in,
                     nvinfer1::DataType type);

// TC_F32, TC_F16 or TC_BF16; -1 for a type that no kernel takes.
int32_t kernelType(nvinfer1::DataType type);

}  // namespace tokcompile
#endif
