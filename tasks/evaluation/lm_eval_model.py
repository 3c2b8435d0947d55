"""lm-eval's adapter of the models: batch sizes, stop texts, and answers by transformers or by vLLM."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from elastic_core.config import ConfigError
from tasks.evaluation.batch_sizes import fitting
from tasks.evaluation.vllm_engine import VllmEngine, continuations, with_defaults
from tasks.settings.sections import Benchmarks

AUTO = 64  # sequences with which `auto` begins


@dataclass(frozen=True)
class Served:
    """A model directory whose answers an engine generates. `load`: the transformers model, for all other tasks."""

    directory: Path
    load: Callable[[], torch.nn.Module]
    engine: Callable[[], VllmEngine]

    def without_weights(self):
        """The transformers model on the meta device, for its configuration."""
        config = AutoConfig.from_pretrained(self.directory, trust_remote_code=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        if (self.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.directory)
        return model


class Model(HFLM):
    """lm-eval's adapter of a transformers model for the tasks of a section, without its progress bars.

    An answer ends at the model's own stop ids, at the stop texts of its task, and at those of the section. With
    `engine`, that generates the answers, and `model` needs no weights.
    """

    def __init__(self, section: Benchmarks, model, tokenizer, engine: VllmEngine | None = None):
        is_chat, think_end = bool(section.apply_chat_template), section.think_end_token
        if think_end in tokenizer.get_added_vocab():  # as a text, it would be gone: special tokens are not decoded
            think_end = tokenizer.convert_tokens_to_ids(think_end)
        if isinstance(section.apply_chat_template, str):  # lm-eval does not hand the name on
            tokenizer.chat_template = tokenizer.get_chat_template(section.apply_chat_template)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=1,  # see `_fitting`
            add_bos_token=False if is_chat else None,  # the template writes bos itself
            think_end_token=think_end,
            enable_thinking=section.enable_thinking,
        )
        self._stop, self._given, self._engine = section.stop, section.batch_size, engine
        if engine is not None:
            self._device = torch.device("cpu")  # of token ids

    def generate_until(self, requests, disable_tqdm=True):
        for request in requests:
            options = request.args[1]
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            options["until"] = [*until, *(text for text in self._stop if text not in until)]
            most = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if most >= self.max_length:
                raise ConfigError(
                    f"evaluate.benchmarks: {request.task_name} asks for answers of up to {most:,} tokens, and the "
                    f"model has a context of {self.max_length:,}; set gen_kwargs: {{max_gen_toks: …}} to less"
                )
        # Sampled answers depend on what was sampled before: every task begins anew, so that they are the same on any
        # number of workers.
        answers = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            of_task = [i for i, request in enumerate(requests) if request.task_name == task]
            torch.manual_seed(DEFAULT_OTHER_SEED)
            found = self._fitting(super().generate_until, [requests[i] for i in of_task])
            answers |= zip(of_task, found, strict=True)
        return [answers[i] for i in range(len(requests))]

    def _fitting(self, score, requests):
        """`score(requests)` with a batch size that fits in memory. The longest requests come first."""
        if self._engine is not None:  # which makes its own batches
            self.batch_size_per_gpu = max(1, len(requests))
            return score(requests, disable_tqdm=True)

        def work(batch_size: int):
            self.batch_size_per_gpu = batch_size
            return score(requests, disable_tqdm=True)

        return fitting(self._given, self.device, AUTO, work)

    def _model_generate(self, context, max_length, stop, **options):
        if self.think_end_token is not None:  # a stop text ends the answer, and not the thinking before it
            stop = []
        if self._engine is not None:
            mask, most = options.pop("attention_mask"), max_length - context.shape[1]
            options = with_defaults(options, self.model.generation_config)
            return continuations(self._engine, context, mask, stop, self._stop_ids(), most, options)
        if self.model.generation_config.max_new_tokens is not None:  # transformers would prefer it to max_length
            options["max_new_tokens"] = max_length - context.shape[1]
        return super()._model_generate(context, max_length, stop, **options)

    def loglikelihood(self, requests, disable_tqdm=True):
        return self._fitting(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return self._fitting(super().loglikelihood_rolling, requests)

    def _stop_ids(self) -> list[int]:
        """The ids that end an answer of the model."""
        ids = self.model.generation_config.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]
