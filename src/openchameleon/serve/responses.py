"""POST /v1/responses: the endpoint whose answers keep text and pictures in their order.

Streaming sends OpenAI's typed events. Each run of text is a `message` item, each picture an
`image_generation_call` item:

    response.created response.in_progress
    ( response.output_item.added response.content_part.added response.output_text.delta ...
      response.output_text.done response.content_part.done response.output_item.done
    | response.output_item.added response.image_generation_call.in_progress .generating
      (.partial_image ...) .completed response.output_item.done ) ...
    response.completed | response.incomplete | response.failed | error
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response as HTTPResponse

from openchameleon.inference.params import Mode
from openchameleon.inference.sequence import Request
from openchameleon.pipeline import Chameleon
from openchameleon.serve import replies
from openchameleon.serve.answer import Answer, Begun, Partial, Picture, Piece
from openchameleon.serve.errors import ApiError, Json
from openchameleon.serve.limits import StrictRoute
from openchameleon.serve.pictures import Source
from openchameleon.serve.prompts import Given, Prompt
from openchameleon.serve.replies import MessageItem, PictureItem, TextPart
from openchameleon.serve.requests import InputImage, InputPicture, ResponsesRequest, ToolChoice
from openchameleon.serve.service import Service, failure_of, seed_for
from openchameleon.serve.sse import EventStream, event
from openchameleon.tokenizer.mixed import TextDelta

router = APIRouter(route_class=StrictRoute)

Event = dict[str, Any]


@router.post("/v1/responses", response_model=replies.Response)
async def create(body: ResponsesRequest, http: HTTPRequest) -> HTTPResponse:
    """One answer of text and pictures, whole or (`stream`) as server-sent events."""
    service: Service = http.app.state.service
    service.require_model(body.model)
    seed = seed_for(body.seed)
    request, warnings = await service.prepare(
        parts_of(body), partial(_request, body, seed), "input"
    )
    answer = service.submit(request, _n_partial(body))
    draft = Draft(body, seed, service, answer)
    draft.response.warnings = warnings
    if body.stream:
        return EventStream(service, [answer], _lines(draft, service), draft.last_words)
    await service.collect(http, [answer])
    for piece in draft.whole():
        draft.take(piece)
    return Json(draft.finish()[-1]["response"])


def parts_of(body: ResponsesRequest) -> Iterator[Given]:
    """The request's words and pictures, in order."""
    if body.instructions:
        yield Given("system", "instructions", body.instructions)
    if isinstance(body.input, str):
        yield Given("user", "input", body.input)
        return
    for i, item in enumerate(body.input):
        where = f"input[{i}]"
        if isinstance(item, InputPicture):
            param = f"{where}.result"
            yield Given("assistant", param, Source(param, base64=item.result))
            continue
        role = "system" if item.role == "developer" else item.role
        if isinstance(item.content, str):
            yield Given(role, f"{where}.content", item.content, new_message=True)
            continue
        for k, part in enumerate(item.content):
            here = f"{where}.content[{k}]"
            if isinstance(part, InputImage):
                param = f"{here}.image_url"
                yield Given(role, param, Source(param, part.image_url), new_message=k == 0)
            else:
                yield Given(role, f"{here}.text", part.text, new_message=k == 0)


def _request(
    body: ResponsesRequest, seed: int, model: Chameleon, prompt: Prompt
) -> tuple[Request, list[str]]:
    wishes = body.wishes(_mode(body), seed, body.max_output_tokens)
    request = model.request(prompt.conversation, least_room=0, **wishes)
    return request, prompt.warnings


def _mode(body: ResponsesRequest) -> Mode | None:
    if body.mode is None and body.tool_choice == "none":
        return "text"
    if body.mode is None and isinstance(body.tool_choice, ToolChoice):
        return "image"
    return body.mode


def _n_partial(body: ResponsesRequest) -> int:
    if not body.stream:
        return 0
    of_tool = body.tools[0].partial_images if body.tools else None
    return body.partial_images if body.partial_images is not None else of_tool or 0


async def _lines(draft: Draft, service: Service) -> AsyncIterator[str]:
    for e in draft.begin():
        yield event(e, e["type"])
    async for piece in draft.answer.pieces(service.pool):
        for e in draft.take(piece):
            yield event(e, e["type"])
    for e in draft.finish():
        yield event(e, e["type"])


