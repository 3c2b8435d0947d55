"""Stage `rank`: score the parent's widths and layers, and sort its weights by importance."""

import json
from pathlib import Path

from tqdm import tqdm

from elastic_core import ElasticModel, rank, sort_
from elastic_core.data.loader import PackedSequences, TokenData
from elastic_core.training.distributed.placement import Ranks
from tasks.runtime.exit_status import errors_as_text
from tasks.runtime.launch import launch
from tasks.settings import params

PARENT, DATA, OUT = Path("artifacts/parent"), Path("artifacts/data"), Path("artifacts/rank")


def work(arguments: dict, ranks: Ranks) -> None:
    """What every worker does: score its own sequences of every batch; all end with the same ranking."""
    settings = arguments["settings"]
    section = settings.rank
    model = ElasticModel.from_pretrained(PARENT).to(ranks.device)
    sequences = PackedSequences(TokenData(DATA), section.mixture, section.sequence_length, settings.seed + 1)
    part = ranks.part(section.batch_size, "rank.batch_size")
    size = part.stop - part.start
    batches = [sequences.batch(i * section.batch_size + part.start, size)[0] for i in range(section.batches)]
    min_depth = min(settings.choices.depth or (len(model.model.layers),))
    bars: dict[str, tqdm] = {}

    def progress(what: str, done: int, total: int) -> None:
        if ranks.rank == 0:
            bar = bars.setdefault(what, tqdm(total=total, desc=f"rank {what}"))
            bar.update(done - bar.n)

    ranking = rank(
        model,
        [batch.to(ranks.device) for batch in batches],
        section.aggregation,
        section.depth_method,
        min_depth,
        section.top_channels,
        section.depth_batches,
        progress,
        ranks.sum,
        section.measure,
    )
    for bar in bars.values():
        bar.close()
    with ranks.first_alone() as is_first:
        if is_first:
            sort_(model, ranking)
            OUT.mkdir(parents=True, exist_ok=True)
            ranking.save(OUT / "ranking.json")
            model.save_pretrained(OUT / "model", tokenizer_from=PARENT)
            print(json.dumps({"depth": ranking.depth}))


@errors_as_text()
def main() -> None:
    settings = params.load()
    launch(work, {"settings": settings}, settings.compute, "rank")


if __name__ == "__main__":
    main()
