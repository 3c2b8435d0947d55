"""Configurations whose memory is counted."""

CASES = {
    "plain": [],
    "checkpointed": ["compute.execution.activation_checkpointing=true", "train_short.microbatches=2"],
    "bfloat16": ["train_short.precision=bfloat16", "train_extended.precision=bfloat16"],
    "sharded": ["compute.workers=1", "compute.execution.activation_checkpointing=true",
                "train_short.precision=bfloat16", "train_extended.microbatches=2"],
}  # fmt: skip
