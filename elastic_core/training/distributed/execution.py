"""How the workers hold and run a model: the fields of `compute.execution` in params.yaml."""

from dataclasses import dataclass

from elastic_core.config import Require, require


@dataclass(frozen=True)
class Execution:
    """How the workers hold and run a model. These settings change the result by rounding only.

    - `activation_checkpointing`: keep only the input of each block, and compute the rest again in the backward pass.
    - `compile`: run the parts of each block through torch.compile, which makes one graph per layer and shape.
    - `offload_teacher`: keep the shards of a frozen teacher in CPU memory.
    - `offload_student`: keep the shards of the trained model in CPU memory: float32 weights, gradients and moments. The
      optimizer computes there. It needs workers.
    - `reduce_once`: with several microbatches per step, reduce the gradients of a block over ranks once per step, after
      the last microbatch that runs the block, and not after every microbatch. Until then, each rank holds the whole
      gradients of the model in float32.
    - `shard_over`: the number of workers that share one copy of the weights (None: all workers). With fewer than all,
      there are several groups of workers: each group holds a copy, and groups average their gradients.
    - `context_parallel`: the number of workers that share every sequence, each with an equal part of its positions.
    - `deterministic`: on GPUs, take only operations that compute the same bits in every run, as far as torch and the
      kernels have them. Steps are slower: kernels are not tuned to the GPU, and some sums need more memory.
    """

    activation_checkpointing: bool = False
    compile: bool = False
    offload_teacher: bool = False
    offload_student: bool = False
    reduce_once: bool = False
    shard_over: int | None = None
    context_parallel: int = 1
    deterministic: bool = False

    def check(self, require: Require = require) -> None:
        require(self.shard_over is None or self.shard_over >= 1, "shard_over", self.shard_over, "null, or 1 or more")
        require(self.context_parallel >= 1, "context_parallel", self.context_parallel, "1 or more")

    def check_workers(self, workers: int, require: Require = require) -> None:
        """Check the settings that need workers. `workers` 0: the stage computes in its own process, unsharded."""
        allowed = "false with compute.workers 0, because only the shards of workers can be in CPU memory"
        divides = self.context_parallel < 1 or max(1, workers) % self.context_parallel == 0
        shared = f"a divisor of the number of workers ({max(1, workers)})"
        require(divides, "execution.context_parallel", self.context_parallel, shared)
        is_possible = workers > 0 or not self.offload_student
        require(is_possible, "execution.offload_student", self.offload_student, allowed)
