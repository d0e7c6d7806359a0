#include "log.h"

#include <atomic>
#include <cstdio>

namespace tokcompile {
namespace {
std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};
}

void setFinder(nvinfer1::ILoggerFinder* found) { finder = found; }

void logError(std::string const& message) {
  auto* found = finder.load();
  auto* logger = found ? found->findLogger() : nullptr;
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

}  // namespace tokcompile
