"""Lists of recommendations: what is retrieved for a person, put in order by a policy.

    shortlist: the best of the catalogue by the retriever, or the items of a file
    order:     EV-1 of each title on it under the person's prompt, or the retriever's own order

People are handled in blocks, each by one process alone: what comes out depends on the block, and
not on how many processes there are or on where a run was stopped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hanorec.base.config import DataConfig
from hanorec.base.distributed import usable_device
from hanorec.base.errors import InputError, shown
from hanorec.base.files import sha256
from hanorec.datasets.catalog import data_hash, load_catalog
from hanorec.datasets.interactions import Example, load_interactions
from hanorec.mllm.builder import PromptBuilder
from hanorec.ranking.candidate_sets import policy_files
from hanorec.ranking.fusion import fuse_scores
from hanorec.recommending.config import ListConfig
from hanorec.recommending.people import NOBODY, Person, item_rows, read_candidates, user_of
from hanorec.recommending.policy import load_policy, policy_scores, trained_prompt
from hanorec.recommending.retrieval import best, load_source
from hanorec.run.inputs import seen_inputs


@dataclass(frozen=True)
class Recommendation:
    """A line of a list."""

    rank: int  # from 1 = best
    item: str
    title: str
    score: float  # EV-1, TR-1 for a binary policy, RC-2, or the retriever's; higher is better
    retriever_rank: int | None  # from 1; None without a retriever


class Shortlist(NamedTuple):
    """Some items of one person, each with its score and the retriever's rank of it."""

    rows: list[int]
    scores: list[float]
    places: list[int | None]


