"""How a model is held and run on the workers; part of section `compute` of params.yaml."""

from dataclasses import dataclass

from elastic_core.config import require


@dataclass(frozen=True)
class Execution:
    """How a model is held and run; none of it changes what is learnt beyond rounding.

    `shard_over`: how many workers share one copy of the weights (None: all); groups of so many hold copies and
    average gradients. `activation_checkpointing` keeps only each block's input and computes the rest again in the
    backward pass. `compile` runs the parts of each block through torch.compile, a graph per layer and shape.
    `offload_teacher` keeps a frozen teacher's shards in CPU memory.
    """

    activation_checkpointing: bool = False
    compile: bool = False
    offload_teacher: bool = False
    shard_over: int | None = None

    def check(self) -> None:
        require(self.shard_over is None or self.shard_over >= 1, "shard_over", self.shard_over, "null, or 1 or more")
