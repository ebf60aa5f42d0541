"""A tokenizer that tests can read, and that other processes can import."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from openchameleon.data.pack import Encoded
from openchameleon.document import Conversation, Record, Text
from openchameleon.errors import UserError
from openchameleon.vocab import Vocab

VOCAB = Vocab.compact(n_codes=8, codes_per_item=4, n_text=256)


class Letters:
    """A tokenizer of ASCII text whose pictures are four zero codes."""

    vocab = VOCAB

    def encode_many(self, records: Sequence[Record], answers_only: bool) -> list[Encoded]:
        return [self._encode(record, answers_only) for record in records]

    def _encode(self, record: Record, answers_only: bool) -> Encoded:
        turns = record.messages if isinstance(record, Conversation) else None
        parts = [(t.document, t.role) for t in turns] if turns else [(record, "assistant")]
        ids, mask = [VOCAB.bos_id], [False]
        for document, role in parts:
            for s in document:
                if isinstance(s, Text) and not s.text.isascii():
                    raise UserError("there is more than ASCII in it.")
                more = (
                    [VOCAB.text_start + ord(c) for c in s.text]
                    if isinstance(s, Text)
                    else VOCAB.image.ids_from_codes([0] * 4)
                )
                ids += more
                mask += [role == "assistant" or not answers_only] * len(more)
        return [*ids, VOCAB.eos_id], [*mask, True]


def die_unless_zero(job: int) -> int:
    """A job that the system kills its process for."""
    if job:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def stop_unless_zero(job: int) -> int:
    """A job in whose place the process stops, and is not ended."""
    if job:
        os.kill(os.getpid(), signal.SIGSTOP)
    return job
