"""--preset: what it sets, what it prints, and what wins over it; --quotes, which it sets."""

import json

import pytest
import toy

import train_dpo
import train_sft
from hanorec.base.config import DataConfig, DpoConfig, EvalConfig, ModelConfig, TrainConfig
from hanorec.base.config_steps import StepConfig
from hanorec.base.files import sha256
from hanorec.base.presets import PRESETS
from hanorec.base.settings import parse
from hanorec.mllm.tasks import preferences, scoring_rows, sft_rows
from hanorec.run.record import all_settings

KINDS = {
    "train_sft": [ModelConfig, DataConfig, TrainConfig],
    "train_dpo": [ModelConfig, DataConfig, TrainConfig, DpoConfig, StepConfig],
    "evaluate": [ModelConfig, DataConfig, EvalConfig],
}
PLACES = ["--model", "M", "--data", "D", "--out", "O"]
RELEASE = ["--preset", "release"]


def settings(command, *flags):
    return all_settings(parse(KINDS[command], [*flags], None, command))


@pytest.mark.parametrize("command", KINDS)
def test_it_sets_what_it_says_and_nothing_else(command, capsys):
    """And prints each with its source. Control: by itself a command has other settings."""
    plain = settings(command, *PLACES)
    assert capsys.readouterr().out == ""
    found, wanted = settings(command, *RELEASE, *PLACES), PRESETS["release"][command]
    said = capsys.readouterr().out
    assert found == plain | {name: value for name, (value, _) in wanted.items()} != plain
    for name, (_, source) in wanted.items():
        assert f"--{name.replace('_', '-')} " in said and source in said
    assert "export --merge" in said


def test_of_the_release_dpo_differs_from_the_document_in_these():
    found, plain = settings("train_dpo", *RELEASE, *PLACES), settings("train_dpo", *PLACES)
    changed = {name: value for name, value in found.items() if value != plain[name]}
    assert changed == {
        "max_pixels": 262_144, "candidate_images": "off", "quotes": "chosen", "history": 3,
        "targets": 3, "candidates": 7,
        "drop_last": True, "lora_dropout": 0.0, "gap": "ranked", "hardness": "ratio",
        "rewards": "noisy", "eta_over": "micro", "noise_draw": "forward", "noise_pass": "forward",
    }


def test_flags_and_files_win_over_it(tmp_path, capsys):
    """In either spelling, before or behind it; a flag wins over the file as well."""
    given = ["--gap", "union", "--lora_rank=4", "--drop-last", "false"]
    for argv in ([*given, *RELEASE, *PLACES], [*PLACES, "--preset=release", *given]):
        found = settings("train_dpo", *argv)
        assert (found["gap"], found["lora_rank"], found["drop_last"]) == ("union", 4, False)
        assert found["hardness"] == "ratio"
        said = capsys.readouterr().out
        assert said.count("not set, since it is given") == 3
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"gap": "signed", "k": 3, "hardness": "sigmoid"}))
    found = settings("train_dpo", str(path), *PLACES, *RELEASE, "--hardness", "standardised")
    assert (found["gap"], found["k"], found["hardness"]) == ("signed", 3, "standardised")
    assert found["rewards"] == "noisy"


def test_there_is_no_other_preset(capsys):
    with pytest.raises(SystemExit) as stop:
        settings("train_dpo", "--preset", "louder", *PLACES)
    assert stop.value.code == 2 and "--preset: invalid choice: 'louder'" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # BR-MRS has none
        parse(KINDS["train_sft"], [*RELEASE, *PLACES])
    assert "unknown arguments: --preset release" in capsys.readouterr().err


def test_a_run_by_the_preset_is_the_run_by_its_flags(launch):
    """To the bit; what it set stands in run.json, without its name."""
    few = ["--epochs", 1, "--accumulation", 2, "--max-pixels", 1024, "--candidates", 7]
    below, _, _ = launch(train_sft.main, *RELEASE, *few)
    preset, log, facts = launch(train_dpo.main, "--sft", below, *RELEASE, *few)
    flags = []
    for name, (value, _) in PRESETS["release"]["train_dpo"].items():
        if name in ("max_pixels", "history", "candidates", "epochs", "accumulation"):
            continue  # given to both
        flags += [f"--{name.replace('_', '-')}", str(value).lower()]
    by_hand, other, _ = launch(train_dpo.main, "--sft", below, *flags, *few)
    assert sha256(preset / "adapter_model.safetensors") == sha256(
        by_hand / "adapter_model.safetensors"
    )
    assert log == other and facts["settings"]["rewards"] == "noisy"
    assert "preset" not in facts["settings"]
    assert log[0]["eta"] != 1  # of noisy rewards, which are none of the reference's


def test_quotes_give_the_chosen_answer_away(data, checkpoints):
    """SFT's answer and the chosen one have them, the rejected ones have not; evaluation writes all
    candidates alike. Control: without the option nobody has them, and all tokens are the title's.
    """
    for quotes in ("chosen", "none"):
        backbone, builder, examples = toy.source_of(data, checkpoints, quotes=quotes)
        titles = builder.catalog.titles

        def written(row, backbone=backbone):
            return [backbone.tokenizer.decode(answer[:-1]) for answer in row.answers]

        (pair,) = preferences(builder, examples[:1], 2025, 2)
        (taught,) = sft_rows(builder, examples[:1], 2025)
        (scored,) = scoring_rows(builder, examples[:1])
        mark = '"' if quotes == "chosen" else ""
        chosen = f"{mark}{titles[pair.chosen]}{mark}"
        assert written(pair.row) == [chosen, *(titles[row] for row in pair.rejected)]
        assert written(taught) == [chosen]
        everyone = [f"{mark}{titles[row]}{mark}" for row in examples[0].candidates]
        assert written(scored) == everyone
