"""The readings of the document that change the step of train_dpo.py itself, and who reads it so.

Their code: hanorec/run/steps.py. Readings of one quantity are settings of `DpoConfig`.
"""

from dataclasses import dataclass, fields
from typing import Literal

from hanorec.base.config import DataConfig, DpoConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.settings import check, option


@dataclass(frozen=True)
class StepConfig:
    """How a step draws its noise, takes its rewards, and what else it adds to the loss."""

    group = "method, read otherwise"

    noise_pass: Literal["both", "forward"] = option(
        "both",
        "document: the gradient is that of the noisy loss; forward (authors' release, inferred): "
        "backward computes the layers again without noise (HN-9)",
    )
    noise_draw: Literal["step", "forward", "answer"] = option(
        "step",
        "ours, the document is silent: one draw a step; forward (authors' release): a draw for "
        "each micro-batch; answer (ours): for each answer, chosen and rejected apart (HN-9)",
    )
    noise_draws: int = option(
        1,
        "ours: so many draws, of whose losses the mean is taken; as many forwards (HN-11)",
    )
    rewards: Literal["clean", "noisy"] = option(
        "clean",
        "document; noisy (authors' release): from the forward that the loss is taken from (HN-6)",
    )
    eta_over: Literal["step", "micro"] = option(
        "step",
        "ours: eta of all pairs of a step; micro (authors' release): of each micro-batch (HN-7)",
    )
    kept: Literal["all", "inner", "near"] = option(
        "all",
        "document: pairs in the loss; inner (document, read otherwise): extreme pairs are left out "
        "of it, too; near: the draw of beta-DPO, another method, with --eta beta_dpo (HN-11)",
    )
    alignment_coef: float = option(
        0.0,
        "ours: weight of the KL of likeness by image from likeness by text, between the items of a "
        "micro-batch (HN-12)",
    )
    continue_sft: bool = option(
        False,
        "ours: train the adapter of --sft itself, under noise, instead of a fresh one on top of it",
    )

    def __post_init__(self) -> None:
        check(self, noise_draws=1, alignment_coef=0)
        if self.rewards == "noisy" and self.eta_over == "step":
            raise InputError(
                "--rewards noisy with --eta-over step: expected --eta-over micro, since a "
                "micro-batch knows the noisy rewards of no other one; add it"
            )

    @property
    def changes_the_step(self) -> bool:
        """Whether any of these is not the default; `--continue-sft` changes no step."""
        other = [field for field in fields(self) if field.name != "continue_sft"]
        return any(getattr(self, field.name) != field.default for field in other)

    def check_with(self, data: DataConfig, train: TrainConfig, dpo: DpoConfig) -> None:
        """InputError where a reading does not go with the other settings."""
        if self.kept == "near" and not (dpo.hars and dpo.eta == "beta_dpo"):
            raise InputError(
                f"--kept near with --eta {dpo.eta} and --ablation {dpo.ablation}: expected --eta "
                "beta_dpo and an ablation with eta, which keep the running mean; add them"
            )
        if self.noise_draw == "answer" and self.noise_pass == "both" and train.checkpointing:
            raise InputError(
                "--noise-draw answer with --checkpointing: expected one of the two, since what "
                "backward computes again would see the noise of the last answer alone"
            )
        if self.noise_pass == "forward" and train.compile:
            raise InputError(
                "--noise-pass forward with --compile true: expected one of the two, since a graph "
                "without noise keeps other tensors for backward than one with it; leave one out"
            )
        if self.alignment_coef > 0 and data.images == "none":
            raise InputError(
                f"--alignment-coef {self.alignment_coef} with --images none: expected images to "
                "align with titles; leave one of the two out"
            )
        if self.alignment_coef > 0 and train.shard:
            raise InputError(
                f"--alignment-coef {self.alignment_coef} with --shard: expected one of the two, "
                "since processes with other items need another number of forwards, which a divided "
                "base must do together"
            )
        if self.continue_sft and train.sft is None:
            raise InputError("--continue-sft without --sft: expected the adapter to go on with")
        if self.continue_sft and dpo.with_kl:
            raise InputError(
                "--continue-sft with --log-kl or --kl-coef: expected neither, since with its "
                "adapter off the policy is not the reference, the SFT policy"
            )
