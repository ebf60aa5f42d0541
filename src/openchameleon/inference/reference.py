"""The slow and obvious generation that the engine must equal: what the fast paths are tested by.

One request, no cache, a full forward for every id and stream, and a modality rule that reads
the whole sequence anew each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openchameleon.inference.engine import room_for
from openchameleon.inference.guidance import from_open_item, without_text
from openchameleon.inference.params import SamplingParams
from openchameleon.inference.sampling import RowParams, sample
from openchameleon.inference.sequence import Completion, Request, generator_for, uniform
from openchameleon.model.transformer import Transformer
from openchameleon.vocab import CodeRange, Vocab


@torch.inference_mode()
def generate_reference(model: Transformer, vocab: Vocab, request: Request) -> Completion:
    """What `Engine.generate` answers to one well-formed request, up to near ties of two ids."""
    params = request.params
    prompt = list(request.token_ids)
    room = room_for(request, model.config.max_seq_len)
    generator = generator_for(params)
    new_ids: list[int] = []
    while True:
        allowed = allowed_ids(vocab, prompt, new_ids, params, room)
        if not allowed:
            return Completion(new_ids, "length")
        logits = reference_logits(model, vocab, prompt + new_ids, params)
        inside, left = open_item(vocab, prompt + new_ids)
        modality = params.image if inside is not None and left else params.text
        seen = torch.zeros(1, vocab.size, dtype=torch.bool)
        seen[0, [i for i in prompt + new_ids if vocab.is_text(i)]] = True
        mask = torch.zeros(1, vocab.size, dtype=torch.bool)
        mask[0, sorted(allowed)] = True
        ids, ok = sample(
            logits[None], mask, RowParams.of([modality]), [uniform(generator, modality)], seen
        )
        if not ok:
            return Completion(new_ids, "nonfinite_logits")
        if ids.item() == vocab.eos_id:
            return Completion(new_ids, "stop")
        new_ids.append(int(ids.item()))


def reference_logits(
    model: Transformer, vocab: Vocab, token_ids: list[int], params: SamplingParams
) -> Tensor:
    """Logits (V,) on the CPU of the next id, guided where `params` ask for it."""

    def last(ids: list[int]) -> Tensor:
        device = model.output_weight.device
        return model.forward(torch.tensor([ids], device=device))[0, -1].cpu()

    full = last(token_ids)
    inside, left = open_item(vocab, token_ids)
    if params.guidance is None or inside is None or left == 0:
        return full
    text_scale, image_scale = params.guidance
    image_only = last(without_text(vocab, token_ids))
    unconditional = last(from_open_item(vocab, token_ids))
    return (
        unconditional
        + image_scale * (image_only - unconditional)
        + text_scale * (full - image_only)
    )


def allowed_ids(
    vocab: Vocab, prompt: list[int], new_ids: list[int], params: SamplingParams, room: int
) -> set[int]:
    """The ids that may follow; empty where there is no room for what would have to come."""
    left = room - len(new_ids)
    inside, codes_left = open_item(vocab, prompt + new_ids)
    if inside is not None:
        if left < codes_left + 2:  # its end and an eos besides
            return set()
        return set(range(inside.first_id, inside.stop_id)) if codes_left else {inside.end_id}
    if left < 1:
        return set()
    begins = {r.begin_id for r in vocab.code_ranges}
    n_opened = sum(i in begins for i in new_ids)
    n_opened += open_item(vocab, prompt)[0] is not None  # begun by the prompt, ended by us
    limit = params.max_images
    if params.mode == "image" and limit is None:
        limit = 1
    fitting = {
        r.begin_id
        for r in vocab.code_ranges
        if params.mode in ("interleaved", r.name) and left >= r.item_len + 1
    }
    if limit is not None and n_opened >= limit:
        fitting = set()
    if params.mode == "image":
        return fitting if n_opened < (limit or 0) else {vocab.eos_id}
    return fitting | {vocab.eos_id} | set(range(vocab.text_start, vocab.text_stop))


def open_item(vocab: Vocab, token_ids: list[int]) -> tuple[CodeRange | None, int]:
    """The code range that the ids leave open, and how many codes it still lacks."""
    for n_codes, i in enumerate(reversed(token_ids)):
        if any(i == r.end_id for r in vocab.code_ranges):
            break
        opened = vocab.range_begun_by(i)
        if opened is not None:
            return opened, opened.codes_per_item - n_codes
    return None, 0
