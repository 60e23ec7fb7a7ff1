"""An adapter's folder, read and checked without a model: plain LoRA, or refused by name.

Source of the keys: PEFT 0.21, tuners/lora, config.py and layer.py.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hanorec.base.errors import InputError, shown
from hanorec.base.files import read_object

# Initialisations by name (beside true and false) that leave the base's weights alone, so that the
# file holds all of the adapter. The others (pissa, pissa_niter_N, olora, corda, loftq, lora_ga)
# take from the base what they put into A and B; PEFT does so again when it loads them.
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")

# Keys of adapter_config.json that change what an adapter computes, and the value at which they do
# not. None stands for {} and [], too.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "megatron_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}

# Keys that may say anything: read below, told by the tensors themselves, or of no effect on what
# an adapter computes once it is trained.
READ = {"r", "lora_alpha", "lora_dropout", "init_lora_weights"}
TOLD_BY_THE_TENSORS = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying",
}
OF_NO_EFFECT = {
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode",
    "peft_version", "runtime_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of the initialisation
}
KNOWN = {*PLAIN, *READ, *TOLD_BY_THE_TENSORS, *OF_NO_EFFECT}


def check_adapter(directory: str | Path) -> None:
    """InputError where a folder holds no adapter that could be loaded, or what it stands on.

    Only texts and headers are read, so it costs nothing before a model is loaded.
    """
    directory = Path(directory)
    config = directory / "adapter_config.json"
    if not config.exists() and (directory / "run.json").exists():
        raise InputError(
            f"{config}: no such file; check the path, or, if this is a run that was stopped, give "
            "its command again to go on with it"
        )
    check_tensor_file(directory, adapter_config(directory)["r"])
    below = directory / "below"
    if below.exists():
        check_adapter(below)


# ---- adapter_config.json ----


def adapter_config(directory: str | Path) -> dict[str, Any]:
    """The checked adapter_config.json of a directory.

    InputError for a variant of LoRA that this code does not compute, and for a key that it does
    not know, unless that is null, false or empty: what is off changes nothing.
    """
    path = Path(directory) / "adapter_config.json"
    config = read_object(path)
    for key, value in PLAIN.items():
        if (config.get(key) or None) != (value or None):
            raise InputError(
                f"{path}: {key} = {shown(config.get(key))}, expected {value!r}; only plain LoRA is "
                "supported"
            )
    _check_start(path, config.get("init_lora_weights"))
    for key, value in config.items():
        if key not in KNOWN and value not in (None, False, [], {}):
            raise InputError(
                f"{path}: {shown(key)} = {shown(value)}, expected no such key, since nothing is "
                "known of what it does to an adapter; only plain LoRA is supported: if it is that "
                "all the same, delete the key"
            )
    _check_numbers(path, config)
    return config


def _check_start(path: Path, start: Any) -> None:
    """How A and B began: those that took something from the base are refused."""
    if start is None or isinstance(start, bool):
        return
    if not (isinstance(start, str) and start.lower() in PLAIN_STARTS):
        raise InputError(
            f"{path}: init_lora_weights = {shown(start)}, expected true, false, "
            f"{', '.join(PLAIN_STARTS)}: others change the base's own weights, and only plain LoRA "
            "is supported; save it with PEFT's path_initial_model_for_weight_conversion, which "
            "makes it plain, or merge it there"
        )


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    r, alpha = config.get("r"), config.get("lora_alpha")
    dropout = config.get("lora_dropout") or 0.0
    numbers = _is_number(r) and _is_number(alpha) and _is_number(dropout)
    if not (numbers and isinstance(r, int) and r >= 1 and alpha > 0 and 0 <= dropout < 1):
        raise InputError(
            f"{path}: r = {shown(r)}, lora_alpha = {shown(alpha)}, lora_dropout = "
            f"{shown(dropout)}, expected numbers: a whole r from 1, lora_alpha above 0, "
            "lora_dropout from 0 to below 1; remake the file"
        )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**31  # so not NaN


# ---- adapter_model.safetensors ----


def check_tensor_file(directory: str | Path, r: int) -> None:
    """InputError where the tensors of an adapter are not there, or not of rank r.

    The rank is checked on their header, before a model is given layers of a size that a file
    dictates.
    """
    path = Path(directory) / "adapter_model.safetensors"
    if not path.is_file():
        if (path.parent / "adapter_model.bin").exists():
            raise InputError(
                f"{path}: no such file, only adapter_model.bin, which is pickled and never read; "
                "load it with PEFT and save it again, which writes safetensors"
            )
        raise InputError(f"{path}: no such file; is {directory} an adapter folder?")
    try:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if key.endswith("lora_A.weight")]  # noqa: SIM118
            shapes = [(key, tuple(file.get_slice(key).get_shape())) for key in keys]
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); save the adapter again"
        ) from None
    for key, shape in shapes or [("no lora_A.weight", ())]:
        if shape[:1] != (r,):
            raise InputError(
                f"{path}: {key} of shape {shape}, expected ({r}, ...) as adapter_config.json says; "
                "the two files are of adapters of different rank: copy them again"
            )
