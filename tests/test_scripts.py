"""train_sft.py and train_dpo.py from end to end, on the tiny Qwen2.5-VL and a Posterland of 24
users.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

import train_dpo
import train_sft
from hanorec.base.command import run
from hanorec.base.config import DataConfig, ModelConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.base.files import sha256
from hanorec.base.settings import parse
from hanorec.lora.files import save_adapter
from hanorec.lora.layer import add_lora, lora_layers
from hanorec.lora.loading import attach_policy
from hanorec.mllm.load import load_backbone
from hanorec.mllm.tasks import load_examples, negatives_of, preferences, sft_rows
from hanorec.run.run import Run

SFT_KEYS = {"step", "epoch", "loss", "gradient_norm", "learning_rate"}
DPO_KEYS = SFT_KEYS | {
    "accuracy", "chosen_reward", "rejected_reward", "margin", "lambda", "lambda_min", "lambda_max",
    "eta", "beta", "beta_min", "beta_max", "kl",
}
BETA0, DIGITS = 0.1, 2e-6  # the log rounds to 6 digits


def check_log(log, keys, steps, rate=1e-3):
    """Complete, finite, and the cosine schedule by hand."""
    assert [record["step"] for record in log] == list(range(steps))
    for record in log:
        assert set(record) == keys
        assert all(math.isfinite(value) for value in record.values() if value is not None)
        assert record["learning_rate"] == pytest.approx(
            rate * 0.5 * (1 + math.cos(math.pi * record["step"] / steps)), abs=DIGITS
        )
        assert record["gradient_norm"] > 0


# ---- stage 1 ----


@pytest.mark.parametrize(("task", "rows"), [("ranking", 24), ("binary", 48)])
def test_sft(launch, data, checkpoints, task, rows):
    """The log, and its first loss from the model itself: minus the mean log-probability of an
    answer token of the first step.
    """
    out, log, facts = launch(
        train_sft.main, *toy.STEPS, "--task", task, "--lora-dropout", 0, "--micro-batch", 16,
        "--accumulation", 3,
    )
    check_log(log, SFT_KEYS, 1)  # 48 rows in a step: it holds all rows, whatever their order
    assert (facts["rows"], facts["steps"], facts["settings"]["task"]) == (rows, 1, task)
    backbone, source, examples = toy.source_of(data, checkpoints, task)
    every = sft_rows(source, examples, 2025)
    with torch.no_grad():
        total = sum(toy.log_probs(backbone, [row], source.pictures).item() for row in every)
    assert log[0]["loss"] == pytest.approx(
        -total / sum(len(row.answers[0]) for row in every), abs=1e-5
    )
    attach_policy(backbone.model, out)
    assert facts["trained_weights"] == sum(
        w.numel() for w in toy.weights(lora_layers(backbone.model).values())
    )
    assert json.loads((out / "hanorec.json").read_text())["prompt"]["task"] == task


def test_sft_learns_a_tiny_set(launch, data, checkpoints):
    """Six users, 15 epochs of one step: the loss falls to less than half, and so it is for the
    saved adapter.
    """
    out, log, _ = launch(
        train_sft.main, "--targets-per-user", 1, "--users-to", 0.25, "--epochs", 15,
        "--micro-batch", 6, "--accumulation", 1, "--learning-rate", 1e-2, "--lora-dropout", 0,
    )
    check_log(log, SFT_KEYS, 15, 1e-2)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    backbone, source, examples = toy.source_of(data, checkpoints, users_to=0.25)
    rows = sft_rows(source, examples, 2025)
    assert len(rows) == 6
    attach_policy(backbone.model, out)
    backbone.model.eval()
    with torch.no_grad():
        loss = -toy.log_probs(backbone, rows, source.pictures).sum().item() / sum(
            len(row.answers[0]) for row in rows
        )
    assert loss < log[-1]["loss"] + 1e-3


def test_sft_on_rows_that_the_caller_made(data, checkpoints, tmp_path):
    """fit knows no task: No on every target, in one step; the first loss is the model's own."""
    argv = ["--model", checkpoints["qwen2_5_vl"], "--data", data, "--out", tmp_path / "out"]
    argv += [*toy.SHORT, *toy.STEPS, "--micro-batch", 5, "--lora-dropout", 0]
    configs = parse([ModelConfig, DataConfig, TrainConfig], [str(word) for word in argv])
    fitted = Run(configs)
    backbone = fitted.load_backbone()
    builder, examples = load_examples(backbone, *configs[1:])
    rows = [builder.binary_row(example, example.target, ["No"]) for example in examples[:5]]
    with torch.no_grad():
        total = toy.log_probs(backbone, rows, builder.pictures).sum().item()
    train_sft.fit(fitted, builder, rows)

    (line,) = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    tokens = sum(row.answer_tokens for row in rows)
    assert json.loads(line)["loss"] == pytest.approx(-total / tokens, abs=1e-5)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["rows"] == 5
    assert toy.adapter(tmp_path / "out")


