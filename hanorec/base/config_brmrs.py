"""Every setting of BR-MRS, its default, and who says so."""

from dataclasses import dataclass
from typing import Literal

from hanorec.base.errors import InputError
from hanorec.base.settings import TINY, check, option


@dataclass(frozen=True)
class BrmrsFiles:
    """What BR-MRS is trained on, where the run goes, and on what device."""

    group = "data and model"

    data: str = option(
        help="folder with NAME.inter, text_feat.npy and image_feat.npy, as the MMRec toolbox has "
        "them, or in the native layout"
    )
    out: str = option(
        help="folder of the run; one that holds an unfinished run of the same settings is gone on "
        "with"
    )
    model: str | None = option(
        None,
        "native layout only: the checkpoint whose embeddings of titles and images are the features",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "ours, of that checkpoint: bfloat16 on a GPU, float32 elsewhere"
    )
    max_pixels: int = option(
        224 * 224, "ours, low: pixels of an image after scaling down, for that checkpoint"
    )
    device: str = option("auto", "ours: cuda if there is one, else cpu")
    hold_out: int = option(
        0,
        "ours, native layout only: N, each user's last items of train.tsv, which are not learnt "
        "from, so that train_sft.py and train_dpo.py can be trained on what is retrieved before "
        "them",
    )

    def __post_init__(self) -> None:
        check(self, hold_out=0)


@dataclass(frozen=True)
class BrmrsConfig:
    """BR-MRS: the recommender, its objective, and its training.

    Document 003 leaves backbone and training open.
    """

    group = "method and training"

    # The recommender.
    dim: int = option(64, "MMRec convention: width d of a branch")
    layers: int = option(
        2, "MMRec convention: LightGCN layers on the user-item graph; 0 = no graph"
    )
    fusion: Literal["mlp", "concat", "sum"] = option(
        "mlp",
        "ours: the later manuscript leaves its fusion open; concat: s_f = s_t + s_v; sum: with "
        "cross terms",
    )
    user_embedding: Literal["per_modality", "shared"] = option(
        "per_modality", "later manuscript; shared (ours): one table for both branches"
    )
    item_embedding: Literal["per_branch", "none"] = option(
        "per_branch", "ours; none: items are their features alone"
    )
    item_graph: int = option(
        0, "ours: off; k (later manuscript): smooth items over their k most alike items"
    )
    user_graph: int = option(
        0, "ours: off; k (later manuscript): smooth users over their k most alike users"
    )
    graph_alpha: float = option(
        0.5,
        "ours: weight of shared interactions in these two graphs, the rest is likeness of features",
    )
    normalise: bool = option(
        True, "ours: centre each feature and scale each item's features to length 1"
    )

    # Its objective.
    lambda_h: float = option(1.0, "ours, weight of L_chns (BR-6); 0 = off")
    lambda_s: float = option(1.0, "ours, weight of L_syn (BR-6); 0 = off")
    bpr_weight: float = option(
        1.0, "document 003, text of 4.3; 0 = the total that it displays (BR-6)"
    )
    theta: float = option(
        0.1,
        "ours: margin of L_syn; document 003 leaves it open, the later manuscript wants it above 0 "
        "(BR-4)",
    )
    detach: bool = option(
        False,
        "document 003: gradients reach the unimodal margins of L_syn too; on (ours): they do not "
        "(BR-4)",
    )
    pool: int = option(4, "ours: n, items in the pool of negatives (BR-1)")
    routing: Literal["cross", "same", "random"] = option(
        "cross",
        "document 003: each modality gets the other's hard negative; same, random: controls",
    )
    hard_fused: bool = option(
        False, "control: the i- of BPR is the pool's hardest item by s_f, not a uniform one"
    )
    unimodal_bpr: float = option(0.0, "control: weight of BPR on each branch by itself")
    weight_decay: float = option(
        1e-4,
        "MMRec convention: weight of half the squared norm of the batch's embeddings (BR-6)",
    )

    # Its training.
    learning_rate: float = option(1e-3, "MMRec convention, Adam")
    batch: int = option(2048, "MMRec convention: training pairs in a step")
    epochs: int = option(
        1000, "MMRec convention: at most; early stopping mostly comes first"
    )
    patience: int = option(
        20,
        "MMRec convention: stop after so many epochs without a better Recall@20 on validation",
    )
    seed: int = option(2025, "ours")

    def __post_init__(self) -> None:
        check(
            self,
            dim=1,
            layers=0,
            item_graph=0,
            user_graph=0,
            graph_alpha=0,
            lambda_h=0,
            lambda_s=0,
            bpr_weight=0,
            theta=0,
            pool=1,
            unimodal_bpr=0,
            weight_decay=0,
            learning_rate=TINY,
            batch=1,
            epochs=1,
            patience=1,
            seed=0,
        )
        if self.graph_alpha > 1:
            raise InputError(f"--graph-alpha {self.graph_alpha}: expected at most 1")
        losses = self.bpr_weight, self.lambda_h, self.lambda_s, self.unimodal_bpr
        if not any(losses):
            raise InputError(
                "--bpr-weight, --lambda-h, --lambda-s and --unimodal-bpr are all 0, so there is "
                "nothing to learn; expected one above 0"
            )
