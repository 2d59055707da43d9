"""InferenceService of a whole control plane: what a request is answered, token for token, to the end of its stream."""

from collections.abc import Callable
from dataclasses import replace

import grpc

from controlplane.services.inference_service import choice_seed
from protos.loraplane.v1 import inference_pb2 as pb
from protos.loraplane.v1 import system_pb2
from tests.controlplane.app.served import ALPHABET, EOS, NULL, TIMEOUT_S, VOCAB_SIZE, Answer, Client, refused, sampling


def test_a_prompt_streams_started_chunks_and_finished(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answer = await client.generate(text="hello", request_id="mine", sampling=sampling(max_tokens=40, seed=7))
        expected = client.expected("hello", 7, 40)
        assert answer.events[0] == "started"
        assert answer.events[-1] == "finished"
        assert set(answer.events[1:-1]) == {"chunk"}
        assert (answer.started.request_id, answer.started.prompt_tokens, answer.started.adapter) == ("mine", 5, "")
        assert answer.token_ids[0] == expected
        assert answer.text[0] == client.tokenizer.decode(expected)
        finished = answer.finished[0]
        assert finished.finish_reason == pb.FINISH_REASON_LENGTH
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 40)
        assert finished.timings.total_time.ToNanoseconds() >= finished.timings.time_to_first_token.ToNanoseconds() > 0
        ids = client.tokenizer.encode("hello").ids
        again = await client.generate(token_ids=pb.TokenIds(ids=ids), sampling=sampling(max_tokens=40, seed=7))
        assert again.token_ids[0] == expected
        assert again.started.request_id != ""

    play(scenario)


