"""Generates with transformers: `python transformers_reader.py DIR REQUEST`; the answer is a line of JSON."""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

directory, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
kind = json.loads((Path(directory) / "config.json").read_text())["model_type"]
if kind not in CONFIG_MAPPING:
    print(json.dumps({"version": transformers.__version__, "unsupported": f"no model_type {kind}"}))
    sys.exit()
tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, trust_remote_code=True).eval()
tokens = []
for ids in request["prompts"]:
    with torch.no_grad():
        output = model.generate(torch.tensor([ids]), max_new_tokens=request["new_tokens"], do_sample=False)
    tokens.append(output[0, len(ids) :].tolist())
chat = tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True, tokenize=False)
texts = [tokenizer(text)["input_ids"] for text in request["texts"]]
print(json.dumps({"version": transformers.__version__, "tokens": tokens, "chat": chat, "texts": texts}))
