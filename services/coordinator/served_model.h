// What the coordinator knows of the model it serves: text in and out, defaults, limits. The weights
// are the worker's.
#ifndef HEADROOM_SERVICES_COORDINATOR_SERVED_MODEL_H_
#define HEADROOM_SERVICES_COORDINATOR_SERVED_MODEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/text/chat_template.h"
#include "common/text/tokenizer.h"
#include "headroom/v1/types.pb.h"
#include "services/coordinator/running_request.h"

namespace headroom::coordinator {

// Constant after Load().
class ServedModel {
 public:
  // Reads tokenizer, chat template, config.json and generation_config.json of `model_dir`. Without
  // tokenizer.json prompts must come as ids and answers have no text; without a chat template there
  // is no chat. INVALID_ARGUMENT names the file and what is wrong with it.
  static absl::StatusOr<std::unique_ptr<ServedModel>> Load(const std::string& model_dir);
  // One of parts; for those that have no folder.
  ServedModel(std::string name, std::string architecture, v1::SamplingParams defaults,
              std::vector<int32_t> eos_ids, std::unique_ptr<Tokenizer> tokenizer,
              std::unique_ptr<ChatTemplate> chat_template);

  const std::string& name() const { return name_; }  // the folder's
  const std::string& architecture() const { return architecture_; }
  // Every field but the seed is set.
  const v1::SamplingParams& default_sampling() const { return default_sampling_; }
  const std::vector<int32_t>& eos_ids() const { return eos_ids_; }
  const Tokenizer* tokenizer() const { return tokenizer_.get(); }             // may be null
  const ChatTemplate* chat_template() const { return chat_template_.get(); }  // may be null

  // Text of an answer to `prompt`; null without a tokenizer. Must not outlive the model.
  std::unique_ptr<TokenDecoder> MakeDecoder(const std::vector<int32_t>& prompt) const;

 private:
  const std::string name_;
  const std::string architecture_;
  const v1::SamplingParams default_sampling_;
  const std::vector<int32_t> eos_ids_;
  const std::unique_ptr<Tokenizer> tokenizer_;
  const std::unique_ptr<ChatTemplate> chat_template_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_SERVED_MODEL_H_