def test_a_conversation_is_rendered_by_the_chat_template(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        messages = [pb.ChatMessage(role="user", content="hi"), pb.ChatMessage(role="assistant", content="yo")]
        for add_generation_prompt, prompt in ((None, "u:hi\na:yo\na:"), (False, "u:hi\na:yo\n")):
            chat = pb.ChatMessages(messages=messages, add_generation_prompt=add_generation_prompt)
            answer = await client.generate(chat=chat, sampling=sampling(max_tokens=4, seed=1))
            assert answer.started.prompt_tokens == len(prompt)
            assert answer.token_ids[0] == client.expected(prompt, 1, 4)

    play(scenario)


def test_choices_draw_from_seeds_of_their_own_and_the_first_from_the_request_s(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answer = await client.generate(text="x", sampling=sampling(max_tokens=9, seed=2**64 - 1, n=4))
        for index in range(4):
            assert answer.token_ids[index] == client.expected("x", choice_seed(2**64 - 1, index), 9)
            assert answer.finished[index].usage.completion_tokens == 9
        assert len({tuple(ids) for ids in answer.token_ids.values()}) == 4
        assert answer.events.count("started") == 1
        assert choice_seed(5, 0) == 5

    play(scenario)


def test_unset_seeds_differ(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answers = [await client.generate(text="x", sampling=sampling(max_tokens=9)) for _ in range(2)]
        assert answers[0].token_ids != answers[1].token_ids

    play(scenario)


def test_nothing_past_a_stop_string_reaches_the_client(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        drawn = ((seed, client.expected("x", seed, 9)) for seed in range(9999))
        # One character per token, so that places in the text are places in the tokens.
        seed, tokens = next((s, t) for s, t in drawn if client.tokenizer.decode(t).isascii() and EOS not in t)
        text = client.tokenizer.decode(tokens)
        stop = text[4:7]
        at = text.index(stop)
        answer = await client.generate(text="x", sampling=sampling(max_tokens=200, seed=seed, stop=["never there", stop]))
        assert answer.text[0] == text[:at]
        assert answer.token_ids[0] == tokens[: at + 3]
        finished = answer.finished[0]
        assert (finished.finish_reason, finished.matched_stop) == (pb.FINISH_REASON_STOP, stop)
        assert finished.usage.completion_tokens == at + 3
        await client.idle()

    play(scenario)


def test_stop_tokens_and_end_of_sequence(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        tokens = client.expected("x", 0, 12)
        stop = next(token for index, token in enumerate(tokens) if index > 3 and token not in tokens[:index] and token != EOS)
        end = tokens.index(stop)
        answer = await client.generate(text="x", sampling=sampling(max_tokens=100, seed=0, stop_token_ids=[stop]))
        finished = answer.finished[0]
        assert (finished.finish_reason, finished.matched_stop_token_id) == (pb.FINISH_REASON_STOP_TOKEN, stop)
        assert answer.token_ids[0] == tokens[: end + 1]
        assert answer.text[0] == client.tokenizer.decode(tokens[:end])
        ends = await client.generate(text="x", sampling=sampling(max_tokens=255, seed=0))
        assert ends.finished[0].finish_reason == pb.FINISH_REASON_STOP
        assert ends.finished[0].WhichOneof("matched") is None
        assert ends.token_ids[0][-1] == EOS
        goes_on = await client.generate(text="x", sampling=sampling(max_tokens=255, seed=0, ignore_eos=True))
        assert len(goes_on.token_ids[0]) == 255

    # The end of sequence, and enough tokens to meet it by chance.
    play(scenario, replace(NULL, eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE))


def test_logprobs_come_with_every_token(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        answer = await client.generate(text="x", logprobs=2, sampling=sampling(max_tokens=5, seed=0))
        assert [entry.logprob for entry in answer.logprobs[0]] == [-1.0] * 5
        assert [(top.token_id, top.text) for top in answer.logprobs[0][0].top] == [(0, ALPHABET[0]), (1, ALPHABET[1])]
        chosen_only = await client.generate(text="x", logprobs=0, sampling=sampling(max_tokens=5, seed=0))
        assert [len(entry.top) for entry in chosen_only.logprobs[0]] == [0] * 5
        without = await client.generate(text="x", sampling=sampling(max_tokens=5, seed=0))
        assert without.logprobs[0] == []

    play(scenario)


def test_output_options(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        tokens = client.expected("x", 0, 20)
        at_end = await client.generate(text="x", sampling=sampling(max_tokens=20, seed=0), output=pb.OutputOptions(at_end=True))
        assert at_end.events == ["started", "chunk", "finished"]
        assert (at_end.token_ids[0], at_end.text[0]) == (tokens, client.tokenizer.decode(tokens))
        ids_only = await client.generate(
            text="x", sampling=sampling(max_tokens=20, seed=0), output=pb.OutputOptions(token_ids_only=True)
        )
        assert (ids_only.token_ids[0], ids_only.text[0]) == (tokens, "")

    play(scenario)


def test_bad_requests_get_their_status_and_details(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, _, details = await refused(client.generate(text="x", sampling=sampling(temperature=-1, n=0)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        fields = [violation.field for violation in details["BadRequest"].field_violations]
        assert fields == ["sampling.temperature", "sampling.n"]
        assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == ("INVALID_FIELD", "loraplane")
        code, message, details = await refused(client.generate(text="x" * 200, sampling=sampling(max_tokens=57)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is 57; with the prompt's 200 tokens that makes 257, over the limit of 256" in message
        assert details["ErrorInfo"].reason == "LENGTH_OVER_LIMIT"
        code, message, details = await refused(client.generate(text="hi", adapter="nobody"))
        assert code is grpc.StatusCode.NOT_FOUND
        assert (details["ResourceInfo"].resource_type, details["ResourceInfo"].resource_name) == (
            "loraplane.v1.Adapter",
            "nobody",
        )
        still_serving = await client.generate(text="x", sampling=sampling(max_tokens=1))
        assert still_serving.finished[0].usage.completion_tokens == 1

    play(scenario)


def test_a_cancelled_call_frees_its_pages(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        call = client.inference.Generate(pb.GenerateRequest(text="x", sampling=sampling(max_tokens=250, n=3)))
        await call.read()
        assert client.null.engine.standing
        call.cancel()
        await client.idle()
        load = await client.system.GetLoad(system_pb2.GetLoadRequest())
        assert (load.num_running, load.num_waiting) == (0, 0)

    play(scenario, replace(NULL, step_s=0.02))


def test_a_reader_that_stops_reading_slows_nobody_and_misses_nothing(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        # Logprobs make the stream far larger than what fits between server and client.
        request = pb.GenerateRequest(text="x", logprobs=20, sampling=sampling(max_tokens=2000, seed=0))
        call = client.inference.Generate(request, timeout=TIMEOUT_S)
        answer = Answer()
        answer.take(await call.read())
        other = await client.generate(text="x", sampling=sampling(max_tokens=50, seed=1))
        assert other.token_ids[0] == client.expected("x", 1, 50)
        await client.idle()
        while (response := await call.read()) is not grpc.aio.EOF:
            answer.take(response)
        assert answer.token_ids[0] == client.expected("x", 0, 2000)
        assert len(answer.logprobs[0]) == 2000
        assert len(answer.events) < 2000

    play(scenario, replace(NULL, num_pages=512, max_model_len=4096))


def test_a_passed_deadline_frees_its_pages(play: Callable[..., None]) -> None:
    async def scenario(client: Client) -> None:
        code, _, _ = await refused(client.generate(text="x", sampling=sampling(max_tokens=250), timeout=0.3))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await client.idle()

    play(scenario, replace(NULL, step_s=0.05))
