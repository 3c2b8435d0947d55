"""Members of a family in a form or a command line: they take what params.yaml takes, and refuse what it refuses."""

import re

import pytest

from elastic_core.cost.budgets import parse
from elastic_core.errors import UserError
from flows.stages import check_command
from tasks.settings.budgets import MEMBER, read_family

GOOD = ["0.43", ".5", "1", "1.0", "12345", "1e9", "4e-1", "9B", "1.2M", "1.5 k", "9e3M", "2t", "16GiB@128k", "640KB"]
GOOD += ["16GiB@128k×8", "16gib @ 128K x 8", "2TiB×3", "3MB@64x1", "35ms/token", "0.2s/token", "1200 tokens/s@2k×4"]
BAD = [
    "",
    "B",
    "9X",
    "large",
    "-1",
    "2",
    "75",
    "1.5",
    "nan",
    "inf",
    "9B@128k",
    "0.5@4k",
    "16GiB@",
    "16GiB×",
    "0.4 half",
]


@pytest.mark.parametrize("text", GOOD)
def test_a_form_takes_what_a_file_takes(text):
    assert re.search(f"^({MEMBER})$", f"small={text}")
    family = read_family([f"small={text}"], "budgets")
    assert parse(family["small"]).amount == parse(text).amount
    (option,) = check_command("smoke", family, ())[4:]  # of the process that checks a run
    assert read_family([option.removeprefix("--budget=")], "--budget") == family


@pytest.mark.parametrize("text", [*(f"small={text}" for text in BAD), "0.4", "=0.4", "a b=0.4", "small"])
def test_a_form_refuses_what_a_file_refuses(text):
    with pytest.raises(UserError, match=r"budgets: got '.*'; allowed: NAME=BUDGET, such as small=0"):
        read_family([text], "budgets")


def test_what_the_pattern_cannot_see():
    with pytest.raises(UserError, match=r"--budget small: got .*; allowed: a fraction as"):
        read_family(["small=1.2.3B"], "--budget")
    with pytest.raises(UserError, match=r"budgets: got small twice"):
        read_family(["small=0.4", "small=9B"], "budgets")
