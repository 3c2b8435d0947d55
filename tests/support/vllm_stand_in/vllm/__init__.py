"""Stands in for the package `vllm` in tests: the part of its interface that is used, computed by transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace


@dataclass
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    stop: list = field(default_factory=list)
    stop_token_ids: list = field(default_factory=list)
    seed: int | None = None


class LLM:
    def __init__(self, model: str, dtype: str, trust_remote_code: bool):
        print("stand-in: loading")
        if not Path(model).is_dir():
            print(f"(EngineCore pid=1) ERROR 01-01 00:00:00 [core.py:1] ValueError: no such model {model}")
            raise SystemExit("As vLLM, many lines that do not say why.\n" * 30)
        import torch  # slow
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.tensor = torch.tensor
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model.generation_config = GenerationConfig()  # a request with SamplingParams does not read the file

    def generate(self, prompts: list[dict], sampling: list[SamplingParams], use_tqdm: bool) -> list:
        assert [one.seed for one in sampling] == list(range(len(prompts))) and not use_tqdm
        assert all(one.temperature == 0 for one in sampling)
        pairs = zip(prompts, sampling, strict=True)
        return [self._generate(prompt["prompt_token_ids"], one) for prompt, one in pairs]

    def _generate(self, ids: list[int], sampling: SamplingParams):
        output = self.model.generate(
            self.tensor([ids]), max_new_tokens=sampling.max_tokens, do_sample=False,
            eos_token_id=sampling.stop_token_ids or None, repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=output[0, len(ids) :].tolist())])
