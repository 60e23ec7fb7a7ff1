"""SPRec's scoring pass: what a policy picks as the rejected item of each training example (SP-1).

    python -m hanorec.baselines.picking --model MODEL --sft POLICY --data DATA --out OUT [...]
        OUT/picks.json, for train_dpo.py --negatives

It takes the flags of train_dpo.py that say which model, data and users, and makes its training
examples by the same function, so they are the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hanorec.base import command
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.settings import option, parse


@dataclass(frozen=True)
class PickConfig:
    """How the rejected items are picked."""

    group = "method"

    pick: Literal["best", "sample"] = option(
        "best",
        "SPRec answers greedily: best = the wrong candidate with the highest score; sample (ours) "
        "= one drawn from the softmax of the wrong candidates' scores",
    )
    previous: str | None = option(
        None,
        "ours: picks.json of the round before, to say how many picks are the same",
    )


KINDS = [ModelConfig, DataConfig, TrainConfig, PickConfig]
if __name__ == "__main__":
    command.start(__file__, parse, KINDS, None, __doc__)  # --help needs no torch

from hanorec.base.distributed import join, rank, usable_device
from hanorec.base.files import read_object
from hanorec.base.lock import unlock_folder
from hanorec.baselines.sprec import pick_items
from hanorec.datasets.picks import equal_picks, picks_by_name, save_picks
from hanorec.mllm import evaluation, tasks
from hanorec.mllm.compiled import compile_layers
from hanorec.mllm.load import load_backbone
from hanorec.run.inputs import check_training, training_inputs
from hanorec.run.record import all_settings, open_run, write_run


def main(argv: Sequence[str] | None = None) -> None:
    model, data, train, config = configs = parse(KINDS, argv, __doc__)
    join(usable_device(model.device))
    check_training(configs)
    if config.previous is not None:
        read_object(Path(config.previous))
    out = open_run(train.out, all_settings(configs), "picks.json")
    backbone = load_backbone(model.model, model.dtype, model.device, model.max_pixels, train.shard)
    if train.compile:
        compile_layers(backbone)
    builder, examples = tasks.load_examples(backbone, data, train)
    evaluation.use_policy(backbone, train.sft or "base")
    earlier = config.previous and picks_by_name(Path(config.previous), builder.catalog)

    rows = tasks.scoring_rows(builder, examples)
    tasks.print_budget(rows, train.micro_batch, backbone)
    scores = evaluation.score(builder, rows, len(examples), train.micro_batch)["sum"]  # (E, C)
    picks = pick_items(examples, scores, config.pick, [train.seed, data.users_seed])

    facts = equal_picks(earlier or {}, examples, picks, builder.catalog)
    write_run(out, configs, training_inputs(builder, rows, train), **facts)
    if rank() == 0:
        save_picks(out / "picks.json", examples, scores, picks, builder.catalog)
        unlock_folder(out)
    print(f"wrote {out / 'picks.json'}")
