// A model.safetensors: whatever its header says, what is accepted can be read to the last byte.
#include <memory>

#include "services/worker/model/safetensors.h"
#include "tests/fuzz/fuzz.h"

using headroom::SafetensorsReader;
using headroom::fuzz::Require;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto* const folder = new headroom::fuzz::Folder();
  static const int at_exit = std::atexit([] { delete folder; });
  Require(at_exit == 0, "the folder goes at the end");
  folder->Write("model.safetensors", {reinterpret_cast<const char*>(data), size});
  const auto reader = SafetensorsReader::Open(folder->path());
  if (!reader.ok()) {
    Require(!reader.status().message().empty(), "an error says what is wrong");
    return 0;
  }
  for (const auto& [name, tensor] : (*reader)->tensors()) {
    Require(tensor.offset_bytes >= 0 && tensor.size_bytes >= 0 &&
                tensor.offset_bytes + tensor.size_bytes <= static_cast<int64_t>(size),
            "a tensor lies within its file");
    const auto bytes = std::make_unique<uint8_t[]>(tensor.size_bytes);
    Require((*reader)->Read(tensor, 0, tensor.size_bytes, bytes.get()).ok(), "it can be read");
    Require(std::memcmp(bytes.get(), data + tensor.offset_bytes, tensor.size_bytes) == 0,
            "and is what the file holds there");
  }
  return 0;
}
