"""Configurations whose memory is counted."""

CASES = {
    "plain": [],
    "checkpointed": ["compute.execution.activation_checkpointing=true", "train_short.microbatches=2"],
    "bfloat16": ["train_short.precision=bfloat16", "train_extended.precision=bfloat16"],
    "states": ["train_short.loss.state_weight=1.0", "train_extended.loss.state_weight=1.0"],
    "sharded": ["compute.workers=1", "compute.execution.activation_checkpointing=true",
                "train_short.precision=bfloat16", "train_extended.microbatches=2",
                "train_extended.loss.state_weight=1.0"],
}  # fmt: skip
