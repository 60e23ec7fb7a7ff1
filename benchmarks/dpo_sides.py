"""Our side of benchmarks/dpo_step.py: the step that stands in train_dpo.py, run by its own `main`.

A toy takes the place of what `main` loads, plans, keeps and writes. The body of its loop, and
`Run.update` below it, are what users run.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import now
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Example, Work, busy_lora, encode, load

from hanorec.base.config import DataConfig
from hanorec.datasets.catalog import Catalog
from hanorec.lora.layer import LoRALinear, adapters_off, language_model, lora_layers
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.collate import Batch
from hanorec.mllm.forward import score_rows
from hanorec.mllm.prompts import Row
from hanorec.mllm.tasks import Preference
from hanorec.run.run import Plan, Run
from hanorec.studies.scripts import script
from hanorec.topk import topk_neighbors

BETA, RATE, CLIP, RANK = 0.1, 1e-5, 1.0, 8
FLAGS = [
    "--model", "toy", "--data", "toys", "--out", "nowhere", "--accumulation", "1",
    "--beta0", str(BETA), "--learning-rate", str(RATE), "--clip", str(CLIP), "--k", "3",
]


@dataclass
class Side:
    """step(): one whole step, and the seconds that it took. losses: of each step. gradient(): of
    the LoRA weights in the first step, clipped, one flat vector, by the layers' names. adapter: the
    layers that a peer starts from.
    """

    step: Callable[[], float]
    losses: list[float]
    gradient: Callable[[], Tensor]
    adapter: dict[str, LoRALinear] | None = None


def ours(
    work: Work, made: list[Example], device: str, *flags: str, tower: bool = False,
    prepared: bool = False, compiled: bool = False,
) -> Side:
    """train_dpo.py's step. flags: more of its flags; tower: encode the images in each step, which
    it does once; prepared: collated beforehand; compiled: the layers, one by one.
    """
    run = ToyRun(work, made, device, tower, prepared)
    for layer in language_model(run.backbone.model).layers if compiled else []:
        layer.compile()
    train_dpo = script("train_dpo")  # a module of this side alone
    train_dpo.Run = run.begin
    train_dpo.load_examples = lambda *_: (run.builder, [])
    train_dpo.preferences = lambda *_: run.prompts
    train_dpo.write_pairs = lambda *_: None

    def step() -> float:
        train_dpo.main([*FLAGS, "--micro-batch", str(len(made)), *flags])
        return run.seconds

    return Side(step, run.losses, lambda: run.gradient, run.adapter)


@dataclass(frozen=True)
class ToyBuilder(PromptBuilder):
    """shown_anew: whose images each `collate` encodes again. ready: a finished batch, if any."""

    shown_anew: list[Example]
    ready: list[Batch] = field(default_factory=list)

    def collate(self, rows: Sequence[Row], part: Sequence[int]) -> Batch:
        if self.ready:
            return self.ready[0]
        self.pictures.update(encode(self.backbone, self.shown_anew))
        return super().collate(rows, part)

    def neighbors(self, k: int, form: str = "input") -> tuple[Tensor, Tensor, Tensor]:
        """Of drawn vectors, since the toys have no titles: e (N, d), scores and index (N, K)."""
        generator = torch.Generator().manual_seed(2)
        drawn = torch.randn(len(self.catalog.ids), self.backbone.width, generator=generator)
        e = F.normalize(drawn, dim=1).to(self.backbone.device)
        return e, *topk_neighbors(e, k)


class ToyRun(Run):
    """A run of one step, always on the same rows, that `main` may begin again and again: the
    adapter and AdamW's moments go on from one to the next. It has no folder.
    """

    def __init__(
        self, work: Work, made: list[Example], device: str, tower: bool, prepared: bool
    ) -> None:
        self.clock = device
        self.backbone, self.rows, pictures = load(work, made, device)
        policy = self.backbone.model
        self.trained = []
        for layer in busy_lora(policy, RANK):
            self.trained += [layer.A, layer.B]
        self.adapter = lora_layers(policy)

        self.prompts = []
        for n, row in enumerate(self.rows):
            self.prompts.append(Preference(row, chosen=2 * n, rejected=[2 * n + 1]))
        ids = tuple(str(item) for item in range(2 * len(self.rows)))
        catalog = Catalog(Path(), "toys", ids, ids, (None,) * len(ids), "none")
        config = DataConfig("toys")
        self.builder = ToyBuilder(self.backbone, catalog, pictures, config, made if tower else [])
        if prepared:
            self.builder.ready.append(self.builder.collate(self.rows, self.batch))
        with adapters_off(policy):
            scores, _ = score_rows(self.backbone, self.rows, pictures, len(made), about="reference")
        self.known = scores.to(device)  # (P, 2)

        self.moments: dict[Tensor, Any] = defaultdict(dict)  # AdamW's
        self.losses: list[float] = []
        self.gradient = torch.empty(0)
        self.seconds = 0.0

    @property
    def batch(self) -> list[int]:
        return list(range(len(self.rows)))

    def begin(self, configs: Sequence[Any]) -> Run:
        """What `main` calls instead of `Run`."""
        self.configs = configs
        self.model, self.data, self.train = configs[:3]
        self.out = Path(self.train.out)  # nothing is written there
        return self

    def load_backbone(self) -> Backbone:
        return self.backbone

    def plan(self, rows: Sequence[Row], backbone: Backbone, least: int = 1) -> Plan:
        return [(0, self.batch)]

    def trainable_adapter(self, backbone: Backbone, fresh: bool = True) -> list[nn.Parameter]:
        return self.trained

    def describe(self, builder: PromptBuilder, **facts: Any) -> None:
        pass

    def reference(self, choice: str, builder: PromptBuilder, rows: Sequence[Row]) -> Tensor:
        return self.known

    def steps(
        self, plan: Plan, optimizer: torch.optim.Optimizer, state: dict[str, Any] | None = None,
        **own_generators: torch.Generator,
    ) -> Iterator[tuple[int, int, list[int]]]:
        """One step, timed until the loop comes back. It is number 1: number 0 has no clean pass."""
        self.optimizer, self.step = optimizer, 1
        optimizer.state = self.moments
        if not self.losses:
            optimizer.register_step_pre_hook(self.keep_gradient)
        start = now(self.clock)
        yield self.step, 0, self.batch
        self.seconds = now(self.clock) - start

    def keep_gradient(self, *_: Any) -> None:
        """Called by the optimizer as its step begins: `Run.update` has clipped by then."""
        grads = []
        for _, layer in sorted(self.adapter.items()):
            grads += [layer.A.grad.flatten().cpu(), layer.B.grad.flatten().cpu()]
        self.gradient = torch.cat(grads)

    def log(self, **record: Any) -> None:
        self.losses.append(record["loss"])

    def finish(self, policy: nn.Module, stage: str, **facts: Any) -> None:
        pass
