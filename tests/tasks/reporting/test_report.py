"""The report: its tables against numbers worked out by hand, its charts, and its page as a browser shows it."""

import contextlib
import copy
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from elastic_core.data.token_files import Manifest, Source, SplitWriter
from elastic_core.errors import UserError
from tasks import report
from tasks.reporting import charts, columns, figures, tables, vega
from tasks.settings.load import load
from tests.support.committed_params import COMMITTED

CHROMIUM = Path("/usr/bin/chromium")
TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
CONFIG = {
    "model_type": "nemotron_h",
    "layers_block_type": [TYPES[character] for character in "M*-M"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 10,
    "n_groups": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "ssm_state_size": 4,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PARENT = {"hidden_size": 32, "kept_layers": [0, 1, 2, 3], "intermediate_size": 64, "mamba_num_heads": 8}
PARENT |= {"mamba_head_dim": 10, "num_attention_heads": 4}
SUBMODELS = {
    "full": PARENT,
    "middle": PARENT | {"hidden_size": 24, "mamba_num_heads": [6, 4]},
    "small": PARENT | {"hidden_size": 16, "kept_layers": [0, 1, 2], "mamba_head_dim": 5, "num_attention_heads": 2},
}
PARAMETERS = {"parent": 1000, "full": 1000, "middle": 700, "small": 400}
LOSSES = {  # of the versions
    "parent": {"parent": 2.0},
    "full": {"zero_shot": 2.0, "short": 2.2, "extended": 2.1},
    "middle": {"zero_shot": 4.0, "short": 3.0, "extended": 2.5},
    "small": {"zero_shot": 6.0, "short": 3.5, "extended": 3.0},
}
RATIOS = {"parent": 1.0, "full": 1.0, "middle": 0.9, "small": 0.5}


RECORD = {"stage": "train_short", "commit": "0123abc", "clean": False, "seconds": 300.0, "device": "A Chip (2 cores)"}


def evaluation(budget: str, loss: float) -> dict:
    """What tasks/evaluate.py writes of one directory."""
    count, ratio = PARAMETERS[budget], RATIOS[budget]
    latency = {"prompt_tokens": 16, "new_tokens": 4, "repeats": 3, "threads": 1}
    for name, seconds in (("prefill", 0.02), ("per_token", 0.004)):
        latency |= {f"{name}_seconds": seconds * ratio, f"parent_{name}_seconds": seconds, f"{name}_ratio": ratio}
        latency[f"{name}_ratio_quartiles"] = [ratio - 0.02, ratio + 0.03]
    task = {"exact_match": 0.75, "standard_error": math.sqrt(0.75 * 0.25 / 12), "chance": 0.1, "items": 12}
    return {
        "num_parameters": count,
        "loss_prose": loss,
        "bits_per_byte_prose": loss / 2,
        "tokens_prose": 500,
        "loss": loss,
        "kl_to_parent": loss - 2.0,
        "bits_per_byte": loss / 2,
        "tokens": 500,
        "memory": {
            "weight_bytes": 4096 * count,
            "cache_tokens": 32,
            "kv_cache_bytes": 2**20,
            "ssm_state_bytes": 2**19,
            "conv_state_bytes": 2**19,
            "cache_bytes": 2**21,
            "element_type": "float32",
        },
        "latency": latency,
        "tasks": {"chains_3": task, "recall_4": task | {"exact_match": 0.5, "chance": 0.25}},
        "benchmarks": {"piqa": {"metric": "acc_norm", "value": 0.625, "standard_error": 0.25, "items": 4, "all": {}}},
        "environment": {
            **{"device": "a processor", "cores": 2, "python": "3", "torch": "2", "transformers": "5"},
            "lm_eval": "0",
        },
        "submodel": SUBMODELS.get(budget),
        "provenance": [] if budget == "parent" else [RECORD],
    }


def step(number: int, mode: str, **budgets) -> dict:
    """A row of metrics: for each budget loss, KL and budget error."""
    found = {
        name: {"loss": loss, "ce": loss + 1 if loss is not None else None, "kl": kl, "budget_error": error}
        for name, (loss, kl, error) in budgets.items()
    }
    return {"step": number, "tokens": 100 * number, "mode": mode, "budgets": found, "microbatches": []}


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The artifacts of a run of our own making; `middle` is served without having been trained."""
    directory = tmp_path_factory.mktemp("report")
    artifacts = directory / "artifacts"
    for budget, versions in LOSSES.items():
        rows = {version: evaluation(budget, loss) for version, loss in versions.items()}
        sample = {"source": "prose", "prompt": "In the\nbeginning", "expected": " was", "continuation": f" <{budget}>"}
        list(rows.values())[-1]["samples"] = [sample]
        if budget == "middle":  # the one whose widths differ between layers
            rows["zero_shot"]["uniform"] = {"num_parameters": 701, "loss": 4.25}
        write_json(artifacts / "evaluate" / f"{budget}.json", rows)
    write_json(artifacts / "rank" / "model" / "config.json", CONFIG)
    scores = {
        "hidden": [float(i) for i in range(32)],
        "mamba_heads.3": [1.0, 4.0, 2.0, 3.0],
        "mamba_heads.0": [2.0, 0.0],
        "ffn.2": [0.0] * 4,
    }
    ranking = {"depth": [0, 1, 2, 3], "depth_scores": {"3": 0.1, "2": 0.4}, "scores": scores, "orders": {}}
    write_json(artifacts / "rank" / "ranking.json", ranking)
    stages = {
        "parent_metrics.jsonl": [step(1, "hard", full=(6.0, 0.0, 0.0)), step(2, "hard", full=(4.0, 0.0, 0.0))],
        "train_short/metrics.jsonl": [
            step(1, "soft", small=(1.0, 1.0, 0.5)),
            step(2, "soft", small=(None, None, None)),  # skipped
            step(3, "hard", small=(0.5, 0.5, 0.01), full=(0.25, 0.25, 0.0)),
        ],
        "train_extended/metrics.jsonl": [step(1, "hard", small=(0.4, 0.4, 0.01))],
    }
    for name, rows in stages.items():
        (artifacts / name).parent.mkdir(parents=True, exist_ok=True)
        (artifacts / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = Manifest(CONFIG["vocab_size"], 0, 0, "", {"prose": Source("drop", {}, {"null": 3})})
    (artifacts / "data").mkdir()
    for split, documents in (("train", [10, 10, 100, 120, 160, 200, 400]), ("held_out", [100])):
        writer = SplitWriter(artifacts / "data", "prose", split, manifest.dtype)
        writer.append([[1] * length for length in documents], num_bytes=1)
        manifest.sources["prose"].splits[split] = writer.close()
    manifest.write(artifacts / "data")
    values = copy.deepcopy(COMMITTED)
    values["budgets"] = {"full": 1.0, "small": 0.4}
    values["untrained"] = {"middle": 0.7}
    for stage in ("train_short", "train_extended"):
        values[stage]["budget_shares"] = {"full": 0.5, "small": 0.5}
    values["evaluate"] |= {"held_out": ["prose"], "tasks": ["chains_3", "recall_4"]}
    values["prepare_data"]["evaluation"] = {"chains": [3], "recall": [4], "items": 12}
    (directory / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return directory


@pytest.fixture
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return tables.read_scores({"small": 0.4, "full": 1.0, "middle": 0.7})


def test_a_damaged_file_of_scores_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(Path("artifacts/evaluate/parent.json"), {})
    Path("artifacts/evaluate/small.json").write_text('{"zero_shot": ')
    with pytest.raises(UserError, match=r"^artifacts/evaluate/small\.json: is not valid JSON"):
        tables.read_scores({"small": 0.4})


@pytest.fixture(scope="module")
def made(workspace):
    """The directory `reports`, as the stage writes it."""
    with contextlib.chdir(workspace):
        report.main()
    return workspace / "reports"


def test_results(inside):
    frame = tables.results(inside)
    named = [("parent", "parent"), ("full", "after stage 1"), ("full", "after stage 2")]
    versions = ("zero-shot slice", "after stage 1", "after stage 2")
    named += [(budget, version) for budget in ("middle", "small") for version in versions]
    assert list(zip(frame["budget"], frame["model"], strict=True)) == named
    row = frame[(frame["budget"] == "small") & (frame["model"] == "after stage 2")].iloc[0].to_dict()
    expected = {
        "parameters": 400,
        "share": 0.4,
        "loss": 3.0,
        "kl_to_parent": 1.0,
        "gap_closed": 0.75,  # 3 of the 4 nats between 6 and 2
        "bits_per_byte": 1.5,
        "ms_per_token": 2.0,
        "parent_ms_per_token": 4.0,
        "latency_ratio": 0.5,
        "latency_ratio_low": 0.48,
        "latency_ratio_high": 0.53,
        "prefill_ratio_high": 0.53,
        "weight_mib": 400 / 256,
        "cache_mib": 2.0,
        "memory_mib": 400 / 256 + 2,
        "chains_3": 0.75,
        "chains_3_error": 0.125,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert frame["gap_closed"].isna().tolist() == [True] * 3 + [False] * 6  # the parent's own architecture has no gap


def test_conversations_have_a_loss_and_no_bits_per_byte(inside):
    """Beside a text, and without any text."""
    settings, scores = load(), copy.deepcopy(inside)
    settings = replace(settings, evaluate=replace(settings.evaluate, held_out=("prose", "talk")))
    for values in (values for versions in scores.values() for values in versions.values()):
        values |= {"loss_talk": 1.5, "tokens_talk": 50}
    described, frame = columns.describe(settings, scores), tables.results(scores)
    assert described["loss_talk"].title == "loss talk, nats/token" and set(frame["loss_talk"]) == {1.5}
    assert "50 of talk" in described["loss"].how and "Of talk, only the trained tokens" in described["loss"].how
    assert (
        "for all sources of text together" in described["bits_per_byte"].how and "bits_per_byte_talk" not in described
    )
    for values in (values for versions in scores.values() for values in versions.values()):
        del values["bits_per_byte"], values["bits_per_byte_prose"]
    described, frame = columns.describe(settings, scores), tables.results(scores)
    assert not any(name.startswith("bits") for name in [*described, *frame])
    assert tables.metrics(frame, [])["small"].keys() == tables.metrics(tables.results(inside), [])["small"].keys() - {
        "bits_per_byte"
    }


def test_metrics_of_the_last_versions(inside):
    found = tables.metrics(tables.results(inside), ["chains_3"])
    assert list(found) == ["parent", "full", "middle", "small"]
    assert found["middle"] == {
        **{"parameters": 700, "share": 0.7, "loss": 2.5, "kl_to_parent": 0.5, "bits_per_byte": 1.25},
        **{"latency_ratio": 0.9, "weight_mib": 2.73438, "cache_mib": 2.0, "chains_3": 0.75},
    }
    assert json.loads(json.dumps(found)) == found


def test_pareto():
    frame = pd.DataFrame(
        [
            (3, 1.0, "best"),
            (1, 3.0, "cheapest"),
            (2, 2.0, "between"),
            (2, 2.5, "worse"),
            (3, 1.0, "same"),
            (4, 1.5, "no"),
        ],
        columns=["cost", "loss", "name"],
    )
    assert tables.pareto(frame, "cost")["name"].tolist() == ["cheapest", "between", "best"]


def test_training(inside):
    frame = tables.training()
    rows = {(row.stage, row.budget): [] for row in frame.itertuples()}
    for row in frame.itertuples():
        rows[row.stage, row.budget].append((row.tokens, row.loss, row.kl, row.budget_error, row.ce))
    assert rows["parent", "parent"] == [(100, 6.0, 0.0, 0.0, 7.0), (200, 4.0, 0.0, 0.0, 5.0)]
    first, skipped, last = rows["train_short", "small"]
    assert first == (100, 1.0, 1.0, 0.5, 2.0) and last == (300, 0.5, 0.5, 0.01, 1.5)
    assert skipped[0] == 200 and all(math.isnan(value) for value in skipped[1:])
    assert rows["train_extended", "small"] == [(100, 0.4, 0.4, 0.01, 1.4)]
    assert tables.settled() == 200


def test_states_have_a_column_where_they_are_matched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {stage: step(100, "hard", small=(1.0, 0.5, 0.0)) for stage in ("parent", "train_short", "train_extended")}
    for state in (None, 0.25):
        if state is not None:
            rows["train_extended"]["budgets"]["small"]["state"] = state
        for stage, row in rows.items():
            path = Path("artifacts", "parent_metrics.jsonl" if stage == "parent" else f"{stage}/metrics.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row) + "\n")
        frame = tables.training()
        assert ("state" in frame) == (state is not None)
    assert frame.dropna(subset="state")[["stage", "state"]].values.tolist() == [["train_extended", 0.25]]


def test_training_is_smoothed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("parent_metrics.jsonl", "train_short/metrics.jsonl", "train_extended/metrics.jsonl"):
        rows = [step(i, "soft", small=(float(i % 2), 0.0, 0.0)) for i in range(1, 601)]
        (tmp_path / "artifacts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "artifacts" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    frame = tables.training()
    assert len(frame) == 3 * tables.POINTS and frame["loss"].tolist() == pytest.approx([0.5] * len(frame), abs=0.06)
    assert tables.settled() is None


def test_router(inside):
    frame = tables.router(inside, SimpleNamespace(**CONFIG))
    found = {(row.budget, row.axis, row.layer): (row.size, row.kept) for row in frame.itertuples()}
    assert set(frame["budget"]) == {"full", "middle", "small"}
    assert all(kept == 1.0 for (budget, *_), (_, kept) in found.items() if budget == "full")
    assert found["middle", "hidden_size", "all"] == (24, 0.75)
    assert found["middle", "mamba_num_heads", "0 M"] == (6, 0.75)
    assert found["middle", "mamba_num_heads", "3 M"] == (4, 0.5)
    assert found["small", "mamba_head_dim", "0 M"] == (5, 0.5)
    assert found["small", "num_attention_heads", "1 *"] == (2, 0.5)
    assert all(math.isnan(value) for value in found["small", "mamba_num_heads", "3 M"])  # a dropped layer


def test_importance(inside):
    config = SimpleNamespace(**CONFIG)
    frame = tables.importance(config)
    parts = {
        key: list(zip(part["rank"], part["importance"], strict=True)) for key, part in frame.groupby(["axis", "layer"])
    }
    ranks, values = zip(*parts["mamba_num_heads", "3 M"], strict=True)
    assert ranks == pytest.approx([0, 1 / 3, 2 / 3, 1]) and values == (1.0, 0.75, 0.5, 0.25)
    assert parts["mamba_num_heads", "0 M"] == [(0, 1.0), (1, 0.0)]
    assert {value for _, value in parts["intermediate_size", "2 -"]} == {0.0}  # of no importance at all
    assert len(parts["hidden_size", "all"]) == 32 and parts["hidden_size", "all"][1] == pytest.approx((1 / 31, 30 / 31))
    order = list(dict.fromkeys(zip(frame["axis"], frame["layer"], strict=True)))
    assert order[-2:] == [("mamba_num_heads", "0 M"), ("mamba_num_heads", "3 M")]
    assert tables.depth(config).to_dict("list") == {"layer": ["3 M", "2 -"], "score": [0.1, 0.4]}


def test_importance_of_many_units_is_a_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "artifacts/rank/ranking.json", {"scores": {"hidden": [1.0, 3.0] * 48}})
    values = tables.importance(SimpleNamespace(**CONFIG))["importance"].tolist()
    assert values == pytest.approx([1.0] * 24 + [1 / 3] * 24)


def test_every_column_is_explained(inside):
    settings, frame = load(), tables.results(inside)
    described = columns.describe(settings, inside)
    numbers = set(frame.columns) - {"budget", "model"}
    assert {name for name in numbers if not name.endswith("_error")} == set(described)
    titles = [column.title for column in described.values()]
    assert len(set(titles)) == len(titles)
    for name, column in described.items():
        assert column.unit or name == "parameters", name
        assert column.how.endswith(".") and "{" not in column.how, name
    assert "12 items" in described["chains_3"].how and "0.250" in described["recall_4"].how
    assert "12 steps" in described["latency_ratio"].how and "; a processor, 1 thread," in described["latency_ratio"].how
    hidden = [column for column in described.values() if not column.shown]
    assert all(column.unit == "ms" or "quartile" in column.unit for column in hidden) and len(hidden) == 6
    assert all("a processor" in column.title for column in hidden if column.unit == "ms")
    rows = tables.rounded(frame, described, tables.chance(inside))
    assert all(list(row) == ["budget", "model", *titles] for row in rows)
    assert (
        rows[-1]["model"] == "guessing"
        and rows[-1]["recall_4, exact match"] == 0.25
        and rows[-1]["loss, nats/token"] is None
    )


def test_large_numbers_are_rounded_too():
    column = columns.Column("throughput", "tokens/s", "Of a device.", ",.1f")
    assert column.round(8881.84) == 8881.8 and column.write(8881.84) == "8,881.8"


@pytest.mark.thorough
def test_every_picture_can_be_drawn_in_light_and_dark(inside):
    settings, frame = load(), tables.results(inside)
    sections = figures.sections(settings, inside, frame)
    drawn = [figure for group in sections.values() for figure in group]
    assert len({figure.title for figure in drawn}) == len(drawn) >= 12
    for figure in drawn:
        light, dark = (vega.to_svg(figure.spec(theme)) for theme in (charts.LIGHT, charts.DARK))
        assert charts.LIGHT.ink in light and charts.DARK.ink in dark and charts.LIGHT.ink not in dark, figure.title
        assert figure.caption and "NaN" not in light and "undefined" not in light, figure.title
    assert 'fill="#ffffff"' in vega.to_svg(drawn[0].spec(charts.PAPER)) and 'fill="#ffffff"' not in light
    router = vega.to_svg(sections["What the router chose"][0].spec(charts.LIGHT))
    assert router.count(">×<") == 1 and all(f">{name}<" in router for name in ("hidden", "3 M", "middle", "24"))


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme, ground", [(charts.LIGHT, "#ffffff"), (charts.DARK, "#161b22")])
def test_words_and_lines_stand_out(theme, ground):
    def contrast(colour):
        darker, lighter = sorted((luminance(colour), luminance(ground)))
        return (lighter + 0.05) / (darker + 0.05)

    assert all(contrast(colour) >= 4.5 for colour in (theme.ink, theme.muted, *theme.series))


class References(HTMLParser):
    """What a page refers to, and images without words."""

    def __init__(self):
        super().__init__()
        self.found, self.tags, self.wordless = [], [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.found += [attributes[name] for name in ("src", "href", "srcset", "data", "action") if name in attributes]
        self.wordless += tag == "img" and not attributes.get("alt")


def test_the_page_stands_alone(made):
    html = (made / "report.html").read_text()
    page = References()
    page.feed(html)
    assert page.found and all(reference.startswith(("data:image/svg+xml;base64,", "#")) for reference in page.found)
    assert not {"script", "link", "iframe"} & set(page.tags) and page.wordless == 0
    assert not re.search(r"@import|url\(", html)
    assert "prefers-color-scheme: dark" in html and page.tags.count("source") == page.tags.count("img")


def test_the_files(made):
    results, metrics = (json.loads((made / name).read_text()) for name in ("results.json", "metrics.json"))
    assert len(results) == 10 and metrics["small"]["latency_ratio"] == 0.5
    assert results[-2]["time per token on a processor, ms"] == 2.0
    ratios = [row["time per token, × parent"] for row in results]
    assert ratios == [1.0, None, 1.0, None, None, 0.9, None, None, 0.5, None]  # one number per shape
    above = (made / "report.md").read_text().split("## Plots")[0]
    assert above.count("\n| ") == 11 and "data:" not in above and "Extracted, but not trained: middle" in above
    target = "(target 100.0% of parameters; reached 100.0%)"
    assert f"full: 100% of the parent's parameters {target}, loss +0.100 nats/token" in above
    assert "0.50 × the parent's time per token (quartiles 0.48 to 0.53)" in above and "| 0.5 (0.48–0.53) |" in above
    gain = "middle: before training, 4.0000 nats/token with heterogeneous widths, 4.2500 with uniform widths"
    assert gain in above and "a gain of 0.2500" in above and "small: before training" not in above
    assert gain in (made / "report.html").read_text()
    header = {
        name: (made / "plots" / f"{name}.csv").read_text().splitlines()[0]
        for name in ("training", "results", "router", "importance")
    }
    assert header["training"].startswith("stage,tokens,budget,loss,kl,budget_error")
    assert header["results"].startswith("budget,model,parameters,loss,kl_to_parent,latency_ratio,latency_ratio_low")
    assert header["router"].startswith("budget,axis,layer,kept")
    assert header["importance"] == "axis,layer,rank,importance"
    assert not list(made.rglob("*.partial"))


def test_a_picture_is_the_same_when_drawn_again(inside):
    settings, frame = load(), tables.results(inside)
    first, again = (
        vega.to_svg(figures.sections(settings, inside, frame)[name][0].spec(charts.LIGHT))
        for name in ["What the router chose"] * 2
    )
    assert "gradient_" in first and first == again


def test_times_of_different_moments_are_not_beside_each_other(made):
    """Only results.json has milliseconds, with the device."""
    for name in ("report.html", "report.md"):
        assert not re.search(r"\bms\b|millisec", text_of(made / name)), name
    assert "ms" not in (made / "plots" / "results.csv").read_text().splitlines()[0]


def test_what_is_called_memory_is_told_apart(made):
    """Without a budget in memory, no number is called memory."""
    text = text_of(made / "report.html")
    assert "weights + cache" in text and not re.search(r"\bmemory\b", text)


def text_of(path: Path) -> str:
    """The words of a page, without styles, data: URLs and the parameters at its end."""
    text = path.read_text().split("<footer>")[0]
    return re.sub(r"<style>.*?</style>|data:[\w/+;]+,[\w+/=]+|<[^>]+>", " ", text, flags=re.DOTALL)


def test_samples_are_shown(made):
    assert all(f"&lt;{budget}&gt;" in (made / "report.html").read_text() for budget in LOSSES)
    lines = (made / "report.md").read_text().splitlines()
    assert "**prose**: ` In the↵beginning `" in lines and "- small: `  <small> `" in lines


def test_the_report_says_where_it_comes_from(made):
    html, markdown = (made / "report.html").read_text(), (made / "report.md").read_text()
    head, rows = "| stage | steps | tokens | time | device | commit |", markdown.splitlines()
    assert "| prose | bible | 7 | 1,000 | 1,000 | 100 | 3 null |" in rows and head in rows
    assert "| 8 to 15 | 2 (2.0%) |" in rows and "| 16 to 31 | – |" in rows and "| 256 to 511 | 1 (40.0%) |" in rows
    assert "| prose | train_short | 48 | drop | 5 | 98.2% |" in rows  # 18 of 993 labels are left
    assert "| parent | 2 | 200 | – | – | – |" in rows
    assert "| train_short | 3 | 300 | 5 min | A Chip (2 cores) | 0123abc with changes |" in rows
    for words in (
        "trained here by stage parent: nemotron_h, layers M*-M, 1,000 parameters",
        "full: 1.0, small: 0.4; not trained: middle: 0.7; counted in parameters",
        "artifacts/train_extended/model",
        "artifacts/models/small",
        f"torch {version('torch')}",
    ):
        assert words in html and words in markdown, words


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_on_a_phone(made, scheme):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_context(color_scheme=scheme, viewport={"width": 375, "height": 800}).new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{made / 'report.html'}")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        shown = page.evaluate("document.images[0].currentSrc === document.images[0].src")
        assert shown == (scheme == "light")
        # The table scrolls in its own box, and its first column stays.
        left = "document.querySelector('tbody th').getBoundingClientRect().left"
        before = page.evaluate(left)
        assert (
            page.evaluate("(box => { box.scrollLeft = 300; return box.scrollLeft })(document.querySelector('.scroll'))")
            > 0
        )
        assert page.evaluate(left) == before
        assert all(url.startswith(("file://", "data:")) for url in asked)
        browser.close()
