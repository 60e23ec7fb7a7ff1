"""BR-MRS: a text branch, an image branch and their fusion, trained to rank (BR-1 .. BR-6).

    python train_brmrs.py --data DATA --out OUT [--lambda-h 0] [--lambda-s 0] [...]
    python train_brmrs.py --data NATIVE --model MODEL --out OUT
        features of titles and images from a checkpoint

DATA: a folder as users of the MMRec toolbox have it, or one in the native layout. OUT receives
log.jsonl (a line an epoch), run.json, the best epoch's weights (model.safetensors, model.json),
what retrieval needs (embeddings.safetensors, names.json), and at last metrics.json with the test
metrics and their rows for each user. The best epoch is the one with the highest Recall@20 on
validation. The same command again goes on with a stopped run from its last whole epoch, and ends as
if it had never been stopped.
"""

from collections.abc import Sequence

from hanorec.base import command
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.settings import parse

KINDS = [BrmrsFiles, BrmrsConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__)  # --help needs no torch

import torch
from torch import Tensor

from hanorec.brmrs.losses import bpr_loss, chns_loss, synergy_loss, total_loss
from hanorec.brmrs.model import BRMRS, hardest, rivals
from hanorec.ranking.full_ranking import scores, wins
from hanorec.ranking.sampler import NegativeSampler
from hanorec.run.ranking_run import RankingRun, means_of


def main(argv: Sequence[str] | None = None) -> None:
    train(*parse(KINDS, argv, __doc__))


def train(files: BrmrsFiles, config: BrmrsConfig) -> None:
    run = RankingRun(files, config)
    users, items = run.users, run.items  # (E,) each: the train pairs
    n_users, n_items = len(run.data.users), len(run.data.items)
    features = {m: x.to(run.device) for m, x in run.data.features.items()}  # (I, d_m) each
    model = BRMRS(n_users, n_items, features, users, items, config).to(run.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    sampler = NegativeSampler(users, items, n_users, n_items)

    for _ in run.epochs(model, optimizer, sampler):
        for batch, part, weight in run.batches():
            u, i = users[batch], items[batch]  # (B,) each
            loss, terms = step_loss(model, u, i, sampler, config, run.generator, part)
            (weight * loss).backward()
            run.update(batch, weight, loss=loss.item(), **terms)
    run.finish()


def step_loss(
    model: BRMRS,
    users: Tensor,
    positives: Tensor,
    sampler: NegativeSampler,
    config: BrmrsConfig,
    generator: torch.Generator | None = None,
    part: slice = slice(None),
) -> tuple[Tensor, dict[str, float]]:
    r"""The objective of one batch of train pairs (u, i+).

    Args:
        users, positives: (B,) int64.
        part: what of the batch counts here; negatives are drawn for all of it, so that processes
            that divide a batch draw what a single one does.
    Returns:
        loss (), and what the log shows, means over the part: the terms of BR-6, each branch's
        margin, and `win`, the share of triples where the fused margin exceeds every unimodal one.
    """
    emb = model.propagate()  # branch m in t, v, f -> z_u^m (U, d), z_i^m (I, d)

    # The same draws whichever losses are on, so that runs compare.
    drawn = sampler.draw(users, 1 + config.pool, generator)[part]  # BR-1: (B, 1 + n)
    users, positives = users[part], positives[part]
    negatives, pool = drawn[:, :1], drawn[:, 1:]
    if config.hard_fused:  # a control
        negatives = hardest(emb, users, pool)  # (B, 1)

    triple = torch.cat([positives[:, None], negatives], 1)  # (B, 2): i+, i-
    s = {m: scores(emb, m, users, triple) for m in emb.user}  # (B, 2) each
    gap = {m: s[m][:, 0] - s[m][:, 1] for m in s}  # Delta_m: (B,) each

    bpr = bpr_loss(gap["f"])  # BR-5: (B,)
    chns = syn = torch.zeros_like(bpr)
    if config.lambda_h:
        for_t, for_v = rivals(emb, users, pool, config.routing)  # BR-2: j_v and j_t, (B, 1) each
        t_at_jv = scores(emb, "t", users, for_t)[:, 0]  # (B,)
        v_at_jt = scores(emb, "v", users, for_v)[:, 0]  # (B,)
        chns = chns_loss(s["t"][:, 0], t_at_jv, s["v"][:, 0], v_at_jt)  # BR-3: (B,)
    if config.lambda_s:
        syn = synergy_loss(gap["f"], gap["t"], gap["v"], config.theta, config.detach)  # BR-4: (B,)

    norm = model.regulariser(users, triple)  # ()
    weights = config.lambda_h, config.lambda_s, config.weight_decay, config.bpr_weight
    loss = total_loss(bpr, chns, syn, norm, *weights)  # BR-6: ()
    if config.unimodal_bpr:  # a control
        alone = [bpr_loss(gap[m]).mean() for m in model.modalities]
        loss = loss + config.unimodal_bpr * sum(alone)

    terms = {"bpr": bpr, "chns": chns, "syn": syn, "norm": norm}
    terms |= {f"gap_{m}": gap[m] for m in gap}
    return loss, means_of({**terms, "win": wins(gap).float()})
