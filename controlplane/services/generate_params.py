"""What a checked Generate request is: the dataclasses that validation makes and the rest of the edge reads.

Imports the wire's types alone; the limits themselves stand in `validation`.
"""

from dataclasses import dataclass

from protos.planes import EngineSampling


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the model allows: ids below vocab_size, at most max_model_len tokens, and characters that so many tokens can be."""

    vocab_size: int
    max_model_len: int
    max_token_chars: int
    can_chat: bool
    can_read_text: bool = True

    @property
    def max_prompt_chars(self) -> int:
        """A longer text cannot be a prompt, whatever its tokens; checked before it is tokenized."""
        return self.max_model_len * self.max_token_chars


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as given."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation: messages with role and content."""

    messages: tuple[dict[str, str], ...]
    add_generation_prompt: bool


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the stream should carry."""

    include_stop: bool = False
    show_special_tokens: bool = False
    at_end: bool = False
    token_ids_only: bool = False


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """A checked request. None: max_tokens up to the model's limit, seed drawn at random, no logprobs, no SLO."""

    request_id: str
    prompt: TextPrompt | TokenPrompt | ChatPrompt
    adapter: str
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    num_choices: int
    num_logprobs: int | None
    priority: int
    ttft_slo_s: float | None
    output: OutputOptions

    def engine_sampling(self, max_tokens: int, seed: int) -> EngineSampling:
        """What the engine needs of this request for one choice."""
        return EngineSampling(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            num_logprobs=self.num_logprobs,
        )
