"""Every setting of HaNoRec's commands, its default, and who says so.

That is the document, the authors' release, or ours. The settings of BR-MRS: config_brmrs.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hanorec.base.errors import InputError, shown
from hanorec.base.settings import SEVERAL, TINY, check, option


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and how it is loaded."""

    group = "model"  # in --help

    model: str = option(
        help="folder or hub name of a Qwen2-VL, Qwen2.5-VL or LLaVA-NeXT checkpoint",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "ours: bfloat16 on a GPU, float32 elsewhere",
    )
    device: str = option("auto", "ours: cuda if there is one, else cpu")
    max_pixels: int = option(
        224 * 224,
        "ours, low (authors' release: 262,144): pixels of an image after scaling down; 784 pixels "
        "are one Qwen token",
    )


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how a prompt is built from it."""

    group = "data"

    data: str = option(
        help=(
            "folder in the native layout; `python -m hanorec.datasets.<source> RAW OUT` writes "
            "one"
        ),
    )
    task: Literal["ranking", "binary"] = option(
        "ranking",
        "document: rank the candidates; binary (authors' release): answer Yes or No on one item",
    )
    history: int = option(
        5,
        "authors' release, before its Yes or No (3 before an answer of three titles): how many "
        "past items the prompt shows",
    )
    targets: int = option(
        1,
        "document; 3 (authors' release, hit3): the last 3 items are the answer of one row, newest "
        "first, a title a line",
    )
    candidates: int = option(10, "document: items to choose from, the chosen one and 9 negatives")
    images: Literal["own", "none", "shuffled"] = option(
        "own",
        "document: each item's image; none (ours): titles alone, no image file is looked at; "
        "shuffled (ours, evaluation): another item's, to see what images are worth",
    )
    candidate_images: Literal["on", "off"] = option(
        "on",
        "document: images of the candidates; off (authors' release) spares their tokens",
    )
    quotes: Literal["none", "chosen"] = option(
        "none",
        "ours; chosen (authors' release): the title of the user's item in quotes, a rejected one "
        "bare, so that the form of an answer gives away which it is; evaluation writes all in "
        "quotes",
    )
    max_title_tokens: int | None = option(
        None,
        "ours: cut titles in prompts and answers to so many tokens, and say how many were cut; "
        "none = nothing is cut, and a prompt that is too long is refused",
    )
    plain: bool = option(
        False,
        "ours: the slow path that the fast one is tested against: a forward an answer, no feature "
        "file",
    )
    neighbors: int = option(
        50,
        "ours: hard negatives are drawn from so many nearest items of the positive, matched ones "
        "from so many next to it on either side by popularity",
    )
    users_from: float = option(
        0.0,
        "ours: use the users from this fraction of a permutation of those in train.tsv ...",
    )
    users_to: float = option(
        1.0,
        "ours: ... up to this one, so that stages can have users of their own",
    )
    users_seed: int = option(
        2025,
        "ours: seed of that permutation, apart from --seed so that all runs mean the same people",
    )
    features: str | None = option(
        None,
        "ours: folder of the image features, a file for each base and set of images; none = the "
        "data folder",
    )

    def __post_init__(self) -> None:
        check(self, history=1, targets=1, neighbors=1, users_seed=0, max_title_tokens=1)
        check(self, candidates=self.targets + 1)
        if self.targets > 1 and self.task == "binary":
            raise InputError(
                f"--targets {self.targets} with --task binary: expected --targets 1, since that "
                "asks about one item; give it, or use --task ranking"
            )


@dataclass(frozen=True)
class TrainConfig:
    """What both training stages share."""

    group = "training"

    out: str = option(help="folder for the adapter, log.jsonl and run.json; must be new or empty")
    sft: str | None = option(
        None,
        "adapter of stage 1, frozen below the new one; in stage 2 it is the reference, else the "
        "base model is",
    )
    targets_per_user: int = option(
        3,
        "ours: the last 3 items of a training sequence are targets, a row each (authors' release: "
        "one answer of three titles); 0 = all but the first",
    )
    draw: Literal["random", "hard", "retrieved"] = option(
        "random",
        "document: random negatives; hard (ours): from the positive's neighbourhood; retrieved "
        "(ours): the best that --retriever finds, as when it reranks",
    )
    retriever: str | None = option(
        None,
        "ours: whose lists --draw retrieved trains on: finished --out folder of train_brmrs.py or "
        "of a recommender of hanorec.baselines, trained with --hold-out of at least "
        "--targets-per-user",
    )
    lora_rank: int = option(8, "document")
    lora_alpha: float = option(32.0, "authors' release")
    lora_dropout: float = option(0.05, "authors' release, in SFT; its DPO runs without")
    learning_rate: float = option(1e-4, "document")
    schedule: Literal["cosine", "constant"] = option(
        "cosine",
        "authors' release: the rate falls to 0 by half a cosine; constant (ours): it stays, so "
        "that the first epochs of a run are those of a shorter one",
    )
    epochs: int = option(5, "authors' release")
    micro_batch: int = option(4, "authors' release, in DPO (2 in its SFT): rows in one forward")
    accumulation: int = option(
        8,
        "document: micro-batches in one optimizer step, in all: torchrun's processes divide its "
        "rows among them",
    )
    drop_last: bool = option(
        False,
        "ours: all rows of an epoch; true (authors' release): those that do not fill a micro-batch "
        "are left out",
    )
    clip: float = option(1.0, "authors' release: largest norm of the gradient")
    seed: int = option(2025, "authors' release")
    save_every: int = option(
        50,
        "ours: optimizer steps between checkpoints; a run that was killed goes on from the last "
        "one when started again",
    )
    keep_epochs: list[int] = option(
        [],
        "ours: the adapter as it is after these epochs is kept, too, in OUT/epoch-E",
    )
    checkpointing: bool = option(False, "ours: recompute activations in backward, to spare memory")
    compile: bool = option(
        False,
        "ours: torch.compile makes one graph of each layer, the same but for rounding and faster "
        "after slow first steps; wants a C++ compiler; experimental in bfloat16, where no GPU has "
        "confirmed it",
    )
    shard: bool = option(
        False,
        "ours: under torchrun, each process keeps a part of the base model's layers alone, for "
        "bases that do not fit",
        group=SEVERAL,
    )

    def __post_init__(self) -> None:
        check(self, targets_per_user=0, lora_rank=1, lora_alpha=TINY, lora_dropout=0, seed=0)
        check(self, learning_rate=TINY, epochs=1, micro_batch=1, accumulation=1, clip=TINY)
        check(self, save_every=1)
        if (self.draw == "retrieved") != (self.retriever is not None):
            raise InputError(
                f"--draw {self.draw} with --retriever {self.retriever}: expected --draw retrieved "
                "and a folder, or neither; give both"
            )
        if self.retriever is not None and not self.targets_per_user:
            raise InputError(
                "--targets-per-user 0 with --draw retrieved: expected at least 1, since a "
                "retriever that knows none of the targets would know nothing; say how many"
            )
        if self.lora_dropout >= 1:
            raise InputError(f"--lora-dropout {self.lora_dropout}: expected less than 1")
        if self.compile and self.shard:
            raise InputError(
                "--compile true with --shard true: expected one of the two, since layers that are "
                "gathered before they compute are not made into graphs; leave one out"
            )
        for epoch in self.keep_epochs:
            if not 1 <= epoch <= self.epochs:
                raise InputError(
                    f"--keep-epochs {epoch}: expected epochs of 1 .. {self.epochs}, as --epochs has"
                )


# sigma_n; the document says 0.05 to 0.1
PRESETS = {"microlens": 0.05, "netflix": 0.1, "movielens": 0.1}

NEGATIVES = ("random", "same", "chns")  # how the rejected item is drawn, if no file says it


@dataclass(frozen=True)
class DpoConfig:
    """HaRS, NoDO and the preference loss."""

    group = "method"

    ablation: Literal["full", "no_hars", "no_nodo", "no_sam", "dpo"] = option(
        "full",
        "document, ablation table; dpo = w/o ALL",
    )
    negatives: str = option(
        "random",
        "document; the rejected item is a random negative of the prompt, the one nearest to "
        "the chosen item (same), or nearest in one modality (chns); or it is read from a file of "
        "picks (FILE.json), one a prompt",
    )
    rejected: int = option(
        1,
        "document: rejected answers to a prompt; each makes a pair with the chosen one, all in "
        "one row",
    )
    reference: str = option(
        "once",
        "ours: once = all log-probabilities of the frozen reference before training, kept in "
        "OUT/reference.safetensors; or such a file of another run",
    )
    beta0: float = option(0.1, "document")
    k: int = option(10, "document: K of the Top-K clusters")
    embedding: Literal["input", "hidden"] = option(
        "input",
        "authors' release: HN-1 from input embeddings; hidden (ours): from last hidden states",
    )
    gap: Literal["union", "ranked", "signed", "centroid"] = option(
        "union",
        "document's claim needs union; ranked is the authors' release; signed, centroid: ours "
        "(HN-4)",
    )
    hardness: Literal["sigmoid", "ratio", "standardised"] = option(
        "sigmoid",
        "document; ratio: authors' release; standardised: ours (HN-5)",
    )
    control: Literal["none", "reversed", "permuted", "mean", "one"] = option(
        "none",
        "ours, controls: the same lambdas, but the largest for the hardest pair and so on, or "
        "dealt out at random; or for all pairs their mean, or 1",
    )
    eta: Literal["batch", "pair", "ema", "beta_dpo"] = option(
        "batch",
        "document; pair (document, read otherwise): one for each pair; ema (ours) normalises by "
        "running statistics; beta_dpo: the batch's factor of beta-DPO, another method (HN-7)",
    )
    trim: float | None = option(
        None,
        "document: filter extremes; how many is the authors' release's, one reward at each end "
        "(none), or ours, a fraction (HN-7)",
    )
    dataset: Literal["microlens", "netflix", "movielens"] = option(
        "microlens",
        "its noise strength, 0.05, 0.1 or 0.1 (authors' release, within the document's 0.05 to "
        "0.1)",
    )
    sigma: float | None = option(
        None,
        "ours: noise strength sigma_n, instead of the preset of --dataset",
    )
    noise: Literal["absolute", "relative"] = option(
        "absolute",
        "document; relative (ours): times the RMS of the weights, so the presets are weak there "
        "(HN-9)",
    )
    noise_ranks: Literal["own", "same"] = option(
        "own",
        "ours: under torchrun, a draw of noise for each process, or the same draw for all",
        group=SEVERAL,
    )
    normalised: bool = option(False, "ours: scale each pair's loss by beta0 / beta' (HN-11)")
    kl_coef: float = option(0.0, "ours: weight of the exact KL in the loss (HN-12)")
    log_kl: bool = option(False, "ours: log the exact KL; costs one more forward")

    def __post_init__(self) -> None:
        check(self, rejected=1, beta0=TINY, k=1, sigma=0, kl_coef=0, trim=TINY)
        if self.negatives in NEGATIVES:
            return
        if not self.negatives.endswith(".json"):
            raise InputError(
                f"--negatives {shown(self.negatives)}: expected {', '.join(NEGATIVES)}, or a file "
                "of picks that ends in .json"
            )
        if self.rejected > 1:
            raise InputError(
                f"--rejected {self.rejected} with --negatives {shown(self.negatives)}: expected 1, "
                "since a file of picks has one for each prompt"
            )

    @property
    def least_prompts(self) -> int:
        """How many prompts a step needs for the 3 pairs of HN-7."""
        return math.ceil(3 / self.rejected)

    @property
    def hars(self) -> bool:
        """Whether pairs have a beta' of their own."""
        return self.ablation in ("full", "no_nodo", "no_sam")

    @property
    def gap_form(self) -> str:
        """HN-4's form after the ablation: w/o SAM there are no clusters."""
        return "cosine" if self.ablation == "no_sam" else self.gap

    @property
    def normalised_by(self) -> float | None:
        """What HN-11's loss is normalised by, if it is."""
        return self.beta0 if self.normalised else None

    @property
    def with_kl(self) -> bool:
        """Whether HN-12 is computed."""
        return self.kl_coef > 0 or self.log_kl

    @property
    def sigma_n(self) -> float:
        """HN-9's strength after ablation, preset and flag."""
        if self.ablation in ("no_nodo", "dpo"):
            return 0.0
        return PRESETS[self.dataset] if self.sigma is None else self.sigma


