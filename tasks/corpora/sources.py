"""The kinds of sources. A section `prepare_data.sources.<name>` of params.yaml becomes one of them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from elastic_core import config
from elastic_core.config import ConfigError
from tasks.corpora.conversations.messages import Conversation
from tasks.corpora.conversations.source import Conversations
from tasks.corpora.reasoning import Chains, Recall
from tasks.corpora.text_sources import Bible, Files, Sympy

Source = Bible | Sympy | Files | Conversations | Chains | Recall
KINDS = {
    **{"bible": Bible, "sympy": Sympy, "files": Files, "conversations": Conversations},
    **{"chains": Chains, "recall": Recall},
}
CHATS = (Conversations, Chains, Recall)
PATHS = ("path", "held_out_path", "chat_template", "dataset")  # fields that name local files or URLs


def parse_source(values, where: str) -> Source:
    """The source that a section describes, as the dataclass of its kind.

    `where` is the start of error messages. Raises ConfigError for an unknown kind and for a wrong value.
    """
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"{where}.kind: got {kind!r}; allowed: {', '.join(KINDS)}")
    return config.load(KINDS[kind], values, where)


def is_conversation(source: Source) -> bool:
    """Whether the documents of a source are conversations."""
    return isinstance(source, CHATS)


def paths_of(source: Source) -> dict[str, str]:
    """Field → path, URL or name of a data set, for the fields of a source that are given."""
    return {name: value for name in PATHS if (value := getattr(source, name, None)) is not None}


def located(source: Source, locate: Callable[[str], str], is_directory: Callable[[str], bool]) -> Source:
    """The source with absolute paths. A data set is a path only if there is such a directory."""
    paths = {name: locate(value) for name, value in paths_of(source).items()}
    if "dataset" in paths and not is_directory(paths["dataset"]):
        del paths["dataset"]
    return replace(source, **paths) if paths else source


def documents(
    source: Source, seed: int, skipped: Counter, notes: Counter
) -> Iterator[tuple[str, str]] | Iterator[tuple[str, Conversation]]:
    """Yield (split, document), a text or a conversation.

    `skipped` counts the rows that are left out, by reason. `notes` counts what else the user should know.
    """
    if isinstance(source, Conversations):
        return source.documents(seed, skipped, notes)
    if isinstance(source, Files):
        return source.texts(seed, skipped, notes)
    return source.conversations(seed) if source.is_generated else source.texts(seed)
