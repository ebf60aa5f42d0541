"""How ids of turns become one sequence: who begins, what closes a turn, what the loss counts.

A document is `<bos> ids <eos>`. A conversation is `<bos> user <eot> assistant <eos>`, where an
answer that is followed by another turn closes with `<eot>`. No role words: one separator token,
as in the paper ("a distinct token to delineate the end of the prompt and the beginning of the
answer", section 3). Knows ids only.
"""

from __future__ import annotations

from collections.abc import Sequence

from openchameleon.document import Role
from openchameleon.vocab import Vocab

Turn = tuple[Role, Sequence[int]]
Tokens = tuple[list[int], list[bool]]
"""`(token_ids, loss_mask)`, equally long: `loss_mask[i]` says that predicting id i is trained."""


def wrap_document(token_ids: Sequence[int], vocab: Vocab) -> Tokens:
    """Every id but the first is learnt."""
    ids = [vocab.bos_id, *token_ids, vocab.eos_id]
    return ids, [False] + [True] * (len(ids) - 1)


def wrap_conversation(turns: Sequence[Turn], vocab: Vocab, answers_only: bool = True) -> Tokens:
    """The answers and the ids that close them are learnt; the user's turns too on request.

    ValueError unless the last turn is the assistant's: there is nothing to learn after it.
    """
    if not turns or turns[-1][0] != "assistant":
        raise ValueError("a conversation to learn from must end with the assistant's turn")
    ids, loss_mask = [vocab.bos_id], [False]
    for i, (role, turn) in enumerate(turns):
        ids += [*turn, vocab.eos_id if i == len(turns) - 1 else vocab.eot_id]
        loss_mask += [role == "assistant" or not answers_only] * (len(turn) + 1)
    return ids, loss_mask


def wrap_prompt(turns: Sequence[Turn], vocab: Vocab) -> list[int]:
    """The ids up to and with the `<eot>` that opens the assistant's turn.

    ValueError unless the last turn is the user's.
    """
    if not turns or turns[-1][0] != "user":
        raise ValueError("a conversation to answer must end with the user's turn")
    ids = [vocab.bos_id]
    for _, turn in turns:
        ids += [*turn, vocab.eot_id]
    return ids
