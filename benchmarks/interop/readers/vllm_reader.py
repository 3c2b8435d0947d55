"""Generates with vLLM: `python vllm_reader.py DIR REQUEST`; the answer is a line of JSON."""

import json
import sys
from pathlib import Path

import vllm

directory, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
engine = vllm.LLM(directory, dtype="float32", trust_remote_code=True, max_model_len=256, enforce_eager=True)
sampling = vllm.SamplingParams(temperature=0, max_tokens=request["new_tokens"])
outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
tokenizer = engine.get_tokenizer()
answer = {
    "version": vllm.__version__,
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    "chat": tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True, tokenize=False),
    "texts": [tokenizer(text)["input_ids"] for text in request["texts"]],
}
print(json.dumps(answer))
