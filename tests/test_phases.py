"""A mixture that changes on its way repeats no row, and stays a pure function of the step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openchameleon.data.loader import RowLoader
from openchameleon.data.pack import save_manifest, write_rows
from openchameleon.data.phases import Phase, PhasedLoader
from openchameleon.errors import UserError
from openchameleon.vocab import Vocab

VOCAB = Vocab.compact(n_codes=8, codes_per_item=4, n_text=256)
SIZES = {"text": 23, "pairs": 11, "better": 7}
FIRST = {"text": 3.0, "pairs": 1.0}
SECOND = {"text": 1.5, "pairs": 0.5, "better": 2.0}


def make_rows(folder: Path, n: int, row_len: int = 4) -> Path:
    folder.mkdir(parents=True)
    rows = [[([0, VOCAB.text_start + i, 2], [0, 1, 1])] for i in range(n)]
    save_manifest(folder, write_rows(rows, folder, row_len, VOCAB))
    return folder


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return {name: make_rows(folder / name, n) for name, n in SIZES.items()}


def two_phases(streams: dict[str, Path], switch: int = 10, batch: int = 12) -> PhasedLoader:
    return PhasedLoader(streams, [Phase(0, FIRST), Phase(switch, SECOND)], batch, seed=5)


@given(switch=st.integers(1, 30), batch=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_no_row_returns_within_a_streams_epoch_over_the_switch(
    streams: dict[str, Path], switch: int, batch: int, seed: int
) -> None:
    loader = PhasedLoader(streams, [Phase(0, FIRST), Phase(switch, SECOND)], batch, seed)
    seen: dict[str, list[int]] = {name: [] for name in streams}
    for step in range(2 * switch + 5):
        for name, row in loader.sample_ids(step):
            seen[name].append(row)
    for name, rows in seen.items():
        for start in range(0, len(rows), SIZES[name]):
            epoch = rows[start : start + SIZES[name]]
            assert len(set(epoch)) == len(epoch)


def test_the_parts_of_all_ranks_are_the_batch_of_one_process(streams: dict[str, Path]) -> None:
    loader = two_phases(streams)
    for step in (0, 9, 10, 11, 500):
        whole = loader.batch(step).inputs.tolist()
        for world in (2, 3, 4):
            ranks = [loader.batch(step, rank, world).inputs.tolist() for rank in range(world)]
            assert [row for rank in ranks for row in rank] == whole


def test_a_run_resumed_in_the_second_phase_sees_the_same_samples(streams: dict[str, Path]) -> None:
    whole = [two_phases(streams).sample_ids(step) for step in range(25)]
    resumed = two_phases(streams)
    assert [resumed.sample_ids(step) for step in range(17, 25)] == whole[17:]


def test_each_phase_has_the_shares_that_it_asks_for(streams: dict[str, Path]) -> None:
    # 256 batches of 12 are three cycles of 1024, in which shares are exact
    loader = two_phases(streams, switch=256)
    for begin, weights in ((0, FIRST), (256, SECOND)):
        steps = range(begin, begin + 256)
        counts = Counter(name for step in steps for name, _ in loader.sample_ids(step))
        total = sum(weights.values())
        assert counts == {name: round(w / total * 3072) for name, w in weights.items()}


def test_rows_used_counts_what_was_read_in_all_phases(streams: dict[str, Path]) -> None:
    loader = PhasedLoader(
        streams, [Phase(0, FIRST), Phase(3, {"better": 1.0}), Phase(5, SECOND)], 4, seed=0
    )
    counts = Counter(dict.fromkeys(streams, 0))
    for step in range(9):
        assert loader.rows_used(step) == counts
        counts.update(name for name, _ in loader.sample_ids(step))


def test_one_phase_is_a_row_loader(streams: dict[str, Path]) -> None:
    phased = PhasedLoader(streams, [Phase(0, FIRST)], 6, seed=2)
    plain = RowLoader({name: (streams[name], weight) for name, weight in FIRST.items()}, 6, seed=2)
    assert [phased.sample_ids(s) for s in range(9)] == [plain.sample_ids(s) for s in range(9)]


def test_a_changed_phase_is_another_order(streams: dict[str, Path]) -> None:
    described = two_phases(streams).describe()
    assert two_phases(streams).describe() == described
    assert two_phases(streams, switch=11).describe() != described


def test_phases_out_of_order_and_streams_unlike_are_refused(
    streams: dict[str, Path], tmp_path: Path
) -> None:
    for begins in ((1,), (0, 5, 5), (0, 5, 3), ()):
        with pytest.raises(ValueError, match="begin at"):
            PhasedLoader(streams, [Phase(begin, FIRST) for begin in begins], 4, seed=0)
    longer = {**streams, "better": make_rows(tmp_path / "longer", 3, row_len=5)}
    with pytest.raises(UserError, match=r"'better' was prepared with row_len 5, 'text' with 4"):
        two_phases(longer)
