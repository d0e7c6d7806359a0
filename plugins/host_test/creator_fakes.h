// What stands in for TensorRT around the plugins in these tests: a logger, node fields, shape expressions.
#ifndef TOKCOMPILE_CREATOR_FAKES_H
#define TOKCOMPILE_CREATOR_FAKES_H

#include <NvInferRuntime.h>

#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace fakes {

using namespace nvinfer1;

// Keeps what was logged as an error.
class Logger final : public ILogger, public ILoggerFinder {
 public:
  void log(Severity severity, AsciiChar const* message) noexcept override {
    if (severity == Severity::kERROR) {
      errors += std::string(message) + "\n";
    }
  }
  ILogger* findLogger() override { return this; }
  std::string errors;
};

// Fields that own their data, in the order in which they were set.
class Fields {
 public:
  void set(std::string const& name, PluginFieldType type, void const* data, size_t bytes, int32_t length) {
    auto& v = values_[name];
    v = {type, std::vector<char>(static_cast<char const*>(data), static_cast<char const*>(data) + bytes), length};
  }
  void ints(std::string const& name, std::vector<int32_t> const& v) {
    set(name, PluginFieldType::kINT32, v.data(), v.size() * 4, int32_t(v.size()));
  }
  void longs(std::string const& name, std::vector<int64_t> const& v) {
    set(name, PluginFieldType::kINT64, v.data(), v.size() * 8, int32_t(v.size()));
  }
  void number(std::string const& name, float v) { set(name, PluginFieldType::kFLOAT32, &v, 4, 1); }
  void text(std::string const& name, std::string const& v) {
    set(name, PluginFieldType::kCHAR, v.c_str(), v.size() + 1, int32_t(v.size()) + 1);
  }
  void remove(std::string const& name) { values_.erase(name); }

  // All integers as 64-bit ones.
  Fields widened() const {
    Fields out;
    for (auto const& [name, v] : values_) {
      if (v.type == PluginFieldType::kINT32) {
        std::vector<int32_t> from(v.length);
        std::memcpy(from.data(), v.data.data(), v.data.size());
        out.longs(name, {from.begin(), from.end()});
      } else {
        out.set(name, v.type, v.data.data(), v.data.size(), v.length);
      }
    }
    return out;
  }

  PluginFieldCollection const* collection() {
    fields_.clear();
    for (auto const& [name, v] : values_) {
      fields_.emplace_back(name.c_str(), v.data.data(), v.type, v.length);
    }
    collection_ = {int32_t(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  struct Value {
    PluginFieldType type;
    std::vector<char> data;
    int32_t length;
  };
  std::map<std::string, Value> values_;
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

// A size, -1 where it is only known at run time, or the difference of such a size and a constant.
class Expr final : public IDimensionExpr, apiv::VDimensionExpr {
 public:
  explicit Expr(int64_t v) : value(v) { mImpl = this; }
  bool isConstant() const noexcept override { return value >= 0; }
  int64_t getConstantValue() const noexcept override { return value; }
  bool isSizeTensor() const noexcept override { return false; }
  int64_t value;
};

class Builder final : public IExprBuilder, apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(int64_t value) noexcept override { return make(value); }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const& a,
                                  IDimensionExpr const& b) noexcept override {
    return make(static_cast<Expr const&>(a).value < 0 ? -1 : a.getConstantValue() - b.getConstantValue());
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) noexcept override {
    return nullptr;
  }
  DimsExprs shape(std::vector<int64_t> const& sizes) {
    DimsExprs out{};
    out.nbDims = int32_t(sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
      out.d[i] = make(sizes[i]);
    }
    return out;
  }

 private:
  Expr const* make(int64_t value) {
    made_.push_back(std::make_unique<Expr>(value));
    return made_.back().get();
  }
  std::deque<std::unique_ptr<Expr>> made_;
};

using Sizes = std::vector<int64_t>;

inline Sizes sizes(DimsExprs const& d) {
  Sizes out;
  for (int32_t i = 0; i < d.nbDims; ++i) {
    out.push_back(static_cast<Expr const*>(d.d[i])->value);
  }
  return out;
}

inline PluginTensorDesc describe(Sizes const& sizes, DataType type) {
  PluginTensorDesc out{};
  out.type = type;
  out.format = TensorFormat::kLINEAR;
  out.dims.nbDims = int32_t(sizes.size());
  std::copy(sizes.begin(), sizes.end(), out.dims.d);
  return out;
}

// A tensor of an optimization profile: its sizes at most.
inline DynamicPluginTensorDesc profile(Sizes const& most, DataType type) {
  DynamicPluginTensorDesc out{};
  out.desc = describe(most, type);
  out.min = out.max = out.opt = out.desc.dims;
  return out;
}

inline IPluginCreatorV3One* creator(std::string const& name) {
  int32_t count = 0;
  auto* const* all = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
    if (name == one->getPluginName()) {
      return one;
    }
  }
  return nullptr;
}

// A plugin with its three capabilities.
struct Plugin {
  explicit Plugin(IPluginV3* made) : plugin(made) {
    if (made) {
      core = static_cast<IPluginV3OneCore*>(made->getCapabilityInterface(PluginCapabilityType::kCORE));
      build = static_cast<v_1_0::IPluginV3OneBuild*>(made->getCapabilityInterface(PluginCapabilityType::kBUILD));
      runtime = static_cast<IPluginV3OneRuntime*>(made->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    }
  }
  explicit operator bool() const { return plugin && core && build && runtime; }
  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneCore* core = nullptr;
  v_1_0::IPluginV3OneBuild* build = nullptr;
  IPluginV3OneRuntime* runtime = nullptr;
};

inline Plugin create(std::string const& name, PluginFieldCollection const* fields, TensorRTPhase phase) {
  auto* found = creator(name);
  return Plugin(found ? found->createPlugin("reduction_0", fields, phase) : nullptr);
}

// A field of 32-bit numbers or of characters as a string.
inline std::string written(PluginField const& f) {
  int32_t const bytes = f.type == PluginFieldType::kCHAR ? f.length : 4 * f.length;
  return std::string(f.name) + "=" + std::to_string(int32_t(f.type)) + ":" +
         std::string(static_cast<char const*>(f.data), bytes) + ";";
}

// The fields as one string: equal for equal plugins.
inline std::string written(Plugin const& p) {
  std::string out = ";";
  auto const* all = p.runtime->getFieldsToSerialize();
  for (int32_t i = 0; all && i < all->nbFields; ++i) {
    out += written(all->fields[i]);
  }
  return out;
}

}  // namespace fakes
#endif
