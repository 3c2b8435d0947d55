"""Every profile can be planned, and docs/results.md says what the plans of real parents say."""

import json
from pathlib import Path

import pytest

from tasks.commands import plan
from tasks.commands.plan_stages import Hardware
from tasks.parents import gguf
from tasks.settings import local_checks
from tasks.settings.merging import ROOT, profile_names
from tests.support.marks import thorough_but
from tests.support.models.real_parents import SMOLLM2

H100 = Hardware(memory=80e9, price=2.5)
RTX_4090 = Hardware(memory=24e9, peak=165e12, price=0.5)  # its data sheet's dense bfloat16
GPUS = {  # profile → the GPU that it is made for
    "qwen3-0.6b": ("RTX 4090, 24 GB", RTX_4090),
    "qwen3-1.7b": ("H100, 80 GB", H100),
    "nemotron-3-nano-4b": ("H100, 80 GB", H100),
    "llama-3.1-8b": ("H100, 80 GB", H100),
    "qwen3-8b": ("H100, 80 GB", H100),
    "nemotron-nano-9b-v2": ("H100, 80 GB", H100),
    "one-node": ("H100, 80 GB", H100),
    "nemotron-nano-12b-v2": ("H100, 80 GB", H100),
}
QUICK = ("default", "smollm2", "nemotron-nano-12b-v2")  # `make test` plans these


@pytest.fixture
def smollm2(monkeypatch):
    """As if SmolLM2's package were installed, which the tests do without."""
    monkeypatch.setattr(local_checks, "find_package_file", lambda path, key: Path("model.gguf"))
    monkeypatch.setattr(gguf, "read_config", lambda path: SMOLLM2)


@pytest.mark.parametrize("profile", thorough_but(QUICK, sorted(profile_names())))
def test_every_profile_can_be_planned(profile, smollm2):
    """And fits its GPUs. No file but the parent's config.json is needed, and no network."""
    planned = plan.plan_profile(profile, (), None, GPUS.get(profile, ("", Hardware()))[1])
    assert planned["fits"], planned
    assert json.loads(json.dumps(planned)) == planned | {"budgets": json.loads(json.dumps(planned["budgets"]))}
    for stage in planned["stages"].values():
        assert stage["total"] == sum(stage["memory"].values()) > 0
    if profile in GPUS:
        documented, found = (ROOT / "docs/results.md").read_text().splitlines(), row(profile, planned)
        assert found in documented, f"docs/results.md lacks: {found}"


def row(profile: str, planned: dict) -> str:
    """The row of a profile in docs/results.md."""
    stages, (gpu, _) = planned["stages"].values(), GPUS[profile]
    together = {key: sum(stage[key] for stage in stages) for key in ("tokens", "gpu_hours", "hours", "cost")}
    cells = (
        f"`{profile}`",
        " / ".join(f"{values['parameters'] / 1e9:.2f}" for values in planned["budgets"].values()),
        f"{next(iter(stages))['workers']} × {gpu}",
        f"{together['tokens'] / 1e9:.1f}",
        " / ".join(f"{stage['sequence_length']:,}" for stage in stages),
        f"{max(stage['total'] for stage in stages) / 1e9:.0f}",
        f"{together['gpu_hours']:,.0f}",
        f"{together['hours']:,.0f}",
        f"{together['cost']:,.0f}",
    )
    return f"| {' | '.join(cells)} |"
