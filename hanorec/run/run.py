"""One run of a training script of HaNoRec: what stands around the loop and is not the method.

Folder, processes, the adapter being trained, checkpoints, record. `Run` never sees a loss or a
beta': the passes, the noise, the losses and `backward` stay in the script, where they are read.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hanorec.base.batches import global_batches
from hanorec.base.distributed import (
    broadcast,
    join,
    own_seed,
    own_stream,
    run_on_all_ranks,
    sum_gradients,
    usable_device,
)
from hanorec.base.errors import InputError
from hanorec.base.lock import unlock_folder
from hanorec.base.progress import Progress
from hanorec.lora.files import save_policy
from hanorec.lora.layer import adapters_off, add_lora
from hanorec.lora.loading import attach_policy, continued_lora
from hanorec.mllm.backbone import Backbone, use_checkpointing
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.compiled import compile_layers, graphs
from hanorec.mllm.forward import score_rows
from hanorec.mllm.load import load_backbone
from hanorec.mllm.memory import print_memory
from hanorec.mllm.prompts import Row
from hanorec.mllm.sharding import set_tower_aside
from hanorec.mllm.tasks import print_budget
from hanorec.run.checkpoint import drop_checkpoints, generators, load_checkpoint, save_checkpoint
from hanorec.run.inputs import check_training, training_inputs
from hanorec.run.log import append_log
from hanorec.run.record import (
    all_settings,
    compare_settings,
    open_run,
    prompt_settings,
    write_run,
)
from hanorec.run.reference import load_reference, rows_hash, save_reference

ON_THE_BAR = ("loss", "margin", "eta", "kl")  # of what is logged
Plan = list[tuple[int, list[int]]]  # a step: its epoch, the rows of its global batch


class Run:
    """A run in its folder, new or gone on with.

    Args:
        configs: ModelConfig, DataConfig, TrainConfig, and what else the command has.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        self.configs = configs
        self.model, self.data, self.train = configs[:3]
        join(usable_device(self.model.device))
        check_training(configs)
        self.out = open_run(self.train.out, all_settings(configs), "adapter_config.json")
        torch.manual_seed(self.train.seed)

    def load_backbone(self) -> Backbone:
        """The checkpoint of --model, its layers compiled where --compile says so."""
        m = self.model
        backbone = load_backbone(m.model, m.dtype, m.device, m.max_pixels, self.train.shard)
        if self.train.compile:
            compile_layers(backbone)
        return backbone

    def plan(self, rows: Sequence[Row], backbone: Backbone, least: int = 1) -> Plan:
        """All steps of the run, each of at least `least` rows; prints what a micro-batch takes."""
        train = self.train
        print_budget(rows, train.micro_batch, backbone)
        size = train.micro_batch * train.accumulation
        self.rows, plan = rows, []
        for epoch in range(train.epochs):
            multiple = train.micro_batch if train.drop_last else 1
            batches = global_batches(len(rows), size, train.seed, epoch, least, multiple)
            plan += [(epoch, batch) for batch in batches]
        self.planned = len(plan)
        return plan

    def trainable_adapter(self, backbone: Backbone, fresh: bool = True) -> list[nn.Parameter]:
        """The weights A and B of the adapter to train, alike on all ranks.

        It is a fresh one, on top of that of --sft, or that of --sft itself.
        """
        self.policy = policy = backbone.model
        train = self.train
        if train.shard:
            set_tower_aside(policy)
        if train.sft is not None:
            attach_policy(policy, train.sft)
            compare_settings(train.sft, prompt_settings(self.model, self.data, backbone))
        self.fresh, self.trained = fresh, []
        shape = train.lora_rank, train.lora_alpha, train.lora_dropout
        for layer in add_lora(policy, *shape) if fresh else continued_lora(policy, *shape):
            self.trained += [layer.A, layer.B]
        if train.checkpointing:
            use_checkpointing(backbone)
        broadcast(self.trained)
        own_stream(train.seed)
        return self.trained

    def generator(self, device: torch.device | str, ranks: str = "same") -> torch.Generator:
        """Random numbers of --seed: the "same" on all ranks, or "own" ones on each."""
        seed = self.train.seed if ranks == "same" else own_seed(self.train.seed)
        return torch.Generator(device).manual_seed(seed)

    def describe(self, builder: PromptBuilder, **facts: Any) -> None:
        """What run.json will say of the inputs and of the run; prints what a step takes.

        It is written once all input has proved good: by `reference` before it computes, by `steps`.
        """
        print_memory(builder, self.rows, self.train, noise=facts.get("sigma_n", 0) > 0)
        self.prompt = prompt_settings(self.model, self.data, builder.backbone)
        self.inputs = training_inputs(builder, self.rows, self.train)
        self.facts = facts

    def reference(self, choice: str, builder: PromptBuilder, rows: Sequence[Row]) -> Tensor:
        """log pi_ref of every answer to every row, (P, A), by the policy before its first step.

        Its top adapter is off, unless it is that of --sft.

        choice: "once" = from OUT/reference.safetensors, computed and kept there if there is none;
        or such a file of another run.
        InputError where the file is stale: any fact that the numbers depend on is another one.
        """
        backbone = builder.backbone
        path = self.out / "reference.safetensors" if choice == "once" else Path(choice)
        first = {name: self.inputs[name] for name in ("stands_on", "adapter", "data")}
        depends = {
            **first,
            "dtype": str(backbone.model.dtype),
            "prompt": prompt_settings(self.model, self.data),
            "rows": rows_hash(rows, builder.pictures),
            "base": self.inputs["base"],
            "adapter_stack": self.inputs["adapter_stack"],
        }
        known = choice != "once" or run_on_all_ranks(path.exists)[0]  # as rank 0 sees it
        reference = load_reference(path, depends) if known else None
        self._write_record()  # all input has proved good
        if reference is not None:
            return reference.to(backbone.device)
        with adapters_off(backbone.model) if self.fresh else nullcontext():
            reference, _ = score_rows(
                backbone,
                rows,
                builder.pictures,
                self.train.micro_batch,
                about="reference",
                plain=self.data.plain,
            )
        save_reference(path, reference, depends)
        return reference.to(backbone.device)

    def _write_record(self) -> None:
        weights = sum(weight.numel() for weight in self.trained)
        facts = {**self.facts, "steps": self.planned, "trained_weights": weights}
        write_run(self.out, self.configs, self.inputs, **facts)

    def steps(
        self,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any] | None = None,
        **own_generators: torch.Generator,
    ) -> Iterator[tuple[int, int, list[int]]]:
        """The steps still to be done, each as (step, epoch, rows of the global batch).

        Goes on from the newest checkpoint, sets each step's learning rate, and writes the adapters
        of --keep-epochs.

        Args:
            state: what else the loop carries from step to step, as JSON; restored in place.
            own_generators: those that the loop draws from.
        """
        self.optimizer = optimizer
        self._write_record()
        state = {} if state is None else state
        random = generators(self.trained[0].device, **own_generators)
        done, carried = load_checkpoint(self.out, self.trained, optimizer, random)
        state.update(carried)
        bar, self.shown = Progress(self.out.name, len(plan), done), {}
        for self.step, (epoch, batch) in enumerate(plan[done:], done):
            self.rate = self.train.learning_rate
            if self.train.schedule == "cosine":
                self.rate *= cosine(self.step, len(plan))
            for group in optimizer.param_groups:
                group["lr"] = self.rate
            yield self.step, epoch, batch
            # Safe here: the loop asks for the next step once it has updated and logged this one. If
            # it failed on the way, it never comes back, and nothing of the step is kept.
            last = self.step + 1 == len(plan) or plan[self.step + 1][0] > epoch
            if last and epoch + 1 in self.train.keep_epochs:
                folder = self.out / f"epoch-{epoch + 1}"
                self._write_adapter(self.policy, folder, epochs=epoch + 1)
            if (self.step + 1) % self.train.save_every == 0:
                done = self.step + 1
                save_checkpoint(self.out, done, self.trained, optimizer, random, **state)
            bar.step(**self.shown)
        bar.close()

    def update(self, users: Sequence[str], *numbers: float) -> tuple[float, ...]:
        """The optimizer's step with the gradients of all ranks, clipped.

        numbers: what each rank has added up beside them; returns the sums over the ranks.
        InputError before anything is updated, if the first number or the gradient is not finite.
        """
        numbers = sum_gradients(self.trained, *numbers)
        self.norm = nn.utils.clip_grad_norm_(self.trained, self.train.clip).item()
        check_finite(numbers[0], self.norm, self.step, users)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return numbers

    def log(self, **record: Any) -> None:
        """A line of log.jsonl: the record, the gradient's norm before clipping, the rate."""
        record |= {"gradient_norm": self.norm, "learning_rate": self.rate}
        append_log(self.out / "log.jsonl", record)
        self.shown = {x: float(record[x]) for x in ON_THE_BAR if record.get(x) is not None}

    def finish(self, policy: nn.Module, stage: str, **facts: Any) -> None:
        """Write the adapter, then drop the checkpoints."""
        self._write_adapter(policy, self.out, stage=stage, **facts)
        drop_checkpoints(self.out)
        unlock_folder(self.out)
        print(f"wrote the adapter to {self.out}")
        if self.train.compile:
            print(f"--compile: {graphs()} graphs were made")

    def _write_adapter(self, policy: nn.Module, folder: Path, **facts: Any) -> None:
        base, below = self.model.model, self.train.sft
        if not self.fresh:  # what that adapter stands on
            below = Path(below) / "below" if (Path(below) / "below").exists() else None
        save_policy(policy, folder, base, below, run=self.out, prompt=self.prompt, **facts)


def cosine(step: int, steps: int) -> float:
    """The learning rate's factor at `step` of 0 .. steps - 1: from 1 toward 0 by half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def check_finite(loss: float, norm: float, step: int, users: Sequence[str]) -> None:
    """Stop before a broken step reaches the weights.

    InputError names the step, the values and the users of the batch.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise InputError(
        f"step {step}: loss {loss}, gradient norm {norm}, expected finite numbers; users of the "
        f"batch: {', '.join(users)}; nothing was updated, the last checkpoint stands: lower "
        "--learning-rate or --sigma, or look at these users' items and at the checkpoint's weights"
    )
