"""Whether other programs read exports and generate the same: `make interop`, or `python -m benchmarks.interop`.

Every engine has an environment of its own, which is kept in ~/.cache/elastic-interop. For every engine and every case,
a script in readers/ loads the export there and generates greedily in float32. Token ids, the text of the chat template,
the ids of texts, and the place where an answer ends have to be those of this environment's transformers.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import logging

from benchmarks.interop.cases import CASES, NEW_TOKENS, QUESTION, TEXTS, answer_of, chat_ids, write_case
from benchmarks.interop.environments import ENVIRONMENTS, Environment

READERS = Path(__file__).with_name("readers")
RESULTS = Path(__file__).parents[1] / "results" / "interop.json"
SECONDS = 1200  # for one engine and one case
EQUAL, OTHER, UNSUPPORTED = "equal", "differs", "–"


def main() -> None:
    light = [name for name, environment in ENVIRONMENTS.items() if not environment.is_large]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop", description=__doc__)
    parser.add_argument("--engines", nargs="*", default=light, choices=ENVIRONMENTS, help="default: all small ones")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--write", action="store_true", help=f"add the results to {RESULTS.name}")
    given = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    found = json.loads(RESULTS.read_text()) if given.write and RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="interop-") as place:
        exports = {name: make_case(name, Path(place)) for name in given.cases}
        for engine in given.engines:
            results = try_engine(engine, ENVIRONMENTS[engine], exports)
            found.setdefault(engine, {"cases": {}})["version"] = results.pop("version")
            found[engine]["cases"] |= results
            if given.write:  # after every engine: some take long
                RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print("\n" + table(found))
    bad = [
        name for name, entry in found.items() for said in entry["cases"].values() if said not in (EQUAL, UNSUPPORTED)
    ]
    sys.exit(f"not equal: {', '.join(dict.fromkeys(bad))}" if bad else 0)


def make_case(name: str, place: Path) -> tuple[Path, dict]:
    """The export of a case, and what is expected of a reader. `request.json` beside the export is what readers get."""
    directory = place / name.replace(" ", "_")
    export = write_case(CASES[name], directory)
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    prompts = [*texts, chat_ids(tokenizer)]
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    request = {"prompts": prompts, "chat": QUESTION, "texts": TEXTS, "new_tokens": NEW_TOKENS}
    request["special"] = tokenizer.all_special_tokens
    (directory / "request.json").write_text(json.dumps(request))
    tokens = answer_of(export, prompts)
    words = [tokenizer.decode(ids, skip_special_tokens=True).replace("\ufffd", "") for ids in tokens]
    print(f"{name}: written, answers of {', '.join(str(len(ids)) for ids in tokens)} tokens", flush=True)
    stop = GenerationConfig.from_pretrained(export).eos_token_id
    stop = {*(stop if isinstance(stop, list) else [stop])}
    answers = [ids[:-1] if ids[-1] in stop else ids for ids in tokens]
    expected = {"tokens": tokens, "answers": answers, "words": words, "stop": sorted(stop)}
    return export, {**expected, "chat": chat, "chat_ids": prompts[-1], "texts": texts}


def try_engine(name: str, environment: Environment, exports: dict[str, tuple[Path, dict]]) -> dict:
    """Case → EQUAL, UNSUPPORTED, or what differs; and the `version` of the engine."""
    try:
        environment.make()
    except subprocess.CalledProcessError as error:
        print(f"{name}: cannot be installed: {error.stderr.strip()[-500:]}", flush=True)
        return {"version": None}
    results = {"version": None}
    for case, (export, expected) in exports.items():
        answer = ask(environment, export)
        results["version"] = answer.get("version", results["version"])
        results[case] = compare(answer, expected)
        print(f"{name}: {case}: {results[case]}", flush=True)
    return results


def ask(environment: Environment, export: Path) -> dict:
    """The answer of a reader: a line of JSON at the end of what it prints."""
    command = [str(environment.python), str(READERS / environment.reader), str(export)]
    command.append(str(export.parent / "request.json"))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, cwd=environment.directory, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        return {"failed": f"status {done.returncode}: {' '.join(done.stderr.split())[-400:]}"}
    return json.loads(lines[-1])


def compare(answer: dict, expected: dict) -> str:
    """What a result says: the answer's own reason, or the names of what differs from `expected`."""
    if "unsupported" in answer:
        return UNSUPPORTED
    if "failed" in answer:
        return f"fails: {answer['failed']}"
    if "answers" in answer:  # with the stop id at the end, or without it
        answer["answers"] = [ids[:-1] if ids[-1:] and ids[-1] in expected["stop"] else ids for ids in answer["answers"]]
    differing = [name for name in expected if name in answer and answer[name] != expected[name]]
    return EQUAL if not differing else f"{OTHER}: {', '.join(differing)}"


def table(found: dict) -> str:
    """A row per engine, a column per case, as Markdown."""
    rows = [["engine", *CASES], ["---"] * (1 + len(CASES))]
    for name, entry in found.items():
        said = [entry["cases"].get(case, "").partition(":")[0] for case in CASES]
        rows.append([f"{name} ({entry['version']})" if entry["version"] else f"{name} (not to be had)", *said])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
