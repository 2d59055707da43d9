"""Adapters as tables for a terminal."""

from collections.abc import Sequence

from google.protobuf import timestamp_pb2
from rich.table import Table
from rich.text import Text

from controlplane.cli.output import human_bytes, printable
from protos.loraplane.v1 import adapter_pb2 as pb

_VERSION_CHARS = 12
_STATE_STYLES = {
    pb.ADAPTER_STATE_READY: "green",
    pb.ADAPTER_STATE_FETCHING: "yellow",
    pb.ADAPTER_STATE_DRAINING: "yellow",
    pb.ADAPTER_STATE_FAILED: "bold red",
}


def adapter_table(adapters: Sequence[pb.Adapter]) -> Table:
    """One line per adapter."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "version", "state", "modules", "aliases"):
        table.add_column(column, overflow="fold")
    for column in ("rank", "pages", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for adapter in adapters:
        current = adapter.current
        table.add_row(
            _text(adapter.name),
            current.version[:_VERSION_CHARS],
            _state(adapter),
            _text(short_modules(current.target_modules)),
            _text(" ".join(sorted(adapter.aliases))),
            str(current.rank),
            str(current.num_pages),
            human_bytes(current.size_bytes),
        )
    return table


def adapter_details(adapter: pb.Adapter) -> Table:
    """Everything about one adapter."""
    current = adapter.current
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("name", _text(adapter.name))
    table.add_row("state", _state(adapter))
    if adapter.error:
        table.add_row("error", _text(adapter.error))
    table.add_row("version", current.version)
    table.add_row("rank, alpha", f"{current.rank}, {current.alpha:g}" + (", rsLoRA" if current.rslora else ""))
    table.add_row("modules", _text(" ".join(current.target_modules)))
    table.add_row("size", f"{human_bytes(current.size_bytes)}, {current.num_pages} pages")
    table.add_row("base model", _text(current.base_model))
    table.add_row("tenant", _text(adapter.tenant))
    table.add_row("labels", _text(" ".join(f"{key}={value}" for key, value in sorted(adapter.labels.items()))))
    for name, digest in sorted(adapter.aliases.items()):
        table.add_row("alias", _text(f"{name} = {digest[:_VERSION_CHARS]}"))
    for version in adapter.versions:
        mark = " (current)" if version.version == current.version else ""
        table.add_row("has version", f"{version.version[:_VERSION_CHARS]} of {_time(version.create_time)}{mark}")
    for place in adapter.residency:
        tier = pb.MemoryTier.Name(place.tier).removeprefix("MEMORY_TIER_").lower()
        used = f", last used {_time(place.last_used)}" if place.HasField("last_used") else ""
        table.add_row("lies in", _text(f"{tier} memory of {place.data_plane}, {human_bytes(place.size_bytes)}{used}"))
    table.add_row("registered", _time(adapter.create_time))
    table.add_row("changed", _time(adapter.update_time))
    table.add_row("etag", _text(adapter.etag))
    return table


def short_modules(names: Sequence[str]) -> str:
    """Module names without what they all end in: "q k v o"."""
    return " ".join(name.removesuffix("_proj") for name in names)


def _state(adapter: pb.Adapter) -> Text:
    name = pb.AdapterState.Name(adapter.state).removeprefix("ADAPTER_STATE_").lower()
    return Text(name + (" (pinned)" if adapter.pinned else ""), style=_STATE_STYLES.get(adapter.state, ""))


def _time(time: timestamp_pb2.Timestamp) -> str:
    return time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC") if time.seconds else "-"


def _text(text: str) -> Text:
    """Names and messages come from elsewhere: no markup, no control characters."""
    return Text(printable(text))
