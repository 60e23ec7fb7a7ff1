"""--compile: each layer of the language model as one graph, by torch.compile.

What a layer does depends on more than its input: on whether a LoRALinear is active, has noise or
dropout, and is in training; on whether gradients are wanted; and on shapes. torch guards on all of
them and makes a graph for every combination that comes up, so a change is never missed
(tests/test_compiled.py).
"""

from typing import Any

import torch
from torch._dynamo.utils import counters

from hanorec.base.errors import InputError, brief
from hanorec.lora.layer import language_model
from hanorec.mllm.backbone import Backbone

# With the random numbers of the plain path, dropout is the same to the bit.
INDUCTOR = {"options": {"fallback_random": True}}
MOST = 64  # graphs; HaNoRec's step has 4, and as many again for a micro-batch of one row


def compile_layers(backbone: Backbone, **backend: Any) -> None:
    """Each layer is compiled when it is first called, so adapters may come later; so must
    `use_checkpointing`, which then goes around the graph.

    There is no way back to the plain path: what cannot be one graph, or needs more than `MOST` of
    them, is an error of torch's.

    Args:
        backend: what torch.compile is told instead of `INDUCTOR`.
    Raises:
        InputError: nothing can be compiled on this machine.
    """
    how = {"fullgraph": True, "dynamic": True, **(backend or INDUCTOR)}
    torch._dynamo.config.recompile_limit = MOST
    like = backbone.model.get_input_embeddings().weight
    try:
        torch.compile(torch.neg, **how)(torch.ones(2, dtype=like.dtype, device=like.device))
    except Exception as error:  # noqa: BLE001
        raise InputError(
            f"--compile true: nothing can be compiled on this machine ({brief(error)}), expected a "
            "C++ compiler, Python's headers and, for a GPU, Triton; install what is missing, or "
            "leave --compile out"
        ) from None
    counters.clear()
    for layer in language_model(backbone.model).layers:
        layer.forward = torch.compile(layer.forward, **how)
    print("the layers will be compiled as they are called: the first steps are slow")


def graphs() -> int:
    """How many graphs have been made since `compile_layers`."""
    return counters["stats"]["unique_graphs"]