def test_sft_continued_stands_on_the_first(launch, sft):
    out, _, _ = launch(train_sft.main, *toy.STEPS, "--sft", sft)
    assert sha256(out / "below" / "adapter_model.safetensors") == sha256(
        sft / "adapter_model.safetensors"
    )
    assert toy.furthest(out, sft) > 0


# ---- stage 2 ----


@pytest.mark.equation("HN-8", "HN-9")
@pytest.mark.parametrize("ablation", ["full", "no_hars", "no_nodo", "no_sam", "dpo"])
def test_ablations(launch, sft, ablation):
    """Each switch does what its name says, read off the log: beta' = eta lambda beta0 with HaRS,
    beta0 without; noise or none.
    """
    flags = [*toy.STEPS, "--sft", sft, "--ablation", ablation, "--lora-dropout", 0]
    out, log, facts = launch(train_dpo.main, *flags, float64=True)
    check_log(log, DPO_KEYS, 3)
    assert facts["sigma_n"] == (0 if ablation in ("no_nodo", "dpo") else 0.05)
    first = log[0]
    if facts["sigma_n"] == 0:  # policy = reference in the first step
        assert first["loss"] == pytest.approx(math.log(2), abs=DIGITS)
        for key in ("margin", "chosen_reward", "rejected_reward"):
            assert first[key] == 0, key
    else:
        assert abs(first["margin"]) > 1e-4
    # the clean policy is the reference, noise or not: all reward gaps are 0
    assert first["eta"] == 1
    for record in log:
        assert record["margin"] == pytest.approx(
            record["chosen_reward"] - record["rejected_reward"], abs=DIGITS
        )
        if ablation in ("no_hars", "dpo"):
            for key in ("lambda", "lambda_min", "lambda_max", "eta"):
                assert record[key] == 1, key
            assert record["beta"] == record["beta_min"] == record["beta_max"] == BETA0
        else:
            assert 0.5 < record["lambda_min"] < record["lambda"] < record["lambda_max"]
            assert record["lambda_max"] < (0.881 if ablation == "no_sam" else 0.805)
            for which in ("", "_min", "_max"):
                assert record[f"beta{which}"] == pytest.approx(
                    record["eta"] * record[f"lambda{which}"] * BETA0, abs=DIGITS
                )
    if ablation in ("full", "no_nodo", "no_sam"):
        assert any(record["eta"] != 1 for record in log[1:])
    facts = json.loads((out / "hanorec.json").read_text())
    assert (facts["stage"], facts["ablation"]) == ("dpo", ablation)
    assert sha256(out / "below" / "adapter_model.safetensors") == sha256(
        sft / "adapter_model.safetensors"
    )
    assert any((value != 0).any() for key, value in toy.adapter(out).items() if "lora_B" in key)


