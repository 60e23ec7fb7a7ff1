"""Everything that is wrong with a data folder, in one pass, before hours are spent on it.

    python -m hanorec.check DATA
        images, titles, interactions, candidates
    python -m hanorec.check DATA --model MODEL
        also titles as the model reads them, and rows that exceed its context
    python -m hanorec.check DATA --model MODEL --history 10 --candidate-images off
        the same with the flags that a run is to be given

It reads as the runs do and writes nothing. Errors are what a run would refuse, train_sft.py or
evaluate.py; notes are what a run goes on with. Exit status: 0 = no error, 1 = an error, 2 = it
cannot look, since the folder or the model is not there.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hanorec.base.command import run
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.flags import Parser
from hanorec.datasets import inspection
from hanorec.datasets.catalog import Catalog
from hanorec.datasets.inspection import Findings
from hanorec.datasets.interactions import Interactions

FEW = 3  # examples of a kind that are printed


def parser() -> argparse.ArgumentParser:
    """The command line; flags that a run has too are called as there, with its defaults."""
    result = Parser(__doc__, prog="python -m hanorec.check")
    result.add_argument("data", type=Path, metavar="DATA", help="folder in the native layout")
    result.add_argument("--model", help="folder or hub name of a checkpoint; its weights stay shut")
    result.add_argument("--all", action="store_true", help=f"print all examples, not {FEW} a kind")
    group = result.add_argument_group("as in a run")
    group.add_argument("--task", choices=["ranking", "binary"], default=DataConfig.task)
    group.add_argument("--history", type=int, metavar="N", default=DataConfig.history)
    group.add_argument("--targets", type=int, metavar="N", default=DataConfig.targets)
    group.add_argument("--candidates", type=int, metavar="N", default=DataConfig.candidates)
    group.add_argument("--images", choices=["own", "none"], default=DataConfig.images)
    group.add_argument(
        "--candidate-images", choices=["on", "off"], default=DataConfig.candidate_images)
    group.add_argument("--max-title-tokens", type=int, metavar="N")
    group.add_argument("--max-pixels", type=int, metavar="N", default=ModelConfig.max_pixels)
    group.add_argument(
        "--targets-per-user", type=int, metavar="N", default=TrainConfig.targets_per_user)
    group.add_argument("--seed", type=int, metavar="N", default=TrainConfig.seed)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    names = (
        "task", "history", "targets", "candidates", "images", "candidate_images",
        "max_title_tokens",
    )
    config = DataConfig(str(args.data), **{name: getattr(args, name) for name in names})
    if not args.data.is_dir():
        raise InputError(f"{args.data}: not a folder; check the path")
    backbone = None
    if args.model is not None:
        # Here, since PyTorch and Transformers take longer to load than most folders to look at.
        from hanorec.mllm.outline import load_outline

        backbone = load_outline(args.model, args.max_pixels)

    findings = Findings()
    catalog = inspection.inspect_items(args.data, findings, args.images != "none")
    if catalog is None:
        print("without titles nothing else can be looked at")
    else:
        inspect(catalog, config, args, backbone, findings)
    print_findings(findings, args.data, most=None if args.all else FEW)
    if findings.errors:
        sys.exit(1)


def inspect(
    catalog: Catalog,
    config: DataConfig,
    args: argparse.Namespace,
    backbone: Any,
    findings: Findings,
) -> None:
    """All that can be looked at once the items are known. backbone: without weights, or None."""
    sizes = inspection.inspect_images(catalog, findings)  # of none with --images none
    data = inspection.inspect_users(catalog, findings)
    print_folder(catalog, data, config)
    examples = inspection.inspect_examples(
        catalog, data, config, args.targets_per_user, findings
    )
    shown = catalog
    if backbone is not None:
        from hanorec.mllm.inspection import inspect_rows, inspect_titles
        from hanorec.mllm.outline import outline_builder

        builder = outline_builder(backbone, catalog, sizes, config)
        alike = inspect_titles(builder, findings)
        shown = builder.shown
    for split, every in examples.items():
        items = shown if split == "train" else catalog  # as the runs draw
        examples[split] = inspection.inspect_candidates(
            items, every, config.candidates - config.targets, args.seed, findings
        )
    if backbone is not None:
        inspect_rows(builder, alike, examples, sizes, args.max_pixels, args.seed, findings)


# ---- what is printed ----


def print_folder(catalog: Catalog, data: Interactions, config: DataConfig) -> None:
    """What the folder holds, as far as it could be read."""
    images = f"{sum(path is not None for path in catalog.images)} with an image"
    if config.images == "none":
        images = "their images not looked at"
    print(
        f"{catalog.directory}: {catalog.name}, {len(catalog.ids)} items, {images}; "
        f"users: {len(data.train)} in train.tsv, {len(data.val)} in val.tsv, {len(data.test)} in "
        "test.tsv"
    )


def print_findings(findings: Findings, directory: Path, most: int | None) -> None:
    """Every kind with its count and its first examples, at most so many."""
    print_kinds("errors, which a run would refuse:", findings.errors, directory, most)
    print_kinds("notes, with which a run goes on:", findings.notes, directory, most)
    counts = []
    for name, kinds in (("errors", findings.errors), ("notes", findings.notes)):
        if kinds:
            counts.append(f"{name}: {sum(map(len, kinds.values()))} of {len(kinds)} kinds")
    print("\n" + ("; ".join(counts) or "nothing found"))


def print_kinds(
    title: str, kinds: Mapping[str, Sequence[str]], directory: Path, most: int | None
) -> None:
    """Errors, or notes; nothing where there are none."""
    if not kinds:
        return
    print(f"\n{title}")
    for kind, examples in kinds.items():
        print(f"\n{len(examples)} x {kind}")
        for example in examples[:most]:
            print(f"    {example.removeprefix(f'{directory}/')}")
        if len(examples) > len(examples[:most]):
            print(f"    ... {len(examples) - most} more: --all")


if __name__ == "__main__":
    run(main)
