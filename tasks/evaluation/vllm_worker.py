"""vLLM in a process of its own, in any environment that has it: reads requests from stdin and answers on stdout.

It is started by path, so it imports nothing of this checkout. The first line is {"model", "dtype", "options"}; every
further line {"prompts": lists of token ids, "sampling": arguments of SamplingParams}. An answer is a line with the
new token ids of every prompt. What libraries print goes to stderr.
"""

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM, SamplingParams

    first = json.loads(sys.stdin.readline())
    engine = LLM(model=first["model"], dtype=first["dtype"], trust_remote_code=True, **first["options"])
    print("{}", file=answers, flush=True)  # ready
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        # A seed for every prompt: sampled answers do not depend on earlier requests, and equal prompts get several.
        sampling = [SamplingParams(**request["sampling"], seed=number) for number in range(len(prompts))]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), file=answers, flush=True)


if __name__ == "__main__":
    main()