class Draft:
    """A response that grows by pieces; what it returns are the events of each growth."""

    def __init__(self, body: ResponsesRequest, seed: int, service: Service, answer: Answer) -> None:
        self.answer, self._size = answer, service.picture_size
        self._n_events = 0
        self._n_partial = 0
        self._open: MessageItem | PictureItem | None = None
        self.response = replies.Response(
            id=f"resp_{answer.job.id}",
            created_at=int(time.time()),
            status="in_progress",
            model=service.settings.name,
            seed=seed,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            metadata=body.metadata or {},
        )

    def begin(self) -> list[Event]:
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def take(self, piece: Piece) -> list[Event]:
        """The events of one more piece."""
        if isinstance(piece, TextDelta):
            return self._text(piece.text)
        if isinstance(piece, Begun):
            return [*self._close_text(), *self._begin_picture()]
        item = self._open
        assert isinstance(item, PictureItem), "a piece of a picture outside of one"
        if isinstance(piece, Partial):
            self._n_partial += 1
            return [self._event(
                "response.image_generation_call.partial_image",
                item_id=item.id, partial_image_index=self._n_partial - 1,
                partial_image_b64=piece.png, codes_done=piece.codes_done,
                codes_total=piece.codes_total, output_format="png", size=item.size,
            )]  # fmt: skip
        item.status, item.result = "completed", piece.png
        done = self._event("response.image_generation_call.completed", item_id=item.id)
        return [done, self._close()]

    def finish(self) -> list[Event]:
        """The events of the end, however it came about; the last one has the response."""
        job, response = self.answer.job, self.response
        error = failure_of(job)
        if job.outcome == "stopped" and error is not None:
            return [self._event("error", code=error.code, message=error.message, param=None)]
        cut = job.outcome == "length"
        events = self._close_text("incomplete" if cut or error else "completed")
        n_in, n_out = len(job.request.token_ids), self.answer.n_tokens
        response.usage = replies.ResponseUsage(
            input_tokens=n_in, output_tokens=n_out, total_tokens=n_in + n_out
        )
        if error is not None:
            response.status = "failed"
            response.error = replies.ResponseError(code=error.code, message=error.message)
        elif cut:
            response.status = "incomplete"
            response.incomplete_details = replies.IncompleteDetails(reason="max_output_tokens")
        else:
            response.status = "completed"
        return [*events, self._whole(f"response.{response.status}")]

    def last_words(self, error: ApiError) -> str:
        """The event of a stream that cannot go on."""
        e = self._event("error", code=error.code, message=error.message, param=None)
        return event(e, "error")

    def whole(self) -> Iterator[Piece]:
        """The pieces of an answer that has ended."""
        for part in self.answer.parts:
            if isinstance(part, Picture):
                yield Begun()
            yield part if isinstance(part, Picture) else TextDelta(part)

    def _text(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self._open is None:
            item = MessageItem(id=_new_id("msg"), status="in_progress", content=[])
            events = [self._add(item)]
            part = TextPart(text="")
            item.content = [part]
            events.append(self._event("response.content_part.added", item_id=item.id,
                                      content_index=0, part=part.model_dump()))  # fmt: skip
        item = self._open  # type: ignore[assignment]
        item.content[0].text += text
        return [*events, self._event("response.output_text.delta", item_id=item.id,
                                     content_index=0, delta=text, logprobs=[])]  # fmt: skip

    def _close_text(self, status: Any = "completed") -> list[Event]:
        item = self._open
        if not isinstance(item, MessageItem):
            return []
        item.status = status
        at = {"item_id": item.id, "content_index": 0}
        part = item.content[0]
        return [
            self._event("response.output_text.done", **at, text=part.text, logprobs=[]),
            self._event("response.content_part.done", **at, part=part.model_dump()),
            self._close(),
        ]

    def _begin_picture(self) -> list[Event]:
        self._n_partial = 0
        item = PictureItem(id=_new_id("ig"), status="in_progress", result=None, size=self._size)
        events = [self._add(item)]
        item.status = "generating"
        for kind in ("in_progress", "generating"):
            name = f"response.image_generation_call.{kind}"
            events.append(self._event(name, item_id=item.id))
        return events

    def _add(self, item: MessageItem | PictureItem) -> Event:
        self.response.output.append(item)
        self._open = item
        return self._event("response.output_item.added", item=item.model_dump())

    def _close(self) -> Event:
        assert self._open is not None
        event = self._event("response.output_item.done", item=self._open.model_dump())
        self._open = None
        return event

    def _whole(self, name: str) -> Event:
        return self._numbered(name, response=self.response.model_dump())

    def _event(self, name: str, **fields: Any) -> Event:
        """An event of the item that is open."""
        if self._open is not None:
            fields["output_index"] = len(self.response.output) - 1
        return self._numbered(name, **fields)

    def _numbered(self, name: str, **fields: Any) -> Event:
        self._n_events += 1
        return {"type": name, "sequence_number": self._n_events - 1, **fields}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
