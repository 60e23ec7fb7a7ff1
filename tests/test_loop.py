"""What the loop of train_dpo.py hands from one equation to the next, three rejected answers to a
prompt: watched while it runs, and computed again in plain loops.
"""

from itertools import chain
from types import SimpleNamespace

import oracle
import pytest
import torch
import toy

import train_dpo
import train_sft
from hanorec.base.batches import global_batches
from hanorec.lora.layer import lora_layers
from hanorec.mllm.tasks import preferences

SEED, BETA0, DIGITS = 2025, 0.1, 2e-6  # log and pairs.tsv round to 6 digits


def watched(launch, *flags):
    """A run, its log, and of each step: h of the reward gaps, beta' of the loss, clean scores."""
    seen = SimpleNamespace(h=[], beta=[], clean=[], noisy=[])
    reward_gap, dpo_loss = train_dpo.reward_gap, train_dpo.dpo_loss
    score = train_dpo.score_batches

    def gap(h, beta0):
        seen.h.append(h.tolist())
        return reward_gap(h, beta0)

    def loss(h, beta):
        seen.beta += beta.tolist()
        return dpo_loss(h, beta)

    def scored(backbone, micros):
        """Also a second time, and a third one with dropout on."""
        model = backbone.model
        seen.noisy += [layer.noise is not None for layer in lora_layers(model).values()]
        training = model.training
        found, again = score(backbone, micros), score(backbone, micros)
        model.train()
        dropped = score(backbone, micros)
        model.train(training)
        seen.clean.append([torch.cat(scores) for scores in (found, again, dropped)])
        return found

    def disturbed(*args):
        """The common stream of random numbers, which lambda owes nothing to, moves on by one."""
        torch.rand(1)
        return preferences(*args)

    spies = {"reward_gap": gap, "dpo_loss": loss, "score_batches": scored}
    with pytest.MonkeyPatch.context() as patch:
        for name, spy in (spies | {"preferences": disturbed}).items():
            patch.setattr(train_dpo, name, spy)
        seen.out, seen.log, _ = launch(
            train_dpo.main, *toy.STEPS, "--rejected", 3, "--k", 4, "--lora-dropout", 0.2, *flags
        )
    return seen


@pytest.fixture(scope="module")
def run(launch, sft):
    """As the document has it."""
    return watched(launch, "--sft", sft)


@pytest.fixture(scope="module")
def other(launch, sft):
    """Running statistics, lambda dealt out at random, another seed."""
    return watched(launch, "--sft", sft, "--eta", "ema", "--control", "permuted", "--seed", 7)


@pytest.fixture(scope="module")
def pairs(data, checkpoints):
    """A line of pairs.tsv for each pair, three a prompt, by loops in float64."""
    _, source, examples = toy.source_of(data, checkpoints)
    e, scores, index = source.neighbors(4)
    e = e.double().numpy()
    found, ids = [], source.catalog.ids
    for prompt in preferences(source, examples, SEED, 3):
        w = prompt.chosen
        for l in prompt.rejected:
            delta = oracle.cluster_gap(e, scores, index, w, l)
            values = oracle.dot(e[w], e[l]), delta, oracle.sigmoid(delta)
            found.append((prompt.row.name, ids[w], ids[l], *values))
    return found


def lines_of(run):
    """pairs.tsv: names and numbers of each line."""
    header, *lines = (run.out / "pairs.tsv").read_text().splitlines()
    assert header.split("\t") == ["user", "chosen", "rejected", "cosine", "delta", "lambda"]
    fields = [line.split("\t") for line in lines]
    return [(*names[:3], *map(float, names[3:])) for names in fields]


@pytest.mark.equation("HN-4", "HN-5")
def test_a_line_of_pairs_tsv_for_each_pair(run, pairs):
    """Cosine, Delta and lambda of the very two items that the line names, in the order of the
    prompts. Controls: no two pairs of a prompt are alike, and one line further nothing fits.
    """
    lines = lines_of(run)
    assert len(lines) == 3 * 24
    for line, pair in zip(lines, pairs, strict=True):
        assert line[:3] == pair[:3]
        assert line[3:] == pytest.approx(pair[3:], abs=DIGITS)
    assert len({line[3:] for line in lines}) > 60
    shifted = zip(lines, [*pairs[1:], pairs[0]], strict=True)
    assert all(line[5] != pytest.approx(pair[5], abs=DIGITS) for line, pair in shifted)


