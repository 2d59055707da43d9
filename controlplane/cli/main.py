"""The entry point of `loraplane`: the commands, the common options, and one place where failures become messages and codes."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import grpc

from controlplane.cli import adapters, failures, generate, health, status, up
from controlplane.cli.arguments import common_options
from controlplane.cli.connection import DEFAULT_SERVER, ConnectionOptions
from controlplane.cli.output import Output
from controlplane.version import running_version

Command = Callable[[argparse.Namespace, ConnectionOptions, Output], int]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `command` to the function that runs it."""
    common = common_options()
    parser = argparse.ArgumentParser(
        prog="loraplane",
        description="Serve many LoRA adapters of one base model, and talk to a running service.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"loraplane {running_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (up, generate, adapters, status, health):
        module.add_command(commands, common)
    return parser


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Runs one command; returns the exit code (0 done, 1 failed, 2 wrong usage, 3 unreachable, 130 interrupted)."""
    args = build_parser().parse_args(argv)
    options = ConnectionOptions(
        server=getattr(args, "server", None) or environment.get("LORAPLANE_SERVER") or DEFAULT_SERVER,
        token=getattr(args, "token", None) or environment.get("LORAPLANE_TOKEN") or "",
        timeout_s=getattr(args, "timeout", None),
    )
    output = Output(as_json=getattr(args, "json", False))
    command: Command = args.command
    try:
        return command(args, options, output)
    except grpc.RpcError as error:
        failure = failures.failure_of(error)
        failures.report(failure, output, options.server)
        return failure.exit_code
    except failures.CommandError as error:
        failures.report_command_error(error, output)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return failures.EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
