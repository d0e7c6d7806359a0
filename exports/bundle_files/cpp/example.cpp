// Loads the plugin library and an engine, runs it once, and prints the first values of each output.
//
//   example ENGINE [--plugin LIBRARY] [INPUT.npy ...]
//
// Inputs are taken in the order of the engine; those that are not given are zeros.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using nvinfer1::DataType;

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, char const* message) noexcept override {
    if (severity <= Severity::kWARNING) {
      std::cerr << message << "\n";
    }
  }
};

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  }
}

template <class T>
std::unique_ptr<T> need(T* made, std::string const& what) {
  if (!made) {
    throw std::runtime_error(what);
  }
  return std::unique_ptr<T>(made);
}

std::vector<char> readFile(std::string const& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

// The values of a .npy file, which begin behind its header; the type is taken to be the engine's.
std::vector<char> readNpy(std::string const& path) {
  auto bytes = readFile(path);
  if (bytes.size() < 12 || std::memcmp(bytes.data(), "\x93NUMPY", 6) != 0) {
    throw std::runtime_error(path + " is no .npy file");
  }
  auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(bytes[i])); };
  size_t begin = 10 + byte(8) + 256 * byte(9);
  if (bytes[6] > 1) {
    begin = 12 + byte(8) + 256 * (byte(9) + 256 * (byte(10) + 256 * byte(11)));
  }
  bytes.erase(bytes.begin(), bytes.begin() + std::min(begin, bytes.size()));
  return bytes;
}

size_t sizeOf(DataType type) {
  switch (type) {
    case DataType::kINT64: return 8;
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    default: return 1;
  }
}

size_t bytesOf(nvinfer1::ICudaEngine const& engine, char const* name) {
  auto shape = engine.getTensorShape(name);
  size_t bytes = sizeOf(engine.getTensorDataType(name));
  for (int i = 0; i < shape.nbDims; ++i) {
    bytes *= static_cast<size_t>(shape.d[i]);
  }
  return bytes;
}

void print(char const* name, std::vector<char> const& bytes, DataType type) {
  std::cout << name << ": " << bytes.size() << " bytes";
  size_t count = std::min<size_t>(5, bytes.size() / sizeOf(type));
  for (size_t i = 0; i < count; ++i) {
    if (type == DataType::kFLOAT) {
      float value;
      std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
      std::cout << " " << value;
    } else if (type == DataType::kINT64) {
      int64_t value;
      std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
      std::cout << " " << value;
    }
  }
  std::cout << "\n";
}

void run(std::string const& path, std::string const& plugin, std::vector<std::string> const& files) {
  Logger logger;
  auto runtime = need(nvinfer1::createInferRuntime(logger), "no TensorRT runtime");
  // before the engine: it holds the names of plugins, and the library their code
  if (!plugin.empty() && !runtime->getPluginRegistry().loadLibrary(plugin.c_str())) {
    throw std::runtime_error("TensorRT cannot load " + plugin);
  }
  auto plan = readFile(path);
  auto engine = need(runtime->deserializeCudaEngine(plan.data(), plan.size()), "TensorRT does not take " + path);
  auto context = need(engine->createExecutionContext(), "no execution context");
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  std::vector<void*> buffers;
  size_t next = 0;
  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    char const* name = engine->getIOTensorName(i);
    size_t bytes = bytesOf(*engine, name);
    buffers.push_back(nullptr);
    check(cudaMalloc(&buffers.back(), std::max<size_t>(bytes, 1)));
    check(cudaMemset(buffers.back(), 0, bytes));
    if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT && next < files.size()) {
      auto values = readNpy(files[next]);
      if (values.size() != bytes) {
        throw std::runtime_error(files[next] + " does not fit the input " + name);
      }
      check(cudaMemcpy(buffers.back(), values.data(), bytes, cudaMemcpyHostToDevice));
      ++next;
    }
    context->setTensorAddress(name, buffers.back());
  }
  if (!context->enqueueV3(stream)) {
    throw std::runtime_error("the engine did not run");
  }
  check(cudaStreamSynchronize(stream));

  for (int i = 0; i < engine->getNbIOTensors(); ++i) {
    char const* name = engine->getIOTensorName(i);
    if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kOUTPUT) {
      std::vector<char> values(bytesOf(*engine, name));
      check(cudaMemcpy(values.data(), buffers[i], values.size(), cudaMemcpyDeviceToHost));
      print(name, values, engine->getTensorDataType(name));
    }
    check(cudaFree(buffers[i]));
  }
  check(cudaStreamDestroy(stream));
}

int main(int argc, char** argv) {
  std::string engine, plugin;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--plugin" && i + 1 < argc) {
      plugin = argv[++i];
    } else if (engine.empty()) {
      engine = argv[i];
    } else {
      files.push_back(argv[i]);
    }
  }
  if (engine.empty()) {
    std::cerr << "usage: example ENGINE [--plugin LIBRARY] [INPUT.npy ...]\n";
    return 2;
  }
  try {
    run(engine, plugin, files);
  } catch (std::exception const& error) {
    std::cerr << "example: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
