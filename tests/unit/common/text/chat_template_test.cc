#include "common/text/chat_template.h"

#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/match.h"

#include "tests/unit/common/text/text_test_util.h"

namespace headroom {
namespace {

std::unique_ptr<ChatTemplate> Template(absl::string_view source,
                                       ChatTemplate::SpecialTokens special_tokens = {}) {
  return Must(ChatTemplate::FromSource(source, "chat_template.jinja", std::move(special_tokens)));
}

std::string Render(absl::string_view source, const std::vector<ChatMessage>& messages = {},
                   ChatTemplate::SpecialTokens special_tokens = {}) {
  return Must(Template(source, std::move(special_tokens))->Render(messages, false));
}

// The error of rendering, which must be INVALID_ARGUMENT and come soon.
std::string ErrorOf(absl::string_view source, const std::vector<ChatMessage>& messages = {}) {
  const absl::Time begin = absl::Now();
  const absl::Status status = Template(source)->Render(messages, false).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << source << ": " << status;
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20)) << source;
  return std::string(status.message());
}

std::vector<ChatMessage> Messages(const Json& array) {
  std::vector<ChatMessage> messages;
  for (const Json& message : array.as_array()) {
    messages.push_back({message.Find("role")->as_string(), message.Find("content")->as_string()});
  }
  return messages;
}

TEST(ChatTemplate, RendersSmolLm2AsPythonDoes) {
  const std::unique_ptr<ChatTemplate> chat = Must(ChatTemplate::FromModelDir(ModelDir()));
  const Json vectors = Vectors();
  ASSERT_GE(vectors.Find("chat")->as_array().size(), 10u);
  for (const Json& vector : vectors.Find("chat")->as_array()) {
    EXPECT_EQ(Must(chat->Render(Messages(*vector.Find("messages")),
                                vector.Find("add_generation_prompt")->as_bool())),
              vector.Find("text")->as_string());
  }
}

// Llama 3, Llama 3.1, Qwen 2.5, Mistral, Gemma, Llama 2; make_chat_goldens.py wrote what transformers
// makes of them.
TEST(ChatTemplate, RendersThirtyConversationsOfEachFamilyAsPythonDoes) {
  const Json goldens = TestData("chat_goldens.json");
  const Json::Array& conversations = goldens.Find("conversations")->as_array();
  ASSERT_EQ(conversations.size(), 30u);
  ASSERT_EQ(goldens.Find("templates")->as_array().size(), 7u);
  int refused = 0;
  for (const Json& golden : goldens.Find("templates")->as_array()) {
    ChatTemplate::SpecialTokens special_tokens;
    for (const auto& [name, text] : golden.Find("special_tokens")->as_object()) {
      special_tokens.emplace_back(name, text.as_string());
    }
    const auto chat = Template(golden.Find("source")->as_string(), std::move(special_tokens));
    for (size_t i = 0; i < conversations.size(); ++i) {
      std::vector<ChatMessage> messages = Messages(conversations[i]);
      if (absl::EndsWith(golden.Find("name")->as_string(), "_without_system") &&
          messages.size() > 1 && messages[0].role == "system") {
        messages.erase(messages.begin());
      }
      const Json::Array& expected = golden.Find("rendered")->as_array()[i].as_array();
      for (const bool add_generation_prompt : {false, true}) {
        const std::string where =
            absl::StrCat(golden.Find("name")->as_string(), ", conversation ", i);
        const Json& text = expected[add_generation_prompt ? 1 : 0];
        const absl::StatusOr<std::string> rendered = chat->Render(messages, add_generation_prompt);
        if (text.is_string()) {
          ASSERT_TRUE(rendered.ok()) << where << ": " << rendered.status();
          EXPECT_EQ(*rendered, text.as_string()) << where;
        } else {
          ++refused;
          EXPECT_TRUE(absl::IsInvalidArgument(rendered.status())) << where;
          EXPECT_TRUE(absl::StrContains(rendered.status().message(),
                                        text.Find("error")->as_string()))
              << where << ": " << rendered.status();
        }
      }
    }
  }
  EXPECT_EQ(refused, 12 + 32 + 12 + 10) << "of Mistral, Gemma (which knows no system), the same "
                                           "without system messages, Llama 2: roles must alternate";
}

