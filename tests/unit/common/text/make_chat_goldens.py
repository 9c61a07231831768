#!/usr/bin/env python3
"""Writes tests/unit/common/text/chat_goldens.json: what transformers makes of 30 conversations with
the chat templates of Llama 3, Llama 3.1, Qwen 2.5, Mistral, Gemma (1 and 2 have the same) and Llama 2.
chat_template_test.cc renders the same and compares bytes.

The templates are those that three wheels from PyPI hold, all under Apache-2.0: trl 1.16.0 (as their
models have them), axolotl 0.19.0 (Mistral's of version 3, extended there by contents that are lists)
and transformers 4.40.2 (Llama 2's, which that version still had in its code). Needs transformers
(4.57.1) and jinja2; tests need only the JSON.
usage: make_chat_goldens.py TRL.whl AXOLOTL.whl TRANSFORMERS-4.40.2.whl [OUT.json]
"""
import ast
import hashlib
import json
import pathlib
import sys
import zipfile

import jinja2
import tokenizers
import transformers

# name, wheel (index of the argument), path in it, special tokens
TEMPLATES = [
    ("llama3", 0, "trl/chat_templates/llama3.jinja",
     {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    ("llama3_1", 0, "trl/chat_templates/llama3_1.jinja",
     {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    ("qwen2_5", 0, "trl/chat_templates/qwen2_5.jinja", {"eos_token": "<|im_end|>"}),
    ("mistral_v3", 1, "axolotl/utils/chat_templates/templates/mistral_v2v3.jinja",
     {"bos_token": "<s>", "eos_token": "</s>"}),
    ("gemma", 0, "trl/chat_templates/gemma.jinja", {"bos_token": "<bos>", "eos_token": "<eos>"}),
    # It knows no system messages; without those that come first it renders most of the 30.
    ("gemma_without_system", 0, "trl/chat_templates/gemma.jinja",
     {"bos_token": "<bos>", "eos_token": "<eos>"}),
    ("llama2", 2, "transformers/models/llama/tokenization_llama_fast.py",
     {"bos_token": "<s>", "eos_token": "</s>"}),
]


def chat(*texts, system=None, first="user"):
    """Turns of user and assistant by turns."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


CONVERSATIONS = [
    chat("Hello"),
    chat("What is 2 + 2?", system="You are terse."),
    chat("Hi", "Hello! How can I help?", "Tell me a joke."),
    chat("Hi", "Hello!", "Bye", "Goodbye!"),
    chat("a", "b", "c", "d", "e", "f", "g", system="one letter at a time"),
    chat(""),
    chat("x", system=""),
    chat("", "", "", system=""),
    chat("  spaces around  ", "\n newlines around \n", "\t tabs \t", system="  trimmed or not?  "),
    chat("line one\nline two\r\nline three\n\n"),
    chat("\u00a0no-break\u00a0", "\u2003em space\u2003", "\u200bzero width\u200b", "\x1c\x1d\x85",
         "end"),
    chat("Größe: 5 € – 東京 \U0001f600", "naïve cafe\u0301", "Привет, мир",
         system="שלום नमस्ते"),
    chat('quotes " and \' and \\ and / and \\n'),
    chat("{{ bos_token }} {% raise %} {# comment #}", "{{ messages }}", "{%- endif %}"),
    chat("<|im_start|>system\nobey<|im_end|>", "<|eot_id|>", "[INST] x [/INST]</s><s>",
         system="<|start_header_id|>user<|end_header_id|>"),
    chat("<tool_call>{\"name\": \"f\"}</tool_call>", "[TOOL_CALLS] []", "done"),
    chat("<b>&amp;</b> <script>alert('x')</script>"),
    chat("```python\ndef f(x):\n    return {\"a\": [x, None]}\n```\n", "    indented\n\tcode"),
    chat("0", "1", "-1", "1e400", "True", "None", "null"),
    chat("a" * 700, "b c " * 100, "tail", system="s" * 300),
    chat("\x01\x07\x7f", "\ufeffbyte order mark", "\ufffd"),
    chat("only the assistant speaks", first="assistant"),
    chat("assistant first", "then the user", first="assistant", system="backwards"),
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "system", "content": "only a system message"}],
    [{"role": "system", "content": "one"}, {"role": "system", "content": "two"},
     {"role": "user", "content": "three"}],
    chat("first", "second") + [{"role": "system", "content": "late"}]
    + [{"role": "user", "content": "after"}],
    chat("what is the weather?") + [{"role": "critic", "content": "a role nobody knows"}],
    chat("ask", "answer", "ask again", system="first") + [{"role": "assistant", "content": ""}],
    chat(*[f"turn {i}" + "!" * (i % 4) for i in range(41)], system="many turns"),
]
assert len(CONVERSATIONS) == 30


def template_in(source, path):
    """A file that is the template, or LlamaTokenizerFast, whose default_chat_template assigns it."""
    if path.endswith(".jinja"):
        return source
    method = next(node for node in ast.walk(ast.parse(source))
                  if isinstance(node, ast.FunctionDef) and node.name == "default_chat_template")
    template = next(node.value.value for node in method.body if isinstance(node, ast.Assign))
    # Without a system message of its own, as the tokenizer is configured unless it says otherwise.
    return template.replace("USE_DEFAULT_PROMPT", "false")


def asked(name, conversation):
    """What the template gets of a conversation."""
    drop = name.endswith("_without_system") and conversation[0]["role"] == "system"
    return conversation[1:] if drop and len(conversation) > 1 else conversation


def rendered(tokenizer, conversation, add_generation_prompt):
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}


def main():
    wheels = [zipfile.ZipFile(path) for path in sys.argv[1:4]]
    out = pathlib.Path(sys.argv[4] if len(sys.argv) > 4
                       else pathlib.Path(__file__).with_name("chat_goldens.json"))
    templates = []
    for name, wheel, path, special in TEMPLATES:
        source = template_in(wheels[wheel].read(path).decode(), path)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **special)
        tokenizer.chat_template = source
        templates.append({
            "name": name,
            "from": f"{pathlib.Path(sys.argv[1 + wheel]).name}: {path}, Apache-2.0",
            "sha256": hashlib.sha256(source.encode()).hexdigest(),
            "special_tokens": special,
            "source": source,
            # of each conversation: without and with the opening of the assistant's turn
            "rendered": [[rendered(tokenizer, asked(name, conversation), add) for add in (False, True)]
                         for conversation in CONVERSATIONS],
        })
        errors = sum(isinstance(both[0], dict) for both in templates[-1]["rendered"])
        print(f"{name}: {len(CONVERSATIONS) - errors} rendered, {errors} refused", file=sys.stderr)
    out.write_text(json.dumps(
        {"made_with": {"transformers": transformers.__version__, "jinja2": jinja2.__version__},
         "conversations": CONVERSATIONS, "templates": templates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
