r"""SPRec: DPO against what the policy itself would have answered, round by round (SP-1, SP-2).

`plan` lists the stages of all rounds, of which picking.py is the first one's command. Source: SPRec
(arXiv 2412.09243; RegionCh/SPRec).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hanorec.base.errors import InputError, shown
from hanorec.datasets.interactions import Example

# SPRec's script: an epoch at 2e-5, 16 rows a step in SFT, 8 pairs in DPO (its beta is 0.1, too).
ROUND = ["--epochs", "1", "--learning-rate", "2e-5", "--micro-batch", "4"]
SFT = ["--accumulation", "4"]
DPO = ["--accumulation", "2", "--ablation", "dpo"]


def self_play(scores: np.ndarray, target: int, noise: np.ndarray | float = 0.0) -> int:
    r"""The place of the wrong candidate that the policy prefers; of equal ones the first.

    Args:
        scores: EV-1 of C candidates under pi_{t-1}, (C,). target: the place of the right one.
        noise: standard Gumbel noise, (C,), makes the pick a draw from the softmax of the wrong
            candidates' scores.
    """
    wrong = np.arange(len(scores)) != target  # (C,)
    # SP-1: y_l = \arg\max_{c \ne w} \log\pi_{t-1}(y_c|x)
    return int(np.where(wrong, scores + noise, -np.inf).argmax())


def pick_items(
    examples: Sequence[Example], scores: np.ndarray, pick: str, seed: Sequence[int]
) -> list[int]:
    """The catalogue row that is rejected in each of E examples.

    Args:
        scores: (E, C) of their candidates. pick: "best", or "sample", whose draw depends on the
            seed and on the example's own prompt.
    Raises:
        InputError: a score is not finite.
    """
    picks = []
    for example, own in zip(examples, scores, strict=True):
        if not np.isfinite(own).all():
            raise InputError(
                f"user {example.user!r}: the candidates' scores are {shown(own.tolist())}, "
                "expected finite numbers; look at the weights of --model and --sft"
            )
        rng = np.random.default_rng([*seed, *example.candidates, *example.history])
        noise = rng.gumbel(size=len(own)) if pick == "sample" else 0.0
        target = example.candidates.index(example.target)
        picks.append(example.candidates[self_play(own, target, noise)])
    return picks


class Stage(NamedTuple):
    """One command: its name, its flags but for `--out`, that folder, and the file in it that is
    written last."""

    name: Literal["picking", "train_sft", "train_dpo", "export"]
    flags: list[str]
    out: Path
    last: str


def plan(
    here: Path,
    sft: str,
    model: str,
    training: Sequence[str],
    rounds: int = 5,
    pick: str = "best",
    users_seed: int = 2025,
) -> tuple[list[Stage], str]:
    r"""The stages of all rounds in order, and the folder of the last policy: `sft` without rounds.

    Each round has a fresh sample of the users, by `--users-seed`; its size is `--users-to` of
    `training`. At its end `hanorec.export` makes one adapter of the three that it has stacked.

    Args:
        here: where the stages' folders will lie. sft: that of the policy pi_0.
        training: flags of all stages that train or score, beside the model; they win over SPRec's.
        pick: "best" or "sample"; or "random", the control: the same steps, random negatives.
    """
    stages, policy, previous = [], sft, []
    for t in range(1, rounds + 1):
        names = ("picks", "sft", "dpo", "policy")
        picks, tuned, played, joined = (here / f"{t}-{name}" for name in names)
        first = ["--model", model, *ROUND]
        own = [*training, "--users-seed", str(users_seed + t)]
        start, negatives = [*own, "--sft", policy], "random"
        if pick != "random":
            scoring = [*first, *start, "--pick", pick, *previous]
            stages.append(Stage("picking", scoring, picks, "picks.json"))
            negatives = str(picks / "picks.json")
            previous = ["--previous", negatives]
        tuning = [*first, *SFT, *start]
        playing = [*first, *DPO, *own, "--sft", str(tuned), "--negatives", negatives]
        joining = ["--model", model, "--adapter", str(played)]
        # SP-2: \pi_t = DPO(y_w, y_l; \pi_{ref}), \pi_{ref} = SFT(y_w; \pi_{t-1})
        stages += [
            Stage("train_sft", tuning, tuned, "adapter_config.json"),
            Stage("train_dpo", playing, played, "adapter_config.json"),
            Stage("export", joining, joined, "run.json"),
        ]
        policy = str(joined)
    return stages, policy
