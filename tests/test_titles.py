"""Titles as the model reads them: two that are one sequence of tokens, and titles that are too
long."""

import json
import shutil
from dataclasses import replace

import pytest
import toy

import evaluate
import train_dpo
import train_sft
from hanorec.base.config import DataConfig
from hanorec.base.errors import InputError
from hanorec.datasets.interactions import Example
from hanorec.mllm.builder import PromptBuilder, cut_title
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import answer_ids, text_ids
from hanorec.mllm.tasks import preferences, scoring_rows, sft_rows

EXAMPLE = Example("u7", (5,), 0, frozenset({0, 5}), (0, 1, 2))


def builder_of(backbone, catalog, *titles, **options):
    """Over the catalogue without images, its first titles replaced."""
    items = replace(
        catalog, titles=(*titles, *catalog.titles[len(titles) :]),
        images=(None,) * len(catalog.ids),
    )
    return PromptBuilder(backbone, items, {}, DataConfig(data="data", **options))


@pytest.fixture
def lower(checkpoints, tmp_path):
    """A checkpoint whose tokenizer makes all letters small."""
    folder = shutil.copytree(checkpoints["qwen2_5_vl"], tmp_path / "lower")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # Qwen's own does not ask the file
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_backbone(str(folder), "float32", "cpu", max_pixels=1024)


# ---- one sequence of tokens ----


def test_titles_of_one_token_sequence_cannot_be_answers_to_one_prompt(lower, qwen, catalog):
    """As a pair and as candidates: an error with both items. The checkpoint that tells them apart
    takes them, and so does SFT, which has one answer.
    """
    same = builder_of(lower, catalog, "ROSE", "rose")
    ids = catalog.ids
    words = f"user 'u7': items '{ids[0]}' and '{ids[1]}' have the titles 'ROSE' and 'rose', which"
    for call in (
        lambda builder: preferences(builder, [EXAMPLE], seed=0, count=2),
        lambda builder: scoring_rows(builder, [EXAMPLE]),
    ):
        with pytest.raises(InputError, match=f"{words} are one .*: change one in the titles file"):
            call(same)
        assert call(builder_of(qwen, catalog, "ROSE", "rose"))
    assert len(sft_rows(same, [EXAMPLE], seed=0)) == 1
    assert answer_ids(lower, "ROSE") == answer_ids(lower, "rose")
    assert answer_ids(qwen, "ROSE") != answer_ids(qwen, "rose")


def test_equal_titles_are_an_error_in_a_pair_alone(qwen, catalog):
    """Candidate sets never hold them; what a retriever finds may, and then they tie."""
    builder = builder_of(qwen, catalog, "Rose", "Rose")
    with pytest.raises(InputError, match="have one title 'Rose', expected two"):
        preferences(builder, [EXAMPLE], seed=0, count=2)
    (row,) = scoring_rows(builder, [EXAMPLE])
    assert row.answers[0] == row.answers[1] != row.answers[2]


# ---- long titles ----

LONG = "A very long story of roses and of thorns"


def test_a_title_is_cut_at_the_last_token_that_fits(backbone):
    """Never in the middle of a letter, never a token too many, and one letter more would be one."""
    titles = (LONG, "Ünï", "東京物語 " * 4, "🎬🎬🎬🎬", "short", "a" * 500)
    for title in titles:
        for most in (6, 8, 11):
            found = cut_title(backbone, title, most)
            assert title.startswith(found) and found and len(text_ids(backbone, found)) <= most
            if len(text_ids(backbone, title)) <= most:
                assert found == title
            else:
                rest = title[len(found) :].lstrip()
                longer = title[: len(title) - len(rest) + 1]
                assert len(text_ids(backbone, longer)) > most
    with pytest.raises(InputError, match="--max-title-tokens 1: the title '🎬🎬' has a first char"):
        cut_title(backbone, "🎬🎬", 1)


def test_titles_are_cut_in_prompts_and_answers_and_counted(qwen, catalog, capsys):
    """Not in the catalogue, whose titles a user is shown."""
    builder = builder_of(qwen, catalog, LONG, "Rose", max_title_tokens=4)
    (row,) = scoring_rows(builder, [EXAMPLE])
    cut = cut_title(qwen, LONG, 4)
    assert cut != LONG and row.answers[0] == answer_ids(qwen, cut)
    text = qwen.tokenizer.decode(row.prompt)
    assert f"{cut}\n" in text and LONG not in text and builder.catalog.titles[0] == LONG
    count = sum(len(text_ids(qwen, title)) > 4 for title in builder.catalog.titles)
    said = capsys.readouterr().out
    note = f"note: {count} of {len(catalog.ids)} titles take more than 4 tokens (--max-title-t"
    assert count > 0 and said.count(note) == 1
    whole = builder_of(qwen, catalog, LONG)
    assert whole.shown is whole.catalog and capsys.readouterr().out == ""
    assert LONG in qwen.tokenizer.decode(scoring_rows(whole, [EXAMPLE])[0].prompt)


