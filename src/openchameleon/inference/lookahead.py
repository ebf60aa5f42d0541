"""Codes guessed ahead and checked together: fewer model calls for the very same codes.

A code is a function of what stands before it and of its own random number (sampling.py inverts a
distribution at one uniform number). So a guess of the next codes can be read in one call, all of
them drawn anew, each at the number that is its own: where a guess equals what was drawn, the code
after it was drawn after the right past. What was drawn beyond the first wrong guess is the next
guess. This is Jacobi's iteration for the whole picture (as in speculative Jacobi decoding, Teng et
al., arXiv 2410.01699, who accept by chance, where here the random numbers are the same); in the end
every code is the one that would have been drawn alone. Plain lists, no tensors.
"""

from __future__ import annotations


def n_right(guess: list[int], drawn: list[int]) -> int:
    """How many guesses at the front equal what was drawn for their places.

    `drawn` has one more: the code after the last guess.
    """
    n = 0
    while n < len(guess) and guess[n] == drawn[n]:
        n += 1
    return n


def next_guess(drawn: list[int], n_right: int, n_left: int, most: int) -> list[int]:
    """A guess of the codes that follow the first n_right + 1 drawn ones.

    n_left: codes that are still to come. most: how long a guess may be; it is long where the last
    one was good. What nothing is known of repeats the last code: pictures have areas.
    """
    n = min(most, n_left - 1, 2 * n_right + 1)
    rest = drawn[n_right + 1 :]
    return (rest + drawn[-1:] * n)[: max(0, n)]
