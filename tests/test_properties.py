"""Properties, over inputs that hypothesis makes up: every reader, the packed batch, and the
mathematics against the oracle.

A reader given anything either returns what the file says or raises InputError with the file's name:
nothing else, and nothing between. The number of placeholders for any titles is in test_prompts.py,
the Top-K kernel in test_topk.py.
"""

import csv
import io
import itertools
import json
import re
import shutil
import unicodedata
from pathlib import Path

import hostile
import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch import nn

from hanorec.base.errors import InputError
from hanorec.base.files import read_json, write_json
from hanorec.datasets import microlens, movielens, netflix, recbole
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.frozen import load_candidates, save_candidates
from hanorec.datasets.images import read_image
from hanorec.datasets.interactions import heldout_examples, load_interactions, training_examples
from hanorec.datasets.lines import numbered_lines
from hanorec.etas import batch_eta, ema_eta
from hanorec.hars import fuse, pair_beta
from hanorec.lora.files import save_adapter
from hanorec.lora.layer import add_lora, lora_layers
from hanorec.lora.loading import attach_adapter
from hanorec.losses import dpo_loss, kl_divergence, preference_logit, sft_loss, token_log_probs
from hanorec.metrics import auc, hit_rate, ndcg, pooled_auc, rank_of_positive, similarity_groups
from hanorec.mllm.collate import collate
from hanorec.mllm.prompts import Row
from hanorec.readings import GAPS, HARDNESS
from hanorec.topk import topk_neighbors


def quick(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def or_refused(call, *names):
    """call(), or None where it raised an InputError that names one of the files."""
    try:
        return call()
    except InputError as error:
        assert any(name in str(error) for name in names), error
        return None


# ---- text files ----

CHARACTERS = st.characters(exclude_categories=["Cs"])
PIECES = st.sampled_from([
    b"\n", b"\r\n", b"\r", b"\t", b",", b'"', b"\0", b"\x1b", b"\xef\xbb\xbf", b"\xff", b"\xe9",
    b"a", b"1", b" ", "é".encode(),
])
ANYTHING = st.lists(PIECES, max_size=12).map(b"".join) | st.binary(max_size=40)
CONTROL = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f\u2028\u2029]")
PLAIN = st.text(CHARACTERS.filter(lambda c: c != "\t" and not CONTROL.match(c)), max_size=20)
NAME = PLAIN.filter(lambda text: text.split() == [text])


@quick(300)
@given(content=ANYTHING)
def test_lines(tmp_path_factory, content):
    """Accepted exactly where it is UTF-8 without control characters; then the lines are what
    splitting the text gives.
    """
    path = tmp_path_factory.getbasetemp() / "lines.tsv"
    path.write_bytes(content)
    found = or_refused(lambda: list(numbered_lines(path)), "lines.tsv:")
    try:
        text = content.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        assert found is None
        return
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if CONTROL.search("".join(lines)):
        assert found is None
    else:
        assert found == (list(enumerate(lines, 1)) if content else [])


@quick(150)
@given(
    rows=st.dictionaries(NAME, PLAIN.filter(str.strip), min_size=1, max_size=6), crlf=st.booleans(),
    bom=st.booleans(),
)
def test_titles_come_back(tmp_path_factory, rows, crlf, bom):
    """Any ids and titles that a csv writer can write: quotes, commas, any script; with either line
    end, with and without a BOM.
    """
    folder, table = tmp_path_factory.mktemp("titles"), io.StringIO()
    csv.writer(table, lineterminator="\r\n" if crlf else "\n").writerows([
        ("item", "title"), *rows.items()
    ])
    (folder / "T_titles.csv").write_bytes(
        (b"\xef\xbb\xbf" if bom else b"") + table.getvalue().encode()
    )
    catalog = load_catalog(folder)
    assert dict(zip(catalog.ids, catalog.titles, strict=True)) == {
        item: unicodedata.normalize("NFC", title.strip()) for item, title in rows.items()
    }
    shutil.rmtree(folder)


@quick(200)
@given(content=ANYTHING, header=st.booleans())
def test_titles_of_any_bytes(tmp_path_factory, content, header):
    path = tmp_path_factory.getbasetemp() / "any" / "T_titles.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((b"item,title\n" if header else b"") + content)
    catalog = or_refused(lambda: load_catalog(path.parent), "T_titles.csv")
    assert catalog is None or (
        len(set(catalog.ids)) == len(catalog.ids) >= 1
        and all(title.strip() == title != "" for title in catalog.titles)
    )


