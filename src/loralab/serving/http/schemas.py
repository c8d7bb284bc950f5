"""What may be asked: OpenAI's fields, checked strictly, and vLLM's for adapters.

A field that is unknown, or asks for what this server does not do, is refused: nothing is ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from loralab.serving.requests import Sampling
from loralab.serving.store import NAME

MOST_PROMPTS = 32
MOST_ANSWERS = 16
MOST_LOGPROBS = 20
MOST_STOPS = 16


def _readable(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a character (a lone surrogate) stands in it")
    return text


def _whole(value: Any) -> Any:
    """In JSON 7.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Text = Annotated[str, AfterValidator(_readable)]
Prompt = Annotated[Text, Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31), WHOLE]], Field(min_length=1)]
Texts = (
    Prompt
    | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_PROMPTS)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
)
_NUMBER = r"[-+]?[0-9]{1,9}(\.[0-9]{1,9})?"
MIX = rf"[^=,\s]+={_NUMBER}(,[^=,\s]+={_NUMBER})*"
ModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2000,
        description="The base's or an adapter's name, or a mix such as `reviews=0.7,tweets=0.3`.",
        # for whoever reads the document; `parse_target` takes a little more, and says what is wrong
        json_schema_extra={"pattern": f"^([^=]+|{MIX})$"},
    ),
]
Probability = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**31), WHOLE]


class Body(BaseModel):
    """A request's body: no unknown fields, no conversion of kinds."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """include_usage: a last event tells the counts of tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Generate(Body):
    """What completions and chats have in common.

    The fields with one permitted value are those that clients send along and this server does not
    act on.
    """

    model: ModelName
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS), WHOLE] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Probability | None = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = 1.0
    ignore_eos: bool | None = False
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def contradictions(self) -> list[str]:
        """Fields that do not go together."""
        alone = self.stream_options is not None and not self.stream
        return ["stream_options is for stream=true alone"] if alone else []

    @property
    def num_answers(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def sampling(self, max_tokens: int, logprobs: int | None, answer: int) -> Sampling:
        """The settings of one answer; several with one seed differ, and are the same next time."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = None if self.seed is None else (self.seed + answer) % 2**63
        return Sampling(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=self.top_k or 0,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            stop=stop,
            seed=seed,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionBody(Generate):
    """`/v1/completions`."""

    prompt: Texts
    max_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    echo: bool | None = False
    best_of: Literal[1] | None = None
    suffix: None = None

    def contradictions(self) -> list[str]:
        """Fields that do not go together."""
        found = super().contradictions()
        if self.echo and self.stream:
            found.append("echo cannot be streamed")
        if self.max_tokens == 0 and not self.echo:
            found.append("max_tokens=0 is for echo=true alone")
        return found


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)]
    name: Text | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class PlainFormat(Body):
    """The only form of answers."""

    type: Literal["text"] = "text"


class ChatBody(Generate):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE] | None = None
    response_format: PlainFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    def contradictions(self) -> list[str]:
        """Fields that do not go together."""
        found = super().contradictions()
        if self.top_logprobs is not None and not self.logprobs:
            found.append("top_logprobs is for logprobs=true alone")
        return found


class EmbeddingBody(Body):
    """`/v1/embeddings`. pooling: over which tokens; `normalize`: vectors of length 1."""

    model: ModelName
    input: Texts
    encoding_format: Literal["float", "base64"] | None = "float"
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    dimensions: None = None
    user: str | None = None


class ClassifyBody(Body):
    """`/v1/classify`."""

    model: ModelName
    input: Texts
    user: str | None = None


Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class LoadBody(Body):
    """`/v1/load_lora_adapter`: vLLM's fields. lora_path: a folder's name under the server's root.

    pinned: it keeps its slot.
    """

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    pinned: bool = False
    base_model_name: None = None


class UnloadBody(Body):
    """`/v1/unload_lora_adapter`: vLLM's fields."""

    lora_name: Name
    lora_int_id: Annotated[int, WHOLE] | None = None


def _or(value: float | None, usual: float) -> float:
    return usual if value is None else value
