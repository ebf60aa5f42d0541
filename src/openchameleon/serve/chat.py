"""POST /v1/chat/completions: the older shape, where pictures stand beside the text.

`message.images` has the pictures of a whole answer; in a stream `delta.images` brings each where it
stands between the deltas of text.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response as HTTPResponse

from openchameleon.inference.params import Mode
from openchameleon.inference.sequence import Request
from openchameleon.pipeline import Chameleon
from openchameleon.serve import replies
from openchameleon.serve.answer import Answer, Picture, Piece
from openchameleon.serve.errors import ApiError, Json
from openchameleon.serve.limits import StrictRoute
from openchameleon.serve.pictures import Source
from openchameleon.serve.prompts import Given, Prompt, Speaker, seeded
from openchameleon.serve.replies import AnswerImage, AnswerUrl
from openchameleon.serve.requests import ChatImage, ChatMessage, ChatRequest, ChatText
from openchameleon.serve.service import Service, failure_of, seed_for
from openchameleon.serve.sse import EventStream, event
from openchameleon.tokenizer.mixed import TextDelta

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", response_model=replies.ChatCompletion)
async def create(body: ChatRequest, http: HTTPRequest) -> HTTPResponse:
    """`n` answers to a conversation, whole or (`stream`) as server-sent events."""
    service: Service = http.app.state.service
    service.require_model(body.model)
    seed = seed_for(body.seed)
    requests, warnings = await service.prepare(
        parts_of(body.messages), partial(_requests, body, seed), "messages"
    )
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    answers = [service.submit(request, stops=stops) for request in requests]
    head: dict[str, Any] = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": service.settings.name,
        "seed": seed,
        "warnings": warnings,
    }
    if body.stream:
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        lines = _lines(service, answers, head, usage)
        return EventStream(service, answers, lines, _last_words)
    await service.collect(http, answers)
    choices = [_choice(i, answer) for i, answer in enumerate(answers)]
    whole = replies.ChatCompletion(choices=choices, usage=_usage(answers), **head)
    return Json(whole.model_dump())


def parts_of(messages: Sequence[ChatMessage]) -> Iterator[Given]:
    """The messages' words and pictures, in order."""
    for i, message in enumerate(messages):
        where, role = f"messages[{i}]", message.role
        speaker: Speaker = "system" if role == "developer" else role
        if isinstance(message.content, str):
            yield Given(speaker, f"{where}.content", message.content, new_message=True)
        else:
            for k, part in enumerate(message.content or []):
                here = f"{where}.content[{k}]"
                if isinstance(part, ChatText):
                    yield Given(speaker, f"{here}.text", part.text, new_message=k == 0)
                else:
                    yield _picture(speaker, f"{here}.image_url.url", part, new_message=k == 0)
        for k, image in enumerate(message.images or []):
            yield _picture(speaker, f"{where}.images[{k}].image_url.url", image)


def _picture(role: Speaker, param: str, part: ChatImage, new_message: bool = False) -> Given:
    return Given(role, param, Source(param, part.image_url.url), new_message)


def _requests(
    body: ChatRequest, seed: int, model: Chameleon, prompt: Prompt
) -> tuple[list[Request], list[str]]:
    max_tokens = body.max_completion_tokens or body.max_tokens
    wishes = body.wishes(_mode(body), seed, max_tokens)
    request = model.request(prompt.conversation, least_room=0, **wishes)
    return seeded(request, body.n or 1), prompt.warnings


def _mode(body: ChatRequest) -> Mode | None:
    if body.mode is None and body.modalities == ["text"]:
        return "text"
    return body.mode


def _choice(index: int, answer: Answer) -> replies.Choice:
    pictures = enumerate(answer.pictures)
    message = replies.AnswerMessage(
        content=answer.text, images=[_image(k, picture) for k, picture in pictures]
    )
    return replies.Choice(index=index, message=message, finish_reason=_finish_reason(answer))


def _image(index: int, picture: Picture) -> AnswerImage:
    url = AnswerUrl(url=f"data:image/png;base64,{picture.png}")
    return AnswerImage(image_url=url, index=index)


def _finish_reason(answer: Answer) -> Any:
    return "length" if answer.job.outcome == "length" and not answer.stopped else "stop"


def _usage(answers: Sequence[Answer]) -> replies.ChatUsage:
    n_in = len(answers[0].job.request.token_ids)
    n_out = sum(answer.n_tokens for answer in answers)
    return replies.ChatUsage(prompt_tokens=n_in, completion_tokens=n_out, total_tokens=n_in + n_out)


async def _lines(
    service: Service, answers: Sequence[Answer], head: dict[str, Any], usage: bool
) -> AsyncIterator[str]:
    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        return event({**head, "object": "chat.completion.chunk", "choices": choices, **more})

    def choice(index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        return chunk([{"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}])

    for i in range(len(answers)):
        yield choice(i, {"role": "assistant", "content": ""})
    async for i, piece in _merged(service, answers):
        if isinstance(piece, TextDelta):
            yield choice(i, {"content": piece.text})
        elif isinstance(piece, Picture):
            image = _image(len(answers[i].pictures) - 1, piece)
            yield choice(i, {"images": [image.model_dump()]})
        elif piece is None:
            if error := failure_of(answers[i].job):
                raise error
            yield choice(i, {}, _finish_reason(answers[i]))
    if usage:
        yield chunk([], usage=_usage(answers).model_dump())
    yield "data: [DONE]\n\n"


async def _merged(
    service: Service, answers: Sequence[Answer]
) -> AsyncIterator[tuple[int, Piece | None]]:
    """(number of the answer, its next piece) as they come; None after its last."""
    queue: asyncio.Queue[tuple[int, Piece | None, Exception | None]] = asyncio.Queue(len(answers))

    async def follow(i: int) -> None:
        error: Exception | None = None
        try:
            async for piece in answers[i].pieces(service.pool):
                await queue.put((i, piece, None))
        except Exception as caught:
            error = caught
        service.cancel([answers[i]])  # where a stop text ended it
        await queue.put((i, None, error))

    tasks = [asyncio.create_task(follow(i)) for i in range(len(answers))]
    try:
        n_left = len(answers)
        while n_left:
            i, piece, error = await queue.get()
            if error is not None:
                raise error
            n_left -= piece is None
            yield i, piece
    finally:
        for task in tasks:
            task.cancel()


def _last_words(error: ApiError) -> str:
    return event(error.body())