TEST(ChatTemplate, WhatItRendersIsEncodedWithItsSpecialTokens) {
  const std::unique_ptr<ChatTemplate> chat = Must(ChatTemplate::FromModelDir(ModelDir()));
  const std::unique_ptr<Tokenizer> tokenizer = ModelTokenizer();
  const std::string text = Must(chat->Render({{"system", "s"}, {"user", "u"}}, true));
  const std::vector<int32_t> ids = Must(tokenizer->Encode(text, Tokenizer::Special::kWithout));
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 1), 3) << "<|im_start|>";
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 2), 2) << "<|im_end|>";
}

TEST(ChatTemplate, WhatItRefusesIsInItsOwnWords) {
  const char* const source =
      "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
      "{{ raise_exception('Roles must alternate user/assistant, got ' + m['role']) }}"
      "{% endif %}{% endfor %}ok";
  EXPECT_EQ(ErrorOf(source, {{"user", "a"}, {"user", "b"}}),
            "Roles must alternate user/assistant, got user");
  EXPECT_EQ(Render(source, {{"user", "a"}, {"assistant", "b"}}), "ok");
}

TEST(ChatTemplate, ARunawayTemplateIsBounded) {
  for (const char* source : {
           "{% for i in range(1000000000) %}x{% endfor %}",
           "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
           "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
           "{{ 'x' * 1000000000000 }}",
           "{% set ns = namespace(s='x') %}{% for i in range(100) %}{% set ns.s = ns.s + ns.s %}"
           "{% endfor %}{{ ns.s }}",
           "{{ '%0999999999d' | format(1) }}{{ '{:999999999}'.format(1) }}",
       }) {
    ErrorOf(source);
  }
}

TEST(ChatTemplate, ALongChatIsNoRunaway) {
  std::vector<ChatMessage> messages;
  for (int i = 0; i < 2000; ++i) messages.push_back({"user", std::string(500, 'x')});
  const std::unique_ptr<ChatTemplate> chat = Must(ChatTemplate::FromModelDir(ModelDir()));
  EXPECT_GT(Must(chat->Render(messages, true)).size(), 1'000'000u);
}

TEST(ChatTemplate, WhatIsNotUtf8NamesMessageFieldAndByte) {
  const std::unique_ptr<ChatTemplate> chat = Template("{{ messages[0].content }}");
  EXPECT_EQ(chat->Render({{"user", "a"}, {"user", "ab\xff"}}, false).status().message(),
            "messages[1].content is not UTF-8 at byte 2");
  EXPECT_EQ(chat->Render({{"us\xc3", "a"}}, false).status().message(),
            "messages[0].role is not UTF-8 at byte 2");
}

TEST(ChatTemplate, TextOfMessagesIsNeverATemplate) {
  const std::string hostile = "{{ messages }} {% for x in y %} <script> & \" ' \\ \n {#";
  EXPECT_EQ(Render("{{ messages[0]['content'] }}", {{"user", hostile}}), hostile);
}

TEST(ChatTemplate, WhitespaceMethodsAndFiltersAreThoseOfPython) {
  EXPECT_EQ(Render("a\n  {% if true %}\n  b\n  {% endif %}\nc"), "a\n  b\nc");
  EXPECT_EQ(Render("{{ ' x '.strip() + 'a,b'.split(',')[1] + 'AbC'.lower() }}"), "xbabc");
  EXPECT_EQ(Render("{{ 'abc'.removeprefix('a') }}{{ 'x-y-z'.rsplit('-', 1)[0] }}"), "bcx-y");
  EXPECT_EQ(Render("{% for m in messages %}[{{ m.content.strip() }}{{ m.content | trim }}"
                   "{{ m.content.lstrip() }}{{ m.content.rstrip() }}{{ m.content.split() | join }}"
                   "{{ m.content | trim(' b\x1c') }}]{% endfor %}",
                   {{"u", "\x1c\x1f a\x1d" "b \x1e"}}),
            "[a\x1d" "ba\x1d" "ba\x1d" "b \x1e\x1c\x1f a\x1d" "bab\x1f a\x1d" "b \x1e]");
  EXPECT_EQ(Render("{{ messages | tojson }}", {{"u", "é<\"\n"}}),
            R"([{"role": "u", "content": "é<\"\n"}])");
  EXPECT_EQ(Render("{{ [1, 2.0, none, true, 1e-7] | tojson }}"), "[1, 2.0, null, true, 1e-07]");
  EXPECT_EQ(Render("{% if tools is none %}none{% endif %}{% if x is defined %}x{% endif %}"), "none");
  EXPECT_EQ(Render("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
                   "{% endfor %}",
                   {{"a", "1"}, {"b", "2"}}),
            "12");
}

