"""Generates with mlx-lm: `python mlx_reader.py DIR REQUEST`; the answer is a line of JSON."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from mlx_lm import load, stream_generate

directory, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
if isinstance(json.loads((Path(directory) / "config.json").read_text())["intermediate_size"], list):
    print(json.dumps({"version": version("mlx-lm"), "unsupported": "no widths that differ between layers"}))
    sys.exit()
model, tokenizer = load(directory)
tokens = []
for ids in request["prompts"]:
    steps = stream_generate(model, tokenizer, ids, max_tokens=request["new_tokens"])
    tokens.append([step.token for step in steps])
chat = tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True, tokenize=False)
texts = [tokenizer.encode(text) for text in request["texts"]]
print(json.dumps({"version": version("mlx-lm"), "tokens": tokens, "chat": chat, "texts": texts}))
