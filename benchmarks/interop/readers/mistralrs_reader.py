"""Generates with mistral.rs: `python mistralrs_reader.py DIR REQUEST`; the answer is a line of JSON.

It takes and gives texts, so the answer has the words of every answer, without special tokens and without the marks of
incomplete characters.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from mistralrs import Architecture, ChatCompletionRequest, CompletionRequest, ModelDType, Runner, Which

os.environ["MISTRALRS_CPU_KV_F32"] = "1"
directory, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
architectures = {"llama": Architecture.Llama, "qwen2": Architecture.Qwen2, "qwen3": Architecture.Qwen3}
kind = json.loads((Path(directory) / "config.json").read_text())["model_type"]
answer = {"version": version("mistralrs")}
if kind in architectures:
    runner = Runner(which=Which.Plain(directory, arch=architectures[kind], dtype=ModelDType.F32), max_seqs=1)
    options = {"model": "default", "max_tokens": request["new_tokens"], "temperature": 0.0}
    words = []
    for text in request["texts"]:
        found = runner.send_completion_request(CompletionRequest(prompt=text, **options))
        words.append(found.choices[0].text)
    found = runner.send_chat_completion_request(ChatCompletionRequest(messages=request["chat"], **options))
    words.append(found.choices[0].message.content)
    for mark in ("\ufffd", *request["special"]):
        words = [word.replace(mark, "") for word in words]
    answer["words"] = words
else:
    answer["unsupported"] = f"no architecture {kind}"
print(json.dumps(answer))
