"""The JSON of requests: OpenAI's shapes, with a few fields of our own.

A field that is unknown is refused. Of OpenAI's fields that mean nothing here, those that change no
answer are accepted and ignored (`Ignored`), and the others are refused unless they ask for nothing
(`REFUSED` of each request).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from openchameleon.inference.params import Mode
from openchameleon.serve import limits
from openchameleon.serve.errors import ApiError

if TYPE_CHECKING:
    from openchameleon.pipeline import Wishes

Ignored = Annotated[Any, Field(description="Accepted and ignored.")]
PICTURE_URL = "A data: URL, or https:// of a host that this server fetches pictures from."
NOTHING: tuple[Any, ...] = (None, False, [], {}, 0, "")


class Body(BaseModel):
    """What a client sends: exact types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(Body):
    """How an answer is drawn; what is left out is as the model's folder says."""

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """OpenAI's field -> the values that ask for nothing."""

    model: str | None = Field(None, description="The model served here, or nothing.")
    temperature: float | None = Field(None, ge=0, le=100, description="0 takes the likeliest.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31, description="0 is off.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="The same seed, the same answer.")
    guidance: float | None = Field(
        None, ge=0, le=100, description="How much more pictures follow the words; unset is off."
    )
    mode: Mode | None = Field(None, description='What may be written; unset is "interleaved".')
    user: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, harmless in cls.REFUSED.items():
            if name in data and not any(data[name] == v for v in harmless):
                raise ApiError(422, "unsupported_parameter",
                               f"{name} is not supported here; leave it out.", name)  # fmt: skip
        return {name: value for name, value in data.items() if name not in cls.REFUSED}

    def wishes(self, mode: Mode | None, seed: int, max_tokens: int | None) -> Wishes:
        """What is asked for here, with what each endpoint names in its own way."""
        return {
            "mode": mode,
            "seed": seed,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "guidance": self.guidance,
        }


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


# --- /v1/responses


class InputText(Body):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class InputImage(Body):
    type: Literal["input_image"]
    image_url: str = Field(description=PICTURE_URL)
    detail: Ignored = None
    file_id: None = None
    prompt_cache_breakpoint: Ignored = None


class OutputText(Body):
    """Text of an earlier answer, given back."""

    type: Literal["output_text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None


Part = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class InputPicture(Body):
    """A picture of an earlier answer, given back."""

    type: Literal["image_generation_call"]
    result: str = Field(description="A picture's file in base64.")
    id: Ignored = None
    status: Ignored = None
    size: Ignored = None
    output_format: Ignored = None
    revised_prompt: Ignored = None
    background: Ignored = None
    quality: Ignored = None
    action: Ignored = None


def _item_kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")] | Annotated[InputPicture, Tag("image_generation_call")],
    Discriminator(_item_kind),
]


class ImageTool(Body):
    """What stock clients send to allow pictures; here they are allowed without it too."""

    type: Literal["image_generation"]
    partial_images: int | None = Field(None, ge=0, le=limits.MAX_PARTIAL_PICTURES)
    output_format: Literal["png"] | None = None
    size: Literal["auto"] | None = None
    quality: Ignored = None
    background: Ignored = None
    moderation: Ignored = None
    model: Ignored = None
    action: Literal["auto", "generate"] | None = None


class ToolChoice(Body):
    type: Literal["image_generation"]


class TextFormat(Body):
    type: Literal["text"]


class TextConfig(Body):
    format: TextFormat | None = None
    verbosity: Ignored = None


class ResponsesRequest(Sampling):
    """A request for one answer of text and pictures."""

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(
            ["background", "conversation", "previous_response_id", "prompt", "moderation",
             "max_tool_calls", "top_logprobs", "context_management"], NOTHING
        ),
        "truncation": (None, "disabled"),
    }  # fmt: skip

    input: str | list[InputItem] = Field(description="A user's words, or a conversation.")
    instructions: str | None = Field(
        None, description="Put before the first words of the user: the model has no other place."
    )
    max_output_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)
    stream: bool | None = None
    partial_images: int | None = Field(
        None, ge=0, le=limits.MAX_PARTIAL_PICTURES,
        description="Growing pictures that are streamed on the way to each whole one.",
    )  # fmt: skip
    tools: list[ImageTool] | None = Field(None, max_length=1)
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    stream_options: StreamOptions | None = None
    parallel_tool_calls: Ignored = None
    include: Ignored = None
    reasoning: Ignored = None


# --- /v1/chat/completions


class ChatText(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    url: str = Field(description=PICTURE_URL)
    detail: Ignored = None


class ChatImage(Body):
    type: Literal["image_url"]
    image_url: ImageUrl
    index: Ignored = None


ChatPart = Annotated[ChatText | ChatImage, Field(discriminator="type")]


class ChatMessage(Body):
    """A message. `images` are those of an earlier answer, given back; they follow its text."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ChatPart] | None = None
    images: list[ChatImage] | None = None
    name: Ignored = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


Stop = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_LENGTH)]


class ChatRequest(Sampling):
    """A request for answers of text, and of pictures beside it."""

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(
            ["frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs",
             "tools", "functions", "audio", "prediction", "web_search_options"], NOTHING
        ),
        "tool_choice": (None, "none", "auto"),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
    }  # fmt: skip

    messages: list[ChatMessage] = Field(min_length=1)
    n: int | None = Field(None, ge=1, le=limits.MAX_ANSWERS, description="Answer i has seed + i.")
    max_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=limits.MAX_TOKENS)
    stop: Stop | Annotated[list[Stop], Field(max_length=limits.MAX_STOPS)] | None = None
    modalities: list[Literal["text", "image"]] | None = Field(
        None, min_length=1, max_length=2, description='["text"] is mode "text".'
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None


# --- /v1/images/generations


class ImagesRequest(Sampling):
    """A request for pictures from words."""

    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **dict.fromkeys(["stream", "partial_images"], NOTHING),
        "mode": (None, "image"),
        "response_format": (None, "b64_json"),
        "output_format": (None, "png"),
    }

    prompt: str
    n: int | None = Field(None, ge=1, le=limits.MAX_ANSWERS, description="Picture i has seed + i.")
    size: str | None = Field(None, description='"auto", or the model\'s own size.')
    quality: Ignored = None
    style: Ignored = None
    background: Ignored = None
    moderation: Ignored = None
    output_compression: Ignored = None
