"""Adapters: `layer` computes them (HN-9, HN-10), `files` keeps them."""

from hanorec.lora.files import save_adapter
from hanorec.lora.layer import LoRALinear, adapters_off, add_lora, lora_noise
from hanorec.lora.loading import load_adapter

__all__ = ["LoRALinear", "adapters_off", "add_lora", "load_adapter", "lora_noise", "save_adapter"]
