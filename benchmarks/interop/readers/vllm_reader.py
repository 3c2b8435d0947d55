"""Generates with vLLM: `python vllm_reader.py DIR REQUEST`; the answer is a line of JSON."""

import json
import os
import sys
from pathlib import Path

CACHE = 256 * 2**20  # bytes of keys, values and states; without it, vLLM takes nine tenths of the machine's memory


def main(directory: str, request: dict) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM and its processes print to stdout
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm

    engine = vllm.LLM(
        directory,
        dtype="float32",
        trust_remote_code=True,
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE,
    )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=request["new_tokens"])
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    tokenizer = engine.get_tokenizer()
    answer = {
        "version": vllm.__version__,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "chat": tokenizer.apply_chat_template(request["chat"], add_generation_prompt=True, tokenize=False),
        "texts": [tokenizer(text)["input_ids"] for text in request["texts"]],
    }
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":  # vLLM's own processes import this file too
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