def test_titles_that_a_cut_makes_equal_are_told(qwen, catalog):
    builder = builder_of(qwen, catalog, f"{LONG} 1", f"{LONG} 2", max_title_tokens=6)
    with pytest.raises(InputError, match=f"'{LONG} 1' and '{LONG} 2'.*: raise --max-title-tokens"):
        scoring_rows(builder, [EXAMPLE])
    assert scoring_rows(builder_of(qwen, catalog, f"{LONG} 1", f"{LONG} 2"), [EXAMPLE])


def test_a_prompt_that_is_too_long_names_what_can_help(qwen, catalog):
    """Text alone beyond the context: smaller images cannot help, so the message does not say so."""
    builder = builder_of(qwen, catalog, "Rose", "word by word " * 2000)
    takes = len(text_ids(qwen, builder.catalog.titles[1]))
    assert takes > qwen.context
    with pytest.raises(InputError) as caught:
        scoring_rows(builder, [EXAMPLE])
    text = str(caught.value)
    for part in ("user u7", "'word by word word", f"takes {takes} tokens", "--max-title-tokens"):
        assert part in text
    assert "--max-pixels" not in text and len(text) < 600
    short = builder_of(qwen, catalog, "Rose", "word by word " * 2000, max_title_tokens=20)
    assert len(scoring_rows(short, [EXAMPLE])) == 1


@pytest.fixture(scope="module")
def long_titles(data, tmp_path_factory):
    """The data set with two titles that no context holds, alike up to their ends."""
    folder = shutil.copytree(
        data, tmp_path_factory.mktemp("long") / "data",
        ignore=shutil.ignore_patterns("features-*", "candidates_*"),
    )
    (table,) = folder.glob("*_titles.csv")
    lines = table.read_text().splitlines()
    for place in (3, 4):
        lines[place] = f"{lines[place].split(',')[0]},{'no end ' * 3000}{place}"
    table.write_text("\n".join(lines) + "\n")
    return folder


def test_through_the_commands(long_titles, checkpoints, tmp_path, capsys):
    """Refused without the option; with it both stages run on pairs that a cut leaves different, the
    adapter says so, and another number is noticed.
    """
    every = ["--model", str(checkpoints["qwen2_5_vl"]), "--data", str(long_titles), *toy.SHORT]
    steps = [*toy.STEPS, "--targets-per-user", "0", "--candidates", "8"]
    cut = ["--max-title-tokens", "5"]
    with pytest.raises(InputError, match="longest title, 'no end no end .*--max-title-tokens"):
        train_sft.main([*every, *steps, "--out", str(tmp_path / "whole")])
    for main, name, more in (
        (train_sft.main, "sft", []), (train_dpo.main, "dpo", ["--sft", str(tmp_path / "sft")])
    ):
        capsys.readouterr()
        main([*every, *steps, *cut, *more, "--out", str(tmp_path / name)])
        assert capsys.readouterr().out.count("titles take more than 5 tokens") == 1
        prompt = json.loads((tmp_path / name / "hanorec.json").read_text())["prompt"]
        assert prompt["max_title_tokens"] == 5
    trained = f"note: {tmp_path / 'sft'} was trained with max_title_tokens = 5, this command uses 6"
    for flags, said in ((cut, False), (["--max-title-tokens", "6"], True)):
        out = ["--sets", "random", "--out", str(tmp_path / f"eval{said}")]
        evaluate.main([*every, *flags, "--adapter", str(tmp_path / "sft"), *out])
        assert (trained in capsys.readouterr().out) == said


@pytest.mark.parametrize("stated", [True, False])
def test_a_cut_is_noticed_where_the_adapter_knew_whole_titles(
    sft, data, checkpoints, tmp_path, capsys, stated
):
    """Also where its file is older than the option."""
    sft = shutil.copytree(sft, tmp_path / "sft")
    facts = json.loads((sft / "hanorec.json").read_text())
    assert facts["prompt"].get("max_title_tokens") is None
    if not stated:
        facts["prompt"].pop("max_title_tokens", None)
        (sft / "hanorec.json").write_text(json.dumps(facts))
    own = shutil.copytree(data, tmp_path / "data")  # candidates are drawn into it
    evaluate.main([
        "--model", str(checkpoints["qwen2_5_vl"]), "--data", str(own), *toy.SHORT, "--sets",
        "random", "--adapter", str(sft), "--out", str(tmp_path / "out"), "--max-title-tokens", "7",
    ])
    note = f"note: {sft} was trained with max_title_tokens = None, this command uses 7"
    assert note in capsys.readouterr().out