@pytest.mark.equation("HN-8")
def test_each_pair_has_its_own_beta_in_the_loss(run, pairs):
    """eta lambda beta0, row by row of the step and answer by answer of the row."""
    lam = [pair[5] for pair in pairs]
    steps = global_batches(24, 8, SEED, 0)
    expected = []
    for batch, record in zip(steps, run.log, strict=True):
        for row in batch:
            expected.append([record["eta"] * BETA0 * x for x in lam[3 * row : 3 * row + 3]])
    assert run.beta == [pytest.approx(row, abs=DIGITS) for row in expected]


@pytest.mark.equation("HN-6", "HN-7")
def test_eta_is_that_of_all_pairs_of_the_step(run):
    """8 prompts with 3 pairs each: 24 reward gaps. Control: the first pairs alone, or the first
    micro-batch, give others.
    """
    assert run.log[0]["eta"] == 1  # the policy is the reference
    for h, record in zip(run.h[1:], run.log[1:], strict=True):
        every = list(chain(*h))
        assert len(h) == 8 and len(every) == 24
        assert record["eta"] == pytest.approx(eta_of(every), abs=DIGITS)
        assert abs(eta_of([row[0] for row in h]) - record["eta"]) > 1e-4
        assert abs(eta_of(every[:12]) - record["eta"]) > 1e-4


def eta_of(h):
    """HN-6 and HN-7 by the oracle."""
    return oracle.responsiveness(oracle.reward_gap(h, BETA0))


@pytest.mark.equation("HN-7")
def test_the_running_statistics_go_from_step_to_step(other):
    """Each step is normalised by the statistics that it has just been mixed into. Control: by those
    before it, or by its own alone, the last eta is another.
    """
    before = oracle.running_statistics([0.0] * 24)  # the first step: policy = reference
    assert other.log[0]["eta"] == 1
    for h, record in zip(other.h[1:], other.log[1:], strict=True):
        R = oracle.reward_gap(chain(*h), BETA0)
        stale, before = before, oracle.running_statistics(R, before)
        assert record["eta"] == pytest.approx(ema_of(R, *before), abs=DIGITS)
    for wrong in (stale, oracle.running_statistics(R)):
        assert abs(ema_of(R, *wrong) - record["eta"]) > 1e-3


def ema_of(R, mean, variance):
    """Option `ema` of HN-7 by the oracle."""
    return oracle.responsiveness_ema(R, mean, variance**0.5)


@pytest.mark.equation("HN-5")
def test_permuted_deals_out_by_the_seed_of_the_run(other):
    """The lambda of each line is that of another line's Delta, in the order of --seed 7. Control:
    of another seed it is another order.
    """
    delta, dealt = ([line[column] for line in lines_of(other)] for column in (4, 5))
    lam = torch.tensor([oracle.sigmoid(x) for x in delta], dtype=torch.float64)
    for seed, alike in ((7, True), (SEED, False)):
        order = torch.randperm(72, generator=torch.Generator().manual_seed(seed))
        assert (dealt == pytest.approx(lam[order].tolist(), abs=DIGITS)) == alike


@pytest.mark.equation("HN-6")
def test_rewards_are_of_the_clean_policy(run):
    """No noise, and no dropout: scored twice, the numbers are the same. Control: with dropout they
    are not, as the policy has left the reference.
    """
    assert len(run.clean) == 2 and not any(run.noisy)  # of the first step they are the reference
    for found, again, dropped in run.clean:
        assert torch.equal(found, again)
        assert (found - dropped).abs().max() > 1e-3


@pytest.mark.parametrize("main", [train_sft.main, train_dpo.main], ids=["sft", "dpo"])
def test_no_weight_decay(launch, main):
    """A fresh B is 0, so A has no gradient in the first step, and whatever the rate stays as it
    was; decay would shrink it by the rate. Control: B does move.
    """
    one_step = ["--users-to", 0.25, "--micro-batch", 6, "--accumulation", 1, "--epochs", 1]
    quiet = ["--ablation", "dpo"] if main is train_dpo.main else []
    adapters = []
    for rate in (1e-3, 1e-1):
        out, log, _ = launch(
            main, "--targets-per-user", 1, *one_step, *quiet, "--learning-rate", rate
        )
        assert len(log) == 1
        adapters.append(toy.adapter(out))
    slow, fast = adapters
    for name in slow:
        assert torch.equal(slow[name], fast[name]) == ("lora_A" in name), name
