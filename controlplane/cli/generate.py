"""`loraplane generate`: streams one prompt's continuation to the terminal, with every knob of the request as an option."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from controlplane.cli.arguments import Subparsers, duration, positive_seconds, token_ids
from controlplane.cli.connection import ConnectionOptions, connect
from controlplane.cli.failures import EXIT_USAGE, CommandError
from controlplane.cli.output import Output, human_seconds, printable, to_dict
from protos.loraplane.v1 import inference_pb2 as pb

_TIMEOUT_S = 600.0

# Options that carry the name, the type and the meaning of a field of SamplingParams.
_SAMPLING_OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "at most this many tokens (up to the model's limit)"),
    ("min_tokens", int, "no stop before this many tokens (0)"),
    ("temperature", float, "0 is greedy (1)"),
    ("top_p", float, "keep the smallest set of tokens that reaches this probability (1)"),
    ("top_k", int, "keep this many most likely tokens (0, all)"),
    ("min_p", float, "drop tokens below this share of the most likely one (0)"),
    ("seed", int, "the same seed gives the same tokens (random)"),
    ("repetition_penalty", float, "on tokens of prompt and output (1)"),
    ("presence_penalty", float, "on tokens of the output (0)"),
    ("frequency_penalty", float, "on each occurrence in the output (0)"),
    ("n", int, "independent choices, 1 to 16 (1)"),
)


def add_command(commands: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `generate`."""
    parser = commands.add_parser("generate", parents=[common], help="continue a prompt, streamed", description=__doc__)
    parser.add_argument("prompt", nargs="?", help="the prompt; read from standard input if it is missing or '-'")
    parser.add_argument("--adapter", default="", help="NAME, NAME@VERSION or alias; the base model if missing")
    form = parser.add_argument_group("prompt")
    form.add_argument("--chat", action="store_true", help="the prompt is a user's message; render the model's chat template")
    form.add_argument("--system", metavar="TEXT", help="a system message before it; implies --chat")
    form.add_argument("--token-ids", type=token_ids, metavar="IDS", help="token ids instead of a text, such as 1,15,27")
    sampling = parser.add_argument_group("sampling (defaults in brackets)")
    for name, kind, meaning in _SAMPLING_OPTIONS:
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=meaning)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    sampling.add_argument(
        "--stop-token-id", action="append", default=[], type=int, metavar="ID", help="stop after this token; repeatable"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="generate past the end of sequence")
    answer = parser.add_argument_group("answer")
    answer.add_argument("--logprobs", type=int, metavar="K", help="log probabilities, with the K best alternatives (0 to 20)")
    answer.add_argument("--include-stop", action="store_true", help="show what it stopped at")
    answer.add_argument("--show-special-tokens", action="store_true", help="show special tokens in the text")
    answer.add_argument("--at-end", action="store_true", help="everything at the end instead of a stream")
    answer.add_argument("--token-ids-only", action="store_true", help="token ids, no text")
    answer.add_argument("--quiet", action="store_true", help="the text alone, no summary")
    queue = parser.add_argument_group("queue")
    queue.add_argument("--request-id", default="", help="your name for the request in the server's log")
    queue.add_argument("--priority", type=int, help="larger is served first, -100 to 100 (0)")
    queue.add_argument("--ttft-slo", type=positive_seconds, metavar="SECONDS", help="give up if the first token comes later")
    parser.set_defaults(command=_generate)


