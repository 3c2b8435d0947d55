"""How the workers hold and run a model: the fields of `compute.execution` in params.yaml."""

from dataclasses import dataclass

from elastic_core.config import Require, require


@dataclass(frozen=True)
class Execution:
    """How the workers hold and run a model. These settings change the result by rounding only.

    - `activation_checkpointing`: keep only the input of each block, and compute the rest again in the backward pass.
    - `compile`: run the parts of each block through torch.compile, which makes one graph per layer and shape.
    - `offload_teacher`: keep the shards of a frozen teacher in CPU memory.
    - `shard_over`: the number of workers that share one copy of the weights (None: all workers). With fewer than all,
      there are several groups of workers: each group holds a copy, and groups average their gradients.
    """

    activation_checkpointing: bool = False
    compile: bool = False
    offload_teacher: bool = False
    shard_over: int | None = None

    def check(self, require: Require = require) -> None:
        require(self.shard_over is None or self.shard_over >= 1, "shard_over", self.shard_over, "null, or 1 or more")
