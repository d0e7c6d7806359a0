#include "reduction.h"

#include <algorithm>

namespace tokcompile {
namespace {

using namespace nvinfer1;

int32_t position(std::vector<std::string> const& names, std::string const& name) {
  auto const at = std::find(names.begin(), names.end(), name);
  return at == names.end() ? -1 : static_cast<int32_t>(at - names.begin());
}

// The first of `among` that `names` has; -1 if it has none.
int32_t position(std::vector<std::string> const& names, std::vector<std::string> const& among) {
  int32_t at = -1;
  for (auto const& name : among) {
    at = at < 0 ? position(names, name) : at;
  }
  return at;
}

// Whether both have the same names, in any order after the first.
bool sameWithFirst(std::vector<std::string> const& names, std::vector<std::string> const& wanted) {
  return !names.empty() && names[0] == wanted[0] &&
         std::is_permutation(names.begin(), names.end(), wanted.begin(), wanted.end());
}

std::vector<Extent> extents(PluginTensorDesc const* in, size_t count) {
  std::vector<Extent> out;
  for (size_t i = 0; i < count; ++i) {
    out.push_back(extent(in[i].dims));
  }
  return out;
}

}  // namespace

Reduction::Reduction(Method const& method, std::string who, PluginFieldCollection const& given)
    : method_(method), who_(std::move(who)), fields_(method.fields()), attributes_(readAttributes(fields_, given)),
      inputs_(split(attributes_.inputs)), outputs_(split(attributes_.outputs)) {
  if (attributes_.k > attributes_.n) {  // TensorRT builds such an engine without a word
    throw Refusal(text("attribute k is ", attributes_.k, "; it must be an integer from 1 to n = ", attributes_.n));
  }
  checkNames();
  if (method_.check) {
    method_.check(attributes_);
  }
}

// Tensors are found by their names, so any order will do as long as x comes first: its type is that of the others.
void Reduction::checkNames() const {
  std::vector<std::string> reads = {"x"}, writes = {"x", "index"};
  for (auto const& names : method_.taps) {
    int32_t const at = position(inputs_, names);
    reads.push_back(at < 0 ? names.front() : inputs_[at]);
  }
  auto const taps = join(reads);
  if (method_.sized && position(inputs_, "size") >= 0) {
    reads.push_back("size");
  }
  if (method_.sized && position(outputs_, "size") >= 0) {
    writes.push_back("size");
  }
  if (position(outputs_, "assign") >= 0) {
    writes.push_back("assign");
  }
  if (!sameWithFirst(inputs_, reads)) {
    throw Refusal(text("attribute inputs is \"", attributes_.inputs, "\"; it must name ", taps,
                       method_.sized ? ", with or without size" : "", ", and x first"));
  }
  if (!sameWithFirst(outputs_, writes)) {
    throw Refusal(text("attribute outputs is \"", attributes_.outputs, "\"; it must name x, index, with or without ",
                       method_.sized ? "size and " : "", "assign, and x first"));
  }
}

void Reduction::checkCounts(size_t nbInputs, size_t nbOutputs) const {
  if (nbInputs != inputs_.size() || nbOutputs != outputs_.size()) {
    throw Refusal(text("the node has ", nbInputs, " inputs and ", nbOutputs, " outputs; its attributes name ",
                       attributes_.inputs, " and ", attributes_.outputs));
  }
}

// Throws Refusal where the kernel takes no such shape, of which launch.h says only that it needs no workspace.
void Reduction::checkLimits(std::vector<Extent> in) const {
  for (auto& e : in) {
    std::replace(e.sizes.begin(), e.sizes.end(), int64_t(-1), int64_t(1));  // the batch of a profile
  }
  if (!method_.workspace(kernelShape(attributes_, inputs_, in, DataType::kFLOAT), attributes_)) {
    throw Refusal(text("the kernel does not take ", attributes_.n, " tokens in groups of ", attributes_.unit,
                       " over x of ", shown(in[0]), ": export with form=\"plain\""));
  }
}

IPluginCapability* Reduction::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<v_1_0::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<v_1_0::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<v_1_0::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* Reduction::clone() noexcept {
  return guarded<IPluginV3*>(who_, nullptr, [&] { return new Reduction(*this); });
}

int32_t Reduction::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
                                      int32_t nbInputs) const noexcept {
  return guarded(who_, -1, [&] {
    checkCounts(nbInputs, nbOutputs);
    for (int32_t i = 0; i < nbOutputs; ++i) {
      outputs[i] = i == 0 ? inputs[0] : outputs_[i] == "size" ? DataType::kFLOAT : DataType::kINT64;
    }
    return 0;
  });
}

