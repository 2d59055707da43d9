"""`loraplane health`: asks the standard health service of either plane; the exit code is what a health check wants."""

import argparse

from grpc_health.v1 import health_pb2, health_pb2_grpc

from controlplane.cli.arguments import Subparsers
from controlplane.cli.connection import ConnectionOptions, connect
from controlplane.cli.failures import EXIT_FAILED
from controlplane.cli.output import Output

_TIMEOUT_S = 5.0


def add_command(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `health`."""
    parser = commands.add_parser(
        "health", parents=[common], help="exit 0 if the service, or a data plane, is serving", description=__doc__
    )
    parser.add_argument("--service", default="", help="full name of one service, such as loraplane.v1.InferenceService")
    parser.set_defaults(command=_health)


def _health(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    with connect(options) as connection:
        request = health_pb2.HealthCheckRequest(service=args.service)
        answer = health_pb2_grpc.HealthStub(connection.channel).Check(request, timeout=connection.timeout_s(_TIMEOUT_S))
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if output.as_json:
        output.json({"status": name})
    else:
        output.console.print(name, markup=False)
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else EXIT_FAILED
