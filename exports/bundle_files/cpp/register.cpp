// Loaded into a process, it registers libtokcompile_plugins.so, which must lie in the same folder, with TensorRT.
//
// Triton opens the libraries it is told of with dlopen and nothing more. That is enough for a library which registers
// itself while it is loaded, but ours does so through getCreators, which only IPluginRegistry::loadLibrary calls.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

namespace {

struct Register {
  Register() {
    Dl_info self{};
    if (!dladdr(&instance, &self) || !self.dli_fname) {
      std::fprintf(stderr, "tokcompile: cannot find the folder of libtokcompile_register.so\n");
      return;
    }
    std::string path = self.dli_fname;
    auto slash = path.rfind('/');
    path = (slash == std::string::npos ? "" : path.substr(0, slash + 1)) + "libtokcompile_plugins.so";
    if (!getPluginRegistry()->loadLibrary(path.c_str())) {
      std::fprintf(stderr, "tokcompile: TensorRT could not load %s\n", path.c_str());
    }
  }
  static Register instance;
};

Register Register::instance;

}  // namespace
