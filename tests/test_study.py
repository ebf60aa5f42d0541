"""The study of stability can be repeated from what is committed."""

from __future__ import annotations

from pathlib import Path

import pytest

from openchameleon.config import override, to_dict

STUDIES = Path(__file__).resolve().parent.parent / "studies"


def test_each_variant_is_a_config_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDIES)
    import stability

    setups = [override(stability.BASE, switches) for switches in stability.VARIANTS.values()]
    assert len({str(to_dict(setup)) for setup in setups}) == len(stability.VARIANTS)
    assert setups[0] == stability.BASE
    assert len(set(stability.GRID)) == len(stability.GRID)


def test_the_page_has_every_run_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDIES)
    import plot_stability

    runs = plot_stability.kept_runs()
    page = (STUDIES.parent / "docs" / "stability.md").read_text(encoding="utf-8")
    assert plot_stability.table(runs) in page
    assert plot_stability.sensitivities(runs) in page
