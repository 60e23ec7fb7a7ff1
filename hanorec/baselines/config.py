"""Every setting of the recommenders whose scores are inner products, its default, who says so.

Their documents, and codes that are held up for them: gusye1234/LightGCN-PyTorch, kang205/SASRec,
FeiSun/BERT4Rec, graytowne/caser_pytorch, and RecBole 1.2.1, from which what they share is taken.
"""

from dataclasses import dataclass
from typing import Literal

from hanorec.base.errors import InputError
from hanorec.base.settings import TINY, check, option


@dataclass(frozen=True)
class VectorFiles:
    """What is learnt from, where the run goes, and on what device."""

    data: str = option(help="folder in the native layout")
    out: str = option(
        help="folder of the run; one that holds an unfinished run of the same settings is gone on "
        "with"
    )
    device: str = option("auto", "ours: cuda if there is one, else cpu")
    hold_out: int = option(
        0,
        "ours: N, each user's last items of train.tsv, which are not learnt from, so that "
        "train_sft.py and train_dpo.py can be trained on what is retrieved before them",
    )

    def __post_init__(self) -> None:
        check(self, hold_out=0)


@dataclass(frozen=True)
class MatrixConfig:
    """LightGCN, and BPR-MF, which is LightGCN without a layer."""

    layers: int = option(3, "LightGCN's authors: K; RecBole 2; 0 = BPR-MF")
    dim: int = option(64, "LightGCN's authors, RecBole: d")
    weight_decay: float = option(
        1e-4,
        "LightGCN's authors: lambda of LG-2; RecBole's is that of a norm without the square",
    )
    learning_rate: float = option(1e-3, "LightGCN's authors, Adam")
    batch: int = option(2048, "LightGCN's authors: training pairs in a step")
    epochs: int = option(1000, "LightGCN's authors: at most; early stopping mostly comes first")
    patience: int = option(
        50,
        "ours: stop after so many validations without a better NDCG@10; RecBole's 10 ends runs of "
        "one setting anywhere between epoch 16 and 133",
    )
    every: int = option(1, "RecBole: epochs between two validations")
    seed: int = option(2025, "ours")

    def __post_init__(self) -> None:
        check(self, layers=0, dim=1, weight_decay=0, learning_rate=TINY, batch=1)
        check(self, epochs=1, patience=1, every=1, seed=0)


@dataclass(frozen=True)
class SequenceConfig:
    """SASRec, GRU4Rec, Caser, BERT4Rec, CL4SRec: what reads a user's items in their order."""

    method: Literal["sasrec", "gru4rec", "caser", "bert4rec", "cl4srec"] = option(
        "sasrec", "which of them"
    )
    length: int = option(
        50,
        "SASRec's authors: L, the last items that count; on MovieLens-1M 200; Caser's authors 5; "
        "BERT4Rec's authors count its mask token, too",
    )
    history: int | None = option(
        None, "ours: from how many last items a state is made; none = as many as are trained on"
    )
    dim: int = option(64, "RecBole: d; SASRec's and Caser's authors 50")
    dropout: float = option(
        0.5, "SASRec's authors, RecBole; on MovieLens-1M 0.2; GRU4Rec 0.3 and Caser 0.4 in RecBole"
    )

    # Attention: sasrec, cl4srec, bert4rec.
    blocks: int = option(2, "SASRec's authors, RecBole: blocks of attention")
    heads: int = option(2, "RecBole: heads of each; SASRec's authors 1")
    norm: Literal["pre", "post"] = option(
        "pre", "SASRec's paper; post: RecBole's block; bert4rec is post in any case"
    )
    loss: Literal["ce", "bce"] = option(
        "ce",
        "RecBole: cross-entropy over all items (SAS-3), of sasrec and cl4srec; bce: SASRec's "
        "authors, against one negative (SAS-2)",
    )
    mask: float = option(0.2, "BERT4Rec's authors: share of a sequence that is hidden")

    # CL4SRec.
    contrast: float = option(0.1, "RecBole-DA: lambda of CL-5; 0 = sasrec")
    temperature: float = option(1.0, "CL4SRec's paper has none: tau of CL-4")
    crop: float = option(0.6, "RecBole-DA: eta of CL-1")
    hide: float = option(0.3, "RecBole-DA: gamma of CL-2")
    reorder: float = option(0.6, "RecBole-DA: beta of CL-3")

    # GRU4Rec and Caser.
    hidden: int = option(128, "RecBole: width of GRU4Rec's state")
    horizontal: int = option(16, "Caser's authors: filters of each height; RecBole 8")
    vertical: int = option(4, "Caser's authors: filters over all steps")

    # Training.
    learning_rate: float = option(1e-3, "SASRec's authors, Adam; BERT4Rec's 1e-4")
    weight_decay: float = option(0.0, "SASRec's authors: weight of the squared norm; Caser's 1e-6")
    batch: int = option(128, "SASRec's authors: users in a step, each with all its positions")
    epochs: int = option(1000, "pmixer/SASRec.pytorch: at most; SASRec's authors 201")
    patience: int = option(
        50, "ours, as for the matrix models: validations without a better NDCG@10"
    )
    every: int = option(1, "RecBole: epochs between two validations")
    seed: int = option(2025, "ours")

    def __post_init__(self) -> None:
        check(self, length=1, history=1, dim=1, dropout=0, blocks=0, heads=1, mask=TINY)
        check(self, contrast=0, temperature=TINY, crop=TINY, hide=0, reorder=0)
        check(self, hidden=1, horizontal=1, vertical=1)
        check(self, learning_rate=TINY, weight_decay=0, batch=1)
        check(self, epochs=1, patience=1, every=1, seed=0)
        for name, most in {"dropout": 0.99, "mask": 1, "crop": 1, "hide": 1, "reorder": 1}.items():
            if getattr(self, name) > most:
                raise InputError(f"--{name} {getattr(self, name)}: expected at most {most}")
