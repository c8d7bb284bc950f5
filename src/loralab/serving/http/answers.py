"""What is answered: OpenAI's documents, and vLLM's for classes."""

from typing import Any, Literal

from pydantic import BaseModel

from loralab.serving.store import AdapterState


class PromptDetails(BaseModel):
    """Of the prompt's tokens, those whose keys and values were there already."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptDetails = PromptDetails()


class CompletionLogprobs(BaseModel):
    """A column for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """An answer to `/v1/completions`; streamed, a part of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token that could have been chosen. bytes: None where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """The token that was chosen, and the best."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """A row for each token."""

    content: list[ChosenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """An answer to `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Vector(BaseModel):
    """One text's vector; base64 is of little-endian fp32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """An answer to `/v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Vector]
    model: str
    system_fingerprint: str
    usage: Usage


class Classified(BaseModel):
    """One text's class."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(BaseModel):
    """An answer to `/v1/classify`."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    system_fingerprint: str
    data: list[Classified]
    usage: Usage


class ProofDocument(BaseModel):
    """Whether the adapter is applied as it was trained.

    state: "proved"; "unproved: " and why; "refused: " and why; "not loaded yet".
    """

    state: str
    effect_nats: float | None = None
    error_nats: float | None = None
    proof_ms: float | None = None
    cached: bool | None = None


class ModelCard(BaseModel):
    """The base, or an adapter on it. version: SHA-256 of what the adapter does.

    labels: of a classifier, the names of the classes, where they have names.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loralab"
    parent: str | None = None
    root: str
    version: str | None = None
    max_model_len: int | None = None
    labels: list[str] | None = None
    proof: ProofDocument | None = None
    tier: Literal["device", "memory", "disk"] | None = None
    pinned: bool | None = None


class ModelList(BaseModel):
    """All that may be asked for."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Done(BaseModel):
    """An adapter was loaded or unloaded; num_requests still finish on it."""

    message: str
    model: ModelCard | None = None
    num_requests: int = 0


class Slots(BaseModel):
    """Whether there are slots enough, by the last requests.

    hit_rates: with so many slots, the share of requests that find their adapter in one.
    """

    num_slots: int
    num_requests: int
    num_distinct: int
    hit_rates: dict[str, float]
    warning: str


class Health(BaseModel):
    """The server is there. slots: what the last requests tell of their number."""

    status: Literal["ok"] = "ok"
    base: str
    engine: dict[str, Any]
    slots: Slots


def proof_of(state: AdapterState) -> ProofDocument:
    """What is known of an adapter, in words and figures."""
    if state.refused is not None:
        return ProofDocument(state=f"refused: {state.refused}")
    proof = state.proof
    if proof is None:
        return ProofDocument(state="not loaded yet")
    return ProofDocument(
        state=f"{proof.state}: {proof.detail}" if proof.detail else proof.state,
        effect_nats=proof.effect_nats,
        error_nats=proof.error_nats,
        proof_ms=proof.proof_ms,
        cached=proof.cached,
    )
