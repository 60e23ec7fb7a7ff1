"""Every setting of the commands, its default, and who says so: the document, the authors' release, or ours.

Flags and JSON keys are the field names: `train_sft.py --model M --data D --out O`, or `train_sft.py run.json`, or both, in which
case the flags win.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from hanorec.errors import InputError
from hanorec.files import read_json


def option(default: Any = MISSING, help: str = "", **argparse_options: Any) -> Any:
    """A dataclass field with its help text; without a default it is required."""
    metadata = {"help": help, **argparse_options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


TINY, HUGE = 1e-9, 1e12  # least value of what must be above 0; what no setting reaches


def check(config: Any, **least: float) -> None:
    """InputError where a setting is below its least value, or absurdly large."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and not bound <= value < HUGE:  # NaN too
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {bound}, and less than {HUGE:.0e}")


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and how it is loaded."""

    model: str = option(help="folder or hub name of a Qwen2-VL, Qwen2.5-VL or LLaVA-NeXT checkpoint")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "ours: bfloat16 on a GPU, float32 elsewhere")
    device: str = option("auto", "ours: cuda if there is one, else cpu")
    max_pixels: int = option(224 * 224, "ours, low: pixels of an image after scaling down; 784 pixels are one Qwen token")


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how a prompt is built from it."""

    data: str = option(help="folder in the native layout; `python -m hanorec.datasets.<source> RAW OUT` writes one")
    task: Literal["ranking", "binary"] = option("ranking", "document: rank the candidates; binary (authors' release): answer Yes or No on one item")
    history: int = option(5, "authors' release: how many past items the prompt shows")
    candidates: int = option(10, "document: items to choose from, the chosen one and 9 negatives")
    candidate_images: Literal["on", "off"] = option("on", "document: images of the candidates; off spares their tokens")
    plain: bool = option(False, "ours: the slow path that the fast one is tested against: a forward an answer, the reference at every step, nothing kept")
    neighbors: int = option(50, "ours: hard negatives are drawn from so many nearest items of the positive")
    users_from: float = option(0.0, "ours: use the users from this fraction of a permutation of those in train.tsv ...")
    users_to: float = option(1.0, "ours: ... up to this one, so that stages can have users of their own")
    users_seed: int = option(2025, "ours: seed of that permutation, apart from --seed so that all runs mean the same people")
    features: str | None = option(None, "ours: folder of the image features, a file for each base and set of images; none = the data folder")

    def __post_init__(self) -> None:
        check(self, history=1, candidates=2, neighbors=1, users_seed=0)


@dataclass(frozen=True)
class TrainConfig:
    """What both training stages share."""

    out: str = option(help="folder for the adapter, log.jsonl and run.json; must be new or empty")
    sft: str | None = option(None, "adapter of stage 1, frozen below the new one; in stage 2 it is the reference, else the base model is")
    targets_per_user: int = option(3, "authors' release: the last 3 items of a training sequence are targets; 0 = all but the first")
    draw: Literal["random", "hard"] = option("random", "document: random negatives; hard (ours): from the positive's neighbourhood")
    lora_rank: int = option(8, "document")
    lora_alpha: float = option(32.0, "authors' release")
    lora_dropout: float = option(0.05, "authors' release")
    learning_rate: float = option(1e-4, "document; cosine to 0")
    epochs: int = option(5, "authors' release")
    micro_batch: int = option(4, "authors' release: rows in one forward")
    accumulation: int = option(8, "document: micro-batches in one optimizer step, in all: torchrun's processes divide its rows among them")
    clip: float = option(1.0, "authors' release: largest norm of the gradient")
    seed: int = option(2025, "authors' release")
    save_every: int = option(50, "ours: optimizer steps between checkpoints; a run that was killed goes on from the last one when started again")
    checkpointing: bool = option(False, "ours: recompute activations in backward, to spare memory")
    shard: bool = option(False, "ours: under torchrun, each process keeps a part of the base model's layers alone, for bases that do not fit")

    def __post_init__(self) -> None:
        check(self, targets_per_user=0, lora_rank=1, lora_alpha=TINY, lora_dropout=0, learning_rate=TINY, epochs=1, micro_batch=1,
              accumulation=1, save_every=1, clip=TINY, seed=0)
        if self.lora_dropout >= 1:
            raise InputError(f"--lora-dropout {self.lora_dropout}: expected less than 1")


PRESETS = {"microlens": 0.05, "netflix": 0.1, "movielens": 0.1}  # sigma_n: the document says 0.05 to 0.1


