"""`/v1/completions` and `/v1/chat/completions`, whole or streamed."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from loralab.errors import LoralabError, RequestError
from loralab.serving.http.answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
)
from loralab.serving.http.errors import body_of, documented
from loralab.serving.http.generation import Ended, Generation
from loralab.serving.http.schemas import ChatBody, CompletionBody, Generate
from loralab.serving.http.service import Admission, Service, within
from loralab.serving.http.shapes import END, TokenTexts, event, usage
from loralab.serving.requests import Piece
from loralab.serving.sampling import Chosen

EVENTS = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
ERRORS = {**documented(404, 422, 429, 504), **EVENTS}
Finish = Literal["stop", "length"]
Part = Callable[[int, Piece], Any]


@dataclass(frozen=True)
class Asked:
    """A checked request: `prompts` has each prompt once for each of its answers."""

    body: Generate
    admission: Admission
    prompts: Sequence[tuple[int, ...]]
    max_tokens: int
    logprobs: int | None
    about: dict[str, Any]  # id, created, model and fingerprint of every document
    deadline: float


def router(service: Service) -> APIRouter:
    """The routes that write text; they are in the document of a model that does."""
    made = APIRouter(prefix="/v1", include_in_schema=service.writes)
    texts = TokenTexts(service.tokenizer)

    @made.post("/completions", response_model=Completion, responses=ERRORS)
    async def completions(request: Request, body: CompletionBody) -> Response:
        async with AsyncExitStack() as stack:
            asked = await _checked(service, request, _completion(service, request, body, stack))
            if body.stream:
                return await _stream(service, asked, CompletionParts(asked, texts))
            return await _answer(service, request, asked, _whole_completion(service, asked, texts))

    @made.post("/chat/completions", response_model=ChatCompletion, responses=ERRORS)
    async def chat(request: Request, body: ChatBody) -> Response:
        async with AsyncExitStack() as stack:
            asked = await _checked(service, request, _chat(service, request, body, stack))
            if body.stream:
                return await _stream(service, asked, ChatParts(asked, texts))
            return await _answer(service, request, asked, _whole_chat(asked, texts))

    return made


async def _checked(service: Service, request: Request, work: Any) -> Asked:
    """A request that has its place and its adapters; gone clients wait for neither."""
    return await within(service.limits.request_seconds, request, work)


# checking -----------------------------------------------------------------------------------------


def _check_together(body: Generate) -> None:
    """Raises `RequestError` that lists the fields that contradict each other."""
    found = body.contradictions()
    if found:
        raise RequestError("; ".join(found), "leave one of them out.")


async def _completion(
    service: Service, request: Request, body: CompletionBody, stack: AsyncExitStack
) -> Asked:
    target = service.target(body.model, service.caller(request))
    _check_together(body)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    prompts = await service.encode(body.prompt)
    for prompt in prompts:
        service.check_length(prompt, max_tokens, "prompt")
    prompts = [prompt for prompt in prompts for _ in range(body.num_answers)]
    admission = await stack.enter_async_context(service.admitted(target, len(prompts)))
    return _asked(service, body, admission, prompts, max_tokens, body.logprobs, "cmpl")


async def _chat(service: Service, request: Request, body: ChatBody, stack: AsyncExitStack) -> Asked:
    target = service.target(body.model, service.caller(request))
    _check_together(body)
    messages = [message.for_template() for message in body.messages]
    size = sum(len(message["content"]) for message in messages)
    prompt = await service.in_thread_if_long(size, lambda: service.chat_ids(messages))
    asked = body.max_completion_tokens or body.max_tokens
    service.check_length(prompt, asked or 1, "messages")
    max_tokens = asked or service.max_tokens - len(prompt)
    admission = await stack.enter_async_context(service.admitted(target, body.num_answers))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prompts = [prompt] * body.num_answers
    return _asked(service, body, admission, prompts, max_tokens, logprobs, "chatcmpl")


def _asked(
    service: Service,
    body: Generate,
    admission: Admission,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    logprobs: int | None,
    kind: str,
) -> Asked:
    loop = asyncio.get_running_loop()
    about = {
        "id": f"{kind}-{uuid4().hex}",
        "created": int(service.now()),
        "model": body.model,
        "system_fingerprint": admission.resolved.fingerprint,
    }
    deadline = loop.time() + service.limits.request_seconds
    return Asked(body, admission, prompts, max_tokens, logprobs, about, deadline)


def _begin(asked: Asked) -> Generation:
    """Submits all answers."""
    generation = Generation(asked.admission)
    samplings = [
        asked.body.sampling(asked.max_tokens, asked.logprobs, index % asked.body.num_answers)
        for index in range(len(asked.prompts))
    ]
    generation.submit(asked.prompts, samplings)
    return generation


# whole --------------------------------------------------------------------------------------------


async def _answer(service: Service, request: Request, asked: Asked, work: Any) -> Response:
    document = await within(service.limits.request_seconds, request, work)
    return JSONResponse(document.model_dump())


async def _generate(asked: Asked) -> tuple[Generation, list[Ended]]:
    """All answers; whatever happens, nothing runs on afterwards."""
    generation = _begin(asked)
    try:
        answers = await generation.all(len(asked.prompts), asked.deadline)
    except LoralabError as error:
        generation.record("error", error)
        raise
    except asyncio.CancelledError:
        generation.record("cancelled")
        raise
    finally:
        generation.cancel()
    generation.record("answered")
    return generation, answers


async def _whole_completion(service: Service, asked: Asked, texts: TokenTexts) -> Completion:
    body = cast(CompletionBody, asked.body)
    answers = [Ended() for _ in asked.prompts]
    num_tokens = num_cached = 0
    if asked.max_tokens:
        generation, answers = await _generate(asked)
        num_tokens, num_cached = generation.num_tokens, generation.num_cached(body.num_answers)
    echoed: dict[tuple[int, ...], list[Chosen]] = {}
    if body.echo:
        for prompt in dict.fromkeys(asked.prompts):
            echoed[prompt] = await _score(service, asked, prompt)
    choices = []
    for index, (prompt, answer) in enumerate(zip(asked.prompts, answers, strict=True)):
        before = str(service.tokenizer.decode(list(prompt))) if body.echo else ""
        tokens = [*echoed.get(prompt, ()), *answer.pieces]
        choices.append(
            CompletionChoice(
                index=index,
                text=before + answer.text,
                logprobs=None if body.logprobs is None else texts.completion(tokens),
                finish_reason=cast(Finish, answer.finish_reason) if answer.pieces else "length",
            )
        )
    num_prompt = sum(len(prompt) for prompt in asked.prompts[:: body.num_answers])
    return Completion(
        **asked.about, choices=choices, usage=usage(num_prompt, num_tokens, num_cached)
    )


async def _score(service: Service, asked: Asked, prompt: tuple[int, ...]) -> list[Chosen]:
    """The prompt's own tokens, with what the model thinks of them where that is asked for."""
    if asked.logprobs is None:
        return [Chosen(token) for token in prompt]
    admission = asked.admission
    future = service.engine.score(
        prompt,
        admission.resolved.entry,
        tenant=admission.target.tenant,
        num_best=asked.logprobs,
    )
    admission.charge(len(prompt))
    return await asyncio.wrap_future(future)


