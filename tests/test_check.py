"""`python -m hanorec.check`: every fault of a folder in one pass, and the verdict of the runs.

That train_sft.py refuses each of the single faults is what tests/test_bad_input.py shows, so its
table is used here.
"""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import hostile
import pytest
import toy
from hostile import TEST, TITLES, TRAIN, add, both, cut, drop, link, picture, put
from PIL import Image
from test_bad_input import CORPUS

import evaluate
import train_sft
from hanorec import check
from hanorec.base.command import run
from hanorec.base.config import DataConfig, EvalConfig, TrainConfig
from hanorec.base.errors import InputError
from hanorec.datasets.candidates import draw_candidates
from hanorec.datasets.catalog import load_catalog
from hanorec.datasets.inspection import Findings, inspect_images
from hanorec.datasets.interactions import Example, heldout_examples, load_interactions
from hanorec.mllm.backbone import FAMILIES, image_features
from hanorec.mllm.builder import cut_title
from hanorec.mllm.inspection import check_alike, inspect_titles
from hanorec.mllm.load import load_backbone
from hanorec.mllm.outline import image_tokens, load_outline, outline_builder
from hanorec.mllm.prompts import text_ids
from hanorec.mllm.remedies import mildest
from hanorec.mllm.ruler import Ruler
from hanorec.mllm.tasks import load_examples, preferences, scoring_rows
from hanorec.mllm.written import longest_answer
from hanorec.ranking.candidate_sets import held_out, list_sets

KEPT = 20  # images of the small world
VAL = "data/val.tsv"
LONG = "A very long story of roses and of thorns"


@pytest.fixture(scope="module")
def small(data, checkpoints, tmp_path_factory):
    """A world of data without computed files and with few images, so that a test takes a moment,
    and a model."""
    root = tmp_path_factory.mktemp("small") / "world"
    computed = shutil.ignore_patterns("features-*", "candidates_*")
    shutil.copytree(data, root / "data", ignore=computed)
    for path in (root / "data/images").iterdir():
        if int(path.stem) > KEPT:
            path.unlink()
    shutil.copytree(checkpoints["qwen2_5_vl"], root / "model")
    return root


