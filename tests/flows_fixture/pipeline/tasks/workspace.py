"""The directory of a profile's run; here every profile runs in the checkout, with its values in params.yaml."""

from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]


def prepare(profile: str) -> Path:
    if profile != "default":
        yaml = YAML(typ="safe")
        params = yaml.load(ROOT / "params.yaml")
        for section, values in yaml.load(ROOT / "profiles" / f"{profile}.yaml").items():
            params[section].update(values)
        yaml.dump(params, ROOT / "params.yaml")
    return ROOT