TEST(ChatTemplate, TellsTheDateItIsGiven) {
  const absl::Time noon = absl::FromUnixSeconds(1'700'049'600);  // 2023-11-15 12:00 UTC
  EXPECT_EQ(Must(Template("{{ strftime_now('%d %b %Y') }}")->Render({}, false, noon)),
            "15 Nov 2023");
  ErrorOf("{{ strftime_now('" + std::string(3000, 'x') + "') }}");
}

TEST(ChatTemplate, SpecialTokensAreKnownByName) {
  EXPECT_EQ(Render("{{ bos_token }}|{{ eos_token }}", {}, {{"bos_token", "<s>"}}), "<s>|");
}

TEST(ChatTemplate, ManyThreadsRenderOneTemplate) {
  const std::unique_ptr<ChatTemplate> chat = Must(ChatTemplate::FromModelDir(ModelDir()));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&chat, &wrong, i] {
      const std::vector<ChatMessage> messages = {{"system", "s"}, {"user", std::to_string(i)}};
      const std::string expected = absl::StrCat("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n",
                                                i, "<|im_end|>\n");
      for (int round = 0; round < 50; ++round) {
        wrong += *chat->Render(messages, false) != expected;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// ---------------------------------------------------------------- files

TEST(ChatTemplateFiles, AModelWithoutATemplateIsSaidToHaveNone) {
  const TempModelDir dir;
  EXPECT_TRUE(absl::IsNotFound(ChatTemplate::FromModelDir(dir.path()).status()));
  dir.Write("tokenizer_config.json", R"({"bos_token": "<s>"})");
  const absl::Status status = ChatTemplate::FromModelDir(dir.path()).status();
  EXPECT_TRUE(absl::IsNotFound(status));
  EXPECT_NE(status.message().find(dir.File("tokenizer_config.json")), std::string::npos) << status;
}

TEST(ChatTemplateFiles, ATemplateIsFoundWhereModelsHaveIt) {
  const TempModelDir dir;
  dir.Write("tokenizer_config.json",
            R"({"bos_token": {"content": "<s>", "special": true}, "eos_token": "</s>",
                "chat_template": [{"name": "tool_use", "template": "no"},
                                  {"name": "default", "template": "{{ bos_token }}{{ pad_token }}"}]})");
  dir.Write("special_tokens_map.json", R"({"pad_token": "<p>", "bos_token": "not this"})");
  EXPECT_EQ(Must(Must(ChatTemplate::FromModelDir(dir.path()))->Render({}, false)), "<s><p>");
  dir.Write("chat_template.jinja", "{{ eos_token }}");
  EXPECT_EQ(Must(Must(ChatTemplate::FromModelDir(dir.path()))->Render({}, false)), "</s>");
}

TEST(ChatTemplateFiles, WrongFilesAreNamed) {
  for (const auto& [name, text] :
       {std::pair{"tokenizer_config.json", "{"}, {"tokenizer_config.json", "[]"},
        {"tokenizer_config.json", R"({"chat_template": 5})"},
        {"tokenizer_config.json", R"({"chat_template": [{"name": "x", "template": "y"}]})"},
        {"tokenizer_config.json", R"({"chat_template": "{% if %}"})"},
        {"special_tokens_map.json", "nonsense"}, {"chat_template.jinja", "{{ unclosed"},
        {"chat_template.jinja", "{% nothing %}"}, {"chat_template.jinja", "\xff"}}) {
    const TempModelDir dir;
    dir.Write(name, text);
    const absl::Status status = ChatTemplate::FromModelDir(dir.path()).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text << ": " << status;
    EXPECT_NE(status.message().find(dir.File(name)), std::string::npos) << status;
  }
}

TEST(ChatTemplateFiles, HugeAndDeepTemplatesAreRefused) {
  const absl::Status huge =
      ChatTemplate::FromSource(std::string((128 << 10) + 1, 'x'), "big.jinja", {}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(huge));
  EXPECT_NE(huge.message().find("big.jinja"), std::string::npos);
  // As long as is allowed, and all of it one expression.
  std::string deep = "{{ ";
  while (deep.size() < (128 << 10) - 8) deep += "-";
  const absl::Status status = ChatTemplate::FromSource(deep + "1 }}", "deep.jinja", {}).status();
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
}

}  // namespace
}  // namespace headroom
