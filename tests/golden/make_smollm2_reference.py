#!/usr/bin/env python3
"""Writes tests/golden/smollm2_reference.json: SmolLM2-135M-Instruct by transformers in float32.

Needs numpy, torch (2.6.0), transformers (4.57.1), jinja2, and the model that scripts/fetch_model
makes; tests need only the JSON and the model. About five minutes on two cores.
usage: make_smollm2_reference.py MODEL_DIR [OUT.json]

  model_sha256  of model.safetensors
  greedy        prompts (text, or messages for the chat template) with 32 greedy steps: each
                step's five best ids and log-probabilities, and the margin between the best two.
                `wide_steps` is how many leading steps have a margin over 0.5: ids are to be
                compared up to there only.
  logprobs      a text's ids, and the log-probability of each id after those before it (null first)
  recall        a number planted in a long text:
                filler * before + needle + filler * after + question, needle with {number} filled
                in; the greedy ids spell the number (refused otherwise)
"""
import hashlib
import json
import os
import sys

import torch
import transformers

STEPS = 32
WIDE_MARGIN = 0.5

GREEDY = {
    "capital": "The capital of France is",
    "counting": "1, 2, 3, 4, 5, 6,",
    "days": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, Monday, Tuesday,",
    "even": "2, 4, 6, 8, 10, 12, 14, 16,",
    "alphabet": "a b c d e f g h i",
    "months": "January, February, March, April, May, June, July,",
    "water": "Water boils at 100 degrees Celsius and freezes at",
    "sum": [{"role": "user", "content": "What is 2+2?"}],
    "colors": [{"role": "user", "content": "Name the three primary colors."}],
    "turns": [{"role": "system", "content": "You answer in one short sentence."},
              {"role": "user", "content": "What is the largest planet?"},
              {"role": "assistant", "content": "Jupiter is the largest planet."},
              {"role": "user", "content": "And the smallest?"}],
}

TEXT = """\
A lighthouse stood at the end of the long pier, and every evening the keeper climbed its one \
hundred and twelve steps to light the lamp. In winter the wind came straight from the north and \
shook the windows, so he carried the oil in a closed can and kept one hand on the rail. He had \
done this for nineteen years. Ships from many countries passed below: grain ships, coal ships, \
and now and then a white passenger ship with music on its deck. He wrote each of them into a \
book, with the hour, the weather and the direction of the wind.

One night in March the lamp went out. The keeper tried a new wick, then a new glass, and at last \
he understood that the oil was mixed with water. There was no more of it on the pier. He thought \
for a moment, took down the curtain from the window, and went to the kitchen for butter. By the \
time the first ship came around the cape, a small, smoky, yellow flame was burning behind the \
great lens, and the lens, which did not care where its light came from, threw it eleven miles \
out to sea.

In the morning the captain of that ship walked up the pier. "Your light was weak," he said, "and \
it smelled of breakfast." The keeper opened his book, found the line, and read aloud: "Four in \
the morning, fog, wind from the north-east, one ship, safe." Then they both laughed and went to \
eat what was left of the bread.
"""
TEXT_TOKENS = 300

RECALL = {
    "filler": "The grass is green. The sky is blue. The sun is yellow. Here we go. "
              "There and back again. ",
    "needle": "The secret code of the castle is {number}. Remember it. ",
    "question": "\nThe secret code of the castle is",
    "steps": 6,
}
# (filler sentences in all, of them before the needle, number)
RECALL_CASES = [(41, 10, 58213), (41, 21, 90417), (41, 34, 31764), (166, 85, 60952),
                (329, 60, 49307)]


@torch.no_grad()
def greedy(model, ids, steps, stop=None):
    """Yields (float32 log-probabilities [vocab]) step by step, feeding back the best id."""
    inputs, cache = torch.tensor([ids]), transformers.DynamicCache()
    for _ in range(steps):
        out = model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logprobs = out.logits[0, -1].double().log_softmax(-1)
        yield logprobs
        best = logprobs.argmax().item()
        if best == stop:
            return
        inputs = torch.tensor([[best]])


def step_record(logprobs):
    top = logprobs.topk(5)
    values = top.values.tolist()
    return {"top_ids": top.indices.tolist(), "top_logprobs": [round(v, 5) for v in values],
            "margin": round(values[0] - values[1], 5)}


def greedy_case(model, tokenizer, name, prompt):
    if isinstance(prompt, str):
        source, ids = {"text": prompt}, tokenizer(prompt, add_special_tokens=False).input_ids
    else:
        source = {"messages": prompt}
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    steps = [step_record(x) for x in greedy(model, ids, STEPS, tokenizer.eos_token_id)]
    margins = [s["margin"] for s in steps]
    wide = next((i for i, m in enumerate(margins) if m <= WIDE_MARGIN), len(margins))
    greedy_ids = [s["top_ids"][0] for s in steps]
    print(f"{name}: {len(ids)} tokens, {wide} of {len(steps)} steps wide, "
          f"{tokenizer.decode(greedy_ids)!r}", flush=True)
    return {"name": name, **source, "prompt_ids": ids, "greedy_ids": greedy_ids,
            "greedy_text": tokenizer.decode(greedy_ids, skip_special_tokens=True),
            "finish_reason": "STOP" if greedy_ids[-1] == tokenizer.eos_token_id else "LENGTH",
            "wide_steps": wide, "steps": steps}


@torch.no_grad()
def logprobs_case(model, tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids[:TEXT_TOKENS]
    if len(ids) != TEXT_TOKENS:
        raise SystemExit(f"the text has {len(ids)} tokens only")
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    of_ids = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    print(f"logprobs: mean {sum(of_ids) / len(of_ids):.4f}", flush=True)
    return {"text": tokenizer.decode(ids), "token_ids": ids,
            "logprobs": [None] + [round(v, 5) for v in of_ids]}


def recall_case(model, tokenizer, fillers, before, number):
    text = (RECALL["filler"] * before + RECALL["needle"].format(number=number)
            + RECALL["filler"] * (fillers - before) + RECALL["question"])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    steps = [step_record(x) for x in greedy(model, ids, RECALL["steps"])]
    greedy_ids = [s["top_ids"][0] for s in steps]
    answer, margin = tokenizer.decode(greedy_ids), min(s["margin"] for s in steps)
    print(f"recall: {len(ids)} tokens, {before} of {fillers} before, {answer!r}, margin {margin}",
          flush=True)
    if str(number) not in answer:
        raise SystemExit(f"{number} is not recalled")
    return {"number": number, "before": before, "after": fillers - before,
            "prompt_tokens": len(ids),
            "prompt_sha256": hashlib.sha256(text.encode()).hexdigest(), "greedy_ids": greedy_ids,
            "greedy_text": answer, "margins": [s["margin"] for s in steps]}


def main():
    folder = sys.argv[1]
    out = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__),
                                                             "smollm2_reference.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    with open(f"{folder}/model.safetensors", "rb") as f:
        sha256 = hashlib.sha256(f.read()).hexdigest()
    reference = {
        "model_sha256": sha256,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "wide_margin": WIDE_MARGIN,
        "greedy": [greedy_case(model, tokenizer, n, p) for n, p in GREEDY.items()],
        "logprobs": logprobs_case(model, tokenizer),
        "recall": {**RECALL,
                   "cases": [recall_case(model, tokenizer, *case) for case in RECALL_CASES]}}
    with open(out, "w") as f:
        json.dump(reference, f, indent=1, ensure_ascii=False)
        f.write("\n")


if __name__ == "__main__":
    main()