ITEMS = Catalog(
    Path("."), "toy", tuple(f"i{n}" for n in range(40)),
    tuple(f"title {n // 2}" for n in range(40)), (None,) * 40, "none",
)
SEQUENCES = st.dictionaries(
    NAME,
    st.tuples(
        st.lists(st.integers(0, 39), min_size=1, max_size=8),
        st.lists(st.integers(0, 39), min_size=1, max_size=2),
    ),
    min_size=1, max_size=5,
)


def write_splits(folder, sequences):
    for split, part in (("train", 0), ("val", 1), ("test", 1)):
        (folder / f"{split}.tsv").write_text(
            "".join(
                f"{user}\t{' '.join(f'i{n}' for n in rows[part])}\n"
                for user, rows in sequences.items()
            ),
            encoding="utf-8",
        )


@quick(80)
@given(
    sequences=SEQUENCES, history=st.integers(1, 4), targets=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_interactions_examples_and_candidates(tmp_path_factory, sequences, history, targets, seed):
    """What was written is read; a history is what came right before its target; a set holds its
    target, no seen item, and no title twice.
    """
    folder = tmp_path_factory.getbasetemp()
    write_splits(folder, sequences)
    data = load_interactions(folder, ITEMS)
    assert {user: list(rows) for user, rows in data.train.items()} == {
        user: rows[0] for user, rows in sequences.items()
    }
    assert data.val == data.test == {user: tuple(rows[1]) for user, rows in sequences.items()}
    for split, examples in (
        ("train", training_examples(data, targets, history)),
        ("test", heldout_examples(data, "test", history)),
    ):
        for example in examples:
            whole = [
                *sequences[example.user][0],
                *(2 * sequences[example.user][1] if split == "test" else []),
            ]
            places = [
                p
                for p, row in enumerate(whole)
                if row == example.target and whole[max(0, p - history) : p] == list(example.history)
            ]
            assert places and example.history and set(example.seen) == set(whole)
        drawn = draw_candidates(examples, ITEMS, 3, seed)
        for example in drawn:
            assert len({ITEMS.titles[row] for row in example.candidates}) == 4
            assert set(example.candidates) & set(example.seen) == {example.target}
        path = folder / "sets.json"
        save_candidates(path, drawn, ITEMS, negatives=3)
        assert load_candidates(path, examples, ITEMS, negatives=3) == drawn
        assert draw_candidates(examples[1:], ITEMS, 3, seed) == drawn[1:]


@quick(150)
@given(
    content=ANYTHING
    | st.lists(
        st.sampled_from(["u\ti1 i2\n", "v\ti3\n", "u\ti9", "\t", "i1", "\n", "w\ti77\n"]),
        max_size=5,
    ).map(lambda x: "".join(x).encode()),
    split=st.sampled_from(["train", "val", "test"]),
)
def test_interactions_of_any_bytes(tmp_path_factory, content, split):
    folder = tmp_path_factory.getbasetemp()
    write_splits(folder, {"u": ([1, 2], [3]), "v": ([4], [5])})
    (folder / f"{split}.tsv").write_bytes(content)
    data = or_refused(lambda: load_interactions(folder, ITEMS), "train.tsv", "val.tsv", "test.tsv")
    assert data is None or (
        data.train
        and all(
            0 <= row < 40
            for part in (data.train, data.val, data.test)
            for rows in part.values()
            for row in rows
        )
    )


# ---- JSON ----

TEXT = st.text(CHARACTERS.filter(lambda c: c != "\0"), max_size=10)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@quick(150)
@given(value=VALUE)
def test_json_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@quick(300)
@given(
    content=st.binary(max_size=30)
    | st.lists(
        st.sampled_from([
            "{", "}", "[", "]", '"a"', ":", ",", "1", "NaN", "-Infinity", "1e999", '"\\ud800"',
            '"\\u0000"', " ",
        ]),
        max_size=12,
    ).map(lambda parts: "".join(parts).encode())
)
def test_json_of_any_bytes(tmp_path_factory, content):
    """Whatever is accepted has no NaN, no infinity and no key twice: written again by a strict
    writer it has as many keys.
    """
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    value = or_refused(lambda: (read_json(path),), "any.json")
    if value is not None:
        again = json.dumps(value[0], allow_nan=False, separators=(",", ":"))
        assert len(re.findall(r'":', again)) == len(re.findall(rb'"\s*:', content))


def changed(content, edits):
    """Some bytes replaced by others: (place, bytes to take out, bytes to put in)."""
    for place, gone, new in edits:
        at = place % (len(content) + 1)
        content = content[:at] + new + content[at + gone :]
    return content


EDITS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 3), PIECES | st.binary(max_size=3)), min_size=1,
    max_size=4,
)


