// Runs one node as TensorRT would, over the kernels' host build: a plugin made from the node's attributes is written,
// made again at run time, and given the inputs. Buffers have exactly the sizes that the plugin says: a sanitizer sees
// what it reads or writes beside them.
//
// Usage: creator_node FOLDER, which holds a file `node` of lines of words, and afterwards output_0, output_1, ...:
//   plugin NAME | int NAME VALUE... | float NAME VALUE | text NAME VALUE | dtype f32|f16|bf16 | input FILE SIZE...
// It prints the type (as in TensorRT) and the sizes of each output.
#include "creator_fakes.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

extern "C" int32_t tc_host_threads(int32_t threads);

namespace {

using namespace fakes;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<void, Free>;

// Filled with what is NaN in every floating type.
Memory memory(size_t bytes) {
  void* p = std::aligned_alloc(256, std::max<size_t>((bytes + 255) / 256 * 256, 256));
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

// Exactly `bytes` bytes, 16 bytes aligned as malloc gives them.
Memory exact(size_t bytes) {
  void* p = std::malloc(bytes);
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

int32_t width(DataType type) {
  return type == DataType::kINT64 ? 8 : type == DataType::kFLOAT ? 4 : 2;
}

size_t bytes(Sizes const& sizes, DataType type) {
  size_t out = width(type);
  for (int64_t size : sizes) {
    out *= size;
  }
  return out;
}

int fail(std::string const& why, Logger const& logger) {
  std::cerr << why << "\n" << logger.errors;
  return 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: creator_node FOLDER\n";
    return 2;
  }
  std::string const folder = arguments[1];
  std::ifstream node(folder + "/node");
  std::string name, inputs;
  Fields fields;
  DataType dtype = DataType::kFLOAT;
  std::vector<std::pair<std::string, Sizes>> given;
  for (std::string line; std::getline(node, line);) {
    std::istringstream words(line);
    std::string kind, key;
    words >> kind >> key;
    std::vector<std::string> const rest{std::istream_iterator<std::string>(words), {}};
    Sizes numbers;
    for (auto const& word : rest) {
      numbers.push_back(std::strtoll(word.c_str(), nullptr, 10));
    }
    if (kind == "plugin") {
      name = key;
    } else if (kind == "int") {
      fields.longs(key, numbers);
    } else if (kind == "float") {
      fields.number(key, std::strtof(rest.at(0).c_str(), nullptr));
    } else if (kind == "text") {
      fields.text(key, rest.at(0));
      inputs = key == "inputs" ? rest[0] : inputs;
    } else if (kind == "dtype") {
      dtype = key == "f16" ? DataType::kHALF : key == "bf16" ? DataType::kBF16 : DataType::kFLOAT;
    } else if (kind == "input") {
      given.emplace_back(key, numbers);
    }
  }

  tc_host_threads(1);  // a thread per CUDA thread only costs time here: the kernels' own tests look for races
  Logger logger;
  setLoggerFinder(&logger);
  auto const built = create(name, fields.collection(), TensorRTPhase::kBUILD);
  if (!built) {
    return fail("no plugin " + name, logger);
  }
  auto const plugin = create(name, built.runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  if (!plugin) {
    return fail("no plugin at run time", logger);
  }

  std::vector<DataType> types;
  std::vector<DimsExprs> shapes;
  std::vector<DynamicPluginTensorDesc> most;
  std::vector<PluginTensorDesc> in;
  std::vector<Memory> owned;
  std::vector<void const*> from;
  Builder builder;
  std::istringstream names(inputs);
  for (auto const& [file, sizes] : given) {
    std::string input;
    std::getline(names, input, ',');
    types.push_back(input == "size" ? DataType::kFLOAT : dtype);
    shapes.push_back(builder.shape(sizes));
    in.push_back(describe(sizes, types.back()));
    most.push_back(profile(sizes, types.back()));
    size_t const length = bytes(sizes, types.back());
    owned.push_back(exact(length));
    from.push_back(owned.back().get());
    std::ifstream(folder + "/" + file, std::ios::binary).read(static_cast<char*>(owned.back().get()), length);
  }

  int32_t const nbIn = int32_t(in.size()), nbOut = plugin.build->getNbOutputs();
  std::vector<DataType> outTypes(nbOut);
  std::vector<DimsExprs> outShapes(nbOut);
  if (plugin.build->getOutputDataTypes(outTypes.data(), nbOut, types.data(), nbIn) ||
      plugin.build->getOutputShapes(shapes.data(), nbIn, nullptr, 0, outShapes.data(), nbOut, builder)) {
    return fail("no types and shapes", logger);
  }
  std::vector<PluginTensorDesc> out;
  std::vector<DynamicPluginTensorDesc> all = most;
  std::vector<void*> to;
  for (int32_t i = 0; i < nbOut; ++i) {
    out.push_back(describe(sizes(outShapes[i]), outTypes[i]));
    all.push_back(profile(sizes(outShapes[i]), outTypes[i]));
    owned.push_back(exact(bytes(sizes(outShapes[i]), outTypes[i])));
    to.push_back(owned.back().get());
  }
  for (int32_t i = 0; i < nbIn + nbOut; ++i) {
    if (!plugin.build->supportsFormatCombination(i, all.data(), nbIn, nbOut)) {
      return fail("tensor " + std::to_string(i) + " has a type that is not supported", logger);
    }
  }
  auto const workspace = memory(plugin.build->getWorkspaceSize(most.data(), nbIn, all.data() + nbIn, nbOut));
  if (plugin.runtime->onShapeChange(in.data(), nbIn, out.data(), nbOut) ||
      plugin.runtime->enqueue(in.data(), out.data(), from.data(), to.data(), workspace.get(), nullptr)) {
    return fail("the kernel was not run", logger);
  }
  for (int32_t i = 0; i < nbOut; ++i) {
    auto const size = sizes(outShapes[i]);
    std::cout << int32_t(outTypes[i]);
    for (int64_t d : size) {
      std::cout << " " << d;
    }
    std::cout << "\n";
    std::ofstream(folder + "/output_" + std::to_string(i), std::ios::binary)
        .write(static_cast<char const*>(to[i]), bytes(size, outTypes[i]));
  }
  return 0;
}