@pytest.mark.equation("DPO-1", "HN-11")
@pytest.mark.parametrize(
    ("task", "ablation"), [("ranking", "full"), ("ranking", "dpo"), ("binary", "full")]
)
def test_dpo_moves_toward_what_the_user_chose(launch, data, checkpoints, sft, task, ablation):
    """Six users, 40 steps: for every example the saved policy prefers the user's item over the
    other one by more than the SFT policy did. What was chosen is read from the data, not from the
    pairs.
    """
    out, log, _ = launch(
        train_dpo.main, "--targets-per-user", 1, "--users-to", 0.25, "--epochs", 40,
        "--micro-batch", 12, "--accumulation", 1, "--learning-rate", 1e-2, "--lora-dropout", 0,
        "--sft", sft, "--task", task, "--ablation", ablation, "--sigma", 0.01,
    )
    assert log[-1]["accuracy"] == 1 and log[-1]["margin"] > log[0]["margin"] + 0.1
    backbone, source, examples = toy.source_of(data, checkpoints, task, users_to=0.25)
    rows = []
    for example in examples:
        if task == "ranking":
            rows.append(source.ranking_row(example, [example.target, *negatives_of(example, 2025)]))
        else:
            rows.append(source.binary_row(example, example.target, ["Yes", "No"]))
    gaps = []
    for folder in (sft, out):
        fresh = load_backbone(backbone.path, "float32", "cpu").model
        backbone.model = fresh
        attach_policy(fresh, folder)
        fresh.eval()
        with torch.no_grad():
            gaps.append(toy.log_probs(backbone, rows, source.pictures) @ torch.tensor([1.0, -1.0]))
    assert len(rows) == 6 and (gaps[1] > gaps[0] + 0.5).all()


@pytest.mark.equation("HN-1", "HN-2", "HN-4", "HN-5")
@pytest.mark.parametrize("ablation", ["no_nodo", "no_sam"])
def test_lambda_from_the_items_by_numpy(launch, data, checkpoints, sft, ablation):
    """The range of lambda in run.json, by loops in float64 from the model's embeddings: union
    clusters, or the cosine alone, whatever --gap says. And each pair's own beta' reaches the loss:
    normalised, at h = 0 and eta = 1, the loss is ln 2 times the mean of 1 / lambda.
    """
    _, log, facts = launch(
        train_dpo.main, *toy.STEPS, "--sft", sft, "--ablation", ablation, "--k", 4,
        "--micro-batch", 8, "--accumulation", 3, "--normalised", "true", "--lora-dropout", 0,
        "--sigma", 0, *(["--gap", "ranked"] if ablation == "no_sam" else []),
    )
    backbone, source, examples = toy.source_of(data, checkpoints)
    table = backbone.model.get_input_embeddings().weight.double().numpy()

    def unit(v):
        return v / np.linalg.norm(v)

    e = []
    for row, title in enumerate(source.catalog.titles):
        tokens = backbone.tokenizer.encode(title, add_special_tokens=False)
        e.append(
            unit(
                unit(table[tokens].mean(0))
                + unit(source.pictures[row].features.double().numpy().mean(0))
            )
        )
    s = np.array(e) @ np.array(e).T
    np.fill_diagonal(s, 1)

    def gap(w, l):
        if ablation == "no_sam":
            return 1 - s[w, l]
        near = [[j for j in np.argsort(-s[m], kind="stable") if j != m][:4] for m in (w, l)]
        union = sorted({w, l, *near[0], *near[1]})
        p = [np.exp(s[m, union]) / np.exp(s[m, union]).sum() for m in (w, l)]
        return np.linalg.norm(p[0] - p[1])

    lam = [
        1 / (1 + np.exp(-gap(pair.chosen, pair.rejected[0])))
        for pair in preferences(source, examples, 2025)
    ]
    assert facts["lambda_range"] == pytest.approx([min(lam), max(lam)], abs=1e-5)
    assert facts["pairs"] == 24 and len(log) == 1
    assert log[0]["loss"] == pytest.approx(math.log(2) * np.mean([1 / x for x in lam]), abs=1e-5)


