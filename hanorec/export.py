"""Hand a trained policy on: as one adapter, or merged into the base as a full checkpoint.

    python -m hanorec.export --model MODEL --adapter DPO --out OUT
        one adapter with what DPO stands on stacked into it
    python -m hanorec.export --model MODEL --adapter SFT --adapter DPO --out OUT
        the same, each layer named
    python -m hanorec.export --model MODEL --adapter DPO --out OUT --merge
        base + adapter as one model
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hanorec.base import command
from hanorec.base.flags import Parser


def parser() -> Parser:
    """The command line."""
    result = Parser(__doc__, prog="python -m hanorec.export")
    result.add_argument("--model", required=True, help="base checkpoint, folder or hub name")
    result.add_argument(
        "--adapter", required=True, action="append",
        help="one: with what it stands on; several: the stack, bottom first")
    result.add_argument("--out", required=True, help="new folder")
    result.add_argument(
        "--merge", action="store_true", help="write a full model instead of an adapter")
    result.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
        help="of a merged model; auto: as the checkpoint says; each sum is computed in float32")
    return result


if __name__ == "__main__":
    command.start(__file__, parser().parse_args)  # --help needs no torch

import torch
from transformers import AutoConfig, AutoProcessor

from hanorec.base.files import claim_folder, read_object, write_text
from hanorec.lora.card import merged_card
from hanorec.lora.files import save_adapter
from hanorec.lora.loading import attach_adapter, attach_policy
from hanorec.lora.merge import collapse_adapters, merge_adapters
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.load import load_backbone
from hanorec.run.inputs import check_named_adapter
from hanorec.run.record import close_run

COPIED = (".json", ".jinja", ".txt", ".model")  # of a checkpoint, beside its weights
TEMPLATES = "additional_chat_templates"  # its folder of named ones, the default perhaps among them


def copy_other_files(source: Path, backbone: Backbone, out: Path) -> None:
    """Tokenizer, template and preprocessor files as the base has them: `out` loads by itself."""
    if source.is_dir():
        for path in source.iterdir():
            index_of_shards = path.name.endswith(".index.json")
            wanted = path.is_file() and path.suffix in COPIED and not index_of_shards
            if wanted and not (out / path.name).exists():
                shutil.copy2(path, out / path.name)
        if (source / TEMPLATES).is_dir():
            shutil.copytree(source / TEMPLATES, out / TEMPLATES)
        return

    if backbone.family == "llava_next":
        # the template and the number of tokens per image live in its processor
        processor = AutoProcessor.from_pretrained(backbone.path, trust_remote_code=False)
        processor.save_pretrained(out)
    else:
        backbone.tokenizer.save_pretrained(out)
        backbone.image_processor.save_pretrained(out)


def checkpoint_dtype(path: str) -> str:
    """What the checkpoint's weights are stored in: bfloat16, or float32 for that and all else."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception:  # noqa: BLE001  of a broken file; load_backbone says what is wrong with it
        return "float32"
    return "bfloat16" if config.dtype == torch.bfloat16 else "float32"


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for directory in args.adapter:
        check_named_adapter("--adapter", directory)
    out = claim_folder(args.out)
    dtype = args.dtype if args.dtype != "auto" else checkpoint_dtype(args.model)
    no_limit = 10**9  # a real one would be saved into the config
    backbone = load_backbone(args.model, dtype, "cpu", max_pixels=no_limit)
    if len(args.adapter) == 1:
        attach_policy(backbone.model, args.adapter[0])
    else:
        for directory in args.adapter:
            attach_adapter(backbone.model, directory)

    run = Path(args.adapter[-1])  # that of the top adapter
    facts = run / "hanorec.json"
    trained = read_object(facts) if facts.exists() else {}
    if args.merge:
        merge_adapters(backbone.model)
        backbone.model.save_pretrained(out)
        copy_other_files(Path(args.model), backbone, out)
        write_text(out / "README.md", merged_card(args.model, trained, run))
    else:
        collapse_adapters(backbone.model)
        save_adapter(backbone.model, out, args.model, run, stage="export", stack=args.adapter)
    close_run(out, [], {}, arguments=vars(args))
    print(f"wrote {'the merged model' if args.merge else 'one adapter'} to {out}")
