// Finds stop strings in text that comes piece by piece.
//
// Text that may yet turn out to begin a stop string is held back, so a client never sees part of
// one.
#ifndef HEADROOM_SERVICES_COORDINATOR_STOP_FINDER_H_
#define HEADROOM_SERVICES_COORDINATOR_STOP_FINDER_H_

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace headroom::coordinator {

// Bytes at the end of `text` that are the beginning of one of `stops`: what must be held back.
size_t HeldBytes(const std::string& text, const std::vector<std::string>& stops);

class StopFinder {
 public:
  StopFinder(std::vector<std::string> stops, bool include_stop)
      : stops_(std::move(stops)), include_stop_(include_stop) {}

  struct Found {
    std::string text;  // may be sent now
    std::optional<std::string> stop;
  };
  // Takes the next piece of text. Of several stop strings that are complete, the one that begins
  // first counts (then the one listed first). After a stop nothing more may be pushed.
  Found Push(const std::string& text);
  // What was held back, when no more text will come.
  std::string Finish();

 private:
  const std::vector<std::string> stops_;
  const bool include_stop_;
  std::string held_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_STOP_FINDER_H_