# flag, value, what must differ from the default run in the log, and what need not
OPTIONS = [
    ("--gap", "ranked", "lambda"),
    ("--hardness", "ratio", "lambda"),
    ("--hardness", "standardised", "lambda"),
    ("--embedding", "hidden", "lambda"),
    ("--draw", "hard", "lambda"),
    ("--k", 3, "lambda"),
    ("--noise", "relative", "margin"),
    ("--sigma", 0.2, "margin"),
    ("--dataset", "movielens", "margin"),
    ("--normalised", "true", "loss"),
    ("--eta", "ema", "eta"),
    ("--trim", 0.3, "eta"),
    ("--kl-coef", 1.0, "gradient_norm"),
    ("--beta0", 0.3, "beta"),
    ("--candidate-images", "off", "margin"),
]


@pytest.mark.parametrize(
    ("flag", "value", "changed"), OPTIONS, ids=lambda value: str(value).lstrip("-")
)
def test_options(launch, sft, full, flag, value, changed):
    """Each option alone runs, gives a complete finite log, and really changes the quantity that it
    is about.
    """
    _, default, _ = full
    out, log, facts = launch(train_dpo.main, *toy.STEPS, "--sft", sft, flag, value)
    check_log(log, DPO_KEYS, 3)
    assert any(abs(a[changed] - b[changed]) > 1e-6 for a, b in zip(log, default, strict=True))
    assert toy.furthest(out, full[0]) > 0
    beta0 = 0.3 if flag == "--beta0" else BETA0
    for record in log:
        assert record["beta"] == pytest.approx(record["eta"] * record["lambda"] * beta0, abs=DIGITS)
    if flag in ("--noise", "--sigma", "--dataset", "--normalised", "--eta", "--trim", "--kl-coef"):
        assert log[0]["lambda"] == default[0]["lambda"]  # the pairs and their hardness are the same
    assert facts["sigma_n"] == {"--sigma": 0.2, "--dataset": 0.1}.get(flag, 0.05)
    if value == "standardised":
        assert log[0]["lambda_max"] > 1 > log[0]["lambda_min"] and facts["lambda_range"][1] < 2
    if value == "ratio":  # sigma(Delta) / sigma(mean Delta) lies around 1
        assert facts["lambda_range"][0] < 1 < facts["lambda_range"][1]
    if flag == "--normalised":  # beta0 / beta' > 1 where lambda < 1
        assert log[0]["loss"] > default[0]["loss"]
    assert (log[0]["kl"] is None) == (flag != "--kl-coef")


def test_kl_is_only_logged_unless_weighted(launch, sft, full):
    """--log-kl: the KL of the noisy policy from the reference, > 0 from the first step on; nothing
    else in the run changes.
    """
    out, log, _ = launch(train_dpo.main, *toy.STEPS, "--sft", sft, "--log-kl", "true")
    assert all(record["kl"] > 0 for record in log)
    assert [record | {"kl": None} for record in log] == full[1] and toy.furthest(out, full[0]) == 0
    _, log, _ = launch(
        train_dpo.main, *toy.STEPS, "--sft", sft, "--log-kl", "true", "--ablation", "dpo",
        "--lora-dropout", 0,
    )
    # without noise policy = reference at first
    assert log[0]["kl"] == pytest.approx(0, abs=DIGITS) and log[2]["kl"] > 0


