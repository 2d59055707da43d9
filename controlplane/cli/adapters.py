"""`loraplane adapters`: puts adapters in, shows them, changes them and takes them out."""

import argparse
import uuid
from pathlib import Path

from controlplane.cli.adapter_tables import adapter_details, adapter_table
from controlplane.cli.arguments import Subparsers, alias, duration, existing_directory, key_value, positive_seconds
from controlplane.cli.connection import Connection, ConnectionOptions, connect
from controlplane.cli.failures import EXIT_USAGE, CommandError
from controlplane.cli.output import Output, to_dict
from controlplane.cli.upload import upload
from protos.loraplane.v1 import adapter_pb2 as pb

_TIMEOUT_S = 30.0
# Converting a large adapter takes a while, and the answer comes when it is published.
_IMPORT_TIMEOUT_S = 600.0
_PAGE_SIZE = 500


def add_command(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `adapters` and its commands."""
    parser = commands.add_parser("adapters", help="register, list, show, update, pin and remove adapters", description=__doc__)
    nested = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_register(nested, common)
    _add_list(nested, common)
    for name, function, meaning in (
        ("show", _show, "everything about one adapter"),
        ("pin", _pin, "keep it on the device"),
        ("unpin", _unpin, "let it be evicted again"),
        ("preload", _preload, "bring it to the device ahead of its first request"),
    ):
        simple = nested.add_parser(name, parents=[common], help=meaning, description=meaning)
        simple.add_argument("name", help="NAME" if name in ("pin", "unpin") else "NAME, NAME@VERSION or alias")
        simple.set_defaults(command=function)
    _add_update(nested, common)
    _add_remove(nested, common)
    watch = nested.add_parser("watch", parents=[common], help="print changes as they happen", description=_watch.__doc__)
    watch.add_argument("--revision", default="", help="from this revision on; every adapter first if missing")
    watch.set_defaults(command=_watch)


def _add_source(parser: argparse.ArgumentParser, directory_option: str) -> None:
    parser.add_argument(directory_option, type=Path, help="a PEFT directory: adapter_config.json, adapter_model.safetensors")
    parser.add_argument(
        "--on-server",
        action="store_true",
        help="the directory is on the server's machine, under one of its --adapter-root directories; nothing is uploaded",
    )


def _add_register(nested: Subparsers, common: argparse.ArgumentParser) -> None:
    parser = nested.add_parser("register", parents=[common], help="publish an adapter", description="Publish an adapter.")
    parser.add_argument("name", help="the name to publish under")
    _add_source(parser, "directory")
    parser.add_argument("--label", action="append", default=[], type=key_value, metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--alias", action="append", default=[], metavar="ALIAS", help="another name for it; repeatable")
    parser.add_argument("--pin", action="store_true", help="keep it on the device")
    parser.add_argument("--validate-only", action="store_true", help="check everything, publish nothing")
    parser.set_defaults(command=_register)


def _add_list(nested: Subparsers, common: argparse.ArgumentParser) -> None:
    parser = nested.add_parser("list", parents=[common], help="all adapters", description="All adapters.")
    parser.add_argument(
        "--filter",
        default="",
        help="terms joined by AND: name:PREFIX, label.KEY=VALUE, state=STATE, module=NAME, rank>=N, rank<=N, pinned=true",
    )
    parser.add_argument("--order-by", default="", help="name, create_time or update_time; append ' desc' to reverse")
    parser.add_argument("--limit", type=int, help="at most this many")
    parser.set_defaults(command=_list)


def _add_update(nested: Subparsers, common: argparse.ArgumentParser) -> None:
    parser = nested.add_parser(
        "update",
        parents=[common],
        help="a new version, labels, aliases",
        description="Change an adapter; what is not named stays.",
    )
    parser.add_argument("name", help="NAME")
    _add_source(parser, "--directory")
    parser.add_argument("--label", action="append", type=key_value, metavar="KEY=VALUE", help="replaces all labels; repeatable")
    parser.add_argument("--clear-labels", action="store_true")
    parser.add_argument(
        "--alias", action="append", type=alias, metavar="ALIAS[=VERSION]", help="replaces all aliases; repeatable"
    )
    parser.add_argument("--clear-aliases", action="store_true")
    parser.add_argument("--current-version", metavar="VERSION", help="serve this version under the bare name again")
    parser.add_argument("--etag", default="", help="change it only if it still has this etag")
    parser.set_defaults(command=_update)


def _add_remove(nested: Subparsers, common: argparse.ArgumentParser) -> None:
    parser = nested.add_parser(
        "remove",
        parents=[common],
        help="unregister an adapter",
        description="Unpublish an adapter, drain it, delete its weights.",
    )
    parser.add_argument("name", help="NAME")
    parser.add_argument("--force", action="store_true", help="abort its requests instead of letting them finish")
    parser.add_argument("--wait", type=positive_seconds, metavar="SECONDS", help="wait this long for its requests to finish")
    parser.add_argument("--etag", default="", help="remove it only if it still has this etag")
    parser.set_defaults(command=_remove)


def _source(connection: Connection, directory: Path, args: argparse.Namespace, output: Output) -> pb.AdapterSource:
    if args.on_server:
        return pb.AdapterSource(path=str(directory))
    try:
        local = existing_directory(str(directory))
    except argparse.ArgumentTypeError as error:
        raise CommandError(str(error), EXIT_USAGE) from error
    return pb.AdapterSource(upload_id=upload(connection, local, output))


def _register(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        request = pb.RegisterAdapterRequest(
            name=args.name,
            source=_source(connection, args.directory, args, output),
            labels=dict(args.label),
            aliases=args.alias,
            pinned=args.pin,
            request_id=str(uuid.uuid4()),
            validate_only=args.validate_only,
        )
        answer = connection.adapters.RegisterAdapter(
            request, timeout=connection.timeout_s(_IMPORT_TIMEOUT_S), metadata=connection.metadata
        )
    return _answer(answer.adapter, output, "is valid" if args.validate_only else "registered")


def _list(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    if args.limit is not None and args.limit < 1:
        raise CommandError(f"--limit is {args.limit}; it must be at least 1", EXIT_USAGE)
    adapters: list[pb.Adapter] = []
    request = pb.ListAdaptersRequest(filter=args.filter, order_by=args.order_by)
    with connect(options) as connection:
        while True:
            request.page_size = _PAGE_SIZE if args.limit is None else min(_PAGE_SIZE, args.limit - len(adapters))
            answer = connection.adapters.ListAdapters(
                request, timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata
            )
            adapters.extend(answer.adapters)
            request.page_token = answer.next_page_token
            if not answer.next_page_token or (args.limit is not None and len(adapters) >= args.limit):
                break
    if output.as_json:
        output.json({"adapters": [to_dict(a) for a in adapters], "total_size": answer.total_size, "revision": answer.revision})
    elif adapters:
        output.console.print(adapter_table(adapters))
        output.note(f"{len(adapters)} of {answer.total_size} adapters")
    else:
        output.note("no adapters match" if args.filter else "no adapters; add one: loraplane adapters register NAME DIRECTORY")
    return 0


def _show(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        answer = connection.adapters.GetAdapter(
            pb.GetAdapterRequest(name=args.name), timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata
        )
    if output.as_json:
        output.json(to_dict(answer.adapter))
    else:
        output.console.print(adapter_details(answer.adapter))
    return 0


def _pin(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        answer = connection.adapters.PinAdapter(
            pb.PinAdapterRequest(name=args.name), timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata
        )
    return _answer(answer.adapter, output, "pinned")


def _unpin(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        answer = connection.adapters.UnpinAdapter(
            pb.UnpinAdapterRequest(name=args.name), timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata
        )
    return _answer(answer.adapter, output, "unpinned")


def _preload(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        answer = connection.adapters.PreloadAdapter(
            pb.PreloadAdapterRequest(name=args.name), timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata
        )
    return _answer(answer.adapter, output, "is on its way to the device")


def _update(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    request = pb.UpdateAdapterRequest(name=args.name, etag=args.etag, request_id=str(uuid.uuid4()))
    if args.label or args.clear_labels:
        request.update_mask.paths.append("labels")
        request.labels.update(args.label or [])
    if args.alias or args.clear_aliases:
        request.update_mask.paths.append("aliases")
        request.aliases.update(args.alias or [])
    if args.current_version:
        request.update_mask.paths.append("current_version")
        request.current_version = args.current_version
    if not request.update_mask.paths and not args.directory:
        raise CommandError("nothing to change: give --directory, --label, --alias or --current-version", EXIT_USAGE)
    with connect(options) as connection:
        if args.directory:
            request.update_mask.paths.append("source")
            request.source.CopyFrom(_source(connection, args.directory, args, output))
        answer = connection.adapters.UpdateAdapter(
            request, timeout=connection.timeout_s(_IMPORT_TIMEOUT_S), metadata=connection.metadata
        )
    return _answer(answer.adapter, output, "updated")


def _remove(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    request = pb.UnregisterAdapterRequest(name=args.name, etag=args.etag, force=args.force)
    if args.wait is not None:
        request.drain_timeout.CopyFrom(duration(args.wait))
    with connect(options) as connection:
        timeout_s = connection.timeout_s(_TIMEOUT_S + (args.wait or 0.0))
        answer = connection.adapters.UnregisterAdapter(request, timeout=timeout_s, metadata=connection.metadata)
    is_draining = answer.adapter.state == pb.ADAPTER_STATE_DRAINING
    return _answer(answer.adapter, output, "unpublished; requests that use it are finishing" if is_draining else "removed")


def _watch(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    """Prints adapters and their changes until interrupted."""
    with connect(options) as connection:
        # No deadline unless asked for: this call is meant to last.
        call = connection.adapters.WatchAdapters(
            pb.WatchAdaptersRequest(revision=args.revision), timeout=options.timeout_s, metadata=connection.metadata
        )
        try:
            for change in call:
                if output.as_json:
                    output.json(to_dict(change))
                    continue
                kind = pb.ChangeType.Name(change.type).removeprefix("CHANGE_TYPE_").lower()
                version = change.adapter.current.version[:12]
                output.console.print(f"{change.revision}  {kind:<9} {change.adapter.name}@{version}", markup=False)
        finally:
            call.cancel()
    return 0


def _answer(adapter: pb.Adapter, output: Output, what_happened: str) -> int:
    if output.as_json:
        output.json(to_dict(adapter))
    else:
        current = adapter.current
        size = f"rank {current.rank}, {current.num_pages} pages, version {current.version[:12]}"
        output.console.print(f"{adapter.name} {what_happened} ({size})", markup=False)
    return 0
