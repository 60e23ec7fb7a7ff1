"""The rows of the comparison: what each is, how it is made, what is tried, what to know of it.

Document 000 names 8 of its 12 baselines; the other four rows are a guess, and said to be one.
"""

from dataclasses import dataclass, replace
from typing import Any

CONTROL = "HaNoRec"  # to which the others are held
ALWAYS = "popularity"  # which every table has, and chance
TRIALS = 6  # of each trained row


@dataclass(frozen=True)
class Trial:
    """A setting to be tried on validation, as a change of the row's default."""

    rate: float = 1.0  # times the learning rate
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        rate = f"rate × {self.rate:.2g}" if self.rate != 1 else ""
        return " ".join(filter(None, [rate, *self.flags])) or "default"


@dataclass(frozen=True)
class Baseline:
    """A row of the table.

    Attributes:
        kind: "none", "traditional", "LLM", "MLLM" or "ours".
        maker: who trains and scores it, of `hanorec.studies.baselines_makers`.
        flags, test: its own, of training and of scoring.
        grid: what is tried, its default first; nothing where nothing is trained.
        below: the row that it stands on, which stands above it in the table.
        named: by the document.
        published: NDCG@3 in percent on MicroLens, Netflix and MovieLens-1M, where it is known.
        said: what differs from the original, to be said under the table.
    """

    kind: str
    maker: str
    flags: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    grid: tuple[Trial, ...] = ()
    below: str | None = None
    named: bool = True
    published: tuple[float | None, ...] = ()
    said: str = ""


def grid(*flags: str) -> tuple[Trial, ...]:
    """Three learning rates, each without and with these flags."""
    rates = (1.0, 3.0, 1 / 3)
    return *(Trial(rate) for rate in rates), *(Trial(rate, flags) for rate in rates)


# ---- scores that are inner products ----

REGULARISED = grid("--weight-decay", "1e-3")
SPARSE = grid("--dropout", "0.2")
CONTRASTS = (
    Trial(), Trial(3.0), Trial(1.0, ("--contrast", "0.01")), Trial(1.0, ("--hide", "0.6")),
    Trial(1.0, ("--dropout", "0.2")), Trial(3.0, ("--dropout", "0.2")),
)

MATRICES = {
    "BPR-MF": Baseline("traditional", "matrix", ("--layers", "0"), grid=REGULARISED, named=False),
    "LightGCN": Baseline("traditional", "matrix", grid=REGULARISED),
}
SEQUENCES = {
    "SASRec (BCE)": Baseline(
        "traditional", "sequence", ("--method", "sasrec", "--loss", "bce"), grid=SPARSE,
        said="against one negative, as its authors trained it"),
    "SASRec (CE)": Baseline(
        "traditional", "sequence", ("--method", "sasrec", "--loss", "ce"), grid=SPARSE,
        said="cross-entropy over all items, as later codes train it"),
    "CL4SRec": Baseline("traditional", "sequence", ("--method", "cl4srec"), grid=CONTRASTS),
    "GRU4Rec": Baseline(
        "traditional", "sequence", ("--method", "gru4rec", "--dropout", "0.3"), grid=SPARSE,
        named=False, said="cross-entropy over all items instead of ranking losses in a batch"),
    "BERT4Rec": Baseline(
        "traditional", "sequence", ("--method", "bert4rec"), grid=SPARSE, named=False),
}
CASER = Baseline(
    "traditional", "sequence", ("--method", "caser", "--length", "5", "--weight-decay", "1e-6"),
    grid=SPARSE, named=False, said="cross-entropy over all items, one target a window; L = 5")


def short(row: Baseline) -> Baseline:
    """The same row with about as much as the language models see: 5 items of history each."""
    flags = (*row.flags, "--length", "5")
    return replace(
        row, flags=flags,
        said="reads 5 items, as the prompts do, and in training the last 6 of each user alone")


# ---- language models ----

ADAPTERS = grid("--lora-dropout", "0.2")
PREFERENCES = grid("--beta0", "0.03")
TEXT = ("--images", "none")
YES_OR_NO = ("--task", "binary")
ONE_BASE = (
    "one base describes, summarises and answers; one image, that of the item asked about; loss on "
    "the answer alone; texts are made once, whichever run needs them first")


def msr(form: str, said: str, **more: Any) -> dict[str, Baseline]:
    """A form of MLLM-MSR, and its two controls."""
    name, flags = f"MLLM-MSR {form}", (*YES_OR_NO, "--form", form)
    row = Baseline("MLLM", "msr", flags, YES_OR_NO, ADAPTERS, said=said, **more)
    control = Baseline("MLLM", "msr_none", test=YES_OR_NO, below=name)
    return {
        name: row,
        f"{name}, no summary": replace(control, said="a control: the row above, asked without"),
        f"{name}, others' summaries": replace(
            control, maker="msr_other", said="a control: each user with another one's summary"),
    }


ROWS = {
    ALWAYS: Baseline("none", "popularity"),
    **MATRICES,
    **SEQUENCES,
    "Caser": CASER,
    **{f"{name}, L = 5": short(row) for name, row in SEQUENCES.items()},
    "SFT": Baseline("ours", "sft", grid=ADAPTERS),
    "TALLRec": Baseline(
        "LLM", "sft", (*TEXT, *YES_OR_NO), (*TEXT, *YES_OR_NO), ADAPTERS,
        said="without its first stage of general instructions; loss on the answer alone; no list "
        "of disliked items, since nobody says what they dislike; all linear layers adapted"),
    "LLaRA": Baseline(
        "LLM", "llara", TEXT, TEXT, ADAPTERS, below="SASRec (CE)",
        said="candidates' titles are scored, none is generated, so no answer is invalid; one "
        "wording; vectors as wide as those of the row SASRec (CE)"),
    "LLaRA, vectors permuted": Baseline(
        "LLM", "llara_permuted", test=TEXT, below="LLaRA",
        said="a control: the row above, each item with another one's vector"),
    "SPRec": Baseline(
        "LLM", "sprec", grid=ADAPTERS, below="SFT",
        said="starts from the row SFT, so it sees images; the rejected answer is the best wrong "
        "candidate, not a free generation; the adapters of a round are joined, so the rank grows; "
        "a part of the users (--users-to) is drawn anew in each round, of all"),
    "MSRBench S1": Baseline(
        "MLLM", "base", test=("--history", "10"),
        said="nothing is trained; titles are scored instead of a list being written; an image an "
        "item instead of one joined picture; which strategy the document ran is not stated"),
    "MSRBench S3": Baseline(
        "MLLM", "reranked", test=("--history", "10"), below="SASRec (CE)",
        said="as S1, the candidates in the order of the row SASRec (CE), which is to be read "
        "beside it"),
    **msr("generated", ONE_BASE, published=(51.10, 57.54, 50.31)),
    **msr(
        "extractive", "ours, for bases that cannot write: images and users are described by words "
        "of titles; else as the generated form"),
    "DPO": Baseline(
        "ours", "dpo", ("--ablation", "dpo"), grid=PREFERENCES, below="SFT",
        published=(49.82, None, None)),
    CONTROL: Baseline(
        "ours", "dpo", ("--ablation", "full"), grid=PREFERENCES, below="SFT",
        published=(56.73, 61.91, 54.03)),
}