@dataclass(frozen=True)
class DpoConfig:
    """HaRS, NoDO and the preference loss."""

    ablation: Literal["full", "no_hars", "no_nodo", "no_sam", "dpo"] = option("full", "document, ablation table; dpo = w/o ALL")
    negatives: Literal["random", "same", "chns"] = option("random", "document 000; the rejected item is a random negative of the prompt, the one nearest to the chosen item, or (chns) nearest in one modality")
    rejected: int = option(1, "document: rejected answers to a prompt; each makes a pair with the chosen one, all in one row")
    reference: str = option("once", "ours: once = all log-probabilities of the frozen reference before training, kept in OUT/reference.safetensors; live = at every step; or such a file of another run")
    beta0: float = option(0.1, "document")
    k: int = option(10, "document: K of the Top-K clusters")
    embedding: Literal["input", "hidden"] = option("input", "ours: HN-1 from input embeddings, or from last hidden states")
    gap: Literal["union", "ranked"] = option("union", "document's claim needs union; ranked is the authors' release (HN-4)")
    hardness: Literal["sigmoid", "ratio", "standardised"] = option("sigmoid", "document; ratio: authors' release; standardised: ours (HN-5)")
    control: Literal["none", "reversed", "permuted", "mean"] = option("none", "ours, controls: the same lambdas, but the largest for the hardest pair and so on, or dealt out at random; or their mean for all")
    eta: Literal["batch", "ema"] = option("batch", "document; ema (ours) normalises by running statistics (HN-7)")
    trim: float | None = option(None, "document: filter extremes; none drops one reward at each end, a fraction more (HN-7)")
    dataset: Literal["microlens", "netflix", "movielens"] = option("microlens", "its noise strength, 0.05, 0.1 or 0.1 (authors' release, within the document's 0.05 to 0.1)")
    sigma: float | None = option(None, "noise strength sigma_n, instead of the preset of --dataset")
    noise: Literal["absolute", "relative"] = option("absolute", "document; relative (ours): times the RMS of the weights, so the presets are weak there (HN-9)")
    noise_ranks: Literal["own", "same"] = option("own", "ours: under torchrun, a draw of noise for each process, or the same draw for all")
    normalised: bool = option(False, "ours: scale each pair's loss by beta0 / beta' (HN-11)")
    kl_coef: float = option(0.0, "ours: weight of the exact KL in the loss (HN-12)")
    log_kl: bool = option(False, "log the exact KL; costs one more forward")

    def __post_init__(self) -> None:
        check(self, rejected=1, beta0=TINY, k=1, sigma=0, kl_coef=0, trim=TINY)

    @property
    def hars(self) -> bool:
        return self.ablation in ("full", "no_nodo", "no_sam")

    @property
    def sigma_n(self) -> float:
        """HN-9's strength after ablation, preset and flag."""
        if self.ablation in ("no_nodo", "dpo"):
            return 0.0
        return PRESETS[self.dataset] if self.sigma is None else self.sigma


@dataclass(frozen=True)
class EvalConfig:
    """What evaluate.py reports."""

    out: str = option(help="folder for metrics.json; must be new or empty")
    adapter: list[str] = option([], "adapter folder; repeat it to compare; `base` = the bare model", action="extend")
    split: Literal["test", "val"] = option("test", "test for reports, val for choosing settings")
    sets: Literal["both", "random", "hard"] = option("both", "candidate sets")
    images: Literal["own", "shuffled"] = option("own", "shuffled (ours): give each item another one's image, to see what images are worth")
    batch: int = option(4, "users in one forward")
    seed: int = option(2025, "seed of the candidate sets and of the intervals")
    similarity: bool = option(False, "EV-4: image-text similarity of all items before and after training, in ten groups")
    retriever: str | None = option(None, "finished --out folder of train_brmrs.py: rerank what it retrieves from the whole catalogue, instead of candidate sets")
    top_n: int = option(20, "ours: N, how many items are retrieved")
    user: str | None = option(None, "print a ranked list for this user instead of metrics")
    top_k: int = option(3, "length of that list")
    shard: bool = option(False, "ours: under torchrun, each process keeps a part of the base model's layers alone, for bases that do not fit")

    def __post_init__(self) -> None:
        check(self, batch=1, seed=0, top_n=1, top_k=1)


@dataclass(frozen=True)
class BrmrsFiles:
    """What BR-MRS is trained on, where the run goes, and on what device."""

    data: str = option(help="folder with NAME.inter, text_feat.npy and image_feat.npy, as the MMRec toolbox has them, or in the native layout")
    out: str = option(help="folder of the run; one that holds an unfinished run of the same settings is gone on with")
    model: str | None = option(None, "native layout only: the checkpoint whose embeddings of titles and images are the features")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "ours, of that checkpoint: bfloat16 on a GPU, float32 elsewhere")
    max_pixels: int = option(224 * 224, "ours, low: pixels of an image after scaling down, for that checkpoint")
    device: str = option("auto", "ours: cuda if there is one, else cpu")