class Recommender:
    """A policy, a retriever, or both, loaded once.

    Args:
        model: base checkpoint; None = the retriever's own order. data: folder in the native layout.
        adapter, retriever, settings: as in `ListConfig`.
    Raises:
        InputError: what `ListConfig` refuses, a retriever of other data; and, when the policy is
            first asked for, an adapter of another base.
    """

    def __init__(
        self,
        model: str | None,
        data: str,
        adapter: str | None = None,
        retriever: str | None = None,
        **settings: Any,
    ) -> None:
        names = {"adapter": adapter, "retriever": retriever}
        self.config = config = ListConfig(data=data, model=model, **names, **settings)
        usable_device(config.device)
        self.prompt = trained_prompt(config.adapter or "base")
        images = self.prompt.get("images", DataConfig.images)
        self.catalog = load_catalog(data, images=images != "none")
        self.interactions = load_interactions(data, self.catalog)
        self.pool = self.source = None
        if config.candidates is not None:
            self.pool = read_candidates(config.candidates, self.catalog)
        if retriever is not None:
            self.source = load_source(retriever, self.catalog, self.interactions)

    def __repr__(self) -> str:
        names = [self.config.model, self.config.adapter, self.config.retriever]
        parts = " + ".join(Path(name).name for name in names if name is not None)
        return f"<Recommender: {parts}, {self.catalog.name}>"

    @cached_property
    def builder(self) -> PromptBuilder | None:
        """The policy with what makes its prompts, or None; loaded when first asked for."""
        if self.config.model is None:
            return None
        return load_policy(self.config, self.prompt, self.catalog)

    def for_history(self, items: Sequence[str], k: int = 10) -> list[Recommendation]:
        """A list for somebody who has had these items, given by id, oldest first.

        Raises:
            InputError: an unknown item, none at all, or fewer than k candidates.
        """
        person = Person(NOBODY, item_rows(items, self.catalog, "history"), False)
        return self.lists([person], k)[0]

    def for_user(self, user: str, k: int = 10) -> list[Recommendation]:
        """A list for a user of the data. InputError: an unknown one, or fewer than k candidates."""
        return self.lists([user_of(user, self.interactions, "user")], k)[0]

    @torch.no_grad()
    def lists(self, people: Sequence[Person], k: int) -> list[list[Recommendation]]:
        """The k best items for each of a block of people, best first."""
        found = self._shortlists(people, k)
        if self.builder is not None:
            found = self._reordered(people, found)
        lists = []
        for person, (rows, scores, places) in zip(people, found, strict=True):
            if not np.isfinite(scores).all():
                raise InputError(
                    f"user {shown(person.name)}: scores that are not finite, expected numbers; use "
                    "--dtype float32, or look at the weights of model, adapter and retriever"
                )
            own = []
            for rank, (row, score, place) in enumerate(zip(rows, scores, places, strict=True), 1):
                item, title = self.catalog.ids[row], self.catalog.titles[row]
                own.append(Recommendation(rank, item, title, round(score, 6), place))
            lists.append(own[:k])
        return lists

    def check_length(self, k: int) -> None:
        """InputError where no list can be as long as k."""
        retrieved = self.config.model is not None and self.source is not None
        if retrieved and k > self.config.top_n:
            raise InputError(
                f"--top-k {k}: {self.config.top_n} candidates are retrieved for the model to rank, "
                "expected at least as many; raise --top-n, or lower --top-k"
            )
        if self.pool is not None and k > len(self.pool):
            raise InputError(
                f"--top-k {k}: --candidates has {len(self.pool)} items, expected at least as many; "
                "add some, or lower --top-k"
            )

    def states_of(self, people: Iterable[Person]) -> str | None:
        """Where the retriever's states of these people come from; None without a retriever."""
        return None if self.source is None else self.source.about(people)

    def inputs(self) -> dict[str, str]:
        """Hashes of what the lists are made from, for the record."""
        files = policy_files(self.config.adapter or "base")
        if self.source is not None:
            files["retriever"] = self.source.file
        if self.config.candidates is not None:
            files["candidates"] = Path(self.config.candidates)
        hashes = {name: sha256(path) for name, path in files.items()}
        shown_to = {} if self.builder is None else seen_inputs(self.builder)
        return {"data": data_hash(self.catalog), **hashes, **shown_to}

    # ---- which items ----

    def _shortlists(self, people: Sequence[Person], k: int) -> list[Shortlist]:
        """Of each person, best first; InputError where one has fewer than k items."""
        found = self._retrieved(people, k) if self.source is not None else self._given(people)
        for person, shortlist in zip(people, found, strict=True):
            if len(shortlist.rows) < k:
                seen = " new to them (--seen leave-out)" if self.config.seen == "leave-out" else ""
                raise InputError(
                    f"--top-k {k}: user {shown(person.name)} has {len(shortlist.rows)} "
                    f"candidates{seen}, expected at least as many; lower --top-k, widen "
                    "--candidates, or give --seen keep"
                )
        return found

    def _retrieved(self, people: Sequence[Person], k: int) -> list[Shortlist]:
        """The retriever's best of the catalogue, or of `--candidates`."""
        n = self.config.top_n if self.builder is not None else k
        scores = self.source.states(people) @ self.source.item.T  # (b, N)
        scores = scores.nan_to_num(torch.inf, torch.inf, torch.inf)  # refused where it is shown
        if self.pool is not None:
            outside = torch.ones(scores.shape[1], dtype=torch.bool)
            outside[list(self.pool)] = False
            scores[:, outside] = -torch.inf
        found = []
        for person, s in zip(people, scores, strict=True):
            if self.config.seen == "leave-out":
                s[list(person.history)] = -torch.inf
            rows = best(s, n)
            places = list(range(1, len(rows) + 1))
            found.append(Shortlist(rows.tolist(), s[rows].tolist(), places))
        return found

    def _given(self, people: Sequence[Person]) -> list[Shortlist]:
        """All of `--candidates`, in the file's order."""
        found = []
        for person in people:
            seen = set(person.history) if self.config.seen == "leave-out" else set()
            rows = [row for row in self.pool if row not in seen]
            found.append(Shortlist(rows, [0.0] * len(rows), [None] * len(rows)))
        return found

    # ---- in what order ----

    def _reordered(
        self, people: Sequence[Person], found: Sequence[Shortlist]
    ) -> list[Shortlist]:
        """The shortlists by the policy's scores, with `--fuse` by RC-2; of equal ones what the
        retriever puts first."""
        examples = []
        for person, shortlist in zip(people, found, strict=True):
            history = person.history[-self.builder.config.history :]
            # In the prompt they stand in a random order, as in training, which depends on the
            # prompt alone: the same person has the same list in any block and on any day.
            rng = np.random.default_rng([self.config.seed, *history, *shortlist.rows])
            candidates = tuple(rng.permutation(shortlist.rows).tolist())
            examples.append(Example(person.name, history, candidates[0], (), candidates))

        ordered = []
        every = policy_scores(self.builder, examples, self.config.batch)
        for example, shortlist, scores in zip(examples, found, every, strict=True):
            score = dict(zip(example.candidates, scores.tolist(), strict=True))
            own = [score[row] for row in shortlist.rows]
            if self.config.fuse is not None:
                own = fuse_scores(own, shortlist.scores, self.config.fuse).tolist()
            order = np.argsort(-np.array(own), kind="stable").tolist()
            ordered.append(Shortlist(
                [shortlist.rows[i] for i in order],
                [own[i] for i in order],
                [shortlist.places[i] for i in order],
            ))
        return ordered
