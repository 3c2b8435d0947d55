"""Generates with llama.cpp: `python llama_cpp_reader.py DIR REQUEST`; the answer is a line of JSON.

Its converter knows a tokenizer by the ids that it gives to one text. It does not know one that was trained here, so it
is told the kind: byte-level BPE that splits digits, as that of SmolLM. llama.cpp has a list of names of tokens that end
a turn. For another name, it is told the id, as `--override-kv tokenizer.ggml.eot_token_id=int:ID` does.
"""

import json
import runpy
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path

import xllamacpp

directory, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
(source,) = Path(sys.prefix).glob("sources/*/llama.cpp")
sys.path[:0] = [str(source), str(source / "gguf-py")]


def convert(file: Path) -> None:
    """Write the model as a GGUF file in float32."""
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def kind(self, tokenizer) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "smollm"

    TextModel.get_vocab_base_pre = kind
    values = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    if isinstance(values, list):
        import gguf

        add = gguf.SpecialVocab.add_to_gguf

        def add_with_end_of_turn(self, writer, quiet: bool = False) -> None:
            add(self, writer, quiet)
            if "eot" not in self.special_token_ids:
                writer.add_eot_token_id(values[-1])

        gguf.SpecialVocab.add_to_gguf = add_with_end_of_turn
    sys.argv = ["convert", str(directory), "--outfile", str(file), "--outtype", "f32"]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


def generate(file: Path) -> dict:
    """What the server in this process answers."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(file), 256, 1, 0
    params.warmup, params.use_jinja, params.cpuparams.n_threads = False, True, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(path: str, **content) -> dict:
        body, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.listening_address}{path}", body, headers)
        ) as reply:
            return json.load(reply)

    def tokenize(text: str) -> list[int]:
        return ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    options = {"n_predict": request["new_tokens"], "temperature": 0, "cache_prompt": False, "return_tokens": True}
    return {
        "answers": [ask("/completion", prompt=ids, **options)["tokens"] for ids in request["prompts"]],
        "chat_ids": tokenize(ask("/apply-template", messages=request["chat"])["prompt"]),
        "texts": [tokenize(text) for text in request["texts"]],
    }


if isinstance(json.loads((directory / "config.json").read_text())["intermediate_size"], list):
    reason = "the converter reads no widths that differ between layers"
    print(json.dumps({"version": version("xllamacpp"), "unsupported": reason}))
    sys.exit()
with tempfile.TemporaryDirectory() as place:
    model = Path(place) / "model.gguf"
    convert(model)
    print(json.dumps({"version": version("xllamacpp"), **generate(model)}), flush=True)
