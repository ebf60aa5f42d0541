"""POST /v1/images/generations: words in, pictures out."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response as HTTPResponse

from openchameleon.inference.sequence import Request
from openchameleon.pipeline import Chameleon
from openchameleon.serve import replies
from openchameleon.serve.errors import ApiError, Json
from openchameleon.serve.limits import StrictRoute
from openchameleon.serve.prompts import Given, Prompt, seeded
from openchameleon.serve.requests import ImagesRequest
from openchameleon.serve.service import Service, seed_for

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/images/generations", response_model=replies.Pictures)
async def create(body: ImagesRequest, http: HTTPRequest) -> HTTPResponse:
    """`n` pictures of the model's own size, as base64 of PNG."""
    service: Service = http.app.state.service
    service.require_model(body.model)
    size = service.picture_size
    if body.size not in (None, "auto", size):
        raise ApiError(400, "invalid_value", f"The model draws pictures of {size} only.", "size")
    seed = seed_for(body.seed)
    words = [Given("user", "prompt", body.prompt)]
    requests = await service.prepare(words, partial(_requests, body, seed), "prompt")
    size = service.picture_size  # which may be another model's by now
    answers = [service.submit(request) for request in requests]
    await service.collect(http, answers)
    n_in, n_out = len(requests[0].token_ids), sum(answer.n_tokens for answer in answers)
    pictures = replies.Pictures(
        created=int(time.time()),
        data=[replies.PictureData(b64_json=p.png) for a in answers for p in a.pictures],
        size=size,
        seed=seed,
        usage=replies.PictureUsage(
            input_tokens=n_in,
            input_tokens_details=replies.PromptDetails(text_tokens=n_in),
            output_tokens=n_out,
            total_tokens=n_in + n_out,
        ),
    )
    return Json(pictures.model_dump())


def _requests(body: ImagesRequest, seed: int, model: Chameleon, prompt: Prompt) -> list[Request]:
    request = model.request(prompt.conversation, **body.wishes("image", seed, None))
    return seeded(request, body.n or 1)
