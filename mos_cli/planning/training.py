"""The memory that a training run needs, estimated before anything is built.

Shapes: D width, B pictures of a process, L tokens of the sequence.
"""

from mos_cli.bundles.shapes import GenerationShape
from mos_cli.errors import MemoryLimitError
from mos_cli.planning.memory import GIB, RESERVE


def state_bytes(shape: GenerationShape, learned: int, *, teacher: bool = False) -> int:
    """Bytes of the weights in fp32 and, for those that learn, of gradients, two moments and two moving averages.

    A teacher has weights of its own.
    """
    return 4 * shape.parameters * (2 if teacher else 1) + 20 * learned


def activation_bytes(shape: GenerationShape, batch: int, patches: int, context: int, *, edits: bool) -> int:
    """Bytes of what the blocks keep for the backward pass, for pictures of `patches` and captions of `context` tokens.

    In a step with edits the pictures before pass the blocks as well. Measured: docs/LOG.md.
    """
    passes, D = 2 if edits else 1, shape.width
    keys = patches * passes + context
    per_token = 16 * D + 5 * shape.hidden + 2 * shape.heads * keys
    return 4 * batch * passes * patches * shape.depth * per_token


def check_memory(
    shape: GenerationShape,
    learned: int,
    batch: int,
    patches: int,
    context: int,
    available: float,
    *,
    edits: bool,
    teacher: bool = False,
) -> float:
    """The GiB that a run needs; raises MemoryLimitError if that is more than is available, with the batch that fits.

    Args:
        learned: the parameters that learn.
        batch: pictures of a step in this process.
        available: GiB.
        teacher: whether the network learns from another of its shape.
    """
    state = state_bytes(shape, learned, teacher=teacher) + RESERVE
    one = activation_bytes(shape, 1, patches, context, edits=edits)
    needed, there = state + batch * one, available * GIB
    if needed <= there:
        return needed / GIB
    fits = int((there - state) // one)
    advice = f"batch = {fits} fits" if fits >= 1 else "take a smaller width or depth, or train a LoRA"
    raise MemoryLimitError(
        f"training needs about {needed / GIB:.1f} GiB ({state / GIB:.1f} for the network and the optimiser, "
        f"{one / GIB:.2f} for each picture of a step), and {available:.1f} are available: {advice}"
    )
