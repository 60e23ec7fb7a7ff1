"""BR-MRS: a recommender with a text branch, an image branch and their fusion, trained to rank (BR-1 .. BR-6).

    python train_brmrs.py --data DATA --out OUT [--lambda-h 0] [--lambda-s 0] [...]
    python train_brmrs.py --data NATIVE --model MODEL --out OUT                     features of titles and images from a checkpoint

DATA: a folder as users of the MMRec toolbox have it, or one in the native layout. OUT receives log.jsonl (a line an epoch), run.json,
the best epoch's weights (model.safetensors, model.json), what retrieval needs (embeddings.safetensors, names.json), and at last
metrics.json with the test metrics and their rows for each user. The best epoch is the one with the highest Recall@20 on validation.
The same command again goes on with a stopped run from its last whole epoch, and ends as if it had never been stopped.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from hanorec.base.command import run
from hanorec.base.config_brmrs import BrmrsConfig, BrmrsFiles
from hanorec.base.distributed import join, rank, run_on_all_ranks, share, sum_gradients, usable_device
from hanorec.base.errors import InputError
from hanorec.base.files import write_bytes, write_json
from hanorec.base.settings import parse
from hanorec.brmrs.model import BRMRS, step_loss
from hanorec.datasets.mmrec import read_mmrec, write_mmrec
from hanorec.ranking.full_ranking import AT, Seen, evaluate
from hanorec.ranking.pairs import load_ranking_data
from hanorec.ranking.sampler import NegativeSampler
from hanorec.run.checkpoint import drop_checkpoints, load_checkpoint, save_checkpoint
from hanorec.run.record import all_settings, append_log, open_run, write_run

DATA = "data"  # in OUT: a native folder's pairs and features, as they were when the run began


def write_tensors(path: Path, **tensors: Tensor) -> None:
    write_bytes(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def train(files: BrmrsFiles, config: BrmrsConfig) -> None:
    device = usable_device(files.device)
    join(device)
    out = open_run(files.out, all_settings([files, config]), "metrics.json")
    kept = run_on_all_ranks((out / DATA).exists)[0]
    data = read_mmrec(out / DATA) if kept else load_ranking_data(files)
    users, items = data.train.to(device)  # (E,) each
    n_users, n_items = len(data.users), len(data.items)
    torch.manual_seed(config.seed)
    model = BRMRS(n_users, n_items, {m: x.to(device) for m, x in data.features.items()}, users, items, config).to(device)
    weights = dict(model.named_parameters())
    best = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
    sampler, seen = NegativeSampler(users, items, n_users, n_items), Seen(users, items, n_users)
    generator = torch.Generator(device).manual_seed(config.seed)
    held_out = {split: getattr(data, split).to(device) for split in ("valid", "test")}
    # One negative for each held-out pair, the same in every epoch: branch margins are measured against it.
    negatives = {split: sampler.draw(pairs[0], 1, torch.Generator(device).manual_seed(0))[:, 0] for split, pairs in held_out.items()}

    # Not before all input has proved good. A run that goes on must still find the data that it began with.
    write_run(out, [files, config], {"data": data.sha256()}, users=n_users, items=n_items, pairs=len(users), weights=sum(w.numel() for w in best.values()))
    if files.model is not None and not kept and rank() == 0:
        write_mmrec(out / DATA, data)

    # The newest checkpoint, if there is one: weights, best weights, Adam's moments, the generator's state, the log's length.
    random = {"loop": generator}
    epoch, facts = load_checkpoint(out, [*weights.values(), *best.values()], optimizer, random)
    score, best_epoch = facts.get("score", -1.0), facts.get("best_epoch", 0)  # validation Recall@20, never rounded
    bar = tqdm(total=config.epochs, initial=epoch, desc="epochs", disable=None)
    while epoch < config.epochs and epoch - best_epoch < config.patience:
        epoch += 1
        means: Counter[str] = Counter()
        for batch in torch.randperm(len(users), generator=generator, device=device).split(config.batch):
            own = share(len(batch))  # several processes divide the triples; tables, graphs and draws are the same in all of them
            weight = (own.stop - own.start) / len(batch)  # one without a triple computes the first at weight 0
            loss, terms = step_loss(model, users[batch], items[batch], sampler, config, generator, own if weight else slice(0, 1))
            optimizer.zero_grad()
            (weight * loss).backward()
            values = sum_gradients(list(weights.values()), *(weight * value for value in (loss.item(), *terms.values())))
            if not math.isfinite(values[0]):
                raise InputError(f"epoch {epoch}: loss {values[0]}, expected a finite number; the last checkpoint stands: lower --learning-rate")
            optimizer.step()
            for name, value in zip(("loss", *terms), values, strict=True):
                means[name] += value * len(batch) / len(users)

        with torch.no_grad():
            report, _, _ = evaluate(model.propagate(), held_out["valid"], seen, negatives["valid"])
        recall = report[f"Recall@{AT}"]
        if recall > score:
            score, best_epoch = recall, epoch
            for name, weight in weights.items():
                best[name].copy_(weight.detach())
        append_log(out / "log.jsonl", {"epoch": epoch, **means, **{f"valid_{name}": value for name, value in report.items()}})
        save_checkpoint(out, epoch, [*weights.values(), *best.values()], optimizer, random, score=score, best_epoch=best_epoch)
        bar.update()
        bar.set_postfix({f"valid Recall@{AT}": f"{recall:.4f}", "best": f"{score:.4f}"})
    bar.close()

    model.load_state_dict(best)
    with torch.no_grad():
        emb = model.propagate()
        valid, _, _ = evaluate(emb, held_out["valid"], seen, negatives["valid"])
        test, who, rows = evaluate(emb, held_out["test"], seen, negatives["test"])
    if rank() > 0:
        return
    write_tensors(out / "model.safetensors", **best)
    write_json(out / "model.json", {"epoch": best_epoch, f"valid_Recall@{AT}": score, "config": asdict(config)})
    write_tensors(out / "embeddings.safetensors", user=emb.user["f"], item=emb.item["f"], train=data.train)
    write_json(out / "names.json", {"users": data.users, "items": data.items})
    write_json(out / "metrics.json", {"epochs": epoch, "best_epoch": best_epoch, "valid": valid, "test": test,
                                      "users": [data.users[u] for u in who], "rows": {name: values.tolist() for name, values in rows.items()}})
    drop_checkpoints(out)
    shown = ", ".join(f"{name} {test[name]:.4f}" for name in ("Recall@10", "Recall@20", "NDCG@10", "NDCG@20"))
    print(f"best epoch {best_epoch} of {epoch}; test: {shown}; wrote {out / 'metrics.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    train(*parse([BrmrsFiles, BrmrsConfig], argv, __doc__))


if __name__ == "__main__":
    run(main)
