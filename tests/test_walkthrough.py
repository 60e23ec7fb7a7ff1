"""docs/walkthrough.md runs, and shows what it says."""

import doctest
import re
from pathlib import Path

import oracle
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"
# H, X
ITEMS = (
    [[1, 0], [5, 0], [0.6, 0.8], [0, 1], [-0.6, 0.8], [-0.8, 0.6]],
    [[1, 0], [7, 24], [0.6, 0.8], [0, 1], [-0.6, 0.8], [-0.8, 0.6]],
)


@pytest.mark.equation(
    "HN-2", "HN-3", "HN-4", "HN-5", "DPO-1", "HN-6", "HN-7", "HN-8", "DPO-2", "HN-11", "HN-9",
    "HN-10",
)
def test_the_walkthrough_runs():
    failed, examples = doctest.testfile(str(PAGE), module_relative=False)
    assert failed == 0 and examples > 30


def test_the_table_of_similarities():
    """Its 36 numbers are the inner products of the page's vectors, by the oracle."""
    e = oracle.fuse(*ITEMS)
    rows = re.findall(r"^\| (\d) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [row for row, _ in rows] == list("012345")
    for i, (_, cells) in enumerate(rows):
        found = [float(cell) for cell in cells.split(" | ")]
        assert found == pytest.approx([oracle.dot(e[i], e[j]) for j in range(6)], abs=1e-12)


def test_the_chain_by_the_oracle():
    """Both pairs from items to the loss of the hard one, in plain loops."""
    e = oracle.fuse(*ITEMS)
    scores, index = oracle.topk_neighbors(e, 2)
    lam = oracle.hardness([oracle.cluster_gap(e, scores, index, 1, l) for l in (2, 4)])
    eta = oracle.responsiveness([0.4, 0.8, 1.2, 4])
    beta = oracle.pair_beta(lam, eta)
    assert [round(float(x), 4) for x in (*lam, eta, *beta)] == [
        0.5157, 0.5858, 0.8910, 0.0459, 0.0522
    ]
    assert [
        round(float(oracle.dpo_loss([4], b, n)[0]), 3)
        for b, n in ((0.1, None), (beta[:1], None), (beta[:1], 0.1))
    ] == [0.513, 0.605, 1.318]
