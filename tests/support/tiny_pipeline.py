"""Parameters of a pipeline that runs in seconds."""

from pathlib import Path

import yaml

from tasks.settings.profiles import _merge

ROOT = Path(__file__).resolve().parents[2]


def write_params(directory, place, **changes):
    """The smoke profile on a corpus, checkpoints and exports below `place`."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    _merge(values, yaml.safe_load((ROOT / "profiles" / "smoke.yaml").read_text()))
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
    _merge(values, changes)
    (directory / "params.yaml").write_text(yaml.safe_dump(values))
