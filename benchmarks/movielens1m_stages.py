"""How benchmarks/movielens1m_base.py teaches, and its first and last stage; the second is in
movielens1m_names.py. A stage makes of the checkpoint before it the one after it, in pieces that end
when `clock` says so.

    tower     the vision tower learns what the teacher says of the posters
    names     the projector (and a language part that began at random) learns to name films
    base      the language part learns from the histories of users kept apart

A stage's steps are a function of the seed and the step alone, and a checkpoint of the step holds
weights, moments and generators, so pieces end in the same weights as one go.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from movielens1m_posters import Posters, normalised
from movielens_base import ranking_loss, warm_cosine
from smollm2_llava import match_size
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hanorec.base.batches import global_batches
from hanorec.base.config import DataConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.files import read_object, whole_folder, write_json
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.evaluation import shown_pictures
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_examples
from hanorec.run.checkpoint import generators, load_checkpoint, save_checkpoint
from hanorec.run.log import append_log

USERS_TO = 0.4  # the users of SFT; those of the preference stage and of the test are others
EXCHANGE = 2025  # of posters where images = "shuffled"; the --seed that evaluate.py exchanges by

Clock = Callable[[], bool]  # whether the time of this piece is over


@dataclass(frozen=True)
class Scale:
    """Sizes, and how long each stage takes. A rate of 0: that part is frozen."""

    image: int  # pixels of the vision tower
    patch: int
    tower_width: int
    tower_layers: int
    crops: int  # further views of each poster
    components: int  # of the teacher's features
    tower_epochs: int  # over all pictures of all views
    tower_rate: float
    names_epochs: int
    names_rate: float  # of the projector
    names_language_rate: float
    targets: int  # of each user, the last ones
    ranking_rate: float
    width: int = 0  # of a language part that begins at random
    layers: int = 0
    vocabulary: int = 0
    batch: int = 64  # pictures, or films; half as many rankings


@dataclass(frozen=True)
class Stage:
    """What `train` does: so many steps on these weights, each group at a rate of its own."""

    work: Path  # log.jsonl and checkpoints of the steps
    groups: list[tuple[list[nn.Parameter], float]]
    steps: int
    loss: Callable[[int], Tensor]


def train(stage: Stage, clock: Clock, save_every: int = 200) -> bool:
    """Go on from the last checkpoint to the end, True, or to where the clock says stop, False."""
    stage.work.mkdir(parents=True, exist_ok=True)
    groups = [{"params": weights, "peak": rate} for weights, rate in stage.groups]
    weights = [weight for group in groups for weight in group["params"]]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    random = generators(weights[0].device)
    done, _ = load_checkpoint(stage.work, weights, optimizer, random)
    for step in tqdm(range(done, stage.steps), stage.work.name, disable=None):
        if clock():
            save_checkpoint(stage.work, step, weights, optimizer, random)
            print(f"{stage.work.name}: {step} of {stage.steps} steps; the same command goes on")
            return False
        for group in optimizer.param_groups:
            group["lr"] = warm_cosine(group["peak"], step, stage.steps)
        loss = stage.loss(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
        if not math.isfinite(norm):
            raise InputError(
                f"{stage.work.name}, step {step}: loss {loss.item()}, gradient norm {norm}, "
                "expected finite numbers; the last checkpoint stands: lower the rate of this stage "
                "in benchmarks/movielens1m_base.py, and take another OUT"
            )
        optimizer.step()
        optimizer.zero_grad()
        append_log(stage.work / "log.jsonl", {"step": step, "loss": loss, "gradient_norm": norm})
        if (step + 1) % save_every == 0:
            save_checkpoint(stage.work, step + 1, weights, optimizer, random)
    for weight in weights:
        weight.requires_grad_(False)
    return True


def write_stage(before: Path, out: Path, model: nn.Module, **facts: object) -> None:
    """The checkpoint after a stage, with what is known of it in stages.json; whole or not at all.
    """
    with whole_folder(out) as folder:
        shutil.copytree(
            before, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", ".*")
        )
        model.save_pretrained(folder)
        known = folder / "stages.json"
        stages = read_object(known) if known.exists() else {}
        write_json(known, stages | {out.name: facts})


def plan(count: int, batch: int, epochs: int, seed: int) -> list[list[int]]:
    """The batches of all epochs."""
    steps: list[list[int]] = []
    for epoch in range(epochs):
        steps += global_batches(count, batch, seed, epoch)
    return steps


# ---- the tower ----


def teach_tower(
    before: Path, out: Path, work: Path, posters: Posters, scale: Scale, seed: int,
    device: str, clock: Clock,
) -> bool:
    """Mean squared error of a linear reading of the tower's places from the whitened targets."""
    backbone = load_backbone(str(before), "float32", device)
    tower = backbone.model.model.vision_tower
    torch.manual_seed(seed)
    head = nn.Linear(tower.config.hidden_size, len(posters.variance)).to(backbone.device)
    views = posters.pixels.shape[1] * 2
    pixels, targets = posters.pixels.flatten(0, 2), posters.targets.flatten(0, 2)  # (P V 2, ...)
    taught = (~posters.held).repeat_interleave(views).nonzero()[:, 0]
    steps = plan(len(taught), scale.batch, scale.tower_epochs, seed)

    def loss(step: int) -> Tensor:
        index = taught[steps[step]]
        wanted = targets[index].to(backbone.device).float()  # (b, g^2, D)
        return F.mse_loss(head(places(backbone, pixels[index])), wanted)

    weights = [*tower.parameters(), *head.parameters()]
    if not train(Stage(work, [(weights, scale.tower_rate)], len(steps), loss), clock):
        return False
    first = normalised(posters.pixels[:256, 0], backbone.image_processor, backbone.device)
    match_size(backbone.model, first, posters.size[:256])
    count, facts = int((~posters.held).sum()), distillation_error(backbone, head, posters)
    print(facts)
    write_stage(before, out, backbone.model, steps=len(steps), posters=count, **facts)
    return True


