// What a plugin knows of its node: those attributes of plugins/contract.py that are needed at run time.
#ifndef TOKCOMPILE_ATTRIBUTES_H
#define TOKCOMPILE_ATTRIBUTES_H

#include "log.h"

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace tokcompile {

struct Attributes {
  std::string inputs, outputs;  // names in order, separated by commas
  int32_t n = 0, k = 0, unit = 0, start = 0, tap_start = 0;
  int32_t prefix = 0, block = 0, depth = 0;
  std::vector<int32_t> text = {0};  // starts and stops of text tokens in the taps; (0,): none
  int32_t option_pivots = 0, option_text_pivots = 0, option_fuse = 0;
  float option_margin = 0, option_alpha = 0;
  std::string option_variant, option_strategy;
};

using Member = std::variant<int32_t Attributes::*, float Attributes::*, std::string Attributes::*,
                            std::vector<int32_t> Attributes::*>;

// One attribute: its name, where it is kept, and what it may be.
struct Field {
  char const* name;
  Member member;
  int32_t least = 0, most = INT32_MAX;  // of integers
  std::vector<std::string> among = {};  // of a string; empty: any
  bool optional = false;                // files of a release that did not have it mean the default
};

using Fields = std::vector<Field>;

// The attributes that `fields` names; all others are ignored. Throws Refusal where one is missing or wrong.
Attributes readAttributes(Fields const& fields, nvinfer1::PluginFieldCollection const& given);

// `attributes` as plugin fields, which point into it.
std::vector<nvinfer1::PluginField> writeAttributes(Fields const& fields, Attributes const& attributes);

// The fields by name and type alone: what a creator tells the parser to look for.
std::vector<nvinfer1::PluginField> declareAttributes(Fields const& fields);

// "a,b" -> {"a", "b"}
std::vector<std::string> split(std::string const& names);

// {"a", "b"} -> "a, b"
std::string join(std::vector<std::string> const& names);

}  // namespace tokcompile
#endif