# ---- converters: a few bytes of the raw files replaced ----


@pytest.mark.parametrize(
    ("module", "name"),
    [(movielens, "1m"), (netflix, "netflix"), (microlens, "microlens"), (recbole, "recbole")],
)
def test_converters_of_spoilt_files(tmp_path, module, name):
    """Either the native layout is written and loads, or an InputError names a file, a user or an
    item, and nothing is written.
    """
    for path, text in hostile.RAW.items():
        hostile.put(path, text.encode("latin-1"))(tmp_path)
    raw, out = tmp_path / "raw" / name, tmp_path / "out"
    whole = {path: path.read_bytes() for path in sorted(raw.iterdir())}
    accepted = []

    @quick(60)
    @given(which=st.integers(0, 1), edits=EDITS)
    def holds(which, edits):
        spoilt = list(whole)[which]
        for path, content in whole.items():
            path.write_bytes(changed(content, edits) if path == spoilt else content)
        accepted.append(
            or_refused(
                lambda: module.main([str(raw), str(out), "--min-items", "3"]) or True, str(raw),
                "user", "item", "--min-items",
            )
        )
        if accepted[-1]:
            catalog = load_catalog(out)
            assert heldout_examples(load_interactions(out, catalog), "test")
            shutil.rmtree(out)
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    holds()
    assert any(accepted) and not all(accepted)  # both ways were walked


