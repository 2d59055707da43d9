"""The smallest useful client: asks one adapter and prints the text as it comes."""

import argparse
import sys

import grpc

from protos.loraplane.v1 import inference_pb2, inference_pb2_grpc


def ask(server: str, adapter: str, prompt: str, timeout_s: float = 60.0) -> None:
    """Streams one answer to the standard output; an empty adapter asks the base model."""
    request = inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content=prompt)]),
        adapter=adapter,
        sampling=inference_pb2.SamplingParams(max_tokens=160, temperature=0),
    )
    with grpc.insecure_channel(server) as channel:
        for response in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=timeout_s):
            match response.WhichOneof("event"):
                case "started":
                    print(f"[{response.started.adapter or 'base'}]", flush=True)
                case "chunk":
                    print(response.chunk.text, end="", flush=True)
                case "finished":
                    reason = inference_pb2.FinishReason.Name(response.finished.finish_reason)
                    print(f"\n[{reason}, {response.finished.usage.completion_tokens} tokens]")


def main() -> int:
    """Asks once; an error of the service goes to the standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("prompt")
    parser.add_argument("--server", default="127.0.0.1:50051")
    parser.add_argument("--adapter", default="", help="name, name@version or alias; the base model when left out")
    args = parser.parse_args()
    try:
        ask(args.server, args.adapter, args.prompt)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call), "a failed call of a stub is a Call"
        print(f"{error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