int32_t Reduction::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
                                   DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& builder) noexcept {
  return guarded(who_, -1, [&] {
    checkCounts(nbInputs, nbOutputs);
    std::vector<Extent> known;
    for (int32_t i = 0; i < nbInputs; ++i) {
      known.push_back(extent(inputs[i]));
    }
    auto const& a = attributes_;
    checkShapes(a, inputs_, known);
    checkLimits(known);
    for (int32_t i = 1; i < nbOutputs; ++i) {
      outputs[i].nbDims = 2;
      outputs[i].d[0] = inputs[0].d[0];
      outputs[i].d[1] = builder.constant(outputs_[i] == "assign" ? a.n : a.k);
    }
    auto const* removed = builder.constant(int64_t(a.n - a.k) * a.unit);
    outputs[0].nbDims = 3;
    outputs[0].d[0] = inputs[0].d[0];
    outputs[0].d[1] = builder.operation(DimensionOperation::kSUB, *inputs[0].d[1], *removed);
    outputs[0].d[2] = inputs[0].d[2];
    return 0;
  });
}

bool Reduction::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                          int32_t nbOutputs) noexcept {
  return guarded(who_, false, [&] {
    checkCounts(nbInputs, nbOutputs);
    auto const& name = pos < nbInputs ? inputs_.at(pos) : outputs_.at(pos - nbInputs);
    auto const& desc = inOut[pos].desc;
    if (desc.format != TensorFormat::kLINEAR) {
      return false;
    }
    if (name == "size") {
      return desc.type == DataType::kFLOAT;
    }
    if (name == "index" || name == "assign") {
      return desc.type == DataType::kINT64;
    }
    return kernelType(desc.type) >= 0 && desc.type == inOut[0].desc.type;
  });
}

int32_t Reduction::configurePlugin(DynamicPluginTensorDesc const*, int32_t nbInputs, DynamicPluginTensorDesc const*,
                                   int32_t nbOutputs) noexcept {
  return guarded(who_, -1, [&] {
    checkCounts(nbInputs, nbOutputs);
    return 0;
  });
}

size_t Reduction::getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const*,
                                   int32_t nbOutputs) const noexcept {
  return guarded<size_t>(who_, 0, [&] {
    checkCounts(nbInputs, nbOutputs);
    std::vector<Extent> largest;
    for (int32_t i = 0; i < nbInputs; ++i) {
      largest.push_back(extent(in[i].max));
    }
    checkShapes(attributes_, inputs_, largest);
    return method_.workspace(kernelShape(attributes_, inputs_, largest, in[0].desc.type), attributes_);
  });
}

int32_t Reduction::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                                 int32_t nbOutputs) noexcept {
  return guarded(who_, -1, [&] {
    checkCounts(nbInputs, nbOutputs);
    auto const now = extents(in, nbInputs);
    checkShapes(attributes_, inputs_, now);
    checkLimits(now);
    return 0;
  });
}

int32_t Reduction::enqueue(PluginTensorDesc const* in, PluginTensorDesc const*, void const* const* inputs,
                           void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded(who_, -1, [&] {
    auto input = [&](std::vector<std::string> const& names) {
      int32_t const at = position(inputs_, names);
      return at < 0 ? nullptr : inputs[at];
    };
    auto output = [&](char const* name) {
      int32_t const at = position(outputs_, name);
      return at < 0 ? nullptr : outputs[at];
    };
    Tensors t{};
    t.x = inputs[0], t.size = static_cast<float const*>(input({"size"}));
    t.normed = input({"normed"}), t.keys = input({"k", "rotated_k"});
    t.attention = input({"cls_attention", "last_attention", "received_attention"});
    t.out = outputs[0], t.index = static_cast<int64_t*>(output("index"));
    t.new_size = static_cast<float*>(output("size")), t.assign = static_cast<int64_t*>(output("assign"));
    t.workspace = workspace, t.stream = stream;
    auto const shape = kernelShape(attributes_, inputs_, extents(in, inputs_.size()), in[0].type);
    int32_t const error = method_.launch(shape, attributes_, t);
    if (error) {
      throw Refusal(text("the kernel returned cudaError_t ", error));
    }
    return 0;
  });
}

PluginFieldCollection const* Reduction::getFieldsToSerialize() noexcept {
  return guarded<PluginFieldCollection const*>(who_, nullptr, [&] {
    written_ = writeAttributes(fields_, attributes_);
    collection_ = {static_cast<int32_t>(written_.size()), written_.data()};
    return &collection_;
  });
}

}  // namespace tokcompile
