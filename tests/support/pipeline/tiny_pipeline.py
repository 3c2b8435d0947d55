"""Parameters of a pipeline that runs in seconds."""

import yaml

from tests.support.committed_params import profile_values


def write_params(directory, place, **changes):
    """The smoke profile on a corpus, checkpoints and exports below `place`.

    `changes`: section → parameters that are added to it.
    """
    values = profile_values("smoke")
    mixture = {"mine": 0.6, "chains": 0.4}
    values["prepare_data"]["sources"] = {
        "mine": {"kind": "files", "path": f"{place}/corpus/*.jsonl", "held_out": 0.1},
        "chains": {"kind": "chains", "documents": 1000, "max_steps": 4},
    }
    for section in (values["parent"]["training"], values["rank"], values["train_short"], values["train_extended"]):
        section["mixture"] = mixture
    values["evaluate"]["held_out"] = ["mine"]
    values["extract"]["destination"] = f"{place}/exports"
    values["compute"]["storage"] = f"{place}/checkpoints"
    values["parent"]["training"] |= {"steps": 10, "warmup_steps": 2, "checkpoint_every": 5}
    values["train_extended"] |= {"steps": 5, "warmup_steps": 2, "checkpoint_every": 5}
    for name, section in changes.items():
        values[name] |= section
    (directory / "params.yaml").write_text(yaml.safe_dump(values))