@pytest.mark.parametrize(
    "flags",
    [["--task", "binary"],
     ["--task", "binary", "--ablation", "dpo", "--candidate-images", "off"],
     ["--gap", "ranked", "--hardness", "standardised", "--noise", "relative",
      "--normalised", "true", "--eta", "ema", "--trim", "0.2", "--kl-coef", "0.1",
      "--embedding", "hidden", "--draw", "hard", "--checkpointing", "true"]],
    ids=["binary", "binary-dpo", "all-at-once"],
)
def test_combinations(launch, sft, flags):
    """Binary has two pairs an example (Yes over No, No over Yes); and all options work together,
    without an SFT adapter too.
    """
    for start in (["--sft", sft], []):
        out, log, facts = launch(train_dpo.main, *toy.STEPS, *flags, *start)
        binary = "binary" in flags
        check_log(log, DPO_KEYS, 6 if binary else 3)
        assert facts["pairs"] == (48 if binary else 24)
        assert (out / "below").exists() == bool(start)


def test_checkpointing_changes_nothing_but_memory(launch, sft, full):
    out, log, _ = launch(train_dpo.main, *toy.STEPS, "--sft", sft, "--lora-dropout", 0)
    again, checkpointed, _ = launch(
        train_dpo.main, *toy.STEPS, "--sft", sft, "--lora-dropout", 0, "--checkpointing", "true"
    )
    assert toy.furthest(out, again) < 1e-6
    assert [r["loss"] for r in checkpointed] == pytest.approx([r["loss"] for r in log], abs=DIGITS)


# ---- what must not matter, and what must ----


