"""What a training step takes at its largest, worked out from shapes before the first one.

Counted is what torch.cuda.max_memory_allocated counts: tensors. A GPU also holds CUDA's context
and what its allocator cannot use; a process on a CPU, its libraries. Passes without gradients, as
those of the reference and of HaRS, keep nothing, and the images are encoded before.

B = rows, T = tokens of a row, N = those of its answers, d = width, q and kv = widths of queries and
keys, f = width of the MLP, V = vocabulary, r = LoRA rank, s = bytes of a number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hanorec.base.config import TrainConfig
from hanorec.base.distributed import world_size
from hanorec.mllm.backbone import Backbone
from hanorec.mllm.builder import PromptBuilder
from hanorec.mllm.prompts import Row

# What cuBLAS allocates on an H100, by default, in the threads of forward and of backward.
WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True)
class Shape:
    """A language model's."""

    layers: int
    width: int  # d
    queries: int  # q
    keys: int  # kv
    heads: int
    mlp: int  # f
    vocabulary: int  # V
    size: int  # s


@dataclass(frozen=True)
class Work:
    """A micro-batch at its largest, and how it is trained on."""

    rows: int  # B
    tokens: int  # T
    answers: int  # N
    packed: bool  # several answers share a prompt
    rank: int = 8
    dropout: bool = False
    noise: bool = False
    checkpointing: bool = False
    compiled: bool = False
    device: str = "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes of a step at its peak, by what they are."""

    weights: int
    adapter: int  # with gradients, AdamW's moments, noise, and copies in the model's type
    activations: int  # that backward needs
    passing: int  # what comes and goes at the top of backward

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.passing

    def __str__(self) -> str:
        parts = (self.weights, self.adapter, self.activations, self.passing)
        weights, adapter, activations, passing = (f"{part / 1e9:.3g}" for part in parts)
        return (
            f"{self.total / 1e9:.3g} GB: weights {weights}, adapter and AdamW {adapter}, "
            f"activations {activations}, in passing {passing}"
        )


