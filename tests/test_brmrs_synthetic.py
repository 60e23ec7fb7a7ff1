r"""BR-MRS on small worlds whose truth is known: who likes what is decided by a bit in the text, a
bit in the image, both, or their XOR.

Items are their features alone and there is no graph, so that a branch can know only what its
modality shows. A branch score is then linear in the features of its modality, and so is s_t + s_v
in those of both; no linear score can follow an XOR. Figures are AUC on items that nobody had in
training: the share of (liked, disliked) pairs in the right order, chance 0.5. On known items the
MLP's would say little: it has weights enough to learn each item's fans by heart.
"""

from functools import cache

import numpy as np
import pytest
import torch

from hanorec.base.config_brmrs import BrmrsConfig
from hanorec.brmrs.model import BRMRS
from hanorec.ranking.sampler import NegativeSampler
from train_brmrs import step_loss

U, I = 60, 160  # users; items of training, and as many new ones
CHANCE, MASTERED = 0.7, 0.9


def items_of(kind, random, directions):
    """Features of I items in both modalities and their trait (I,): the two bits are crossed evenly
    (equal in `both`), so neither says anything of the other, nor of their XOR.
    """
    crossed = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])
    text, image = crossed[random.permutation(np.arange(I) % 4)].T
    image = text if kind == "both" else image
    features = [
        np.outer(bit, direction) + 0.5 * random.standard_normal((I, 8))
        for bit, direction in zip((text, image), directions, strict=True)
    ]
    trait = {"text": text, "image": image, "both": text, "xor": text * image}[kind]
    features = torch.tensor(np.array(features), dtype=torch.float32)
    return dict(zip("tv", features, strict=True)), trait


@cache
def trained(kind, seed=0, shuffled=False, **options):
    """After 120 steps, branch -> (U, I / 2) scores of the new items that each user likes, and of
    those they do not. Each half of the users likes one half of the items; half of what they like
    are train pairs.
    """
    random = np.random.default_rng(seed)
    directions, taste = random.standard_normal((2, 8)), np.resize([1, -1], U)
    features, trait = items_of(kind, random, directions)
    if shuffled:
        features["t"] = features["t"][torch.as_tensor(random.permutation(I))]
    liked = taste[:, None] == trait  # (U, I)
    users, items = (
        torch.as_tensor(ids) for ids in (liked & (random.random((U, I)) < 0.5)).nonzero()
    )
    config = BrmrsConfig(**{
        "dim": 8, "layers": 0, "item_embedding": "none", "weight_decay": 0.0, **options
    })
    torch.manual_seed(seed)
    model = BRMRS(U, I, features, users, items, config)
    sampler = NegativeSampler(users, items, U, I)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        batch = torch.randint(len(users), (256,), generator=generator)
        optimizer.zero_grad()
        step_loss(model, users[batch], items[batch], sampler, config, generator)[0].backward()
        optimizer.step()

    features, trait = items_of(kind, random, directions)
    new = BRMRS(U, I, features, users, items, config)
    new.load_state_dict(model.state_dict())
    emb = new.propagate()
    s = {m: (emb.user[m] @ emb.item[m].T).detach().numpy() for m in "tvf"}  # (U, I)
    liked = taste[:, None] == trait
    return {m: (s[m][liked].reshape(U, -1), s[m][~liked].reshape(U, -1)) for m in s}


def auc(*world, **options):
    return {
        m: (yes[:, :, None] > no[:, None]).mean()
        for m, (yes, no) in trained(*world, **options).items()
    }


def margin(*world, **options):
    return {m: yes.mean() - no.mean() for m, (yes, no) in trained(*world, **options).items()}


SEEDS = pytest.mark.parametrize("seed", [0, 1])


@pytest.mark.parametrize("fusion", ["mlp", "concat", "sum"])
@pytest.mark.parametrize(("kind", "knows"), [("text", "t"), ("image", "v"), ("both", "tv")])
def test_the_branches_tell_which_modality_carries_the_preference(kind, knows, fusion):
    result = auc(kind, fusion=fusion)
    assert result["f"] > MASTERED
    for m in "tv":
        assert result[m] > MASTERED if m in knows else result[m] < CHANCE


@SEEDS
def test_control_text_of_other_items(seed):
    """The same world with the texts dealt out at random: nothing left to know."""
    assert max(auc("text", seed, shuffled=True).values()) < CHANCE


@SEEDS
def test_only_the_mlp_can_hold_a_preference_that_neither_modality_shows(seed):
    assert auc("xor", seed)["f"] > MASTERED
    for fusion in ("concat", "sum"):
        assert auc("xor", seed, fusion=fusion)["f"] < CHANCE
    for m in "tv":
        assert auc("xor", seed)[m] < CHANCE


@SEEDS
def test_the_fusion_decides_not_the_losses(seed):
    """With mlp, plain BPR masters XOR, and so does the synergy loss alone; no loss makes concat do
    it. CHNS never looks at the fusion: alone, it trains both branches and leaves XOR at chance.
    """
    plain, alone = {"lambda_h": 0.0, "lambda_s": 0.0}, {"lambda_h": 0.0, "bpr_weight": 0.0}
    assert auc("xor", seed, **plain)["f"] > MASTERED
    assert auc("xor", seed, **alone)["f"] > MASTERED
    assert auc("xor", seed, fusion="concat", **plain)["f"] < CHANCE
    chns = {"lambda_s": 0.0, "bpr_weight": 0.0}
    assert min(auc("both", seed, **chns).values()) > MASTERED
    assert auc("xor", seed, **chns)["f"] < CHANCE


@SEEDS
def test_literal_synergy_alone_holds_the_better_modality_down(seed):
    """What the max allows: alone, with the gradient through it, the fusion wins while the text,
    which carries all, keeps a far smaller share of the margin than with the max detached. BPR and
    CHNS beside it lift the text above both.
    """
    alone = {"lambda_h": 0.0, "bpr_weight": 0.0}
    literal = margin("text", seed, **alone)
    detached = margin("text", seed, detach=True, **alone)
    full = margin("text", seed)
    share = [gaps["t"] / gaps["f"] for gaps in (literal, detached, full)]
    assert 2 * share[0] < share[1] < share[2]
    assert auc("text", seed, **alone)["f"] > MASTERED
