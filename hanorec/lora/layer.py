r"""LoRA by hand, and its Gaussian noise (HN-9, HN-10).

An adapter is one `LoRALinear` around every linear of the language model. A second `add_lora` wraps
the first one's layers, which makes a stack: the base, the frozen SFT adapter, the DPO adapter being
trained on top. Everything here that says "the adapter" means the top one, so `adapters_off` gives
exactly the policy as it was before the top adapter existed.

Source: document 000, section 2.2, NoDO.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanorec.base.errors import InputError


class LoRALinear(nn.Module):
    r"""y = W x + scale * B A x, with W (any linear, or a LoRALinear below this one) frozen.

    A: (r, in), kaiming-uniform; B: (out, r), zero, so that a fresh adapter changes nothing.
    scale = alpha / r. A and B are float32 (float64 under a float64 base), whatever the base is:
    small updates would vanish in bfloat16.
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        weight = base.B if isinstance(base, LoRALinear) else base.weight
        like = {"dtype": torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, **like))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scale, self.dropout = alpha / r, dropout
        self.active = True
        self.noise: tuple[Tensor, Tensor] | None = None  # of A and B, while `lora_noise` is open

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.active:
            return y
        A, B = self.A, self.B
        if self.noise is not None:
            # HN-10: \tilde\pi_\theta = \pi_{\theta}(A', B') \text{, the noisy weights}
            A, B = A + self.noise[0], B + self.noise[1]
        # A frozen adapter is part of the reference, so it has no dropout.
        x = F.dropout(x, self.dropout, self.training and self.A.requires_grad)
        return y + F.linear(self.scale * F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def language_model(model: nn.Module) -> nn.Module:
    """The part that LoRA may touch.

    That is model.model.language_model of an MLLM, model.model of a text-only language model.
    """
    inner = getattr(model, "model", model)
    return getattr(inner, "language_model", inner)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Module path -> LoRALinear of the top adapter; empty for a model without one."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, LoRALinear]]:
        for name, child in module.named_children():
            here = f"{path}.{name}" if path else name
            if isinstance(child, LoRALinear):
                yield here, child  # what lies below it belongs to the stack, not to the top
            else:
                yield from walk(child, here)

    return dict(walk(model, ""))


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 32,
    dropout: float = 0.05,
) -> list[LoRALinear]:
    """Freeze the model and put a fresh trainable adapter on every linear of its language model.

    Earlier adapters are frozen, too. Returns the new layers.
    Raises InputError for r < 1 or where there is no linear.
    """
    if r < 1:
        raise InputError(f"LoRA rank {r}: expected at least 1")
    model.requires_grad_(False)
    added = []
    for parent in list(language_model(model).modules()):
        if isinstance(parent, LoRALinear):
            continue  # its `base` is inside the stack already
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear | LoRALinear):
                added.append(LoRALinear(child, r, alpha, dropout).train(child.training))
                setattr(parent, name, added[-1])
    if not added:
        raise InputError(
            f"{type(model).__name__} has no linear in its language model, expected some; is it a "
            "supported family?"
        )
    return added


def absolute_noise(layer: LoRALinear) -> tuple[float, float]:
    """The document's scale of the noise on A and on B: sigma_n itself."""
    return 1.0, 1.0


@contextmanager
def lora_noise(
    model: nn.Module,
    sigma: float,
    generator: torch.Generator | None = None,
    scale: Callable[[LoRALinear], tuple[float, float]] = absolute_noise,
) -> Iterator[None]:
    r"""NoDO: one draw of Gaussian noise on the A and B of the top adapter, held for the block.

    Forward AND backward belong inside the block: activation checkpointing computes the forward
    again during backward, and must see the same draw. sigma = 0 draws nothing and is exactly LoRA.

    Args:
        sigma: sigma_n >= 0.
        generator: where the draws come from; default torch's global one.
        scale: layer -> what sigma_n is multiplied by, for A and for B (readings.py, NOISES).
    """
    layers = list(lora_layers(model).values())
    if sigma < 0:
        raise InputError(f"noise of strength {sigma}: expected sigma >= 0")
    if any(layer.noise is not None for layer in layers):
        raise RuntimeError("lora_noise inside lora_noise: the outer draw would be lost")
    try:
        for layer in layers if sigma > 0 else []:
            scale_A, scale_B = scale(layer)
            # HN-9: A' = A + \sigma_n \epsilon_A, \quad B' = B + \sigma_n \epsilon_B,
            #       \epsilon \sim N(0, I)
            noise_A = sigma * scale_A * _gaussian(layer.A, generator)
            noise_B = sigma * scale_B * _gaussian(layer.B, generator)
            layer.noise = noise_A, noise_B
        yield
    finally:
        for layer in layers:
            layer.noise = None


def _gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    draw = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    return draw.to(like.device)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The reference policy: inside the block the top adapter does nothing."""
    layers = list(lora_layers(model).values())
    before = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = False
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active