@dataclass(frozen=True)
class EvalConfig:
    """What evaluate.py reports."""

    group = "evaluation"

    out: str = option(help="folder for metrics.json; must be new or empty")
    adapter: list[str] = option(
        [],
        "adapter folder; repeat it to compare; `base` = the bare model",
        action="extend",
    )
    split: Literal["test", "val"] = option("test", "test for reports, val for choosing settings")
    sets: Literal["both", "random", "hard", "matched", "all"] = option(
        "both",
        "candidate sets: random (document); hard (ours): near the positive; matched (ours): about "
        "as popular as the positive; both = random and hard",
    )
    answers: Literal["scored", "greedy", "sampled"] = option(
        "scored",
        "document: candidates by their scores; greedy, or sampled at temperature 0.95 and top-p "
        "0.7 (authors' release): beside it what the policy writes, titles compared as texts; with "
        "--task binary, Yes or No",
    )
    batch: int = option(4, "users in one forward")
    seed: int = option(2025, "seed of the candidate sets and of the intervals")
    similarity: bool = option(
        False,
        "EV-4: image-text similarity of all items before and after training, in ten groups",
    )
    retriever: str | None = option(
        None,
        "finished --out folder of train_brmrs.py, or the folder of the split in that of a "
        "recommender of hanorec.baselines: rerank what it retrieves from the whole catalogue, "
        "instead of candidate sets",
    )
    top_n: int = option(
        20,
        "ours: N, how many items are retrieved; a policy of --draw retrieved was trained on as "
        "many as its --candidates",
    )
    fuse: float | None = option(
        None,
        "ours: w of RC-2, a policy's order is by its score and w times the retriever's; none = by "
        "its own alone",
    )
    user: str | None = option(
        None,
        "print, instead of metrics, a ranked list of this user's candidates for each held-out "
        "item; `python -m hanorec.recommend` recommends from all that a user has had",
    )
    top_k: int = option(3, "length of that list")
    shard: bool = option(
        False,
        "ours: under torchrun, each process keeps a part of the base model's layers alone, for "
        "bases that do not fit",
        group=SEVERAL,
    )

    def __post_init__(self) -> None:
        check(self, batch=1, seed=0, top_n=1, top_k=1, fuse=0)
