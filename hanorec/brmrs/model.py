r"""BR-MRS, the recommender: two branches, their fusion, and the objective of one batch.

Branch m in {t, v}: (z_u^m, z_i^m) = LightGCN_L(G_uu U^m, G_ii (W_m x_i^m + E_i^m)), x = the features, centred and of length 1;
G h = h + A h with the graph's A, or h without a graph.
A score is always an inner product: s_m(u, i) = <z_u^m, z_i^m>, m in {t, v, f}; recommendations go by s_f.
U = users, I = items, d = width of a branch, B = triples of a batch, n = items of a pool.
Source: document 003 for the objective; its score functions are not in the draft: backbone of the later manuscript, fusion ours.
"""



import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.config_brmrs import BrmrsConfig
from hanorec.base.errors import InputError
from hanorec.brmrs.graph import incidence, interaction_graph, lightgcn, likeness_graph, smooth
from hanorec.brmrs.losses import bpr_loss, chns_loss, hard_negatives, synergy_loss, total_loss
from hanorec.ranking.full_ranking import Embeddings, scores
from hanorec.ranking.sampler import NegativeSampler, distinct_pairs

MODALITIES = {"t": "text", "v": "image"}


INITIAL_STD = 0.1  # LightGCN's; of W too, so that the part W x (length of x = 1) starts as large as the part E


class BRMRS(nn.Module):
    """The embeddings and what makes them.

    Args:
        features: "t" and "v" -> (I, d_m) float, row = item. One of them may be missing if lambda_h = lambda_s = 0; s_f is then its score.
        users, items: (E,) int64 train pairs, on the features' device.
    Raises:
        InputError: a modality is missing or has the wrong number of rows; train pairs out of range.
    """

    def __init__(self, n_users: int, n_items: int, features: dict[str, Tensor], users: Tensor, items: Tensor, config: BrmrsConfig) -> None:
        super().__init__()
        self.sizes, self.config = [n_users, n_items], config
        self.modalities = [m for m in MODALITIES if m in features]
        if not self.modalities:
            raise InputError("no item features at all, expected those of text, of images or both; add a file of features")
        for m, name in MODALITIES.items():
            if m not in features and (config.lambda_h or config.lambda_s):
                raise InputError(f"no {name} features, but --lambda-h {config.lambda_h} and --lambda-s {config.lambda_s} compare two modalities: "
                                 f"add the file of {name} features, or set --lambda-h 0 --lambda-s 0 to train on the other modality alone")
            if m in features and (features[m].ndim != 2 or len(features[m]) != n_items):
                raise InputError(f"{name} features of shape {tuple(features[m].shape)}, expected one row for each of {n_items} items; "
                                 "remake the file from the same item list")
        x = {m: unit_rows(features[m]) if config.normalise else features[m] for m in self.modalities}

        d = config.dim
        owners = self.modalities if config.user_embedding == "per_modality" else ["shared"]
        self.user = nn.ParameterDict({m: INITIAL_STD * torch.randn(n_users, d) for m in owners})
        self.item = nn.ParameterDict({m: INITIAL_STD * torch.randn(n_items, d) for m in self.modalities if config.item_embedding == "per_branch"})
        self.W = nn.ParameterDict({m: INITIAL_STD * torch.randn(x[m].shape[1], d) for m in self.modalities})
        if config.fusion == "mlp" and len(x) == 2:
            self.item_mlp = nn.Sequential(nn.Linear(3 * d, d), nn.LeakyReLU(), nn.Linear(d, d))
            self.user_map = nn.Linear(2 * d, d, bias=False)

        users, items = distinct_pairs(users, items, n_users, n_items)
        constants = {f"x_{m}": x[m] for m in x} | {"graph": interaction_graph(users, items, n_users, n_items)}
        if config.item_graph:
            constants["item_graph"] = likeness_graph(items, users, n_items, n_users, list(x.values()), config.item_graph, config.graph_alpha)
        if config.user_graph:
            taste = [torch.sparse.mm(incidence(users, items, n_users, n_items), f) for f in x.values()]  # (U, d_m): sums over a user's items
            constants["user_graph"] = likeness_graph(users, items, n_users, n_items, taste, config.user_graph, config.graph_alpha)
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)  # moves with the model, is not saved with it

    def propagate(self) -> Embeddings:
        """All embeddings of the three branches, with gradients; once a step."""
        user, item = {}, {}
        for m in self.modalities:
            z_u = self.user[m if m in self.user else "shared"]  # (U, d)
            z_i = getattr(self, f"x_{m}") @ self.W[m]  # (I, d)
            if m in self.item:
                z_i = z_i + self.item[m]
            if self.config.user_graph:
                z_u = z_u + smooth(self.user_graph, z_u)
            if self.config.item_graph:
                z_i = z_i + smooth(self.item_graph, z_i)
            user[m], item[m] = lightgcn(self.graph, torch.cat([z_u, z_i]), self.config.layers).split(self.sizes)
        user["f"], item["f"] = self.fuse([user[m] for m in self.modalities], [item[m] for m in self.modalities])
        return Embeddings(user, item)

    def fuse(self, user: list[Tensor], item: list[Tensor]) -> tuple[Tensor, Tensor]:
        r"""[(U, d)] and [(I, d)] of the modalities, t before v -> (U, d_f), (I, d_f)."""
        fusion = self.config.fusion
        if len(user) == 1:
            return user[0], item[0]
        if fusion == "sum":  # s_f = s_t + s_v + <z_u^t, z_i^v> + <z_u^v, z_i^t>
            return user[0] + user[1], item[0] + item[1]
        if fusion == "concat":  # s_f = s_t + s_v, so Delta_f - max(Delta_t, Delta_v) = min(Delta_t, Delta_v): L_syn is BPR on the weaker modality
            return torch.cat(user, 1), torch.cat(item, 1)
        if fusion == "mlp":  # s_f = s_t + s_v + <W [z_u^t; z_u^v], MLP(...)>: can hold a preference that neither modality shows alone
            return (torch.cat([*user, self.user_map(torch.cat(user, 1))], 1),
                    torch.cat([*item, self.item_mlp(torch.cat([*item, item[0] * item[1]], 1))], 1))
        raise InputError(f"--fusion {fusion}: expected mlp, concat or sum")

    def regulariser(self, users: Tensor, items: Tensor) -> Tensor:
        r"""||Theta||^2 as LightGCN takes it: half the squared norm of the batch's rows of the embedding tables U^m and E^m, divided by B.

        users (B,), items (B, k) -> (). W and the fusion's weights are not in it.
        """
        rows = [F.embedding(users, table) for table in self.user.values()] + [F.embedding(items, table) for table in self.item.values()]
        return sum(row.square().sum() for row in rows) / (2 * len(users))


