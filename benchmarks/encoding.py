"""Encoding 1,000 items in batches against one by one, and reading them back from the feature file.

    python benchmarks/encoding.py [--items N] [--pixels P] [--rounds R]

CPU seconds on one thread, medians of interleaved rounds after a warm-up: tiny Qwen2.5-VL
(`hanorec.studies.tiny`), posters and titles of Posterland. Both sides must agree before any ratio
is printed. The floor is what batches cannot spare (decoding and the image processor, or the
tokenizer), measured alone in the same rounds, plus the FLOPs of the rest at the rate of a large
matrix product.
The last table maps a feature file of MicroLens's size: 41,081 items of 64 tokens, width 2,048,
bfloat16, 10.8 GB (sparse).
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from measure import agree, gemm_rate, interleaved, measure_memory, now, peak_memory
from PIL.Image import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hanorec.base.command import run
from hanorec.datasets.catalog import Catalog, load_catalog
from hanorec.datasets.images import read_image
from hanorec.datasets.posterland import make_posterland
from hanorec.hars import mean_pool
from hanorec.mllm.backbone import (
    Backbone,
    ImageFeatures,
    hidden_states,
    image_features,
    prompt_positions,
)
from hanorec.mllm.features import open_features, stored_pictures, write_index
from hanorec.mllm.items import BATCH, encode_pictures, item_embeddings
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import text_ids
from hanorec.studies.tiny import make_checkpoint


def in_batches(do: Callable[[list], list], things: list, size: int) -> list:
    done = []
    for start in range(0, len(things), size):
        done += do(things[start : start + size])
    return done


@torch.no_grad()
def embeddings_one_by_one(
    backbone: Backbone, catalog: Catalog, pictures: dict[int, ImageFeatures], form: str
) -> tuple[Tensor, Tensor]:
    """H and X of HN-1 by a loop over the items."""
    embed = backbone.model.get_input_embeddings()

    def pooled(ids: list[int], picture: ImageFeatures | None) -> Tensor:
        if form == "input":
            return mean_pool(embed(torch.tensor(ids)) if picture is None else picture.features)
        grids, features = [], torch.zeros(0, backbone.width)
        if picture is not None:
            grids, features = [picture.grid], picture.features
        positions = prompt_positions(backbone, ids, grids)[:, None]
        return mean_pool(hidden_states(backbone, torch.tensor([ids]), positions, None, features)[0])

    H = [pooled(text_ids(backbone, title), None) for title in catalog.titles]
    X = []
    for picture in pictures.values():
        X.append(pooled([backbone.image_token] * len(picture.features), picture))
    return torch.stack(H), torch.stack(X)


def sides_of(backbone: Backbone, catalog: Catalog) -> dict[str, dict[str, Callable[[], object]]]:
    """What is measured -> one by one, in batches, and the part that batches cannot spare."""
    paths = list(catalog.images)
    pictures = encode_pictures(backbone, catalog, range(len(catalog.ids)))
    images = [read_image(path) for path in paths]

    def features(part: list[Image]) -> list[ImageFeatures]:
        return image_features(backbone, part)

    def prepare(part: list[Image]) -> list:
        return backbone.image_processor(images=part, return_tensors="pt")["image_grid_thw"]

    found = {
        "image files to features": {
            "one": lambda: [features([read_image(path)])[0] for path in paths],
            "batches": lambda: list(encode_pictures(backbone, catalog, range(len(paths))).values()),
            "least": lambda: in_batches(
                lambda part: prepare([read_image(path) for path in part]), paths, BATCH
            ),
        },
        "the same, files decoded before": {
            "one": lambda: in_batches(features, images, 1),
            "batches": lambda: in_batches(features, images, BATCH),
            "least": lambda: in_batches(prepare, images, BATCH),
        },
    }
    for form in ("input", "hidden"):
        found[f"H and X, {form} form"] = {
            "one": lambda form=form: embeddings_one_by_one(backbone, catalog, pictures, form),
            "batches": lambda form=form: item_embeddings(backbone, catalog, pictures, form)[:2],
            "least": lambda: backbone.tokenizer(list(catalog.titles), add_special_tokens=False)}
    return found


def numbers(found: Iterable[ImageFeatures | Tensor]) -> Tensor:
    """All that a side has made, in one tensor."""
    return torch.cat([getattr(one, "features", one) for one in found])


def large(folder: Path) -> None:
    count, tokens, width = 41_081, 64, 2048
    stem, pictures, facts = folder / "features-large", [], {"dtype": "bfloat16"}
    with open(stem.with_suffix(".bin"), "wb") as file:
        file.truncate(count * tokens * width * 2)
    write_index(stem.with_suffix(".json"), facts, [tokens] * count, [[1, 16, 16]] * count)
    start = now("cpu")
    memory = measure_memory(lambda: pictures.extend(open_features(stem, facts, width)), "cpu")
    seconds, some = now("cpu") - start, pictures[:: count // 1000]
    read = read_seconds(lambda: some, 3)  # after a warm-up: no disk
    size = stem.with_suffix(".bin").stat().st_size / 1e9
    print(
        f"a file of {size:.1f} GB: mapped in {seconds:.2f} s and {memory:.0f} MB; {len(some)} of "
        f"its items copied out of the page cache in {read:.3f} s"
    )


def read_seconds(pictures: Callable[[], Iterable[ImageFeatures]], rounds: int) -> float:
    """The median of getting the pictures and reading all that they hold."""
    read = {"read": lambda: [picture.features.clone() for picture in pictures()]}
    return interleaved(read, rounds, "cpu")["read"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument(
        "--pixels", type=int, default=32 * 32,
        help="of an image; 1,024 are one token of the tiny model",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory", nargs=2, metavar=("WHAT", "SIDE"),
        help="print the peak memory of one side, in a process of its own",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_posterland(folder / "data", users=24)
        whole = load_catalog(folder / "data")
        rows = [row % len(whole.ids) for row in range(args.items)]
        catalog = replace(
            whole, ids=tuple(map(str, range(args.items))),
            titles=tuple(whole.titles[row] for row in rows),
            images=tuple(whole.images[row] for row in rows),
        )
        make_checkpoint("qwen2_5_vl", folder / "model", whole.titles)
        backbone = load_backbone(str(folder / "model"), "float32", "cpu")
        backbone.image_processor.size = {"shortest_edge": args.pixels, "longest_edge": args.pixels}
        sides = sides_of(backbone, catalog)
        if args.memory:
            print(measure_memory(sides[args.memory[0]][args.memory[1]], "cpu"))
            return
        print(
            f"torch {torch.__version__}, one CPU thread, float32; {args.items} items in batches "
            f"of {BATCH}"
        )
        rate, table = gemm_rate("cpu"), []
        for name, three in sides.items():
            one, batches = three["one"](), three["batches"]()
            agree(name, numbers(batches), numbers(one), 1e-5)
            with FlopCounterMode(display=False) as counter:
                three["batches"]()
            s = interleaved(three, args.rounds, "cpu")
            again = [
                __file__, "--items", str(args.items), "--pixels", str(args.pixels),
                "--memory", name,
            ]
            memory = [peak_memory([*again, side]) for side in ("one", "batches")]
            table.append((
                name, s["one"], s["batches"], s["least"] + counter.get_total_flops() / rate,
                *memory,
            ))
        for form, row in (("input", 2), ("hidden", 3)):
            sums = [sum(part) for part in zip(table[0][1:4], table[row][1:4], strict=True)]
            table.append((
                f"whole items, {form} form", *sums,
                *(max(table[0][i], table[row][i]) for i in (4, 5)),
            ))
        print(
            f"\nlarge matrix product: {rate / 1e9:.0f} GFLOP/s; {one[1].numel() // args.items} "
            "numbers an item\n"
        )
        print(
            "| | one by one, s | in batches, s | ratio | floor, s | over the floor | peak memory, "
            "MB |\n|---|---|---|---|---|---|---|"
        )
        for name, one, batches, floor, *memory in table:
            cells = [
                f"{one:.3f}", f"{batches:.3f}", f"{one / batches:.1f}", f"{floor:.3f}",
                f"{batches / floor:.1f}", "{:.1f}, {:.1f}".format(*memory),
            ]
            print("| " + " | ".join([name, *cells]) + " |")
        start = now("cpu")
        stored_pictures(backbone, catalog, folder)
        first = now("cpu") - start
        later = read_seconds(
            lambda: stored_pictures(backbone, catalog, folder).values(), args.rounds
        )
        print(
            f"\nfeature file: the first run takes {first:.3f} s; a later one {later:.3f} s (hash "
            "tower and images, map, read every item)"
        )
        large(folder)


if __name__ == "__main__":
    run(main)
