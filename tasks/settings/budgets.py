"""Checks of the budgets in params.yaml that need no parent: their names, their spelling, and their order."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_core.config import require
from elastic_core.cost.budgets import Cost, Spelling, family_setting, parse

# The notation of `elastic_core.cost.budgets` as a pattern for forms, which cannot call `parse`.
_SERVING = r"( ?@ ?\d+[kKmM]?)?( ?[×xX] ?\d+)?"
PATTERN = (
    r"0?\.\d+|1(\.0*)?|\d{4,}|[\d.]+(e\d+)? ?[KMBTkmbt]"  # shares, counts of parameters
    rf"|[\d.]+ ?[KMGTkmgt][iI]?[Bb]{_SERVING}|[\d.]+ ?(m?s/token|tokens/s){_SERVING}"  # memory, time
)


def check_text(text: str) -> str:
    """The text of a budget from a form or a command line, unchanged. Raises ConfigError where it is no budget."""
    parse(text)
    return text


def number_or_text(text: str) -> Spelling:
    """The text of a budget as params.yaml reads it: a share or a count is a number."""
    try:
        return float(text)
    except ValueError:
        return text


def check_spellings(cost: Cost, budgets: Mapping[str, Spelling], untrained: Mapping[str, Spelling]) -> None:
    """Check the names and spellings of all budgets. Check their order too if all are shares of the parent.

    Other spellings can be ordered only after the parent is known; see `tasks.runtime.preflight`. Raises ConfigError.
    """
    require(bool(budgets), "budgets", budgets, "one or more")
    family_setting(cost, budgets)
    parsed = []
    for section, given in (("budgets", budgets), ("untrained", untrained)):
        for name in given:
            allowed = "names of letters, digits and _, other than parent"
            require(name.isidentifier() and name != "parent", section, name, allowed)
        parsed.append({name: parse(spelling, f"{section}.{name}") for name, spelling in given.items()})
    for name in untrained:
        require(name not in budgets, "untrained", name, "names that are not in budgets")
    if all(budget.kind == "share" for group in parsed for budget in group.values()):
        shares = ({name: budget.amount for name, budget in group.items()} for group in parsed)
        check_shares(budgets, untrained, *shares)


def check_shares(
    budgets: Mapping[str, Spelling],
    untrained: Mapping[str, Spelling],
    budget_shares: Mapping[str, float],
    untrained_shares: Mapping[str, float],
) -> None:
    """Check that all shares of the parent differ and that untrained shares lie between trained ones.

    `budgets` and `untrained` hold the budgets as the user wrote them; error messages quote them. Raises ConfigError.
    """
    for section, given, shares in (("budgets", budgets, budget_shares), ("untrained", untrained, untrained_shares)):
        distinct = len(set(shares.values())) == len(shares)
        require(distinct, section, [given[name] for name in shares], "different targets")
    trained = set(budget_shares.values())
    for name, share in untrained_shares.items():
        allowed = f"a share between the trained {min(trained)} and {max(trained)} that differs from every trained share"
        if parse(untrained[name]).kind != "share":
            allowed += f" (this is {share:.4g} of the parent)"
        between = min(trained) < share < max(trained) and share not in trained
        require(between, f"untrained.{name}", untrained[name], allowed)
