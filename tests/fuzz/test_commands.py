"""`elastic` with random and nearly right arguments: it ends with an error of one line, and starts no work."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from elastic_core.errors import UserError
from flows.cli.app import app
from tests.support.fuzzing import directories
from tests.support.fuzzing.calls import call, examples

WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
NUMBERS = st.integers(-(10**12), 10**12).map(str) | st.floats().map(str) | WORDS
NEW_WORDS = WORDS.map("x".__add__)
PROFILES = st.sampled_from(["smok", "defaults", "../params", "profiles/smoke.yaml", "smoke.yaml", ""]) | NEW_WORDS
STAGES = st.sampled_from(["train", "rank ", "Rank", "extract@small", ""]) | NEW_WORDS
SETTINGS = st.sampled_from(["seed=", "=1", "seed", "seed=[", "seed=&a [*a]", "a..b=1"]) | WORDS
BUDGETS = st.sampled_from(["small", "fulll", "9Q", "0.5x", "8MB@", "0", "-1", "nan", "1e400", "35ms/token"]) | WORDS
PATHS = st.sampled_from(["nowhere", "", "/dev/null", "file.txt", "empty", ".", "\x00", "a" * 300]) | WORDS


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A working directory with a family, an empty directory and a file."""
    scratch = tmp_path_factory.mktemp("commands")
    directories.write_family(scratch / "family", "llama")
    (scratch / "empty").mkdir()
    (scratch / "file.txt").write_text("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(scratch)
        patch.setenv("TERMINAL_WIDTH", "200")
        assert run(scratch, ["inspect", "family"]).exit_code == 0
        yield scratch


def run(scratch, arguments: list[str], target: str | None = None):
    """The end of a command. 0: success; 1: an error of ours; 2: an error of its usage."""
    with pytest.MonkeyPatch.context() as patch:
        if arguments[0] in ("clean", "compare"):  # they shall not see the runs of this checkout
            patch.setattr("tasks.settings.profiles.ROOT", scratch)
        result = call(f"elastic {target or arguments[0]}", scratch, lambda: CliRunner().invoke(app, arguments))
    assert not isinstance(result, UserError)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments}: {result.exception!r}") from result.exception
    assert result.exit_code in (0, 1, 2), (arguments, result.exit_code, result.output)
    assert result.exit_code == 0 or "rror" in result.output, (arguments, result.output)
    assert "Traceback" not in result.output
    return result


def options(*pairs) -> st.SearchStrategy:
    """Up to three options of (name, strategy of its value; None for a flag)."""
    one = st.one_of(
        *(st.just([name]) if value is None else value.map(lambda v, n=name: [n, v]) for name, value in pairs)
    )
    return st.lists(one, max_size=3).map(lambda found: [word for words in found for word in words])


SHARED = (("--unknown", None), ("--set", SETTINGS), ("", None), ("-", None))


@examples(16)
@given(
    profile=PROFILES, stage=STAGES, rest=options(*SHARED, ("--budget", BUDGETS), ("--force", None), ("--only", STAGES))
)
def test_run(scratch, profile, stage, rest):
    """A stage that does not exist is refused before anything is checked or made."""
    assert run(scratch, ["run", profile, *rest, "--from", stage], "run").exit_code != 0


@examples(16)
@given(profile=PROFILES, rest=options(*SHARED, ("--gpus", NUMBERS), ("--gpu-memory", BUDGETS), ("--peak", NUMBERS)))
def test_plan(scratch, profile, rest):
    assert run(scratch, ["plan", profile, *rest], "plan").exit_code != 0


@examples(16)
@given(
    profile=PROFILES,
    rest=options(*SHARED, ("--context", NUMBERS), ("--batch", NUMBERS), ("--device", WORDS), ("--out", PATHS)),
)
def test_measure(scratch, profile, rest):
    assert run(scratch, ["measure", profile, *rest], "measure").exit_code != 0


@examples(16)
@given(directory=PATHS, rest=options(("--json", None), ("--unknown", None)))
def test_inspect(scratch, directory, rest):
    run(scratch, ["inspect", directory, *rest], "inspect")


@examples(12)
@given(
    directory=PATHS | st.just("family"), budget=BUDGETS, rest=options(("--dtype", WORDS), ("--heterogeneous", WORDS))
)
def test_extract(scratch, directory, budget, rest):
    run(scratch, ["extract", directory, "out/model", "--force", "--budget", budget, *rest], "extract")


@examples(12)
@given(
    prompt=WORDS,
    directory=PATHS | st.just("family"),
    rest=options(("--budget", BUDGETS), ("-t", NUMBERS), ("-n", st.sampled_from(["0", "-1", "x", "2", ""]))),
)
def test_generate(scratch, prompt, directory, rest):
    run(scratch, ["generate", "--model", directory, "-n", "2", *rest, "--", prompt], "generate")


@examples(16)
@given(directory=PATHS, data=PATHS, rest=options(("--budget", BUDGETS), ("--name", WORDS), ("--text-field", WORDS)))
def test_init(scratch, directory, data, rest):
    """The directory holds no parent, so nothing is written."""
    assert run(scratch, ["init", directory, "--data", data, *rest], "init").exit_code != 0


@examples(8)
@given(names=st.lists(NEW_WORDS | PATHS.filter(bool), min_size=1, max_size=2))
def test_clean(scratch, names):
    """Names that nothing has: nothing is removed."""
    assert run(scratch, ["clean", "--", *names], "clean").exit_code != 0


@examples(8)
@given(names=st.lists(NEW_WORDS | PATHS | st.just("family"), min_size=1, max_size=3))
def test_compare(scratch, names):
    run(scratch, ["compare", "--", *names], "compare")


def test_an_empty_name_of_a_stage_is_refused(scratch):
    """It had counted as no name, so that all stages would have run."""
    for option in ("--from", "--until", "--only"):
        result = run(scratch, ["run", "smoke", option, ""], "found")
        assert result.exit_code == 1 and "stage: got ''; allowed: fingerprint" in result.output
