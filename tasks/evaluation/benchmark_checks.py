"""Checks the benchmarks of params.yaml with lm-eval, which is imported only if there are any."""

from tasks.settings.sections import Benchmarks


def check_benchmarks(section: Benchmarks | None, where: str = "evaluate.benchmarks") -> None:
    """Raise ConfigError for benchmarks that lm-eval cannot score (see `check_benchmark_tasks`). Downloads nothing."""
    if section is not None:
        from tasks.evaluation.lm_eval_tasks import check_benchmark_tasks  # here, because its import takes seconds

        check_benchmark_tasks(section, where)
