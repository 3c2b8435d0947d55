"""Budgets as forms and command lines give them; checks that need no parent: names, spelling, and order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from elastic_core.config import Problems
from elastic_core.cost.budgets import Cost, Spelling, family_setting, parse
from elastic_core.errors import UserError

# The notation of `elastic_core.cost.budgets` as a pattern, for forms, which cannot call `parse`.
_SERVING = r"( ?@ ?\d+[kKmM]?)?( ?[×xX] ?\d+)?"
PATTERN = (
    r"0?\.\d+|1(\.0*)?|\d{4,}(\.\d*)?|[\d.]+e[+-]?\d+|[\d.]+(e\d+)? ?[KMBTkmbt]"  # shares, counts of parameters
    rf"|[\d.]+ ?[KMGTkmgt][iI]?[Bb]{_SERVING}|[\d.]+ ?(m?s/token|tokens/s){_SERVING}"  # memory, time
)
MEMBER = rf"[A-Za-z_]\w*=({PATTERN})"
MEMBER_FORMS = "NAME=BUDGET, such as small=0.4, small=9B, small=16GiB@128k or small=35ms/token"


def read_family(texts: Iterable[str], where: str) -> dict[str, Spelling]:
    """``NAME=BUDGET`` per member, from a form or a command line, as section `budgets` would hold them.

    `where` is the start of error messages. Raises UserError for another form and for a name that is there twice.
    """
    family: dict[str, Spelling] = {}
    for text in texts:
        if not re.fullmatch(MEMBER, text):
            raise UserError(f"{where}: got {text!r}; allowed: {MEMBER_FORMS}")
        name, _, budget = text.partition("=")
        if name in family:
            raise UserError(f"{where}: got {name} twice; allowed: every name once")
        parse(budget, f"{where} {name}")
        try:
            family[name] = float(budget)
        except ValueError:
            family[name] = budget
    return family


def check_spellings(cost: Cost, budgets: Mapping[str, Spelling], untrained: Mapping[str, Spelling]) -> None:
    """Check the names and spellings of all budgets. Check their order too if all are shares of the parent.

    Other spellings can be ordered only after the parent is known; see `tasks.runtime.preflight`. Raises ConfigError.
    """
    problems, parsed = Problems(), {"budgets": {}, "untrained": {}}
    problems.require(bool(budgets), "budgets", budgets, "one or more")
    for section, given in (("budgets", budgets), ("untrained", untrained)):
        for name, spelling in given.items():
            allowed = "names of letters, digits and _, other than parent"
            problems.require(name.isidentifier() and name != "parent", section, name, allowed)
            with problems.collecting():
                parsed[section][name] = parse(spelling, f"{section}.{name}")
    for name in untrained:
        problems.require(name not in budgets, "untrained", name, "names that are not in budgets")
    problems.raise_all()
    with problems.collecting():
        family_setting(cost, budgets)
    if all(budget.kind == "share" for group in parsed.values() for budget in group.values()):
        shares = ({name: budget.amount for name, budget in group.items()} for group in parsed.values())
        with problems.collecting():
            check_shares(budgets, untrained, *shares)
    problems.raise_all()


def check_shares(
    budgets: Mapping[str, Spelling],
    untrained: Mapping[str, Spelling],
    budget_shares: Mapping[str, float],
    untrained_shares: Mapping[str, float],
) -> None:
    """Check that all shares of the parent differ and that untrained shares lie between trained ones.

    `budgets` and `untrained` hold the budgets as the user wrote them; error messages quote them. Raises ConfigError.
    """
    problems = Problems()
    for section, given, shares in (("budgets", budgets, budget_shares), ("untrained", untrained, untrained_shares)):
        distinct = len(set(shares.values())) == len(shares)
        problems.require(distinct, section, [given[name] for name in shares], "different targets")
    trained = set(budget_shares.values())
    for name, share in untrained_shares.items():
        allowed = f"a share between the trained {min(trained)} and {max(trained)} that differs from every trained share"
        if parse(untrained[name]).kind != "share":
            allowed += f" (this is {share:.4g} of the parent)"
        between = min(trained) < share < max(trained) and share not in trained
        problems.require(between, f"untrained.{name}", untrained[name], allowed)
    problems.raise_all()