@pytest.mark.parametrize(
    ("main", "flags"),
    [(train_sft.main, []),
     (train_dpo.main, []),
     (train_dpo.main, ["--eta", "ema", "--normalised", "true"]),
     (train_dpo.main, ["--kl-coef", "1", "--rejected", "3"])],
    ids=["sft", "dpo", "ema", "kl"],
)
def test_accumulation_does_not_matter(launch, sft, main, flags):
    """7 rows x 2 micro-batches = 14 x 1: the same adapter and log, in float64; dropout 0, noise on.
    Answers differ in length and the second step has parts of 7 and 3 rows, so a mean of means would
    show.
    """
    common = [*toy.STEPS, "--lora-dropout", 0, *flags]
    common += ["--sft", sft] if main is train_dpo.main else []
    (one, log, _), (two, other, _) = [
        launch(main, *common, "--micro-batch", m, "--accumulation", 14 // m, float64=True)
        for m in (7, 14)
    ]
    assert toy.furthest(one, two) < 1e-10
    for a, b in zip(log, other, strict=True):
        for key, value in a.items():
            assert (value or 0) == pytest.approx(b[key] or 0, rel=0, abs=DIGITS)  # kl may be None


@pytest.mark.parametrize("main", [train_sft.main, train_dpo.main], ids=["sft", "dpo"])
def test_one_seed_one_run(launch, sft, full, main):
    """With dropout and noise on, a second run is the same to the bit; another seed is another run.
    """
    start = ["--sft", sft] if main is train_dpo.main else []
    first = full if main is train_dpo.main else launch(main, *toy.STEPS)
    second, other = launch(main, *toy.STEPS, *start), launch(main, *toy.STEPS, *start, "--seed", 7)
    assert sha256(first[0] / "adapter_model.safetensors") == sha256(
        second[0] / "adapter_model.safetensors"
    )
    assert first[1] == second[1] and first[1] != other[1]


def test_settings_from_a_json_file(launch, sft, full, tmp_path):
    """The settings that a run wrote down, given back as a file: the same run. Flags win over the
    file.
    """
    path = tmp_path / "settings.json"
    settings = full[2]["settings"] | {"out": str(tmp_path / "again"), "epochs": 3}
    path.write_text(json.dumps(settings))
    train_dpo.main([str(path), "--epochs", "1"])
    assert sha256(tmp_path / "again" / "adapter_model.safetensors") == sha256(
        full[0] / "adapter_model.safetensors"
    )
    path.write_text(json.dumps(settings | {"lerning_rate": 1}))
    with pytest.raises(
        InputError, match="settings.json: unknown keys lerning_rate; expected .*learning_rate"
    ):
        train_dpo.main([str(path)])
    path.write_text("[1]")
    with pytest.raises(InputError, match="settings.json: not an object"):
        train_dpo.main([str(path)])
    with pytest.raises(InputError, match="nothing.json: no such file"):
        train_dpo.main([str(tmp_path / "nothing.json")])


def test_a_script_as_a_command(tmp_path):
    """Bad input is one line on stderr and exit code 2, without a traceback."""
    script = Path(train_sft.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--model", str(tmp_path), "--data", str(tmp_path),
         "--out", str(tmp_path / "out"), "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}: no config.json")


def fails(main, *flags):
    """The message of the InputError, through the same door as the commands (exit code 2)."""
    with pytest.raises(SystemExit) as caught:
        run(lambda: main([*map(str, flags)]))
    return caught.value.code


@pytest.mark.parametrize(("flags", "part"), [
    (["--micro-batch", 1, "--accumulation", 1], "steps of 1, expected at least 3"),
    (["--k", 294], "--k|K"),
    (["--k", 0], "k"),
    (["--trim", 0.5], "trim|dropped"),
    (["--lora-rank", 0], "rank"),
    (["--epochs", 0], "epochs"),
    (["--micro-batch", 0], "micro.batch"),
    (["--sigma", -1], "sigma"),
    (["--users-to", 0], "users"),
    (["--users-from", 0, "--users-to", 0.05], "at least 3"),
    (["--history", 0], "history"),
    (["--candidates", 1], "candidates"),
    (["--candidates", 401], "negatives"),
    (["--max-pixels", 10], "max_pixels"),
    (["--device", "cuda:77"], "cuda:77"),
], ids=lambda value: " ".join(map(str, value)).replace("--", "") if isinstance(value, list) else "")
def test_settings_that_cannot_work(data, checkpoints, tmp_path, capfd, flags, part):
    """Each is an input error that names the setting, not a traceback, and leaves no adapter."""
    code = fails(
        train_dpo.main, "--model", checkpoints["qwen2_5_vl"], "--data", data,
        "--out", tmp_path / "out", *toy.SHORT, *toy.STEPS, *flags,
    )
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and re.search(part, last), last
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_files_that_do_not_fit(launch, data, checkpoints, sft, make, tmp_path, capfd):
    """An output folder in use, an SFT adapter of another base, and one that is none."""
    common = ["--data", data, *toy.SHORT, *toy.STEPS]
    model = ["--model", checkpoints["qwen2_5_vl"]]
    before = sha256(sft / "adapter_model.safetensors")
    assert fails(train_sft.main, *model, *common, "--out", sft) == 2
    assert "holds a finished run" in capfd.readouterr().err
    assert sha256(sft / "adapter_model.safetensors") == before
    assert (
        fails(
            train_dpo.main, "--model", make("qwen2_5_vl", seed=3), *common, "--out", tmp_path / "a",
            "--sft", sft,
        )
        == 2
    )
    assert "trained on another base" in capfd.readouterr().err
    assert fails(train_dpo.main, *model, *common, "--out", tmp_path / "b", "--sft", tmp_path) == 2
    assert "adapter_config.json: no such file" in capfd.readouterr().err


def test_a_broken_step_stops_the_run(data, checkpoints, tmp_path, capfd, sft):
    """Weights that overflow give a NaN loss: the run stops before it is written, and names the step
    and the users.
    """
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu")
    for layer in add_lora(backbone.model):
        torch.nn.init.constant_(layer.A, 1e30), torch.nn.init.constant_(layer.B, 1e30)
    save_adapter(backbone.model, tmp_path / "broken", "x")
    code = fails(
        train_dpo.main, "--model", checkpoints["qwen2_5_vl"], "--data", data,
        "--out", tmp_path / "out", "--sft", tmp_path / "broken", *toy.SHORT, *toy.STEPS,
        "--ablation", "dpo",
    )
    assert code == 2 and "step 0: loss nan" in capfd.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
