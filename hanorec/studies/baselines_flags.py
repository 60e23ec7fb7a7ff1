"""Every baseline of document 000 beside HaNoRec: one table, on the same frozen candidates.

    python -m hanorec.baselines --data DATA --out OUT --test "--sets random"
        the rows that need no checkpoint; hard candidates are drawn by one
    python -m hanorec.baselines --data DATA --model MODEL --out OUT [--rows "SASRec (CE);SPRec"]
            [--seeds 3] [--trials 6] [--split val] [--sft FLAGS] [--dpo FLAGS] [--sprec FLAGS]
            [--matrix FLAGS] [--sequence FLAGS] [--test FLAGS]

The same command again goes on where it stopped; what is finished is not done again.

Every trained row of `hanorec.baselines.rows` gets equally many trials: with the first seed it is
trained once a setting, and the setting with the highest NDCG@3 on validation, random candidates, is
kept for all seeds. FLAGS, one string each, are defaults for all rows that are made in that way;
those of --test are evaluate.py's. What shapes a prompt (--history, --max-pixels) is to be given to
the stages and to --test alike. OUT/seed-S/ROW/trial-K is a training run, OUT/seed-S/trials its
evaluations on validation, OUT/seed-S/SPLIT those in the table. OUT/results-SPLIT.json and
OUT/table-SPLIT.md hold what is read from them.
"""

from pathlib import Path

from hanorec.base.flags import Parser
from hanorec.baselines.rows import CONTROL, ROWS, TRIALS

# Flags that a user may give, and whose they are.
STAGES = {
    "sft": "train_sft.py: SFT, TALLRec, LLaRA, MLLM-MSR",
    "dpo": "train_dpo.py: DPO, HaNoRec",
    "sprec": "all training stages of SPRec, and --rounds",
    "matrix": "hanorec.baselines.matrix_training: BPR-MF, LightGCN",
    "sequence": "hanorec.baselines.sequence_training: the other rows by inner product",
    "test": "evaluate.py: all rows",
}


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.baselines")
    result.add_argument("--data", required=True, help="folder in the native layout")
    result.add_argument("--model", help="the checkpoint of the rows that need one")
    result.add_argument("--out", required=True, type=Path)
    result.add_argument(
        "--rows",
        help="names of rows, between semicolons; those that they stand on come with them, and "
        f"{CONTROL} where there is a model; default all that can be: " + "; ".join(ROWS))
    result.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    result.add_argument("--seed", type=int, default=2025)
    result.add_argument(
        "--trials", type=int, default=TRIALS,
        help=f"settings tried for each trained row, 1 .. {TRIALS}; 1: its default alone")
    result.add_argument(
        "--split", choices=["val", "test"], default="test", help="of the table's evaluations")
    for stage, what in STAGES.items():
        result.add_argument(f"--{stage}", default="", help=f"flags of {what}")
    return result
