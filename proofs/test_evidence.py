"""The evidence behind kernel.toml is listed, and there are two kinds of it for each line."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from proofs import evidence

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@cache
def found() -> dict[str, dict[str, list[str]]]:
    return evidence.found()


def test_the_page_is_what_is_found() -> None:
    assert evidence.PAGE.read_text() == evidence.page(found()), "run python -m proofs.evidence"


def test_nothing_rests_on_one_kind_alone() -> None:
    thin = {name for name, classes in found().items() for said in classes.values() if len(said) < 2}
    assert not {name for name in thin if name.startswith("aten.")}  # Python's own are on numbers


@pytest.mark.parametrize("kind", evidence.COQ)
def test_the_lemma_of_a_class_stands_in_coq(kind: str) -> None:
    folder = Path(evidence.PAGE).parent / "coq"
    proofs = (folder / "Operations.v").read_text() + (folder / "Integrals.v").read_text()
    for name in evidence.COQ[kind].split(", "):
        assert f"Theorem {name} " in proofs or f"Lemma {name} " in proofs
