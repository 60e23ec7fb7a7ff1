"""--shard: a base that no device can hold, divided over the ranks by FSDP2
(torch.distributed.fsdp.fully_shard).

What is divided is what grows with a base: the language model's layers. Each rank keeps 1 / ranks of
every layer's weights and gathers the rest right before that layer computes, forward and backward.
Whole on every rank are:

- the adapters (1% of the base). FSDP never hears of them, since they are added later, so LoRA,
  noise, `adapters_off`, clipping, optimizer, checkpoints and adapter files are the same code on
  either path.
- the embedding and the head. Where they are tied, a step needs them from its first operation to its
  last, so dividing them would spare memory between steps alone, and cost a message of their size
  for each micro-batch.
- the vision tower, which runs before training only, and not equally often on every rank; then it
  leaves the device (`set_tower_aside`).
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText

from hanorec.base.distributed import rank, world_size
from hanorec.lora.layer import language_model
from hanorec.mllm.spellings import read_config


@torch.no_grad()
def divided(
    full: nn.Module | None, path: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The model of checkpoint `path` with its layers divided over the ranks.

    No other rank than 0 ever holds more than one whole layer, nor any device: the model is built
    without memory, divided, given memory for its parts, and filled from rank 0 weight by weight.

    full: rank 0's, whole, on the CPU; None on the others.
    """
    dist.barrier()  # rank 0 has read a whole checkpoint
    config = read_config(path)
    config.tie_word_embeddings = _is_tied(full, device)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)

    language = language_model(model.requires_grad_(False))
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in language.layers:
        fully_shard(layer, mesh=mesh)
    # The root of its layers, with no weight of its own: it gathers one while another computes.
    fully_shard(language, mesh=mesh, ignored_params=set(language.parameters()))

    model.to_empty(device=device)
    model.tie_weights()
    _fill(model, full, mesh, device)
    return model


def _is_tied(full: nn.Module | None, device: torch.device) -> bool:
    """Whether rank 0's embeddings serve as its head, too. config.json may say so while the files
    have two weights that differ; those are kept."""
    tied = full is not None and full.lm_head.weight is full.get_input_embeddings().weight
    number = torch.tensor(int(tied), device=device)
    dist.broadcast(number, 0)
    return bool(number)


def _fill(
    model: nn.Module, full: nn.Module | None, mesh: DeviceMesh, device: torch.device
) -> None:
    """Rank 0's weights, and the buffers that no checkpoint holds (frequencies of positions)."""
    given = {}
    if full is not None:
        given = {**dict(full.named_parameters()), **dict(full.named_buffers())}
    for name, part in [*model.named_parameters(), *model.named_buffers()]:
        if rank() == 0:
            value = given[name].detach().to(device)
        else:
            value = torch.empty(part.shape, dtype=part.dtype, device=device)
        if isinstance(part, DTensor):
            part.to_local().copy_(distribute_tensor(value, mesh, part.placements).to_local())
        else:
            dist.broadcast(value, 0)
            part.copy_(value)


def set_tower_aside(model: nn.Module) -> None:
    """Once every image is encoded: the vision tower and its projector leave the device."""
    for child in model.model.children():
        if child is not language_model(model):
            child.to("cpu")