def places(backbone: Backbone, pixels: Tensor) -> Tensor:
    """What the projector gets of uint8 pictures (n, 3, s, s): (n, g^2, h)."""
    shown = normalised(pixels, backbone.image_processor, backbone.device)
    layer = backbone.config.vision_feature_layer
    seen = backbone.model.model.vision_tower(shown, output_hidden_states=True)
    return seen.hidden_states[layer][:, 1:]


@torch.no_grad()
def seen_posters(backbone: Backbone, posters: Posters) -> Tensor:
    """`places` of the two pictures of each poster itself: (P, 2, g^2, h)."""
    pixels = posters.pixels[:, 0].flatten(0, 1)
    return torch.cat([places(backbone, part) for part in pixels.split(256)]).unflatten(0, (-1, 2))


@torch.no_grad()
def distillation_error(backbone: Backbone, head: nn.Module, posters: Posters) -> dict[str, float]:
    """On the posters held out, and beside them on those that taught: the squared error of whitened
    components and the share of the components' variance that is explained; what zeros reach, which
    is 1 on those that taught, and the mean of each place."""
    told = head(seen_posters(backbone, posters)).cpu()  # (P, 2, g^2, D)
    wanted = posters.targets[:, 0].float()
    error = (told - wanted).square()
    place = (wanted[~posters.held].mean(0) - wanted).square()

    def explained(squares: Tensor) -> float:
        of_component = squares.flatten(0, -2).mean(0)
        return 1 - float((of_component * posters.variance).sum() / posters.variance.sum())

    return {
        "components_share": float(posters.variance.sum() / posters.total),
        "held_out_error": error[posters.held].mean().item(),
        "held_out_explained": explained(error[posters.held]),
        "taught_error": error[~posters.held].mean().item(),
        "zeros_error": wanted[posters.held].square().mean().item(),
        "place_mean_error": place[posters.held].mean().item(),
    }


# ---- rankings ----


def is_language(name: str) -> bool:
    """Whether a weight of this name is one of the language part's."""
    return ".language_model." in name or name.startswith("lm_head.")


def language_weights(backbone: Backbone) -> list[nn.Parameter]:
    """All of them, the tied head once."""
    return [weight for name, weight in backbone.model.named_parameters() if is_language(name)]


def teach_ranking(
    before: Path, out: Path, work: Path, data: Path, candidate_images: str, scale: Scale,
    seed: int, device: str, clock: Clock, images: str = "own",
) -> bool:
    """SFT-1 on the ranking prompt, as benchmarks/movielens_base.py has it."""
    backbone = load_backbone(str(before), "float32", device)
    work.mkdir(parents=True, exist_ok=True)
    shown = DataConfig(
        data=str(data), images=images, candidate_images=candidate_images, users_to=USERS_TO,
        features=str(work),
    )
    wanted = TrainConfig(out="", targets_per_user=scale.targets, seed=seed)
    source, examples = load_examples(backbone, shown, wanted)
    source.pictures.update(shown_pictures(source.pictures, images, EXCHANGE))
    steps = plan(len(examples), scale.batch // 2, 1, seed)

    def loss(step: int) -> Tensor:
        return ranking_loss(backbone, source, [examples[i] for i in steps[step]])

    groups = [(language_weights(backbone), scale.ranking_rate)]
    if not train(Stage(work, groups, len(steps), loss), clock):
        return False
    users = len({example.user for example in examples})
    write_stage(before, out, backbone.model, steps=len(steps), targets=len(examples), users=users)
    return True
