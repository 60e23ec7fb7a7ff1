"""Every setting of LLaRA beside those of train_sft.py, its default, and who says so.

The authors' own ones, where they are not the defaults of train_sft.py: `--lora-dropout 0.1`,
`--learning-rate 8e-4`, `--accumulation 32`, `--history 10`, `--candidates 20`.
"""

from dataclasses import dataclass

from hanorec.base.settings import check, option


@dataclass(frozen=True)
class LlaraConfig:
    """What is put into the prompt, and how what brings it there is trained."""

    table: str = option(
        help="folder of a SASRec row's vectors, whose item table is read: embeddings.safetensors, "
        "names.json",
    )
    projector_decay: float = option(
        1e-5,
        "authors' code: weight decay of the projector, there as a part of Adam's gradient, here "
        "apart from it",
    )

    def __post_init__(self) -> None:
        check(self, projector_decay=0)
