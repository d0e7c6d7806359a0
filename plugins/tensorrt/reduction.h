// One reduction node as a TensorRT plugin. All methods share this class; what differs stands in methods.cpp.
#ifndef TOKCOMPILE_REDUCTION_H
#define TOKCOMPILE_REDUCTION_H

#include "methods.h"
#include "shapes.h"

#include <string>
#include <vector>

namespace tokcompile {

constexpr char const* NAMESPACE = "tokcompile";
constexpr char const* VERSION = "1";

// The interfaces of TensorRT 10.0. Outputs never share memory with inputs, which is what these promise.
class Reduction final : public nvinfer1::IPluginV3,
                        public nvinfer1::v_1_0::IPluginV3OneCore,
                        public nvinfer1::v_1_0::IPluginV3OneBuild,
                        public nvinfer1::v_1_0::IPluginV3OneRuntime {
 public:
  // Throws Refusal where the fields do not make sense for the method.
  Reduction(Method const& method, std::string who, nvinfer1::PluginFieldCollection const& given);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  char const* getPluginName() const noexcept override { return method_.name; }
  char const* getPluginVersion() const noexcept override { return VERSION; }
  char const* getPluginNamespace() const noexcept override { return NAMESPACE; }

  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(outputs_.size()); }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t nbOutputs, nvinfer1::DataType const* inputs,
                             int32_t nbInputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const* shapeInputs,
                          int32_t nbShapeInputs, nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                 int32_t nbOutputs) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t nbOutputs) const noexcept override;

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const* out,
                        int32_t nbOutputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  void checkNames() const;
  void checkCounts(size_t nbInputs, size_t nbOutputs) const;
  void checkLimits(std::vector<Extent> in) const;

  Method const& method_;
  std::string who_;  // for messages
  Fields fields_;
  Attributes attributes_;
  std::vector<std::string> inputs_, outputs_;  // of attributes_, taken apart
  std::vector<nvinfer1::PluginField> written_;  // what getFieldsToSerialize last gave
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace tokcompile
#endif
