"""Memory that has run out, as a message with the flags that help."""

import sys
from pathlib import Path

from hanorec.base.errors import brief

# What helps each command, what helps most first: docs/scale.md has the sizes.
TRAINING = (
    "--checkpointing true; --micro-batch 1, with as much more --accumulation; a smaller "
    "--max-pixels; --candidate-images off; --lora-dropout 0; --shard true under torchrun"
)
REMEDIES = {
    "train_sft": TRAINING,
    "train_dpo": TRAINING,
    "evaluate": "--batch 1; a smaller --max-pixels; --candidate-images off; --shard true under "
    "torchrun",
    "recommend": "--batch 1; a smaller --top-n",
    "train_brmrs": "a smaller --batch",
}
OTHERWISE = "end what else uses it, or use a larger machine"


def is_exhausted(error: BaseException) -> bool:
    """Whether it says that memory is full: of a GPU, of PyTorch on a CPU, or of Python."""
    on_gpu = type(error).__name__ == "OutOfMemoryError"  # torch's, which converters do not import
    return on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def exhausted(error: Exception) -> str:
    """The message of the command that runs."""
    where = "a GPU" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    command = Path(sys.argv[0].split()[-1]).stem.replace("-", "_")  # of `hanorec train-sft`, too
    remedy = REMEDIES.get(command, OTHERWISE)
    return (
        f"the memory of {where} is full ({brief(error)}), expected room for what the command "
        f"holds at once; what helps, most first: {remedy}"
    )