# ---- binary files: a few bytes replaced ----


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_of_spoilt_bytes(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    path = tmp_path / f"a.{suffix}"
    whole = path.read_bytes()

    @quick(120)
    @given(edits=EDITS)
    def holds(edits):
        path.write_bytes(changed(whole, edits))
        image = or_refused(lambda: read_image(path), path.name)
        assert image is None or image.mode == "RGB" and min(image.size) >= 1

    holds()


class Small(nn.Module):
    """A language model as far as LoRA looks: `model.language_model` with linears in it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.language_model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "adapter_config.json", "hanorec.json"]
)
def test_adapters_of_spoilt_bytes(tmp_path, file):
    """Loaded, then with the weights that were saved, or some of their digits changed where no hash
    guards them; or refused.
    """
    model = Small()
    add_lora(model, 2, 8.0)
    save_adapter(model, tmp_path, "small")
    path = tmp_path / file
    whole = path.read_bytes()
    if file != "hanorec.json":
        (tmp_path / "hanorec.json").unlink()  # its hash would see everything

    @quick(120)
    @given(edits=EDITS)
    def holds(edits):
        path.write_bytes(changed(whole, edits))
        fresh = Small()
        if or_refused(lambda: attach_adapter(fresh, tmp_path) or True, str(tmp_path)):
            assert all(
                weight.isfinite().all()
                for layer in lora_layers(fresh).values()
                for weight in (layer.A, layer.B)
            )

    holds()


def test_candidates_of_spoilt_bytes(tmp_path):
    """The hash guards every set: what is still accepted is what was saved."""
    write_splits(tmp_path, {"u": ([1, 2, 3], [4]), "v": ([5, 6], [7])})
    examples = heldout_examples(load_interactions(tmp_path, ITEMS), "test")
    drawn, path = draw_candidates(examples, ITEMS, 3), tmp_path / "sets.json"
    save_candidates(path, drawn, ITEMS, negatives=3)
    whole = path.read_bytes()

    @quick(150)
    @given(edits=EDITS)
    def holds(edits):
        path.write_bytes(changed(whole, edits))
        load = lambda: load_candidates(path, examples, ITEMS, negatives=3)
        assert or_refused(load, "sets.json") in (None, drawn)

    holds()


# ---- the packed batch ----

TOKENS = st.lists(st.integers(10, 99), min_size=1, max_size=5)


def test_the_answers_and_nothing_else(qwen):
    """For any prompts and answers: labels are exactly the answers; each answer's token sees its
    prompt and its own answer up to itself, nothing else; and each is predicted from the place
    before it.
    """
    @quick(80)
    @given(
        data=st.data(), answers=st.integers(1, 3), prompts=st.lists(TOKENS, min_size=1, max_size=3)
    )
    def holds(data, answers, prompts):
        rows = [
            Row(
                f"u{n}", prompt, torch.arange(len(prompt)).expand(3, -1), [],
                data.draw(st.lists(TOKENS, min_size=answers, max_size=answers)),
            )
            for n, prompt in enumerate(prompts)
        ]
        batch = collate(qwen, rows, {})
        answered = []
        for row in rows:
            answered += itertools.chain(*row.answers)
        labels = batch.labels.flatten().tolist()
        assert [label for label in labels if label != -100] == answered
        assert (batch.mask is None) == (answers == 1)
        seen_tokens = 0
        for b, row in enumerate(rows):
            end = len(row.prompt)
            start = end if answers == 1 else max(map(len, prompts))
            for answer in row.answers:
                for t, token in enumerate(answer):
                    column = start + t
                    assert batch.ids[b, column] == token
                    assert batch.positions[:, b, column].tolist() == [end + t] * 3
                    if batch.mask is not None:
                        sees = (
                            (batch.mask[b, 0, column - batch.ids.shape[1]] == 0)
                            .nonzero()
                            .flatten()
                            .tolist()
                        )
                        assert sees == [*range(end), *range(start, column + 1)]
                    assert batch.token[seen_tokens] == token and batch.row[seen_tokens] == b
                    assert batch.columns[b, batch.query[seen_tokens]] == (
                        end - 1 if t == 0 else column - 1
                    )
                    seen_tokens += 1
                start += len(answer)
        assert seen_tokens == len(batch.token)

    holds()


# ---- mathematics against the oracle, in float64 ----

def numbers(*shape, most=6.0):
    return arrays(np.float64, shape, elements=st.floats(-most, most, allow_subnormal=False))


def close(ours, theirs, tolerance=1e-9):
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=tolerance,
        atol=tolerance
    )


@quick(80)
@given(
    logits=numbers(2, 4, 5, most=300.0),
    labels=arrays(np.int64, (2, 4), elements=st.sampled_from([-100, 0, 1, 2, 3, 4])),
)
def test_sft_loss_and_log_probabilities(logits, labels):
    assume((labels[:, 1:] != -100).any())
    close(
        sft_loss(torch.tensor(logits), torch.tensor(labels)),
        oracle.sft_loss(logits.tolist(), labels.tolist()),
    )
    tokens = np.maximum(labels[0], 0)
    close(
        token_log_probs(torch.tensor(logits[0]), torch.tensor(tokens)).sum(),
        oracle.answer_log_prob(logits[0].tolist(), tokens.tolist()),
    )


@quick(80)
@given(
    four=numbers(4, 5, most=1e4), beta=arrays(np.float64, 5, elements=st.floats(1e-6, 2.0)),
    normalised_by=st.sampled_from([None, 0.1]),
)
def test_preference_losses(four, beta, normalised_by):
    h = preference_logit(*torch.tensor(four))
    close(h, oracle.preference_logit(*four.tolist()))
    close(
        dpo_loss(h, torch.tensor(beta), normalised_by),
        oracle.dpo_loss(h.tolist(), beta.tolist(), normalised_by),
    )
    close(dpo_loss(h, 0.1), oracle.dpo_loss(h.tolist(), 0.1))


@quick(60)
@given(policy=numbers(3, 4, most=200.0), ref=numbers(3, 4, most=200.0))
def test_kl(policy, ref):
    kl = kl_divergence(torch.tensor(policy), torch.tensor(ref))
    close(kl, oracle.kl_divergence(policy.tolist(), ref.tolist()))
    assert kl >= -1e-12


@quick(60)
@given(
    H=numbers(6, 3), X=numbers(6, 3), has_image=arrays(np.bool_, 6),
    form=st.sampled_from(list(GAPS)), k=st.integers(1, 5),
)
def test_clusters(H, X, has_image, form, k):
    lengths = np.linalg.norm(H, axis=1), np.where(has_image, np.linalg.norm(X, axis=1), 1)
    assume(min(map(np.min, lengths)) > 1e-3)
    unit = H / lengths[0][:, None] + np.where(has_image[:, None], X / lengths[1][:, None], 0)
    assume(np.linalg.norm(unit, axis=1).min() > 1e-2)
    e = fuse(torch.tensor(H), torch.tensor(X), torch.tensor(has_image))
    close(e, oracle.fuse(H.tolist(), X.tolist(), has_image.tolist()), 1e-8)
    scores, index = topk_neighbors(e, k)
    w, l = torch.tensor([0, 3, 5]), torch.tensor([1, 4, 2])
    delta = GAPS[form](e, scores, index, w, l)
    close(
        delta,
        [
            oracle.cluster_gap(e.tolist(), scores.tolist(), index.tolist(), int(a), int(b), form)
            for a, b in zip(w, l, strict=True)
        ],
        1e-7,
    )
    for kind in ("sigmoid", "ratio"):
        close(HARDNESS[kind](delta), oracle.hardness(delta.tolist(), kind))


@quick(150)
@given(
    rewards=st.lists(st.integers(-40, 40), min_size=3, max_size=9),
    scale=st.sampled_from([1e-6, 0.01, 1.0, 1e6]), trim=st.sampled_from([None, 0.1, 0.3]),
    mean=st.floats(-2, 2), std=st.floats(0.1, 3),
)
def test_responsiveness_and_weights(rewards, scale, trim, mean, std):
    """Whole numbers times a scale: their mean is 0 or far from it, on both sides of the threshold.
    eta depends on neither scale nor sign. That of running statistics is the oracle's, too.
    """
    # the rounding of a mean that cancels grows with the scale
    assume(sum(rewards) != 0 or scale < 1e3)
    R = torch.tensor(rewards, dtype=torch.float64) * scale
    eta = batch_eta(R, {}, trim)
    close(eta, oracle.responsiveness(R.tolist(), trim), 1e-7)
    if abs(sum(rewards)) >= 1:
        close(batch_eta(-7 * R, {}, trim), eta, 1e-7)
    state, plain = {"mean": mean, "variance": std**2}, (R / scale).tolist()
    running = ema_eta(R / scale, state, trim)
    m, variance = oracle.running_statistics(plain, (mean, std**2))
    close([state["mean"], state["variance"]], [m, variance])
    close(running, oracle.responsiveness_ema(plain, m, variance**0.5, trim))
    lam = R.sigmoid()
    close(pair_beta(lam, eta), oracle.pair_beta(lam.tolist(), eta.item()))


SCORES = arrays(
    np.float64, (6, 4), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0]) | st.floats(-3, 3)
)


@quick(120)
@given(scores=SCORES, positive=arrays(np.int64, 6, elements=st.integers(0, 3)), k=st.integers(1, 4))
def test_metrics(scores, positive, k):
    """With many ties. Ranks, HR, NDCG and both AUCs are the oracle's; a positive that alone scores
    best has rank 1.
    """
    ranks = rank_of_positive(scores, positive)
    assert ranks.tolist() == [
        oracle.rank_of_positive(row, p)
        for row, p in zip(scores.tolist(), positive.tolist(), strict=True)
    ]
    close(hit_rate(ranks, k), oracle.hit_rate(ranks.tolist(), k))
    close(ndcg(ranks, k), oracle.ndcg(ranks.tolist(), k))
    own = np.take_along_axis(scores, positive[:, None], 1)[:, 0]
    negative = scores[np.arange(4) != positive[:, None]].reshape(6, 3)
    close(auc(own, negative), oracle.auc(own.tolist(), negative.tolist()))
    close(
        pooled_auc(own, negative.ravel()),
        oracle.binary_auc(own.tolist(), negative.ravel().tolist()),
    )
    for ours, theirs in zip(
        similarity_groups(own, negative[:, 0], 3),
        oracle.similarity_groups(own.tolist(), negative[:, 0].tolist(), 3), strict=True,
    ):
        close(ours, theirs)
