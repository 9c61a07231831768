#include "services/coordinator/stop_finder.h"

#include <algorithm>

namespace headroom::coordinator {

size_t HeldBytes(const std::string& text, const std::vector<std::string>& stops) {
  size_t held = 0;
  for (const std::string& stop : stops) {
    const size_t most = std::min(text.size(), stop.size() - 1);
    for (size_t bytes = most; bytes > held; --bytes) {
      if (text.compare(text.size() - bytes, bytes, stop, 0, bytes) == 0) held = bytes;
    }
  }
  return held;
}

StopFinder::Found StopFinder::Push(const std::string& text) {
  held_ += text;
  size_t first = std::string::npos;
  const std::string* which = nullptr;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < first) {
      first = at;
      which = &stop;
    }
  }
  Found found;
  if (which != nullptr) {
    found.text = held_.substr(0, include_stop_ ? first + which->size() : first);
    found.stop = *which;
    held_.clear();
    return found;
  }
  const size_t sent = held_.size() - HeldBytes(held_, stops_);
  found.text = held_.substr(0, sent);
  held_.erase(0, sent);
  return found;
}

std::string StopFinder::Finish() { return std::exchange(held_, std::string()); }

}  // namespace headroom::coordinator
