"""What was predicted of the three experiments of `hanorec.studies.map`, before any of them was run.

docs/map.md has the same sentences, with their reasons; a test compares. Figures of NDCG@3 and of
accuracy are in points.
"""

from collections.abc import Sequence

from hanorec.studies.map_claims import Order, Part, Prediction, higher, near
from hanorec.studies.map_rows import (
    BETA0,
    CONTROL,
    MEAN,
    TUNED,
    epoch_cell,
    epoch_run,
    label_cell,
    noise_cell,
    noise_cells,
)

# ---- E1 ----

_LITERAL, _FORWARD, _RELEASE = (
    noise_cell(row, 0.05)
    for row in ("literal", "forward", "forward, noisy R, η a micro-batch"))
_LITERAL_STRONG, _FORWARD_STRONG = (noise_cell(row, 0.1) for row in ("literal", "forward"))

E1 = [
    Prediction(
        "E1.1",
        "At σ 0.05 the first update that has forgotten the noise has a cosine of 0.5 to 0.85 with "
        "the clean one, above that of the literal one",
        [
            Part("cosine, start", {_FORWARD: 1.0}, 0.5, 0.85),
            higher("cosine, start", _FORWARD, _LITERAL),
        ]),
    Prediction(
        "E1.2",
        "At σ 0.05 the clean h that forward only reaches lies between the literal one's and DPO's",
        [higher("h", _FORWARD, _LITERAL), higher("h", CONTROL, _FORWARD)]),
    Prediction(
        "E1.3",
        "At σ 0.1 neither learns: clean h stays below a quarter of DPO's",
        [
            Part("h", {_LITERAL_STRONG: 1.0, CONTROL: -0.25}, high=0.0),
            Part("h", {_FORWARD_STRONG: 1.0, CONTROL: -0.25}, high=0.0),
        ]),
    Prediction(
        "E1.4",
        "Over all cells clean h orders with the first update's cosine, Spearman above 0.8",
        [Order(("h", "cosine, start"), list(noise_cells()), 0.8)]),
    Prediction(
        "E1.5",
        "At σ 0.05 noisy rewards and η a micro-batch change NDCG@3 of forward only by less than 1 "
        "point",
        [near("NDCG@3", _RELEASE, _FORWARD, 1.0)]),
]

# ---- E2 ----


def _labels(labels: str) -> dict[str, str]:
    """Row -> its cell with these labels."""
    rows = (CONTROL, "standardised", "reversed", "standardised, normalised", "ratio", "β-DPO")
    return {row: label_cell(row, labels) for row in rows}


_right, _quarter, _half = map(_labels, ("none wrong", "hardest, ρ 0.25", "hardest, ρ 0.5"))
_easy = _labels("easiest, ρ 0.5")

E2 = [
    Prediction(
        "E2.1", "With right labels standardised is below uniform weights in accuracy",
        [higher("accuracy", _right[CONTROL], _right["standardised"])]),
    Prediction(
        "E2.2", "With ρ 0.25 of the hardest wrong, standardised is within 0.5 points of uniform",
        [near("accuracy", _quarter["standardised"], _quarter[CONTROL], 0.5)]),
    Prediction(
        "E2.3",
        "With ρ 0.5 of the hardest wrong, standardised is above uniform and reversed below it",
        [
            higher("accuracy", _half["standardised"], _half[CONTROL]),
            higher("accuracy", _half[CONTROL], _half["reversed"]),
        ]),
    Prediction(
        "E2.4", "With ρ 0.5 of the easiest wrong, the two change places",
        [
            higher("accuracy", _easy["reversed"], _easy[CONTROL]),
            higher("accuracy", _easy[CONTROL], _easy["standardised"]),
        ]),
    Prediction(
        "E2.5", "Ratio is within 0.5 points of uniform, whatever the labels",
        [
            near("accuracy", cells["ratio"], cells[CONTROL], 0.5)
            for cells in (_right, _half, _easy)
        ]),
    Prediction(
        "E2.6",
        "Normalised, standardised weighs nothing at h = 0, so with ρ 0.5 of the hardest wrong it "
        "is below standardised as it is",
        [higher("accuracy", _half["standardised"], _half["standardised, normalised"])]),
    Prediction(
        "E2.7", "With ρ 0.5 of the hardest wrong, standardised is above β-DPO, which does not know "
        "which pairs are hard",
        [higher("accuracy", _half["standardised"], _half["β-DPO"])]),
    Prediction(
        "E2.8", "With ρ 0.5 of the hardest wrong, what standardised gains shows in NDCG@3, too",
        [higher("NDCG@3", _half["standardised"], _half[CONTROL])]),
]

# ---- E3 ----

MIDDLE = "best middle epoch"  # of the reads but the first and the last, by mean NDCG@3


def tuned_cell(row: str, negatives: str) -> str:
    """A row at its own beta0 and epoch, on the test split."""
    return f"{row}, {negatives}, tuned"


def exchanged_cell(row: str, negatives: str) -> str:
    """The same where half of the posters are exchanged."""
    return f"{tuned_cell(row, negatives)}, posters exchanged"


def of_epochs(reads: Sequence[int]) -> list[Prediction]:
    """E3, read after these epochs, ascending."""
    first, last = reads[0], reads[-1]
    run = {row: epoch_run(row, "random", BETA0) for row in (*TUNED, MEAN)}
    others = [row for row in TUNED if row != CONTROL]

    def tuned(name: str, text: str, cell: str, negatives: str, within: float) -> Prediction:
        of_row = {"tuned": tuned_cell, "exchanged": exchanged_cell}[cell]
        control = of_row(CONTROL, negatives)
        parts = [near("NDCG@3", of_row(row, negatives), control, within) for row in others]
        return Prediction(name, text, parts)

    return [
        Prediction(
            "E3.1", "After the first epoch all rows are within 1 point of DPO",
            [
                near("NDCG@3", epoch_cell(run[row], first), epoch_cell(run[CONTROL], first), 1.0)
                for row in others
            ]),
        Prediction(
            "E3.2", "DPO is best at a middle epoch, and falls by the last",
            [
                higher("NDCG@3", f"{run[CONTROL]}, {MIDDLE}", epoch_cell(run[CONTROL], end))
                for end in (first, last)
            ]),
        Prediction(
            "E3.3", "The literal λ is within 0.5 points of its own mean for all, at every epoch",
            [
                near("NDCG@3", epoch_cell(run["literal"], read), epoch_cell(run[MEAN], read), 0.5)
                for read in reads
            ]),
        Prediction(
            "E3.4", "Relative noise delays the fall: after the last epoch 1 is above DPO",
            [higher("NDCG@3", epoch_cell(run["noise 1"], last), epoch_cell(run[CONTROL], last))]),
        tuned(
            "E3.5", "Each row tuned and stopped on validation is within 0.5 points of DPO on test",
            "tuned", "random", 0.5),
        tuned(
            "E3.6", "So it is with `same` negatives, within 1 point", "tuned", "same", 1.0),
        tuned(
            "E3.7", "So it is where half of the posters are exchanged, within 1 point",
            "exchanged", "random", 1.0),
    ]
