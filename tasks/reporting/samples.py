"""The sample generations of a run: for each prompt, how the parent and every final member go on."""

from dataclasses import dataclass

from tasks.reporting import tables


@dataclass(frozen=True)
class Prompt:
    """A prompt from `source`, what is right or was written there, and model → its continuation."""

    source: str
    text: str
    expected: str
    continuations: dict[str, str]


def prompts(scores: tables.Scores) -> list[Prompt]:
    """The prompts of stage evaluate, in its order; the models in the order of the results."""
    found: dict[tuple[str, str], Prompt] = {}
    for budget, versions in scores.items():
        for sample in versions["parent" if budget == "parent" else tables.FINAL]["samples"]:
            key = sample["source"], sample["prompt"]
            prompt = found.setdefault(key, Prompt(*key, sample["expected"], {}))
            prompt.continuations[budget] = sample["continuation"]
    return list(found.values())
