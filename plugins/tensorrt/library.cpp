// The library's two entry points, which TensorRT finds by name, and the creators it gets there.
#include "reduction.h"

#include <memory>

namespace tokcompile {
namespace {

using namespace nvinfer1;

class Creator final : public v_1_0::IPluginCreatorV3One {
 public:
  explicit Creator(Method const& method) : method_(method), declared_(declareAttributes(method.fields())) {
    collection_ = {static_cast<int32_t>(declared_.size()), declared_.data()};
  }
  Creator(Creator const&) = delete;  // collection_ points into declared_

  // The fields of an engine at run time are those of the node, so both phases are one.
  IPluginV3* createPlugin(char const* name, PluginFieldCollection const* given, TensorRTPhase) noexcept override {
    return guarded<IPluginV3*>(method_.name, nullptr, [&]() -> IPluginV3* {
      auto const who = text("tokcompile plugin ", method_.name, " \"", name ? name : "", "\"");
      return guarded<IPluginV3*>(who, nullptr, [&] {
        PluginFieldCollection const none{};
        return new Reduction(method_, who, given ? *given : none);
      });
    });
  }

  // The parser hands over only the attributes that stand here.
  PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return method_.name; }
  char const* getPluginVersion() const noexcept override { return VERSION; }
  char const* getPluginNamespace() const noexcept override { return NAMESPACE; }

 private:
  Method const& method_;
  std::vector<PluginField> declared_;
  PluginFieldCollection collection_{};
};

struct Creators {
  Creators() {
    for (auto const& method : methods()) {
      owned.push_back(std::make_unique<Creator>(method));
      all.push_back(owned.back().get());
    }
  }
  std::vector<std::unique_ptr<Creator>> owned;
  std::vector<IPluginCreatorInterface*> all;
};

}  // namespace
}  // namespace tokcompile

extern "C" TC_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
  static tokcompile::Creators const creators;
  nbCreators = static_cast<int32_t>(creators.all.size());
  return creators.all.data();
}

extern "C" TC_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { tokcompile::setFinder(finder); }
