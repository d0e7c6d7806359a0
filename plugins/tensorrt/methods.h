// The methods that have a kernel, as data: adding one is one row in methods.cpp.
#ifndef TOKCOMPILE_METHODS_H
#define TOKCOMPILE_METHODS_H

#include "../kernels/launch.h"
#include "attributes.h"

#include <string>
#include <vector>

namespace tokcompile {

// Device pointers by their names in the contract; null where the node does not have them.
struct Tensors {
  void const* x;
  float const* size;
  void const* normed;
  void const* keys;
  void const* attention;
  void* out;
  int64_t* index;
  float* new_size;
  int64_t* assign;
  void* workspace;
  tc_stream stream;
};

struct Method {
  char const* name;                            // of the plugin: the node's op type
  std::vector<std::vector<std::string>> taps;  // the inputs beside x and size; each goes by any of its names
  bool sized;                                  // whether the kernel reads and writes sizes
  Fields options;                              // attributes beside those that all methods have
  void (*check)(Attributes const&);            // throws Refusal; null where nothing is left to check
  size_t (*workspace)(tc_shape const&, Attributes const&);
  int32_t (*launch)(tc_shape const&, Attributes const&, Tensors const&);

  Fields fields() const;  // all attributes
};

std::vector<Method> const& methods();

}  // namespace tokcompile
#endif
