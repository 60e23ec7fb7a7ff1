"""The rows and sizes of the three experiments of `hanorec.studies.map`, all flags of train_dpo.py.

A cell is a row at one place of the map: at a strength of the noise (E1), with some labels wrong
(E2), at a beta0 and an epoch (E3).
"""

from dataclasses import dataclass
from typing import Literal

from hanorec.studies import stages

SEEDS = {"E1": 5, "E2": 3, "E3": 3}

CONTROL = "DPO"

# Rows about lambda have no noise and rows about noise no lambda. One pair a prompt.
NO_NODO = ["--ablation", "no_nodo"]
STANDARDISED = [*NO_NODO, "--hardness", "standardised"]
BETA_DPO = [*NO_NODO, "--control", "one", "--eta", "beta_dpo", "--kept", "near"]
RELATIVE = ["--ablation", "no_hars", "--noise", "relative", "--sigma"]
COMMON = ["--micro-batch", "16", "--lora-dropout", "0", "--rejected", "1"]

# ---- E1: is the noise kept in backward, or forgotten? ----

# The release's adapter, alpha / r = 4; 448 pairs, 2 epochs, 28 steps: all micro-batches are whole.
KEPT_OR_FORGOTTEN = [
    *COMMON, "--accumulation", "2", "--lora-rank", "8", "--lora-alpha", "32", "--epochs", "2",
    "--learning-rate", "2e-3", "--beta0", "0.1",
    "--users-from", "0.5", "--users-to", "0.666", "--targets-per-user", "1",
]

SIGMAS = (0.05, 0.1)

NOISY = {
    "literal": ["--ablation", "no_hars"],
    "forward": ["--ablation", "no_hars", "--noise-pass", "forward"],
    "forward, noisy R, η a micro-batch": [
        "--ablation", "full", "--hardness", "ratio", "--noise-pass", "forward",
        "--rewards", "noisy", "--eta-over", "micro",
    ],
}


def noise_cell(row: str, sigma: float) -> str:
    return f"{row}, σ {sigma:g}"


def noise_cells() -> dict[str, list[str]]:
    """Cell -> flags of its own; the control first."""
    cells = {CONTROL: ["--ablation", "dpo"]}
    for sigma in SIGMAS:
        for row, flags in NOISY.items():
            cells[noise_cell(row, sigma)] = [*flags, "--sigma", str(sigma)]
    return cells


# ---- E2: which weights bear labels that are wrong? ----

# 896 pairs, 1 epoch, 28 steps.
WRONG_LABELS = [
    *COMMON, "--accumulation", "2", "--lora-rank", "16", "--epochs", "1",
    "--learning-rate", "2e-3", "--beta0", "0.1",
    "--users-from", "0.5", "--users-to", "0.666", "--targets-per-user", "2",
]

RHOS = (0.25, 0.5)

SHARE = 0.3  # of the pairs, whose labels may be wrong


@dataclass(frozen=True)
class WrongLabels:
    """Of the hardest or easiest `SHARE` of the pairs a part rho, in 0 .. 1, is told wrong."""

    which: Literal["hardest", "easiest"]
    rho: float


WEIGHTS = {
    CONTROL: ["--ablation", "dpo"],
    "standardised": STANDARDISED,
    "reversed": [*STANDARDISED, "--control", "reversed"],
    "standardised, normalised": [*STANDARDISED, "--normalised", "true"],
    "ratio": [*NO_NODO, "--hardness", "ratio"],
    "β-DPO": BETA_DPO,
}

# Name -> which labels are wrong.
LABELS: dict[str, WrongLabels | None] = {"none wrong": None}
for _rho in RHOS:
    LABELS[f"hardest, ρ {_rho:g}"] = WrongLabels("hardest", _rho)
    LABELS[f"easiest, ρ {_rho:g}"] = WrongLabels("easiest", _rho)


def label_cell(row: str, labels: str) -> str:
    return f"{row}: {labels}"


# ---- E3: over-optimisation ----

# 32 pairs in steps of 16, so 2 an epoch, at a constant rate.
OVER = [
    *COMMON, "--accumulation", "1", "--lora-rank", "16", "--schedule", "constant",
    "--learning-rate", "1e-3",
    "--users-from", "0.5", "--users-to", "0.5119", "--targets-per-user", "1",
]

READS = (1, 4, 16, 64)  # epochs
BETA0 = 0.1  # the document's, where curves are compared
GRID = {"random": (BETA0, 0.5), "same": (BETA0,)}  # negatives -> the values of beta0

# All rows are tuned over the same grid of beta0 and READS, on validation.
TUNED = {
    CONTROL: ["--ablation", "dpo"],
    "literal": NO_NODO,
    "standardised": STANDARDISED,
    "normalised": [*STANDARDISED, "--normalised", "true"],
    "β-DPO": BETA_DPO,
    "noise 0.3": [*RELATIVE, "0.3"],
    "noise 1": [*RELATIVE, "1"],
}

# A control of "literal" with its mean for all, with random negatives and BETA0 alone.
MEAN = "λ mean"


def epoch_run(row: str, negatives: str, beta0: float) -> str:
    return f"{row}, {negatives}, β0 {beta0:g}"


def epoch_cell(run: str, epoch: int) -> str:
    return f"{run}, epoch {epoch}"


def epoch_runs() -> dict[str, tuple[str, list[str]]]:
    """Run -> the one whose reference it takes, and flags of its own."""
    runs = {}
    for negatives, beta0s in GRID.items():
        first = epoch_run(CONTROL, negatives, beta0s[0])
        for beta0 in beta0s:
            for row, flags in TUNED.items():
                run = epoch_run(row, negatives, beta0)
                own = [*flags, "--negatives", negatives, "--beta0", str(beta0)]
                runs[run] = "" if run == first else first, own
    first = epoch_run(CONTROL, "random", BETA0)
    mean = [*NO_NODO, "--control", "mean", "--negatives", "random", "--beta0", str(BETA0)]
    runs[epoch_run(MEAN, "random", BETA0)] = first, mean
    return runs


# ---- stage 1 and evaluation ----

SFT = stages.SFT  # 1,350 users, 3 targets each

# 300 users whom no stage saw
TEST = stages.TEST

# ---- what the command has to know of all three ----

STAGE = {"E1": "noise", "E2": "labels", "E3": "over"}  # whose flags an experiment takes

# Stage -> the flags of each row's own.
OWN = {
    "noise": list(noise_cells().values()),
    "labels": list(WEIGHTS.values()),
    "over": [["--epochs", str(READS[-1]), *flags] for _, flags in epoch_runs().values()],
}

# Experiment -> the first of its runs, which is plain DPO.
FIRST = {
    "E1": CONTROL,
    "E2": label_cell(CONTROL, "none wrong"),
    "E3": epoch_run(CONTROL, "random", BETA0),
}