@dataclass(slots=True)
class _Choice:
    """What has arrived of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    finished: pb.Finished | None = None


def build_request(args: argparse.Namespace) -> pb.GenerateRequest:
    """The request that the options describe; the server checks the values."""
    request = pb.GenerateRequest(request_id=args.request_id, adapter=args.adapter)
    _set_prompt(request, args)
    for name, _, _ in _SAMPLING_OPTIONS:
        _set(request.sampling, name, getattr(args, name))
    for name in ("logprobs", "priority"):
        _set(request, name, getattr(args, name))
    try:
        request.sampling.stop_token_ids.extend(args.stop_token_id)
    except ValueError as error:
        raise CommandError(f"--stop-token-id: {error}", EXIT_USAGE) from error
    request.sampling.stop.extend(args.stop)
    if args.ignore_eos:
        request.sampling.ignore_eos = True
    for name in ("include_stop", "show_special_tokens", "at_end", "token_ids_only"):
        if getattr(args, name):
            setattr(request.output, name, True)
    if args.ttft_slo is not None:
        request.ttft_slo.CopyFrom(duration(args.ttft_slo))
    return request


def _set(message: pb.GenerateRequest | pb.SamplingParams, name: str, value: int | float | None) -> None:
    if value is None:
        return
    try:
        setattr(message, name, value)
    except ValueError as error:  # more than the field can hold, such as a negative count
        raise CommandError(f"--{name.replace('_', '-')} is {value}, which is out of range", EXIT_USAGE) from error


def _set_prompt(request: pb.GenerateRequest, args: argparse.Namespace) -> None:
    if args.token_ids is not None:
        if args.prompt is not None or args.chat or args.system is not None:
            raise CommandError("--token-ids takes the place of the prompt; give one of the two", EXIT_USAGE)
        request.token_ids.ids.extend(args.token_ids)
        return
    prompt = sys.stdin.read() if args.prompt in (None, "-") else args.prompt
    if not args.chat and args.system is None:
        request.text = prompt
        return
    if args.system is not None:
        request.chat.messages.add(role="system", content=args.system)
    request.chat.messages.add(role="user", content=prompt)


def _generate(args: argparse.Namespace, options: ConnectionOptions, output: Output) -> int:
    request = build_request(args)
    with connect(options) as connection:
        call = connection.inference.Generate(request, timeout=connection.timeout_s(_TIMEOUT_S), metadata=connection.metadata)
        try:
            if output.as_json:
                for response in call:
                    output.json(to_dict(response))
                return 0
            _show(call, args, output)
        finally:
            call.cancel()  # of an unfinished call: Ctrl-C frees the server's pages at once
    return 0


def _show(responses: Iterator[pb.GenerateResponse], args: argparse.Namespace, output: Output) -> None:
    """Streams a single choice as it comes; several choices each in one piece, in the order in which they finish."""
    is_streaming = (args.n or 1) == 1
    choices: dict[int, _Choice] = {}
    for response in responses:
        event = response.WhichOneof("event")
        if event == "chunk":
            chunk = response.chunk
            choice = choices.setdefault(chunk.choice_index, _Choice())
            new = " ".join(str(token) for token in chunk.token_ids) if args.token_ids_only else chunk.text
            if args.token_ids_only and choice.text:
                new = f" {new}"
            choice.text += new
            choice.token_ids.extend(chunk.token_ids)
            choice.logprobs.extend(chunk.logprobs)
            if is_streaming:
                output.text(new)
        elif event == "finished":
            choice = choices.setdefault(response.finished.choice_index, _Choice())
            choice.finished = response.finished
            output.text("\n" if is_streaming else f"[{response.finished.choice_index}] {choice.text}\n")
            _summarize(choice, response.finished, args, output)


def _summarize(choice: _Choice, finished: pb.Finished, args: argparse.Namespace, output: Output) -> None:
    if choice.logprobs:
        output.console.print(_logprobs_table(choice))
    if args.quiet:
        return
    timings, usage = finished.timings, finished.usage
    total_s = timings.total_time.ToTimedelta().total_seconds()
    first_s = timings.time_to_first_token.ToTimedelta().total_seconds()
    parts = [
        f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out",
        _reason(finished),
        f"first token {human_seconds(first_s)}",
    ]
    if usage.completion_tokens > 1 and total_s > first_s:
        parts.append(f"{(usage.completion_tokens - 1) / (total_s - first_s):.1f} tokens/s")
    for name, spent in (("queue", timings.queue_time), ("adapter", timings.adapter_wait_time)):
        seconds = spent.ToTimedelta().total_seconds()
        if seconds >= 1e-3:
            parts.append(f"{name} {human_seconds(seconds)}")
    if timings.num_preemptions:
        parts.append(f"preempted {timings.num_preemptions}x")
    output.note(" · ".join(parts))


def _reason(finished: pb.Finished) -> str:
    reason = pb.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower().replace("_", " ")
    matched = finished.WhichOneof("matched")
    if matched == "matched_stop":
        return f"{reason} at {finished.matched_stop!r}"
    if matched == "matched_stop_token_id":
        return f"{reason} {finished.matched_stop_token_id}"
    return reason


def _logprobs_table(choice: _Choice) -> Table:
    table = Table("token", "logprob", "alternatives", box=None, pad_edge=False)
    for token_id, logprobs in zip(choice.token_ids, choice.logprobs, strict=False):
        alternatives = "  ".join(f"{top.token_id} {printable(repr(top.text))} {top.logprob:.3f}" for top in logprobs.top)
        table.add_row(str(token_id), f"{logprobs.logprob:.3f}", Text(alternatives))
    return table
