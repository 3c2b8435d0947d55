"""The model card (README.md) of an export and of a family: licence and parent, sizes, provenance, and how to load it.

What the card says of the parent comes from a small file that every model made of it has (`PARENT_CARD`). The stage that
imports the parent writes it, from the parent's own card or its licence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load, yaml

from elastic_core.cost.metrics import num_active_parameters, num_parameters
from elastic_core.errors import UserError
from elastic_core.io.json_files import read_json
from elastic_core.io.provenance_file import read_provenance
from elastic_core.io.tokenizer_files import LEGAL, PARENT_CARD
from elastic_core.model import architectures, hf
from elastic_core.model.axes import FIELDS, TITLES
from elastic_core.model.dims import layer_of
from elastic_core.model.submodel import Submodel

CARD = "README.md"
PARENT_KEYS = ("base_model", "license", "license_name", "license_link", "language")
KNOWN_LICENSES = {"apache-2.0": ("apache license", "version 2.0"), "mit": ("mit license",)}
FIXED = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nemotron-elastic"]}
PROVENANCE = "Provenance"
PLACE = '"DIRECTORY"'  # stands for the place of the model in a card, until it has one


def parent_facts(directory: str | os.PathLike, name: str | None) -> dict:
    """What the cards of a family say of its parent, by the keys of a card's metadata.

    - `directory`: the parent's. Its card tells the licence. Without a card, the text of its licence does.
    - `name`: the parent's name on the Hugging Face hub, if it has one.

    Raises UserError for a card with metadata that cannot be read.
    """
    facts = {} if name is None else {"base_model": name}
    card = Path(directory) / CARD
    if card.is_file():
        try:
            found = metadata_load(card) or {}
        except (ValueError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{card}: its metadata cannot be read ({text}); copy it again, or remove it") from None
        facts |= {key: found[key] for key in PARENT_KEYS[1:] if key in found}
    if "license" not in facts:
        facts |= _license_of(Path(directory))
    return facts


def _license_of(directory: Path) -> dict:
    files = sorted(path for path in directory.iterdir() if path.is_file() and LEGAL.fullmatch(path.name))
    files = [path for path in files if path.name.lower().startswith(("licen", "copying"))]
    if not files:
        return {}
    text = " ".join(files[0].read_text(encoding="utf-8", errors="replace").lower().split())
    for license, words in KNOWN_LICENSES.items():
        if all(word in text for word in words):
            return {"license": license}
    return {"license": "other", "license_link": files[0].name}


def write_parent_facts(directory: str | os.PathLike, facts: dict) -> None:
    """Write `facts` into the directory of an imported parent, from which every model made of it copies them."""
    (Path(directory) / PARENT_CARD).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def card_of_submodel(
    directory: str | os.PathLike, config, submodel: Submodel, name: str | None = None, is_stock: bool = True
) -> str:
    """The card of an export.

    directory: the elastic checkpoint. name: the budget, as the caller spelt it. is_stock: whether the export loads
    without a modeling file.
    """
    submodel = submodel.resolve(config)
    count, full = num_parameters(config, submodel), num_parameters(config)
    active = num_active_parameters(config, submodel)
    uses = "" if active is None else f", of which a token uses {active:,}"
    parent = _parent_of(directory)
    base = parent.get("base_model")
    of = f" of [{base}](https://huggingface.co/{base})" if base else ""
    body = [
        f"# {count:,} parameters{f', budget {name}' if name else ''}",
        f"A nested model{of}: {count:,} parameters{uses}, {count / full:.1%} of the {full:,} of its family's "
        "largest. It was cut from an elastic checkpoint, which holds a model for every budget in one set of weights.",
        "## Use",
        _usage(is_stock),
        "## Sizes",
        _sizes(config, submodel),
    ]
    return with_provenance(_front(parent) + "\n\n".join(body) + "\n", read_provenance(directory))


def card_of_family(directory: str | os.PathLike) -> str:
    """The card of an elastic checkpoint, a directory with ``elastic.json``."""
    config = hf.read_config(directory)
    budgets = read_json(Path(directory) / "elastic.json", shape={"budgets": {str: dict}})["budgets"]
    full, rows = num_parameters(config), []
    for name, entry in budgets.items():
        submodel = Submodel(**entry["submodel"]).resolve(config)
        count = num_parameters(config, submodel)
        layers = f"{len(submodel.kept_layers)} / {architectures.num_layers(config)}"
        rows.append((name, f"{entry['target']:g}", f"{count:,}", f"{count / full:.1%}", layers))
    body = [
        f"# An elastic checkpoint of {len(rows)} budgets",
        f"One set of weights of {full:,} parameters holds a nested model for every budget. The files are those of the "
        "largest one, so it loads like any model. `elastic extract DIR OUT --budget NAME` writes another one as a "
        "directory of its own.",
        "## Budgets",
        table(("budget", "target", "parameters", "share", "layers"), rows),
        "## Sizes of the largest",
        _sizes(config, Submodel().resolve(config)),
    ]
    return with_provenance(_front(_parent_of(directory)) + "\n\n".join(body) + "\n", read_provenance(directory))


def with_provenance(card: str, records: Sequence[dict]) -> str:
    """A card with the stages that its weights come from (see provenance_file.py)."""
    rows = [
        (
            *(record["stage"], (record["commit"] or "")[:12] + ("" if record["clean"] else " with changes")),
            *(record["started"][:10], f"{record['tokens']:,}" if "tokens" in record else "", record["device"]),
        )
        for record in records
    ]
    if not rows:
        return card
    return with_section(card, PROVENANCE, table(("stage", "code", "date (UTC)", "tokens", "device"), rows))


def with_section(card: str, title: str, body: str) -> str:
    """A card with a section of this title: in place of the one that it has, or at its end."""
    section = f"## {title}\n\n{body}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(card):
        return pattern.sub(lambda _: section + "\n", card, count=1).rstrip("\n") + "\n"
    return f"{card.rstrip()}\n\n{section}"


def at_place(card: str, repository: str, revision: str | None) -> str:
    """A card whose code loads the model from a repository of the hub, and from a branch of it (None: main)."""
    branch = "" if revision is None else f', revision="{revision}"'
    return card.replace(f"from_pretrained({PLACE}", f'from_pretrained("{repository}"{branch}')


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parent_of(directory: str | os.PathLike) -> dict:
    file = Path(directory) / PARENT_CARD
    found = read_json(file) if file.is_file() else {}
    return {key: found[key] for key in PARENT_KEYS if key in found}


def _front(facts: dict) -> str:
    return f"---\n{ModelCardData(**facts, **FIXED).to_yaml()}\n---\n\n"


def _usage(is_stock: bool) -> str:
    trust = "" if is_stock else ", trust_remote_code=True"
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({PLACE})",
        f"model = AutoModelForCausalLM.from_pretrained({PLACE}{trust})",
    ]
    return "\n".join(["```python", *lines, "```"])


def _sizes(config, submodel: Submodel) -> str:
    """The global sizes, and a table of the layers: number, kind, number in the parent, widths."""
    sizes, pattern = submodel.sizes(config), architectures.pattern(config)
    fields = {key: FIELDS.get(key.partition(".")[0]) for key in sizes}
    named = [(key, f"{TITLES[fields[key]]} {size}") for key, size in sizes.items() if fields[key] is not None]
    whole = ", ".join(text for key, text in named if layer_of(key) is None)
    rows = []
    for number, layer in enumerate(submodel.kept_layers):
        own = ", ".join(text for key, text in named if layer_of(key) == layer)
        rows.append((str(number), pattern[layer], str(layer), own))
    return f"{whole}; vocabulary {config.vocab_size:,}\n\n" + table(("layer", "kind", "in the family", "sizes"), rows)
