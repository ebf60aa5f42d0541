"""The `tokenizer.json` of a Chameleon as each layout spells it.

The model hub calls one of the released reserved ids "<image>": its processor puts that id at each
place of a picture to come. And every control id must have a name for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from openchameleon.checkpoints.checkpoint import PUBLISHED
from openchameleon.vocab import Vocab

PLACEHOLDER, RELEASED_AS = "<image>", "<reserved08707>"


def names_for_hub(vocab: Vocab, names: Mapping[str, int]) -> dict[str, tuple[str, int]]:
    """Role -> (name, id) of the control ids, and of "image", the placeholder.

    names: those of the tokenizer. An id without a name gets the released one if that is free. The
    placeholder is the id of that name, else one that nothing uses, else unk's.
    """
    ids = {
        "bos": vocab.bos_id, "pad": vocab.pad_id, "eos": vocab.eos_id, "unk": vocab.unk_id,
        "begin": vocab.image.begin_id, "end": vocab.image.end_id, "eot": vocab.eot_id,
    }  # fmt: skip
    name_of = {i: name for name, i in names.items()}
    chosen = {}
    for role, i in ids.items():
        released = PUBLISHED[role] if PUBLISHED[role] not in names else f"<chameleon:{role}>"
        chosen[role] = (name_of.get(i, released), i)
    stated = names.get(PLACEHOLDER, names.get(RELEASED_AS))
    chosen["image"] = (PLACEHOLDER, _spare_id(vocab) if stated is None else stated)
    return chosen


def _spare_id(vocab: Vocab) -> int:
    used = {vocab.bos_id, vocab.pad_id, vocab.eos_id, vocab.unk_id, vocab.eot_id}
    for r in vocab.code_ranges:
        used |= {r.begin_id, r.end_id, *range(r.first_id, r.stop_id)}
    spare = (i for i in range(vocab.size) if i not in used and not vocab.is_text(i))
    return next(spare, vocab.unk_id)


def as_hub(source: bytes, names: Mapping[str, tuple[str, int]]) -> bytes:
    """The file with `names` (as of `names_for_hub`), and with bos in front of every text.

    Its other bytes stay where they can, so that `as_released` gives the file back.
    """
    if _quoted(PLACEHOLDER) not in source:
        source = source.replace(_quoted(RELEASED_AS), _quoted(PLACEHOLDER))
    source = _NO_PROCESSOR.sub(lambda m: m[1] + _bos_first(*names["bos"]), source, count=1)
    data = json.loads(source)
    pieces, added = data["model"]["vocab"], data.get("added_tokens") or []
    known = {*pieces, *(entry["content"] for entry in added)}
    taken = {*pieces.values(), *(entry["id"] for entry in added)}
    missing = {n: i for n, i in names.values() if n not in known and i not in taken}
    if not missing:
        return source
    data["model"]["vocab"] = pieces | missing
    data["added_tokens"] = [
        *added,
        *(
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for name, i in missing.items()
        ),
    ]  # fmt: skip
    return json.dumps(data, ensure_ascii=False, indent=2).encode()


def as_released(source: bytes, bos_id: int) -> bytes:
    """The file as `as_hub` was given it, where its names were the released ones."""
    source = source.replace(_bos_first(PUBLISHED["bos"], bos_id), b"null")
    if _quoted(RELEASED_AS) in source:
        return source
    return source.replace(_quoted(PLACEHOLDER), _quoted(RELEASED_AS))


_NO_PROCESSOR = re.compile(rb'("post_processor"\s*:\s*)null')


def _bos_first(name: str, i: int) -> bytes:
    bos, text = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    second = {"Sequence": {"id": "B", "type_id": 0}}
    return json.dumps(
        {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, second],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
        }
    ).encode()


def _quoted(name: str) -> bytes:
    return f'"{name}"'.encode()