@pytest.fixture
def world(small, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(small, tmp_path / "world", symlinks=True)


@pytest.fixture
def look(capsys):
    """look(words of the command) -> (exit status, what was printed)."""

    def start(*words):
        capsys.readouterr()
        status = 0
        try:
            run(partial(check.main, [str(word) for word in words]))
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.err if status == 2 else printed.out

    return start


def count(text, words):
    """How many of the kind that has these words; 0 where it is not listed."""
    (line,) = [line for line in text.splitlines() if words in line and " x " in line] or ["0 x"]
    return int(line.partition(" x")[0])


def errors(text):
    """The number that the last line states."""
    last = text.splitlines()[-1]
    return int(last.split("errors: ")[1].split()[0]) if "errors: " in last else 0


# ---- as the runs ----

OF_DATA = ("titles: ", "train: ", "image: ", "images: ", "dataset.json: ")
REFUSED = [case for case in CORPUS if case[2] == "sft" and case[0].startswith(OF_DATA)]

# Damages to a whole file, so that one fault is several.
WHOLE = [
    "titles: UTF-16", "titles: UTF-16 without a mark", "titles: all alike",
    "train: commas for tabs", "train: line ends of old", "train: compressed", "images: a file",
]


def messages(text, folder):
    """What is listed, as the run would have said it."""
    found = []
    for block in text.split("\n\n"):
        head, *examples = block.splitlines()
        _, _, kind = head.partition(" x ")
        found += [f"{folder}/{example.strip()}; {kind}" for example in examples if kind]
    return found


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("name", "spoil", "words"), [(c[0], c[1], c[3]) for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_what_sft_refuses_is_an_error(world, look, name, spoil, words):
    """With the same words, and once."""
    spoil(world)
    status, text = look(world / "data", "--candidates", 4)
    assert status == 1
    assert (errors(text) == 1) == (name not in WHOLE)
    said = messages(text, world / "data")
    assert any(all(word in message for word in words) for message in said), text


def test_the_table_has_many_of_them():
    assert len(REFUSED) > 50 and {name for name, *_ in REFUSED} >= set(WHOLE)


# ---- several at once ----


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_all_faults_of_a_folder_are_found_in_one_pass(world, look):
    """Each with its count. An id behind which a fault lies is known all the same, so that no second
    fault follows from the first."""
    titles = [
        "900,Good, the Bad", "901,One, two; three, four", '902,"Open', "903,Fine", "7,Again",
        "904, ", "905, ", '906,"Two', 'lines"',
    ]
    users = [
        "a\t900 901 99999 99998 1", "b\t902 903", "c\t904 905", "d\t906 7", "e\t1\t2", "3\t1 2",
        "no tab", "f\t",
    ]
    both(
        add(TITLES, "\n".join(titles).encode() + b"\n907,Caf\xe9\n"),
        add(TRAIN, "\n".join(users) + "\n"),
        add(VAL, "stranger\t1\ne\t5\nf\t5\n"),
        cut("data/images/7.png", 60),
        put("data/images/8.png", "<html>404</html>"),
        picture("data/images/9.png", (1, 300)),
        link("data/images/10.png", "/etc/passwd"),
        picture("data/images/11.jpg"),
    )(world)
    status, text = look(world / "data", "--all")
    expected = {
        "put a title with a comma in double quotes": 2,
        "close the quotes of a quoted title": 1,
        "close the quote or remove the break": 1,
        "expected each id once": 1,
        "add one or remove the item": 2,
        "save the file as utf-8": 1,
        "expected an id of the titles file": 2,
        "user<TAB>id id id": 2,
        "expected one line a user": 1,
        "expected at least one, so add them": 1,
        "so add it or remove the user here": 1,
        "replace the file": 2,
        "so crop or replace the image": 1,
        "copy it there": 1,
        "expected one an item": 1,
    }
    assert {words: count(text, words) for words in expected} == expected
    assert status == 1 and errors(text) == sum(expected.values())
    for example in ("titles.csv:297: 4 fields", "train.tsv:25: unknown item id '99998'"):
        assert f"    {example}" in text.replace("Posterland_", "")


def test_a_few_examples_of_each_kind_or_all(world, look):
    for number in range(1, 8):
        put(f"data/images/{number}.png", "")(world)
    _, few = look(world / "data")
    _, every = look(world / "data", "--all")
    line = "    images/{}.png: not a whole"
    assert line.format(3) in few and line.format(4) not in few and "4 more: --all" in few
    assert all(line.format(number) in every for number in range(1, 8)) and "more" not in every
    assert count(few, "replace the file") == count(every, "replace the file") == 7


# ---- what a run goes on with ----


def test_notes_are_no_errors_here_or_in_a_run(world, look, capsys):
    both(
        add(TITLES, f"900,Twin\n901,Twin\n902,{LONG} 1\n903,{LONG} 2\n"),
        add(TRAIN, "single\t5\nagain\t5 6 7\n"),
        add(VAL, "again\t6\n"),
        put(TEST, ""),
        picture("data/images/30.gif"),
        put("data/images/31.jfif", ""),
        picture("data/images/unknown.png"),
    )(world)
    model = ["--model", world / "model", "--max-pixels", 1024, "--max-title-tokens", 4]
    status, text = look(world / "data", "--history", 2, "--candidates", 4, *model)
    catalog = load_catalog(world / "data")
    backbone = load_outline(str(world / "model"), 1024)
    spelt = {}
    for title in catalog.titles:
        spelt.setdefault(cut_title(backbone, title, 4), set()).add(title)
    alike = sum(len(titles) > 1 for titles in spelt.values())
    long = sum(len(text_ids(backbone, title)) > 4 for title in catalog.titles)
    expected = {
        "convert them": 2,
        "of no item in the titles file": 1,
        "items without an image": len(catalog.ids) - KEPT,
        "titles of several items": 1,
        "users with a single item": 1,
        "targets of val.tsv that their user had before": 1,
        "evaluate.py --split test` would have nobody": 1,
        "titles of more than 4 tokens": long,
        "one sequence of tokens": alike,
    }
    assert {words: count(text, words) for words in expected} == expected
    assert long >= 2 and alike >= 1
    assert status == 0 and errors(text) == 0
    assert "'Twin': items '900', '901'" in text and "user 'again', item '6'" in text

    paths = ["--model", world / "model", "--data", world / "data", "--out", world / "out"]
    words = [*paths, *toy.SHORT, *toy.STEPS, "--max-title-tokens", 4]
    train_sft.main([str(word) for word in words])
    assert (world / "out" / "adapter_model.safetensors").exists()


def test_a_clean_folder(data, checkpoints, look):
    for family in FAMILIES:
        status, text = look(data, "--model", checkpoints[family], "--max-pixels", 1024)
        assert status == 0 and text.endswith("\n\nnothing found\n")
        assert text.startswith(f"{data}: Posterland, 294 items, 294 with an image; users: 24 in")


def test_nothing_is_written(world, look):
    both(cut("data/images/7.png", 60), add(TITLES, "7,Again\n"))(world)

    def state():
        times = {path: path.stat().st_mtime_ns for path in [world, *world.rglob("*")]}
        return hostile.snapshot(world), times

    before = state()
    assert look(world / "data", "--model", world / "model", "--max-pixels", 1024)[0] == 1
    assert state() == before
    add(TITLES, "\n")(world)
    assert state() != before


# ---- where it cannot look ----


def test_what_cannot_be_looked_at(world, look):
    status, text = look(world / "none")
    assert status == 2 and text.startswith(f"error: {world}/none: not a folder")
    assert look(world / TITLES)[0] == 2
    status, text = look(world / "data", "--model", world / "data")
    assert status == 2 and "no config.json" in text and "Traceback" not in text
    status, text = look(world / "data", "--model", world / "modle")
    assert status == 2 and f"{world}/modle: no such folder, and by this name cannot be" in text
    assert look(world / "data", "--model", world / "model", "--max-pixels", 9)[0] == 2
    status, text = look(world / "data", "--history", 0)
    assert status == 2 and "--history 0" in text


def test_a_folder_without_titles_is_refused(world, look):
    drop(TITLES)(world)
    status, text = look(world / "data")
    assert status == 1 and count(text, "expected exactly one") == 1
    assert "nothing else can be looked at" in text


def test_help(look):
    status, text = look("--help")
    assert status == 0
    for words in ("python -m hanorec.check DATA --model MODEL", "--all", "Exit status: 0"):
        assert words in text


# ---- rows ----

SIZES = [(64, 64), (128, 64), (50, 200), (1, 150), (97, 33), (300, 299), (28, 57), (640, 480)]


def test_an_image_takes_as_many_tokens_as_the_model_makes(backbone):
    images = [Image.new("RGB", size, "red") for size in SIZES]
    for pixels in (1024, 2000, 50176):
        loaded = load_backbone(backbone.path, "float32", "cpu", pixels)
        outline = load_outline(backbone.path, pixels)
        made = [len(image_features(loaded, [image])[0].features) for image in images]
        assert [image_tokens(outline, *size) for size in SIZES] == made


def outline_of(path, folder, **options):
    """The builder of prompts without weights, as the command makes it."""
    catalog = load_catalog(folder)
    sizes = inspect_images(catalog, Findings())
    backbone = load_outline(str(path), 1024)
    return outline_builder(backbone, catalog, sizes, DataConfig(data=str(folder), **options))


@pytest.mark.parametrize("task", ["ranking", "binary"])
def test_rows_are_as_long_as_those_of_the_runs(world, checkpoints, task):
    """Of training, DPO's among it, and of evaluation; never longer than the quick bound says."""
    options = {"task": task, "history": 2, "candidates": 4}
    _, builder, examples = toy.source_of(world / "data", {"qwen2_5_vl": world / "model"}, task)
    ruler = Ruler(outline_of(world / "model", world / "data", **options), seed=2025)
    lengths = set()
    for example in examples:
        scored = scoring_rows(builder, [example])
        trained = scored
        if task == "binary":
            trained = [pair.row for pair in preferences(builder, [example], 2025)]
        for rows, training in ((scored, False), (trained, True)):
            length = max(len(row.prompt) + max(map(len, row.answers)) for row in rows)
            assert ruler.longest(example, training)[0] == length <= ruler.at_most(example)
            lengths.add(length)
        assert ruler.at_most(example) <= ruler.at_most(replace(example, candidates=()))
    assert len(lengths) > 5


def test_rows_of_lists_are_as_long_as_those_of_the_runs(world):
    """--targets 3: evaluation writes the longest titles, training any of the candidates'."""
    _, builder, _ = toy.source_of(world / "data", {"qwen2_5_vl": world / "model"}, candidates=6)
    config = replace(builder.config, targets=3)
    builder = replace(builder, config=config)
    train = TrainConfig(out="", targets_per_user=3)
    _, examples = load_examples(builder.backbone, config, train)
    options = {"history": 2, "candidates": 6, "targets": 3}
    ruler = Ruler(outline_of(world / "model", world / "data", **options), seed=2025)
    for example in examples:
        longest = longest_answer(builder, example)
        length, _ = ruler.longest(example, False)
        assert length == len(longest.prompt) + len(longest.answers[0]) <= ruler.at_most(example)
        (pair,) = preferences(builder, [example], 2025)
        trained = max(len(pair.row.prompt) + len(answer) for answer in pair.row.answers)
        assert trained <= ruler.longest(example, True)[0]
        assert ruler.at_most(example) <= ruler.at_most(replace(example, candidates=()))
    assert len(examples) > 20


def test_lists_of_targets(world, look):
    """Who has too few items is noted, where all have it is an error, as evaluate.py's."""
    both(
        add(TRAIN, "three\t5 6 7\nfour\t5 6 7 8\ntwice\t5 6 7 6\n"),
        put(VAL, "three\t6\ntwice\t7\n"),
    )(world)
    flags = ["--targets", 3, "--candidates", 6, "--model", world / "model", "--max-pixels", 1024]
    status, text = look(world / "data", *flags, "--all")
    noted = "users of train.tsv without 3 different last items"
    assert count(text, noted) == 2 and "    user 'three'\n    user 'twice'" in text
    assert count(text, "users of val.tsv without 3 different last items") == 2
    assert status == 1 and errors(text) == 1
    assert "of 2 users in val.tsv nobody has 3 different targets and an earlier item" in text

    data = DataConfig(str(world / "data"), targets=3, candidates=6)
    config = EvalConfig("O", split="val")
    held = held_out(data, config)
    with pytest.raises(InputError, match="of 2 users in val.tsv nobody has 3 different targets"):
        list_sets(held, data, config)

    put(VAL, "four\t6\n")(world)  # 6 7 8 6: 7 8 6 are three
    status, text = look(world / "data", *flags)
    assert status == 0 and errors(text) == 0 and count(text, noted) == 2

    status, text = look(world / "data", *flags, "--targets-per-user", 4)
    assert status == 2 and "--targets-per-user 4 with --targets 3: expected a multiple" in text


def test_the_quick_bound_holds_for_odd_titles(backbone, data):
    """What is spelt out or falls apart takes most: markers, emoji, text of other scripts."""
    builder = outline_of(backbone.path, data)
    odd = ["<|im_start|><image></s>", "🎬👩‍👩‍👧‍👦🎬", "東京物語", "Ünïcödé", "a", "{}[]<>|~^"]
    titles = tuple(odd[row % 6] * (1 + row % 3) for row in range(len(builder.catalog.ids)))
    catalog = replace(builder.catalog, titles=titles)
    ruler = Ruler(replace(builder, catalog=catalog), seed=2025)
    for row in range(0, 60, 3):
        example = Example("u", (row, row + 1, row + 2), row, (), tuple(range(row, row + 10)))
        assert 0 < ruler.longest(example, True)[0] <= ruler.at_most(example)


@pytest.fixture
def short(world):
    """short(context) -> the world's model with a context of so many tokens, images of four."""
    path = world / "model" / "config.json"
    config = json.loads(path.read_text())

    def change(context):
        config["text_config"]["max_position_embeddings"] = context
        path.write_text(json.dumps(config))

    return change


FOUR = ["--max-pixels", 6400, "--history", 4, "--candidates", 4]


def test_rows_beyond_the_context_and_what_helps(world, look, short):
    """As many as the true prompts say, the longest first. Every flag that is named is enough, and
    none of the next milder values is; training says the same."""
    folder, words = world / "data", [world / "data", "--model", world / "model", *FOUR]
    config = DataConfig(data=str(folder), history=4, candidates=4)
    train = TrainConfig(out="")
    backbone = load_backbone(str(world / "model"), "float32", "cpu", 6400)
    builder, examples = load_examples(backbone, config, train)
    interactions = load_interactions(folder, builder.catalog)
    for split in ("val", "test"):
        held_out = heldout_examples(interactions, split, 4)
        examples = examples + draw_candidates(held_out, builder.catalog, 3, train.seed)
    lengths = []
    for row in scoring_rows(builder, examples):
        lengths.append(len(row.prompt) + max(map(len, row.answers)))
    lengths.sort(reverse=True)

    short(lengths[3])  # so that some are longer by a little
    longer = sum(length > lengths[3] for length in lengths)
    status, text = look(*words)
    assert status == 1 and count(text, "rows exceed the context") == longer > 0
    (line,) = [line for line in text.splitlines() if "rows exceed the context" in line]
    assert f" {lengths[0]} tokens" in text.partition(line)[2].splitlines()[1]

    flags = dict(flag.split(" ") for flag in line.partition("each alone: ")[2].split(", "))
    assert {"--history", "--candidate-images", "--max-pixels"} <= flags.keys()
    for flag, value in flags.items():
        assert look(*words, flag, value)[0] == 0
    milder = {"--history": lambda n: n + 1, "--max-pixels": lambda n: 2 * n}
    for flag, step in milder.items():
        assert look(*words, flag, step(int(flags[flag])))[0] == 1

    short(min(lengths) - 1)
    assert count(look(*words)[1], "rows exceed the context") == len(lengths)
    with pytest.raises(InputError, match="prompt and answer take"):
        train_sft.main([str(word) for word in [
            "--model", world / "model", "--data", folder, "--out", world / "out", *FOUR,
            "--device", "cpu",
        ]])


def test_where_no_flag_is_enough(world, look, short):
    words = [world / "data", "--model", world / "model", *FOUR]
    short(30)
    status, text = look(*words)
    assert status == 1 and "not even --history 1 is enough; use a checkpoint with a longer" in text


def test_images_may_help_where_they_cannot_be_smaller(data, world, look, short):
    """One token each, of which those of the candidates can still be left out."""
    flags = ["--max-pixels", 1024, "--history", 1, "--candidates", 4]
    words = [data, "--model", world / "model", *flags]
    short(20)
    _, text = look(*words)
    (longest, *_) = [line for line in text.splitlines() if line.startswith("    ")]
    short(int(re.search(r"(\d+) tokens, \d+ of them images", longest)[1]) - 1)
    status, text = look(*words)
    (line,) = [line for line in text.splitlines() if "rows exceed the context" in line]
    assert status == 1 and "--candidate-images off" in line.partition("each alone: ")[2]
    assert "--max-pixels" not in line and "--history" not in line
    assert look(*words, "--candidate-images", "off")[0] == 0


def test_tilings_that_cannot_be_smaller(checkpoints, world, look):
    """LLaVA-NeXT's smallest tiling takes what it takes, however few pixels are asked for."""
    model = shutil.copytree(checkpoints["llava_next"], world / "llava")
    config = json.loads((model / "config.json").read_text())
    words = [world / "data", "--model", model, "--task", "binary", "--history", 1]

    def line_of(context, pixels):
        config["text_config"]["max_position_embeddings"] = context
        (model / "config.json").write_text(json.dumps(config))
        _, text = look(*words, "--max-pixels", pixels)
        lines = text.splitlines()
        (place,) = [i for i, line in enumerate(lines) if "rows exceed the context" in line]
        return lines[place], lines[place + 1]  # the longest

    longest = int(re.search(r"(\d+) tokens, \d+ of them images", line_of(20, 28 * 28)[1])[1])
    tried = "not even --history 1{} is enough"
    assert tried.format("") in line_of(longest - 1, 28 * 28)[0]
    assert tried.format(" --max-pixels 784") in line_of(longest - 1, 28 * 56)[0]


def test_one_long_title_is_named(world, look):
    """Nothing but cutting it helps, and it is cut no more than it must."""
    add(TITLES, f"900,{'no end ' * 900}\n")(world)
    add(TRAIN, "long\t900 1 2\n")(world)
    words = [world / "data", "--model", world / "model", *FOUR]
    status, text = look(*words)
    (line,) = [line for line in text.splitlines() if "rows exceed the context" in line]
    flags = line.partition("each alone: ")[2]
    assert flags.startswith("--max-title-tokens ") and "," not in flags
    assert status == 1 and "the longest title is that of item '900' 'no end no end" in text
    most = int(flags.split()[1])
    assert look(*words, "--max-title-tokens", most)[0] == 0
    assert look(*words, "--max-title-tokens", most + 1)[0] == 1


def test_the_mildest_value_that_is_enough():
    assert mildest(range(9, 0, -1), lambda n: n <= 4) == 4
    assert mildest([8, 4, 2], lambda n: n < 9) == 8
    assert mildest([8, 4, 2], lambda n: n < 2) is None
    assert mildest([], lambda n: True) is None


def test_titles_alike_to_the_model_are_a_note_until_they_meet(world, look):
    """SFT has one answer to a prompt and takes them; evaluation has all candidates as answers."""
    add(TITLES, f"900,{LONG} 1\n901,{LONG} 2\n")(world)
    flags = ["--history", 2, "--max-pixels", 1024, "--max-title-tokens", 8]
    words = [world / "data", "--model", world / "model", *flags]
    status, text = look(*words, "--candidates", 2)
    assert status == 0 and count(text, "one sequence of tokens") == 1
    assert f"    item '900' '{LONG} 1' and item '901' '{LONG} 2'" in text

    status, text = look(*words, "--candidates", 200, "--all")
    meet = [line for line in text.splitlines() if line.startswith("    user '")]
    assert status == 1 and errors(text) == len(meet) > 0
    assert count(text, "cannot be told apart: raise --max-title-tokens") == len(meet)
    argv = ["--model", world / "model", "--data", world / "data", "--out", world / "out", *flags]
    argv += ["--candidates", 200, "--sets", "random"]
    with pytest.raises(InputError, match=f"'{LONG} [12]' and '{LONG} [12]', which"):
        evaluate.main([str(word) for word in argv])


def test_titles_alike_meet_in_a_pair_of_dpo_too(checkpoints, data):
    """To LLaVA-NeXT's tokenizer a space and the character that stands for one are the same. DPO
    has the target and one negative as answers, here the other one of the two."""
    builder = outline_of(checkpoints["llava_next"], data)
    titles = ("Red Rose", "Red\u2581Rose", *builder.catalog.titles[2:])
    builder = replace(builder, catalog=replace(builder.catalog, titles=titles))
    findings = Findings()
    alike = inspect_titles(builder, findings)
    assert alike == {0: 0, 1: 0} and len(findings.notes) == 1 and not findings.errors
    example = Example("u", (5,), 0, (), (1, 0))
    for training in (True, False):
        with pytest.raises(InputError, match="items '2' and '1'|items '1' and '2'"):
            check_alike(builder, alike, example, training, 2025)
        check_alike(builder, alike, replace(example, candidates=(0, 2)), training, 2025)
    with pytest.raises(InputError, match="'Red Rose' and 'Red.Rose', which are one sequence"):
        preferences(builder, [example], 2025)
