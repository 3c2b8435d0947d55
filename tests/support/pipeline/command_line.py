"""The command line called in this process, and the family that its tests inspect."""

from transformers import NemotronHConfig
from typer.testing import CliRunner

from elastic_core import Submodel
from flows.cli.app import app

WORDS = ["<end>", *(f"w{i}" for i in range(36))]


CONFIG = NemotronHConfig(
    vocab_size=len(WORDS),
    hidden_size=24,
    layers_block_type=NemotronHConfig._pattern_to_list("M-*M-"),
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=5,
    intermediate_size=19,
    mamba_num_heads=6,
    mamba_head_dim=6,
    n_groups=2,
    ssm_state_size=7,
    eos_token_id=0,
)


MEMBERS = {
    "full": Submodel(),
    "uneven": Submodel(17, (0, 1, 2, 4), (13, 4), 4, 5, 4),
    "small": Submodel(12, (0, 2), 7, 2, 5, 2),
}


def call(*arguments, status=0):
    """What the command says, on stdout or, where it ends with an error, on stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if status else result.stdout


def error_of(*arguments):
    text = call(*arguments, status=1)
    assert text.startswith("error: ") and text.count("\n") == 1
    return text
