"""The JSON of replies: OpenAI's shapes, with a few fields of our own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

# --- /v1/responses


class TextPart(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class MessageItem(BaseModel):
    type: Literal["message"] = "message"
    id: str
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[TextPart]


class PictureItem(BaseModel):
    """A picture: base64 of a PNG in `result`."""

    type: Literal["image_generation_call"] = "image_generation_call"
    id: str
    status: Literal["in_progress", "generating", "completed", "failed"]
    result: str | None
    output_format: Literal["png"] = "png"
    size: str


class InputDetails(BaseModel):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseError(BaseModel):
    code: str
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class Response(BaseModel):
    """An answer: messages and pictures in `output`, in the order in which they were written.

    seed: with the same request, gives the same answer again. warnings: what was not read.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[MessageItem | PictureItem] = []
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    usage: ResponseUsage | None = None
    seed: int
    warnings: list[str] = []
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = False
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tools: list[Any] = []


# --- /v1/chat/completions and /v1/images/generations


class AnswerUrl(BaseModel):
    url: str


class AnswerImage(BaseModel):
    """A picture as a data: URL; `index` counts the pictures of one answer."""

    type: Literal["image_url"] = "image_url"
    image_url: AnswerUrl
    index: int


class AnswerMessage(BaseModel):
    """`images` where there are any; only a stream says where they stand in the text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    images: list[AnswerImage] = []


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    seed: int
    warnings: list[str] = []


class PictureData(BaseModel):
    b64_json: str


class PromptDetails(BaseModel):
    text_tokens: int
    image_tokens: int = 0


class PictureUsage(BaseModel):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    total_tokens: int


class Pictures(BaseModel):
    created: int
    data: list[PictureData]
    output_format: Literal["png"] = "png"
    size: str
    seed: int
    usage: PictureUsage


# --- everywhere


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorDetail
