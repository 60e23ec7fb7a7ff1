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

import argparse
import difflib
import shlex
from collections.abc import Sequence
from pathlib import Path

from hanorec.base.errors import InputError
from hanorec.base.files import write_json, write_text
from hanorec.base.lock import lock_folder
from hanorec.baselines.rows import ALWAYS, CONTROL, ROWS, TRIALS, Baseline
from hanorec.studies.baselines_makers import MAKERS, STAGES
from hanorec.studies.baselines_runs import Comparison
from hanorec.studies.baselines_scoring import load_asked, rank_popular, untrained_share
from hanorec.studies.baselines_table import summarise, table

OWN = ["--split", "--adapter", "--out", "--retriever", "--user"]  # not to be given by --test


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's flags, with its rows, and the flags of each stage.

    InputError for what does not go together.
    """
    parser = argparse.ArgumentParser(
        prog="python -m hanorec.baselines", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in the native layout")
    parser.add_argument("--model", help="the checkpoint of the rows that need one")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--rows",
        help="names of rows, between semicolons; those that they stand on come with them, and "
        f"{CONTROL} where there is a model; default all that can be: " + "; ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--seed", type=int, default=2025)
    parser.add_argument(
        "--trials", type=int, default=TRIALS,
        help=f"settings tried for each trained row, 1 .. {TRIALS}; 1: its default alone")
    parser.add_argument(
        "--split", choices=["val", "test"], default="test", help="of the table's evaluations")
    for stage, what in STAGES.items():
        parser.add_argument(f"--{stage}", default="", help=f"flags of {what}")
    args = parser.parse_args(argv)

    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    if not 1 <= args.trials <= TRIALS:
        raise InputError(
            f"--trials {args.trials}: expected 1 .. {TRIALS}, since each row has so many settings")
    args.rows = chosen_rows(args.rows, args.model)
    args.flags = {stage: shlex.split(getattr(args, stage)) for stage in STAGES}
    used = {"test", *(MAKERS[row.maker].stage for row in args.rows.values())}
    for stage in STAGES:
        if args.flags[stage] and stage not in used:
            print(f"note: --{stage}: no chosen row takes flags of {STAGES[stage]}")
    for flag in args.flags["test"]:
        if flag.partition("=")[0] in OWN:
            raise InputError(
                f"--test {args.test!r}: holds {flag}, expected flags of evaluate.py other than "
                f"{', '.join(OWN)}")
    return args


def chosen_rows(asked: str | None, model: str | None) -> dict[str, Baseline]:
    """The rows asked for, what they stand on, popularity, and with a checkpoint the control, in the
    order of `ROWS`."""
    if asked is None:
        names = [name for name, row in ROWS.items() if model or not MAKERS[row.maker].model]
        if model is None:
            print(f"note: no --model, so {len(ROWS) - len(names)} rows that need one are left out")
    else:
        names = [name.strip() for name in asked.strip("; ").split(";")]
        names = [name for name in names if name != "chance"]  # which is no recommender
    for name in names:
        if name not in ROWS:
            near = [row for row in ROWS if name.casefold() in row.casefold()][:2]
            near = near or difflib.get_close_matches(name, ROWS, n=1, cutoff=0)
            raise InputError(
                f"--rows: no row {name!r}, is {' or '.join(map(repr, near))} meant? Expected some "
                f"of {'; '.join(ROWS)}")
        if model is None and MAKERS[ROWS[name].maker].model:
            raise InputError(
                f"--rows: the row {name!r} needs a checkpoint and there is none, expected --model; "
                "give it, or leave the row out")
    wanted = {*names, ALWAYS, *([CONTROL] if model else [])}
    for name in reversed(ROWS):  # a row stands on one before it
        if name in wanted and (below := ROWS[name].below):
            wanted.add(below)
    return {name: row for name, row in ROWS.items() if name in wanted}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_command(argv)
    study = Comparison(
        args.data, args.model, args.out, args.split, args.rows, args.flags, args.trials)
    study.check_flags(args.seed)  # before the first row trains
    asked = load_asked(study.test(args.split))
    lock_folder(args.out)
    seeds = {}
    for seed in range(args.seed, args.seed + args.seeds):
        seeds[seed] = study.run_seed(seed)

    results = summarise(study, seeds, untrained_share(asked), rank_popular(asked))
    report, text = args.out / f"results-{args.split}.json", table(results)
    write_json(report, results)
    write_text(args.out / f"table-{args.split}.md", text)
    print(f"{text}\nwrote {report} and table-{args.split}.md")