def unit_rows(x: Tensor) -> Tensor:
    r"""Features (I, d_m), centred over the items, then each row of length 1; a row equal to the mean is 0, whatever rounding leaves of it."""
    centred = x - x.mean(0)
    return F.normalize(centred.masked_fill(centred.norm(dim=1, keepdim=True) <= 1e-5 * x.norm(dim=1, keepdim=True), 0), dim=1)


def step_loss(model: BRMRS, users: Tensor, positives: Tensor, sampler: NegativeSampler, config: BrmrsConfig,
              generator: torch.Generator | None = None, part: slice = slice(None)) -> tuple[Tensor, dict[str, float]]:
    r"""BR-1 .. BR-6 for one batch of train pairs (u, i+).

    Args:
        users, positives: (B,) int64. part: what of the batch counts here; negatives are drawn for all of it, so that processes that
            divide a batch draw what a single one does.
    Returns:
        loss (), and numbers to log, each a mean over the batch: the terms `bpr`, `chns`, `syn`, the squared norm `norm`, the margins
        `gap_t`, `gap_v`, `gap_f`, and `win`, the share of triples where the fused margin exceeds every unimodal one.
    """
    emb = model.propagate()
    drawn = sampler.draw(users, 1 + config.pool, generator)[part]  # (B, 1 + n): the same draws whichever losses are on, so that runs compare
    users, positives = users[part], positives[part]
    negatives, pool = drawn[:, :1], drawn[:, 1:]
    if config.hard_fused:
        with torch.no_grad():
            negatives = pool.gather(1, scores(emb, "f", users, pool).argmax(1, keepdim=True))  # (B, 1)

    triple = torch.cat([positives[:, None], negatives], 1)  # (B, 2): i+ and i-
    s = {m: scores(emb, m, users, triple) for m in emb.user}  # (B, 2) each
    gap = {m: s[m][:, 0] - s[m][:, 1] for m in s}  # (B,) each: Delta_m
    best = torch.stack([gap[m] for m in model.modalities]).amax(0).detach()  # (B,)

    bpr = bpr_loss(gap["f"])
    chns = syn = torch.zeros_like(bpr)
    if config.lambda_h:
        for_t, for_v = rivals(emb, users, pool, config.routing)
        chns = chns_loss(s["t"][:, 0], scores(emb, "t", users, for_t)[:, 0], s["v"][:, 0], scores(emb, "v", users, for_v)[:, 0])
    if config.lambda_s:
        syn = synergy_loss(gap["f"], gap["t"], gap["v"], config.theta, config.detach)
    norm = model.regulariser(users, triple)
    loss = total_loss(bpr, chns, syn, norm, config.lambda_h, config.lambda_s, config.weight_decay, config.bpr_weight)
    if config.unimodal_bpr:
        loss = loss + config.unimodal_bpr * sum(bpr_loss(gap[m]).mean() for m in model.modalities)

    log = {"bpr": bpr, "chns": chns, "syn": syn, "norm": norm, **{f"gap_{m}": gap[m] for m in gap}, "win": (gap["f"] > best).float()}
    return loss, dict(zip(log, torch.stack([value.detach().mean() for value in log.values()]).tolist(), strict=True))


@torch.no_grad()
def rivals(emb: Embeddings, users: Tensor, pool: Tensor, routing: str) -> tuple[Tensor, Tensor]:
    r"""The pool's items that text and the image must tell apart from i+: (B, n) -> for_t, for_v, each (B, 1).

    cross (document): each gets what confuses the other. Controls: same: each gets what confuses itself; random: the first and
    the last of the pool, which was drawn at random.
    """
    if routing == "random":
        return pool[:, :1], pool[:, -1:]
    j_v, j_t = hard_negatives(scores(emb, "v", users, pool), scores(emb, "t", users, pool))  # (B,) each
    j_v, j_t = pool.gather(1, j_v[:, None]), pool.gather(1, j_t[:, None])  # (B, 1) each: items
    if routing == "cross":
        return j_v, j_t
    if routing == "same":
        return j_t, j_v
    raise InputError(f"--routing {routing}: expected cross, same or random")
