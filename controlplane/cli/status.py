"""`loraplane status`: what is served, how busy it is, and how the page pool is filled."""

import argparse
import time

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from controlplane.cli.arguments import Subparsers, positive_seconds
from controlplane.cli.connection import Connection, ConnectionOptions, connect
from controlplane.cli.output import Output, human_bytes, human_seconds, printable, to_dict
from protos.loraplane.v1 import system_pb2 as pb

_TIMEOUT_S = 10.0
_BAR_WIDTH = 48
_MAX_ADAPTERS = 32
# Parts of a pool's bar, in order: name, style, character.
_PARTS = (
    ("KV", "cyan", "█"),
    ("adapters in use", "magenta", "█"),
    ("adapters idle", "magenta", "▒"),
    ("free", "bright_black", "░"),
)


def add_command(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `status`."""
    parser = commands.add_parser("status", parents=[common], help="queues, page pool, resident adapters", description=__doc__)
    parser.add_argument(
        "--watch", nargs="?", const=1.0, type=positive_seconds, metavar="SECONDS", help="again every SECONDS (1) until Ctrl-C"
    )
    parser.set_defaults(command=_status)


def _status(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        if args.watch is None:
            _print(connection, output)
            return 0
        if output.as_json or not output.console.is_terminal:
            while True:
                _print(connection, output)
                time.sleep(args.watch)
        with Live(render(*_ask(connection)), console=output.console, auto_refresh=False) as live:
            while True:
                time.sleep(args.watch)
                live.update(render(*_ask(connection)), refresh=True)


def _print(connection: Connection, output: Output) -> None:
    info, load = _ask(connection)
    if output.as_json:
        output.json({"server": to_dict(info), "load": to_dict(load)})
    else:
        output.console.print(render(info, load))


def _ask(connection: Connection) -> tuple[pb.GetServerInfoResponse, pb.GetLoadResponse]:
    timeout_s = connection.timeout_s(_TIMEOUT_S)
    info = connection.system.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout_s, metadata=connection.metadata)
    load = connection.system.GetLoad(pb.GetLoadRequest(), timeout=timeout_s, metadata=connection.metadata)
    return info, load


def render(info: pb.GetServerInfoResponse, load: pb.GetLoadResponse) -> RenderableType:
    """The whole picture."""
    state = Text("draining", "bold yellow") if load.draining else Text("serving", "bold green")
    if not info.data_planes:
        state = Text("no data plane is connected", "bold red")
    head = Text.assemble(("loraplane ", "bold"), info.version, " · ", printable(info.base_model) or "(base model unknown)")
    if info.architecture:
        head.append(f" ({info.architecture})")
    head.append(" · ").append(state)
    waiting = f"{load.num_waiting} waiting" + (f" (limit {info.limits.max_waiting})" if info.limits.max_waiting else "")
    queues = Text(f"{load.num_running} running · {waiting} · {load.output_tokens_per_s:.1f} output tokens/s")
    addresses = {plane.address: plane for plane in info.data_planes}
    parts: list[RenderableType] = [head, queues]
    for plane in load.data_planes:
        parts += ["", *_data_plane(plane, addresses.get(plane.address))]
    return Group(*parts)


def _data_plane(load: pb.DataPlaneLoad, info: pb.DataPlaneInfo | None) -> list[RenderableType]:
    title = Text.assemble(("data plane ", "bold"), printable(load.address))
    if not load.connected:
        return [title.append(" · ").append("not connected", "bold red")]
    if info:
        title.append(f" · {printable(info.device)} · {info.dtype} · pages of {info.page_tokens} tokens, ")
        title.append(human_bytes(info.page_bytes))
    step_s = load.last_step_time.ToTimedelta().total_seconds()
    steps = f"  {load.num_running} running · {load.num_steps} steps, the latest {human_seconds(step_s)}"
    if load.num_preemptions:
        steps += f" · {load.num_preemptions} preemptions"
    lines: list[RenderableType] = [title, Text(steps), *_pool(load.pool)]
    if load.adapters:
        lines.append(_resident_adapters(load))
    return lines


def _pool(pool: pb.PoolUsage) -> list[Text]:
    counts = (
        pool.kv_pages,
        pool.adapter_pages - pool.idle_adapter_pages,
        pool.idle_adapter_pages,
        pool.free_pages,
    )
    bar, legend = Text("  "), Text("  ")
    for (name, style, character), width, count in zip(_PARTS, bar_widths(counts, _BAR_WIDTH), counts, strict=True):
        bar.append(character * width, style)
        share = f" {100 * count / pool.num_pages:.0f}%" if pool.num_pages else ""
        legend.append(character, style).append(f" {name} {count}{share}   ")
    return [bar.append(f"  {pool.num_pages} pages"), legend]


def bar_widths(counts: tuple[int, ...], width: int) -> list[int]:
    """Splits a bar in proportion: the widths sum to `width`, and what is there at all is seen."""
    total = sum(counts)
    if not total:
        return [0] * (len(counts) - 1) + [width]
    widths = [max(1, round(width * count / total)) if count else 0 for count in counts]
    # Rounding is made good where it is seen least.
    widths[widths.index(max(widths))] += width - sum(widths)
    return widths


def _resident_adapters(load: pb.DataPlaneLoad) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  resident adapter")
    for column in ("version", "pages", "running"):
        table.add_column(column, justify="right" if column != "version" else "left")
    ordered = sorted(load.adapters, key=lambda a: (-a.num_requests, list(a.names)))
    for adapter in ordered[:_MAX_ADAPTERS]:
        names = printable(", ".join(adapter.names)) or "(unregistered)"
        running = Text(str(adapter.num_requests), "" if adapter.num_requests else "dim")
        table.add_row(Text(f"  {names}"), adapter.version[:12], str(adapter.num_pages), running)
    if len(ordered) > _MAX_ADAPTERS:
        table.add_row(Text(f"  and {len(ordered) - _MAX_ADAPTERS} more", "dim"))
    return table
