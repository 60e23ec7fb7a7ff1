"""Every setting of lists of recommendations, its default, and who says so."""

from dataclasses import dataclass
from typing import Literal

from hanorec.base.errors import InputError
from hanorec.base.settings import check, option


@dataclass(frozen=True)
class ListConfig:
    """What lists are made from, and how. Prompts are as the adapter was trained on."""

    group = "data, model and retriever"

    data: str = option(help="folder in the native layout")
    model: str | None = option(
        None,
        "folder or hub name of the base checkpoint that ranks what is retrieved; none = the "
        "retriever's own order",
    )
    adapter: str | None = option(
        None, "adapter folder, with what it stands on; none or `base` = the bare model"
    )
    retriever: str | None = option(
        None,
        "finished --out folder of train_brmrs.py, or of a recommender of hanorec.baselines: it "
        "looks through the whole catalogue",
    )
    candidates: str | None = option(
        None,
        "file of item ids, one a line: no other item is recommended; without --retriever the "
        "model ranks all of them",
    )
    top_n: int = option(
        10,
        "document: items to choose from; so many are retrieved for the model to rank, and a "
        "retriever alone retrieves as many as a list has",
    )
    fuse: float | None = option(
        None,
        "ours: w of RC-2, by which the order is that of the model's score and w times the "
        "retriever's; none = of the model's alone",
    )
    seen: Literal["leave-out", "keep"] = option(
        "leave-out", "ours: items that the user has had are not recommended, or are"
    )
    history_length: int | None = option(
        None, "how many past items the prompt shows; none = as the adapter was trained on"
    )
    batch: int = option(4, "ours: users in one forward")
    plain: bool = option(
        False, "ours: the slow path to compare with: a forward a candidate, no feature file"
    )
    features: str | None = option(
        None, "ours: folder of the image features; none = the data folder"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "ours: bfloat16 on a GPU, float32 elsewhere"
    )
    device: str = option("auto", "ours: cuda if there is one, else cpu")
    seed: int = option(2025, "ours: of the order in which a prompt lists the candidates")

    def __post_init__(self) -> None:
        check(self, top_n=1, fuse=0, history_length=1, batch=1, seed=0)
        if self.model is None and self.retriever is None:
            raise InputError(
                "neither --model nor --retriever, expected at least one that can rank; add one"
            )
        if self.model is None and self.adapter is not None:
            raise InputError(
                f"--adapter {self.adapter} without --model: expected the base that it stands on; "
                "add --model, or leave --adapter out"
            )
        if self.fuse is not None and (self.model is None or self.retriever is None):
            raise InputError(
                f"--fuse {self.fuse}: expected --model and --retriever, whose scores it adds up; "
                "add them, or leave --fuse out"
            )
        if self.retriever is None and self.candidates is None:
            raise InputError(
                "--model without --retriever and --candidates: expected one of them, since a "
                "prompt cannot list the whole catalogue; add one"
            )


@dataclass(frozen=True)
class PeopleConfig:
    """Who is recommended to, and where the lists go."""

    group = "users and lists"

    users: str | None = option(
        None,
        "all = everybody in train.tsv; the name of one of them; or else a file with a user a line, "
        "where a line user<TAB>id id id is somebody who is not in the data",
    )
    history: str | None = option(
        None, "instead of --users: the items that somebody has had, \"id id id\", oldest first"
    )
    top_k: int = option(10, "length of a list")
    out: str | None = option(
        None, "a new file, .tsv or .jsonl (JSON lines); none = the lists are printed as TSV"
    )

    def __post_init__(self) -> None:
        check(self, top_k=1)
        if (self.users is None) == (self.history is None):
            raise InputError(
                "--users and --history: expected one of the two; say who is recommended to"
            )
        if self.out is not None and not self.out.endswith((".tsv", ".jsonl")):
            raise InputError(
                f"--out {self.out}: expected a file that ends in .tsv or .jsonl; name one"
            )
