"""Candidates matched to the target's popularity: on a skewed catalogue popularity is at chance."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_interactions import make_catalog

from hanorec.base.config import DataConfig, EvalConfig
from hanorec.base.errors import InputError
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.interactions import Example, Interactions, heldout_examples, item_counts
from hanorec.datasets.matched import deal_places, draw_matched_candidates
from hanorec.metrics import auc_rows, ndcg_rows
from hanorec.ranking.candidate_sets import frozen_sets, held_out
from hanorec.ranking.report import chance, popularity, summarise

ITEMS, USERS, NEGATIVES, NEAR = 400, 900, 9, 30


@pytest.fixture(scope="module")
def zipf():
    """Catalogue, training sequences, test examples and counts: the r-th item is chosen as 1 / (r +
    5), so that the first 40 of 400 items have half of all choices."""
    rng = np.random.default_rng(0)
    weight = 1 / (np.arange(ITEMS) + 5)
    names = rng.permutation(ITEMS)  # so that rows say nothing of popularity
    train, test = {}, {}
    for user in range(USERS):
        had = rng.choice(ITEMS, 9, replace=False, p=weight / weight.sum())
        train[f"u{user}"] = tuple(names[had[:-1]].tolist())
        test[f"u{user}"] = (int(names[had[-1]]),)
    count = item_counts(train)
    counts = np.array([count[row] for row in range(ITEMS)])
    examples = heldout_examples(Interactions(train, {}, test), "test")
    return make_catalog(ITEMS), train, examples, counts


def by_popularity(train, examples):
    """HR@3, NDCG@3, AUC and pooled AUC of popularity on these candidates."""
    report = summarise(popularity(train, examples), examples, 0)
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    return {**values, "pooled": report["pooled_AUC"]}


def nearest_items(examples, counts, seed):
    """The control: uniform among the 2 NEAR unseen items nearest by logarithm of the count."""
    rng, drawn = np.random.default_rng(seed), []
    for example in examples:
        far = np.abs(np.log1p(counts) - np.log1p(counts[example.target]))
        far[list(example.seen)] = np.inf
        near = np.lexsort((rng.random(len(far)), far))[: 2 * NEAR]
        order = rng.permutation([example.target, *rng.choice(near, NEGATIVES, replace=False)])
        drawn.append(replace(example, candidates=tuple(order.tolist())))
    return drawn


def test_popularity_is_at_chance_where_others_give_it_away(zipf):
    """In HR@3 and NDCG@3 as exactly as 900 users can be dealt out to 10 places; AUC with them.

    The pooled AUC compares users, so it is near. Controls: among uniform negatives popularity is
    far above chance, and still among the nearest: next to a popular item most are less popular.
    """
    catalog, train, examples, counts = zipf
    by_chance = {k: v["value"] for k, v in chance(NEGATIVES + 1)["metrics"].items()}
    matched = draw_matched_candidates(examples, catalog, counts, NEAR, NEGATIVES)
    found = by_popularity(train, matched)
    for name, value in by_chance.items():
        assert found[name] == pytest.approx(value, abs=1e-12)
    assert found["pooled"] == pytest.approx(0.5, abs=0.05)

    uniform = by_popularity(train, draw_candidates(examples, catalog, NEGATIVES))
    assert uniform["AUC"] > 0.75 and uniform["NDCG@3"] > 2 * by_chance["NDCG@3"]
    nearest = by_popularity(train, nearest_items(examples, counts, 1))
    assert nearest["AUC"] > 0.6 and nearest["HR@3"] > 1.3 * by_chance["HR@3"]


def test_negatives_come_from_the_nearest_on_either_side(zipf):
    """Against plain loops over the catalogue."""
    catalog, _, examples, counts = zipf
    for example in draw_matched_candidates(examples, catalog, counts, NEAR, NEGATIVES)[::20]:
        assert len(set(example.candidates)) == NEGATIVES + 1
        assert example.target in example.candidates
        negatives = set(example.candidates) - {example.target}
        assert not negatives & set(example.seen)
        assert negatives <= pool_of(example, counts, 1) | pool_of(example, counts, -1)


def pool_of(example, counts, side):
    """The NEAR unseen items next to the target on one side by count, and all as near as the last.
    """
    own, beyond = counts[example.target], []
    for row, count in enumerate(counts):
        if side * (count - own) > 0 and row not in example.seen:
            beyond.append((abs(int(count) - int(own)), row))
    beyond.sort()
    last = beyond[:NEAR][-1][0] if beyond else 0
    return {row for distance, row in beyond if distance <= last}


def test_the_draw_is_uniform_within_the_pool(zipf):
    """1,000 sets of one target in the middle: how often each item of the two pools comes."""
    catalog, _, examples, counts = zipf
    one = next(e for e in examples if 20 < (counts > counts[e.target]).sum() < 60)
    many = [Example(f"v{n}", one.history, one.target, one.seen) for n in range(1000)]
    times = Counter()
    for example in draw_matched_candidates(many, catalog, counts, NEAR, NEGATIVES):
        times.update(example.candidates)
    for side in (1, -1):
        pool = pool_of(one, counts, side)
        assert NEAR <= len(pool) < ITEMS / 4
        expected = 1000 * NEGATIVES / 2 / len(pool)
        spread = [times[row] for row in pool]
        assert all(abs(n - expected) < 5 * expected**0.5 for n in spread)


def test_places_are_dealt_out_equally_within_their_bounds():
    rng = np.random.default_rng(3)
    most = np.where(rng.random(1003) < 0.1, rng.integers(10, size=1003), 9)
    least = np.where(rng.random(1003) < 0.1, rng.integers(10, size=1003), 0)
    least = np.minimum(least, most)
    places = deal_places(least, most, 9, rng)
    assert (least <= places).all() and (places <= most).all()
    assert np.ptp(np.bincount(places)) <= 1
    free = (least == 0) & (most == 9)
    assert len(set(places[free])) == 10

    # 40 of 50 cannot but be first: the others take what is left
    most = np.array([0] * 40 + [9] * 10)
    places = deal_places(np.zeros(50, int), most, 9, rng)
    assert (places[:40] == 0).all() and 0 not in places[40:]


def test_a_set_is_the_same_every_time(zipf):
    catalog, _, examples, counts = zipf
    args = catalog, counts, NEAR, NEGATIVES
    first = draw_matched_candidates(examples, *args)
    assert draw_matched_candidates(iter(examples), *args) == first
    assert draw_matched_candidates(examples, *args, seed=1) != first
    where = [example.candidates.index(example.target) for example in first]
    assert set(where) == set(range(NEGATIVES + 1))  # in the prompt


def test_targets_at_the_ends_and_ties(capsys):
    """Counts 9, 8, .. 0: the most popular target has all negatives below it, the least all above.
    Where all counts are equal ties fill up, and AUC is half."""
    catalog, counts = make_catalog(10), np.arange(10)[::-1]
    for target in (0, 9):
        example = Example("u", (5,), target, (5, target))
        (one,) = draw_matched_candidates([example], catalog, counts, 3, 3)
        near = {0: {1, 2, 3}, 9: {6, 7, 8}}[target]
        assert set(one.candidates) == near | {target}
    capsys.readouterr()
    examples = [Example(f"u{n}", (5,), 0, (5, 0)) for n in range(8)]
    draw_matched_candidates(examples, catalog, counts, 3, 3)
    printed = capsys.readouterr().out
    assert "occur 0 to 8 times each, so popularity is not quite at chance" in printed

    flat = np.ones(10, int)
    (one,) = draw_matched_candidates(examples[:1], catalog, flat, 3, 3)
    scores = np.array([[flat[row] for row in one.candidates]])
    assert auc_rows(scores[:, 0], scores[:, 1:]).tolist() == [0.5]
    assert ndcg_rows([4], 3).tolist() == [0]


def test_what_cannot_be_drawn_is_refused(zipf):
    catalog, _, examples, counts = zipf
    with pytest.raises(InputError, match="--neighbors 8: expected at least 9.*raise it"):
        draw_matched_candidates(examples, catalog, counts, 8, 9)
    with pytest.raises(InputError, match="negatives is 0"):
        draw_matched_candidates(examples, catalog, counts, 8, 0)
    few = Example("u'", (0,), 1, (0, 1))
    with pytest.raises(InputError, match='user "u\'": 2 unseen .* 3 negatives wanted'):
        draw_matched_candidates([few], make_catalog(4), np.arange(4), 3, 3)
    same = make_catalog(5, ["a", "b", "c", "c", "c"])
    with pytest.raises(InputError, match="1 unseen items with titles of their own"):
        draw_matched_candidates([few], same, np.arange(5), 3, 3)


def test_the_frozen_file_states_what_it_was_drawn_under(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("images", "features-*"))

    def sets(seed=2025, users_to=1.0, **options):
        config = DataConfig(
            str(folder), candidates=4, images="none", users_to=users_to, **options)
        evaluation = EvalConfig("out", sets="matched", seed=seed)
        held = held_out(config, evaluation)
        return frozen_sets(held, config, evaluation, None, "")["matched"]

    every = sets()
    stored = json.loads((folder / "candidates_test_matched.json").read_text())
    facts = stored["facts"]
    assert (facts["kind"], facts["neighbors"], facts["negatives"]) == ("matched", 50, 3)
    assert len(stored["rows"]) == len(every) == 24
    some = sets(users_to=0.25)
    assert len(some) == 6 and all(example in every for example in some)
    with pytest.raises(InputError, match="neighbors is 50 in the file, expected 40; delete"):
        sets(neighbors=40)
    with pytest.raises(InputError, match="seed is 2025 in the file, expected 1; delete"):
        sets(seed=1)
    stored["rows"][0]["candidates"].reverse()
    (folder / "candidates_test_matched.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="the file was edited"):
        sets()
