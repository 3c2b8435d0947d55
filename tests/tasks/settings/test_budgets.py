"""The pattern of budgets for forms: it takes what params.yaml takes, and refuses what params.yaml refuses."""

import re

import pytest

from elastic_core.config import ConfigError
from elastic_core.cost.budgets import parse
from tasks.settings.budgets import PATTERN, check_text, number_or_text

GOOD = ["0.43", ".5", "1", "1.0", "12345", "9B", "1.2M", "1.5 k", "9e3M", "2t", "16GiB@128k", "16GiB@128k×8", "640KB"]
GOOD += ["16gib @ 128K x 8", "2TiB×3", "3MB@64x1", "35ms/token", "0.2s/token", "1200tokens/s", "1200 tokens/s@2k×4"]
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
    assert re.search(f"^({PATTERN})$", text) and check_text(text) == text
    assert parse(number_or_text(text)).amount == parse(text).amount


@pytest.mark.parametrize("text", BAD)
def test_a_form_refuses_what_a_file_refuses(text):
    assert not re.search(f"^({PATTERN})$", text)
    with pytest.raises(ConfigError, match="allowed: a fraction as"):
        check_text(text)
