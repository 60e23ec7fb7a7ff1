"""Helpers of the model-level tests: large random weights, a prompt or two, a LoRA that does
something.
"""

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file

from hanorec.base.config import DataConfig, TrainConfig
from hanorec.lora.layer import add_lora
from hanorec.mllm.collate import collate
from hanorec.mllm.forward import forward
from hanorec.mllm.load import load_backbone
from hanorec.mllm.prompts import answer_ids, encode_row, ranking_parts
from hanorec.mllm.tasks import load_examples
from hanorec.scoring import answer_log_probs

# Flags that keep a run of a script short: one token an image, short prompts, 24 rows; 3 steps of 8
# = 2 x 4 rows.
SHORT = ["--max-pixels", "1024", "--history", "2", "--candidates", "4", "--device", "cpu"]
STEPS = [
    "--targets-per-user", "1", "--epochs", "1", "--micro-batch", "4", "--accumulation", "2",
    "--learning-rate", "1e-3",
]


def sharpen(folder):
    """Scale a checkpoint's weights. As initialised (0.02) attention is uniform and logits are flat:
    a wrong mask would not show.
    """
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if weight.ndim >= 2:
            vision = "vis" in name or "projector" in name
            weight *= 6 if "embed_tokens" in name else 3 if vision else 4
    save_file(weights, path, {"format": "pt"})


def ranking_row(
    backbone, catalog, pictures, history=(0, 1, 2), candidates=(3, 4, 5), answers=(3, 4), name="u1"
):
    """A ranking prompt of the odd catalogue, answered by these rows' titles."""
    tokens = [answer_ids(backbone, catalog.titles[row]) for row in answers]
    return encode_row(backbone, name, ranking_parts(catalog, history, candidates), pictures, tokens)


def log_probs(backbone, rows, pictures):
    """(B, A) of rows side by side."""
    batch = collate(backbone, rows, pictures)
    return answer_log_probs(forward(backbone, batch), batch)


def single_answer(row, a):
    """The same prompt with one of its answers: what the packed row is compared with."""
    return replace(row, answers=[row.answers[a]])


def log_probs_alone(backbone, row, pictures):
    """(1, A) by the plain path: a forward an answer, without packing or padding."""
    return torch.cat(
        [log_probs(backbone, [single_answer(row, a)], pictures) for a in range(len(row.answers))],
        1
    )


def busy_lora(model, seed=1, r=4, alpha=8.0, dropout=0.0):
    """add_lora with A and B drawn, so that the adapter changes the policy. Returns the layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = add_lora(model, r, alpha, dropout)
    with torch.no_grad():
        for layer in layers:
            layer.A.copy_(torch.randn(layer.A.shape, generator=generator) * 0.1)
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator) * 0.1)
    return layers


def weights(layers):
    """A and B of each layer, in a fixed order."""
    return [weight for layer in layers for weight in (layer.A, layer.B)]


def gradients(loss, layers):
    """One flat vector (n,) of the gradients of A and B, zeros where there is none."""
    grads = torch.autograd.grad(loss, weights(layers), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def apart(a, b):
    """Largest difference, relative to the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def furthest(a, b):
    """Largest difference between the tensors of two adapter folders."""
    one, two = adapter(a), adapter(b)
    assert one.keys() == two.keys()
    return max((one[key] - two[key]).abs().max().item() for key in one)


def source_of(data, checkpoints, task="ranking", **options):
    """What the scripts load, as they load it: the backbone, the source, and the training examples.
    """
    backbone = load_backbone(str(checkpoints["qwen2_5_vl"]), "float32", "cpu", max_pixels=1024)
    config = TrainConfig(out="", targets_per_user=1)
    source, examples = load_examples(
        backbone,
        DataConfig(
            data=str(data), task=task, history=2, candidates=options.pop("candidates", 4),
            **options
        ),
        config,
    )
    return backbone, source, examples
