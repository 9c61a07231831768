// Which steps do not count: those that were discarded, what goes on from them, and those of sequences that
// nobody wants any more.
//
// A step in flight may be discarded after others were sent that go on from it: of the same sequence all
// positions after the discarded ones do not count either, until a step begins at those again. Policy only:
// not thread-safe, knows no device. Allocates nothing while no step is discarded.
#ifndef HEADROOM_SERVICES_WORKER_DISCARDED_STEPS_H_
#define HEADROOM_SERVICES_WORKER_DISCARDED_STEPS_H_

#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include "services/worker/step.h"

namespace headroom {

class DiscardedSteps {
 public:
  // Nobody wants what the sequences have in flight, until they are closed. Beyond 1,024 of them no matter:
  // their steps run to their ends.
  void Abandon(const std::vector<uint64_t>& sequence_ids);
  bool AllAbandoned(const Step& step) const;

  // Whether a step that is to begin is to be run: none of its sequences is abandoned or goes on from a step
  // that was not run. Then what had not been run at its positions is run now.
  bool MayRun(const Step& step);
  // Whether a step that has run counts: none of its sequences goes on from a discarded step. Then what had
  // been discarded at its positions is made good.
  bool Counts(const Step& step);
  // The step does not count. `run`: it has been run all the same, so that what follows can be.
  void Discard(const Step& step, bool run);

  void Close(const std::vector<uint64_t>& sequence_ids);
  void Clear();

 private:
  struct Discarded {
    int64_t first_pos = 0;  // the first position that was
    bool run = true;
  };

  std::map<uint64_t, Discarded> discarded_;  // by sequence
  std::set<uint64_t> abandoned_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_DISCARDED_STEPS_H_