def shape_of(text: Any, dtype: torch.dtype) -> Shape:
    """Of a text_config and the model's type of numbers."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        text.num_hidden_layers, text.hidden_size, heads * head, text.num_key_value_heads * head,
        heads, text.intermediate_size, text.vocab_size, dtype.itemsize,
    )


def step_memory(shape: Shape, work: Work, weights: int, trained: int) -> Memory:
    """weights: bytes of what is frozen. trained: how many numbers the adapter has."""
    return Memory(
        weights,
        adapter_bytes(shape, work, trained),
        work.rows * work.tokens * kept_of_a_token(shape, work),
        passing_bytes(shape, work),
    )


def adapter_bytes(shape: Shape, work: Work, trained: int) -> int:
    wide = max(4, shape.size)  # float32, or float64 with the model
    each = 4 * wide  # value, gradient, and AdamW's two moments
    if work.noise:
        each += wide
    if work.noise or shape.size < wide:
        each += shape.size  # what the products take: noisy, and in the model's type
    return each * trained


def kept_of_a_token(shape: Shape, work: Work) -> int:
    """Bytes of one token that the whole model keeps for backward."""
    d, s = shape.width, shape.size
    wide, layer = max(4, s), kept_in_a_layer(shape, work)
    if work.checkpointing:  # what stands after the layers is gone when one is computed again
        return shape.layers * s * d + layer
    # The last norm, and its output, of which columns are gathered; cosines and sines.
    around = wide * (d + 1) + s * d + 2 * s * shape.queries // shape.heads
    if work.packed and s == wide:
        around += s * work.answers  # the mask, one for all layers
    # What goes into the first layer has no gradient: its norm keeps nothing, nor does dropout.
    first = wide * (d + 1) + (3 * mask_bytes(shape, work) * d if work.dropout else 0)
    return around + shape.layers * layer - first


def mask_bytes(shape: Shape, work: Work) -> int:
    """What dropout keeps of a number."""
    return 1 if work.device == "cuda" else shape.size


def kept_in_a_layer(shape: Shape, work: Work) -> int:
    """Bytes of one token that one layer keeps for backward.

    The base is frozen: its products keep nothing of the token. A compiled layer computes norms and
    silu(gate) once more.
    """
    d, q, kv, f, s = shape.width, shape.queries, shape.keys, shape.mlp, shape.size
    wide = max(4, s)
    norms = 2 * (s if work.compiled else wide) * d + 2 * wide  # inputs, widened; 1 / RMS
    attention = s * (2 * q + 2 * kv) + 4 * shape.heads  # queries, output, keys, values; logsumexp
    if work.packed and s < wide:
        attention += s * work.answers  # the mask, in the model's type
    mlp = s * (2 if work.compiled else 3) * f  # gate, up, silu(gate)
    if work.dropout:  # each LoRA layer keeps an input and a mask of its own
        inputs = (s + mask_bytes(shape, work)) * (5 * d + q + f)
    else:  # q, k, v share an input, so do gate and up; that of o may be the output of attention
        of_o = q if work.packed or work.compiled else 0
        inputs = s * (2 * d + of_o + f)
    return norms + attention + mlp + inputs + 7 * s * work.rank


def passing_bytes(shape: Shape, work: Work) -> int:
    """The logits, and the larger of two moments: their gradient, and that of the last MLP."""
    wide = max(4, shape.size)
    logits = shape.size * work.rows * (work.answers + 1) * shape.vocabulary
    # In float32: logits of the answers, their gradient, exponentials and their product.
    of_head = 4 * wide * work.rows * work.answers * shape.vocabulary
    # The gradient of the MLP's product, through the base and through LoRA.
    of_mlp = shape.size * work.rows * work.tokens * 2 * shape.mlp
    return logits + max(of_head, of_mlp) + (WORKSPACES if work.device == "cuda" else 0)


def frozen_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of the weights and buffers that this process holds on a device and does not train."""
    held = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.requires_grad and tensor.device == device:
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            held[own.data_ptr()] = own.nbytes  # tied ones once
    return sum(held.values())


def print_memory(
    builder: PromptBuilder, rows: Sequence[Row], train: TrainConfig, noise: bool
) -> None:
    """What a step on these rows takes, so that it can be judged before memory runs out.

    The model has its adapters. noise: whether NoDO draws any.
    """
    backbone, model = builder.backbone, builder.backbone.model
    shape = shape_of(backbone.config.text_config, model.dtype)
    work = largest_work(backbone, rows, train, builder.config.plain, noise)
    weights = frozen_bytes(model, backbone.device)
    if train.shard:  # a layer computes while the next one is gathered
        weights += 2 * layer_bytes(shape)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"a step takes about {step_memory(shape, work, weights, trained)}")


def largest_work(
    backbone: Backbone, rows: Sequence[Row], train: TrainConfig, plain: bool, noise: bool
) -> Work:
    """The largest micro-batch that a rank may be given. plain: a forward an answer."""
    step = min(len(rows), train.micro_batch * train.accumulation)
    side_by_side = min(train.micro_batch, -(-step // world_size()))
    count = len(rows[0].answers)
    answers = max(row.answer_tokens for row in rows)
    if plain:
        side_by_side *= count
        answers = max(max(map(len, row.answers)) for row in rows)
    return Work(
        rows=side_by_side,
        tokens=max(len(row.prompt) for row in rows) + answers,
        answers=answers,
        packed=count > 1 and not plain,
        rank=train.lora_rank,
        dropout=train.lora_dropout > 0,
        noise=noise,
        checkpointing=train.checkpointing,
        compiled=train.compile,
        device=backbone.device.type,
    )


def layer_bytes(shape: Shape) -> int:
    """The weights of a layer: of q and o, of k and v, of the MLP."""
    d = shape.width
    return shape.size * d * (2 * shape.queries + 2 * shape.keys + 3 * shape.mlp)
