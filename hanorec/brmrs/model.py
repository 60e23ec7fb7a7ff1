r"""BR-MRS, the recommender: two branches and their fusion.

Branch m in {t, v}: (z_u^m, z_i^m) = LightGCN_L(G_uu U^m, G_ii (W_m x_i^m + E_i^m)), x = the
features, centred and of length 1; G h = h + A h with the graph's A, or h without a graph.

A score is always an inner product: s_m(u, i) = <z_u^m, z_i^m>, m in {t, v, f}; recommendations go
by s_f. U = users, I = items, d = width of a branch, B = triples of a batch, n = items of a pool.

Source: document 003 for the objective; its score functions are not in the draft: backbone of the
later manuscript, fusion ours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.config_brmrs import BrmrsConfig
from hanorec.base.errors import InputError
from hanorec.brmrs.graph import incidence, interaction_graph, lightgcn, likeness_graph, smooth
from hanorec.brmrs.losses import hard_negatives
from hanorec.ranking.full_ranking import Embeddings, scores
from hanorec.ranking.sampler import distinct_pairs

MODALITIES = {"t": "text", "v": "image"}

# LightGCN's; of W too, so that the part W x (length of x = 1) starts as large as the part E.
INITIAL_STD = 0.1


class BRMRS(nn.Module):
    """The embeddings and what makes them.

    Args:
        features: "t" and "v" -> (I, d_m) float, row = item. One of them may be missing if lambda_h
            = lambda_s = 0; s_f is then its score.
        users, items: (E,) int64 train pairs, on the features' device.
    Raises:
        InputError: a modality is missing or has the wrong number of rows; train pairs out of range.
    """

    def __init__(
        self,
        n_users: int,
        n_items: int,
        features: Mapping[str, Tensor],
        users: Tensor,
        items: Tensor,
        config: BrmrsConfig,
    ) -> None:
        super().__init__()
        _check_features(features, n_items, config)
        self.sizes, self.config = [n_users, n_items], config
        self.modalities = [m for m in MODALITIES if m in features]
        x = {m: features[m] for m in self.modalities}  # (I, d_m) each
        if config.normalise:
            x = {m: unit_rows(of_modality) for m, of_modality in x.items()}

        d = config.dim
        per_modality = config.user_embedding == "per_modality"
        owners = self.modalities if per_modality else ["shared"]
        with_own_embedding = self.modalities if config.item_embedding == "per_branch" else []
        self.user = nn.ParameterDict({m: _table(n_users, d) for m in owners})  # U^m
        self.item = nn.ParameterDict({m: _table(n_items, d) for m in with_own_embedding})  # E^m
        self.W = nn.ParameterDict({m: _table(x[m].shape[1], d) for m in x})  # (d_m, d)
        if config.fusion == "mlp" and len(x) == 2:
            self.item_mlp = nn.Sequential(nn.Linear(3 * d, d), nn.LeakyReLU(), nn.Linear(d, d))
            self.user_map = nn.Linear(2 * d, d, bias=False)

        constants = self._graphs(x, *distinct_pairs(users, items, n_users, n_items))
        constants |= {f"x_{m}": x[m] for m in x}
        for name, constant in constants.items():
            # It moves with the model and is not saved with it.
            self.register_buffer(name, constant, persistent=False)

    def _graphs(self, x: Mapping[str, Tensor], users: Tensor, items: Tensor) -> dict[str, Tensor]:
        """`hanorec.brmrs.graph`, of the distinct train pairs (E',): name -> matrix."""
        (n_users, n_items), config = self.sizes, self.config
        _check_graphs(n_users, n_items, config)
        graphs = {"graph": interaction_graph(users, items, n_users, n_items)}
        if config.item_graph:
            graphs["item_graph"] = likeness_graph(
                items, users, n_items, n_users,
                list(x.values()), config.item_graph, config.graph_alpha,
            )
        if config.user_graph:
            R = incidence(users, items, n_users, n_items)  # (U, I)
            taste = [torch.sparse.mm(R, f) for f in x.values()]  # (U, d_m): sums over their items
            graphs["user_graph"] = likeness_graph(
                users, items, n_users, n_items,
                taste, config.user_graph, config.graph_alpha,
            )
        return graphs

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
            z = lightgcn(self.graph, torch.cat([z_u, z_i]), self.config.layers)  # (U + I, d)
            user[m], item[m] = z.split(self.sizes)
        user["f"], item["f"] = self.fuse(list(user.values()), list(item.values()))
        return Embeddings(user, item)

    def fuse(self, user: list[Tensor], item: list[Tensor]) -> tuple[Tensor, Tensor]:
        r"""[(U, d)] and [(I, d)] of the modalities, t before v -> (U, d_f), (I, d_f)."""
        fusion = self.config.fusion
        if len(user) == 1:
            return user[0], item[0]
        if fusion == "sum":  # s_f = s_t + s_v + <z_u^t, z_i^v> + <z_u^v, z_i^t>
            return user[0] + user[1], item[0] + item[1]
        if fusion == "concat":
            # s_f = s_t + s_v, so Delta_f - max(Delta_t, Delta_v) = min(Delta_t, Delta_v): L_syn is
            # BPR on the weaker modality.
            return torch.cat(user, 1), torch.cat(item, 1)
        if fusion == "mlp":
            # s_f = s_t + s_v + <W [z_u^t; z_u^v], MLP(...)>: it can hold a preference that neither
            # modality shows alone.
            user_f = torch.cat([*user, self.user_map(torch.cat(user, 1))], 1)  # (U, 3d)
            crossed = torch.cat([*item, item[0] * item[1]], 1)  # (I, 3d)
            item_f = torch.cat([*item, self.item_mlp(crossed)], 1)  # (I, 3d)
            return user_f, item_f
        raise InputError(f"--fusion {fusion}: expected mlp, concat or sum")

    def regulariser(self, users: Tensor, items: Tensor) -> Tensor:
        r"""||Theta||^2 as LightGCN takes it: users (B,), items (B, k) -> ().

        That is half the squared norm of the batch's rows of the embedding tables U^m and E^m,
        divided by B. W and the fusion's weights are not in it.
        """
        rows = [F.embedding(users, table) for table in self.user.values()]
        rows += [F.embedding(items, table) for table in self.item.values()]
        return sum(row.square().sum() for row in rows) / (2 * len(users))


def _check_features(features: Mapping[str, Tensor], n_items: int, config: BrmrsConfig) -> None:
    if not features.keys() & MODALITIES:
        raise InputError(
            "no item features at all, expected those of text, of images or both; add a file of "
            "features"
        )
    for m, name in MODALITIES.items():
        if m not in features and (config.lambda_h or config.lambda_s):
            raise InputError(
                f"no {name} features, but --lambda-h {config.lambda_h} and --lambda-s "
                f"{config.lambda_s} compare two modalities: add the file of {name} features, or "
                "set --lambda-h 0 --lambda-s 0 to train on the other modality alone"
            )
        if m in features and (features[m].ndim != 2 or len(features[m]) != n_items):
            raise InputError(
                f"{name} features of shape {tuple(features[m].shape)}, expected one row for each "
                f"of {n_items} items; remake the file from the same item list"
            )


def _check_graphs(n_users: int, n_items: int, config: BrmrsConfig) -> None:
    graphs = {"item": (config.item_graph, n_items), "user": (config.user_graph, n_users)}
    for kind, (k, n) in graphs.items():
        if k >= n:
            raise InputError(
                f"--{kind}-graph {k}: K = {k} of {n} {kind}s, expected at most {n - 1}; choose a "
                "smaller one, or 0 for no such graph"
            )


def _table(rows: int, width: int) -> Tensor:
    return INITIAL_STD * torch.randn(rows, width)


def unit_rows(x: Tensor) -> Tensor:
    r"""Features (I, d_m), centred over the items, then each row of length 1.

    A row equal to the mean is 0, whatever rounding leaves of it.
    """
    centred = x - x.mean(0)
    is_mean = centred.norm(dim=1, keepdim=True) <= 1e-5 * x.norm(dim=1, keepdim=True)  # (I, 1)
    return F.normalize(centred.masked_fill(is_mean, 0), dim=1)


# ---- what a pool is searched for ----


@torch.no_grad()
def rivals(emb: Embeddings, users: Tensor, pool: Tensor, routing: str) -> tuple[Tensor, Tensor]:
    r"""The pool's items that text and the image must tell apart from i+.

    cross (document): each gets what confuses the other. Controls: same: each gets what confuses
    itself; random: the first and the last of the pool, which was drawn at random.

    users (B,), pool (B, n) -> for text and for the image, (B, 1) each.
    """
    if routing == "random":
        return pool[:, :1], pool[:, -1:]
    s_v, s_t = scores(emb, "v", users, pool), scores(emb, "t", users, pool)  # (B, n) each
    j_v, j_t = hard_negatives(s_v, s_t)  # (B,) each: places in the pool
    j_v, j_t = pool.gather(1, j_v[:, None]), pool.gather(1, j_t[:, None])  # (B, 1) each: items
    if routing == "cross":
        return j_v, j_t
    if routing == "same":
        return j_t, j_v
    raise InputError(f"--routing {routing}: expected cross, same or random")


@torch.no_grad()
def hardest(emb: Embeddings, users: Tensor, pool: Tensor) -> Tensor:
    r"""A control: the pool's item with the largest s_f. users (B,), pool (B, n) -> (B, 1)."""
    s_f = scores(emb, "f", users, pool)  # (B, n)
    return pool.gather(1, s_f.argmax(1, keepdim=True))
