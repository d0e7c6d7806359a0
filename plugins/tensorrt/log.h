// Messages to TensorRT's log, or to stderr where nobody gave us a logger.
#ifndef TOKCOMPILE_LOG_H
#define TOKCOMPILE_LOG_H

#include <NvInferRuntime.h>

#include <sstream>
#include <stdexcept>
#include <string>

#if NV_TENSORRT_MAJOR < 10
#error "tokcompile needs TensorRT 10 or later: IPluginV3 does not exist before"
#endif

namespace tokcompile {

// A node or a shape that a plugin does not take. It never leaves the library: TensorRT's interfaces must not throw.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(Parts const&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

void setFinder(nvinfer1::ILoggerFinder* finder);
void logError(std::string const& message);

// f(), or `failure` with a logged message that begins with `who` where f refuses.
template <class Result, class Function>
Result guarded(std::string const& who, Result failure, Function f) noexcept {
  try {
    try {
      return f();
    } catch (std::exception const& error) {
      logError(text(who, ": ", error.what()));
    }
  } catch (...) {  // out of memory, while writing the message
  }
  return failure;
}

}  // namespace tokcompile
#endif