async def _whole_chat(asked: Asked, texts: TokenTexts) -> ChatCompletion:
    generation, answers = await _generate(asked)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(content=answer.text),
            logprobs=None if asked.logprobs is None else texts.chat(answer.pieces),
            finish_reason=cast(Finish, answer.finish_reason),
        )
        for index, answer in enumerate(answers)
    ]
    num_cached = generation.num_cached(asked.body.num_answers)
    counts = usage(len(asked.prompts[0]), generation.num_tokens, num_cached)
    return ChatCompletion(**asked.about, choices=choices, usage=counts)


# streamed -----------------------------------------------------------------------------------------


class CompletionParts:
    """Pieces of completions as parts of a stream."""

    kind = "text_completion"

    def __init__(self, asked: Asked, texts: TokenTexts) -> None:
        self._wants = asked.logprobs is not None
        self._texts = texts
        self._offsets = [0] * len(asked.prompts)

    def first(self, index: int) -> dict[str, Any] | None:
        """What opens an answer: nothing."""
        return None

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of one event."""
        logprobs = None
        if self._wants:
            made = self._texts.completion([piece], self._offsets[index])
            self._offsets[index] += sum(map(len, made.tokens))
            logprobs = made.model_dump()
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }


class ChatParts:
    """Pieces of a chat's answers as parts of a stream."""

    kind = "chat.completion.chunk"

    def __init__(self, asked: Asked, texts: TokenTexts) -> None:
        self._wants = asked.logprobs is not None
        self._texts = texts

    def first(self, index: int) -> dict[str, Any] | None:
        """What opens an answer: whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of one event."""
        return {
            "index": index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._texts.chat([piece]).model_dump() if self._wants else None,
            "finish_reason": piece.finish_reason,
        }


async def _stream(
    service: Service, asked: Asked, parts: CompletionParts | ChatParts
) -> StreamingResponse:
    """The response, once the first piece is there: until then an error has its own status."""
    generation = _begin(asked)
    pieces = generation.pieces(len(asked.prompts), asked.deadline)
    try:
        first = await anext(pieces)
    except BaseException as error:
        generation.cancel()
        generation.record("error", error if isinstance(error, LoralabError) else None)
        raise
    return StreamingResponse(
        _events(asked, parts, generation, first, pieces),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(
    asked: Asked,
    parts: CompletionParts | ChatParts,
    generation: Generation,
    first: tuple[int, Piece],
    rest: AsyncIterator[tuple[int, Piece]],
) -> AsyncIterator[bytes]:
    options = asked.body.stream_options
    counts = options is not None and options.include_usage
    about = {**asked.about, "object": parts.kind} | ({"usage": None} if counts else {})
    outcome, fault = "cancelled", None
    try:
        for index in range(len(asked.prompts)):
            opening = parts.first(index)
            if opening is not None:
                yield event({**about, "choices": [opening]})
        yield event({**about, "choices": [parts.part(*first)]})
        async for index, piece in rest:
            if _tells(piece, asked):
                yield event({**about, "choices": [parts.part(index, piece)]})
        if counts:
            num_prompt = sum(len(p) for p in asked.prompts[:: asked.body.num_answers])
            num_cached = generation.num_cached(asked.body.num_answers)
            told = usage(num_prompt, generation.num_tokens, num_cached).model_dump()
            yield event({**about, "choices": [], "usage": told})
        outcome = "answered"
        yield END
    except LoralabError as error:  # the status is sent already: the stream itself tells
        outcome, fault = "error", error
        yield event(body_of(error)[1])
    finally:
        generation.cancel()
        generation.record(outcome, fault)


def _tells(piece: Piece, asked: Asked) -> bool:
    """Whether a piece is worth an event: text, an end, or a token to report on."""
    return bool(piece.text) or piece.finish_reason is not None or asked.logprobs is not None
