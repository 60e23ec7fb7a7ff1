"""Adapters: `layer` computes them (HN-9, HN-10), `files` keeps them."""

from hanorec.lora.files import load_adapter, save_adapter
from hanorec.lora.layer import LoRALinear, adapters_off, add_lora, lora_noise

__all__ = ["LoRALinear", "adapters_off", "add_lora", "load_adapter", "lora_noise", "save_adapter"]