@dataclass(frozen=True)
class BrmrsConfig:
    """BR-MRS: the recommender, its objective, and its training. Document 003 leaves backbone and training open."""

    dim: int = option(64, "MMRec convention: width d of a branch")
    layers: int = option(2, "MMRec convention: LightGCN layers on the user-item graph; 0 = no graph")
    fusion: Literal["mlp", "concat", "sum"] = option("mlp", "ours: the later manuscript leaves its fusion open; concat: s_f = s_t + s_v; sum: with cross terms")
    user_embedding: Literal["per_modality", "shared"] = option("per_modality", "later manuscript; shared (ours): one table for both branches")
    item_embedding: Literal["per_branch", "none"] = option("per_branch", "ours; none: items are their features alone")
    item_graph: int = option(0, "ours: off; k (later manuscript): smooth items over their k most alike items")
    user_graph: int = option(0, "ours: off; k (later manuscript): smooth users over their k most alike users")
    graph_alpha: float = option(0.5, "ours: weight of shared interactions in these two graphs, the rest is likeness of features")
    normalise: bool = option(True, "ours: centre each feature and scale each item's features to length 1")
    lambda_h: float = option(1.0, "ours, weight of L_chns (BR-6); 0 = off")
    lambda_s: float = option(1.0, "ours, weight of L_syn (BR-6); 0 = off")
    bpr_weight: float = option(1.0, "document 003, text of 4.3; 0 = the total that it displays (BR-6)")
    theta: float = option(0.1, "ours: margin of L_syn; document 003 leaves it open, the later manuscript wants it above 0 (BR-4)")
    detach: bool = option(False, "document 003: gradients reach the unimodal margins of L_syn too; on (ours): they do not (BR-4)")
    pool: int = option(4, "ours: n, items in the pool of negatives (BR-1)")
    routing: Literal["cross", "same", "random"] = option("cross", "document 003: each modality gets the other's hard negative; same, random: controls")
    hard_fused: bool = option(False, "control: the i- of BPR is the pool's hardest item by s_f, not a uniform one")
    unimodal_bpr: float = option(0.0, "control: weight of BPR on each branch by itself")
    weight_decay: float = option(1e-4, "MMRec convention: weight of half the squared norm of the batch's embeddings (BR-6)")
    learning_rate: float = option(1e-3, "MMRec convention, Adam")
    batch: int = option(2048, "MMRec convention: training pairs in a step")
    epochs: int = option(1000, "MMRec convention: at most; early stopping mostly comes first")
    patience: int = option(20, "MMRec convention: stop after so many epochs without a better Recall@20 on validation")
    seed: int = option(2025, "ours")

    def __post_init__(self) -> None:
        check(self, dim=1, layers=0, item_graph=0, user_graph=0, graph_alpha=0, lambda_h=0, lambda_s=0, bpr_weight=0, theta=0, pool=1,
              unimodal_bpr=0, weight_decay=0, learning_rate=TINY, batch=1, epochs=1, patience=1, seed=0)
        if self.graph_alpha > 1:
            raise InputError(f"--graph-alpha {self.graph_alpha}: expected at most 1")
        if not (self.bpr_weight or self.lambda_h or self.lambda_s or self.unimodal_bpr):
            raise InputError("--bpr-weight, --lambda-h, --lambda-s and --unimodal-bpr are all 0, so there is nothing to learn; expected one above 0")


def parse(types: Sequence[type], argv: Sequence[str] | None = None, about: str | None = None) -> tuple[Any, ...]:
    """The dataclasses filled from a JSON file (first argument, if it ends in .json) and flags. Unknown keys are InputErrors."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(types, description=about, allow_abbrev=False)
    if argv and argv[0].endswith(".json"):
        path, settings = Path(argv[0]), read_json(Path(argv[0]))
        if isinstance(settings, dict) and isinstance(settings.get("settings"), dict):
            settings = settings["settings"]  # the run.json of an earlier run: the same again
        known = {field.name for kind in types for field in dataclasses.fields(kind)}
        if not isinstance(settings, dict) or (unknown := sorted(settings.keys() - known)):
            what = f"unknown keys {', '.join(unknown)}" if isinstance(settings, dict) else "not an object"
            raise InputError(f"{path}: {what}; expected a JSON object with keys among {', '.join(sorted(known))}")
        from_file, given = [], {flag.partition("=")[0].replace("_", "-") for flag in argv}
        for key, value in settings.items():
            if value is not None and value != [] and f"--{key}".replace("_", "-") not in given:  # --adapter would add to the file's list
                from_file += [f"--{key}", *(map(str, value) if isinstance(value, list) else [_flag(value)])]
        argv = from_file + argv[1:]
    *configs, unknown_flags = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown_flags:
        parser.error(f"unknown arguments: {' '.join(unknown_flags)}; --help lists the known ones")
    return tuple(configs)


def _flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
