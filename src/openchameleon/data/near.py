"""Texts that are nearly equal, by datatrove's MinHash; imported only where it is wanted."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np

from openchameleon.errors import UserError

try:
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.logging import logger
    from datatrove.utils.word_tokenizers import WordTokenizer
except ImportError as error:
    raise UserError(
        "To find near duplicates, install datatrove: pip install 'openchameleon[data]'."
    ) from error


class _Words(WordTokenizer):
    """Words between spaces: the other splitters of datatrove fetch models."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [word.span() for word in re.finditer(r"\S+", text)]


CONFIG = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
"""Shingles of 5 words, 14 buckets of 8 hashes: texts of .8 similarity are found with .92."""


def write_signatures(folder: Path, i: int, n_shards: int, texts: Iterable[str]) -> None:
    """Writes those of shard i; a text of fewer than five words has none."""
    logger.disable("datatrove")  # of each file that it writes; its errors are exceptions
    step = MinhashDedupSignature(str(folder / "signatures"), CONFIG, language=_Words())
    documents = (Document(text=text, id=str(n)) for n, text in enumerate(texts))
    step.run(documents, i, n_shards)


def clusters(folder: Path, n_shards: int) -> Iterator[list[tuple[int, int]]]:
    """The (shard, number of the record) of texts that are nearly equal to one another."""
    logger.disable("datatrove")  # of each file that it writes; its errors are exceptions
    pairs, found = str(folder / "pairs"), folder / "clusters"
    buckets = MinhashDedupBuckets(str(folder / "signatures"), pairs, config=CONFIG)
    for bucket in range(CONFIG.num_buckets):
        buckets.run(None, bucket, CONFIG.num_buckets)
    with redirect_stderr(io.StringIO()):  # it draws a bar, however short it takes
        MinhashDedupCluster(pairs, str(found), CONFIG, save_cluster_id=True).run()
    members = defaultdict(list)
    for i in range(n_shards):
        file = found / f"{i:06d}.clusters"
        if file.exists():
            for number, cluster in np.fromfile(file, np.uint32).reshape(-1, 2).tolist():
                members[cluster].append((i, number))
    yield from members.values()
