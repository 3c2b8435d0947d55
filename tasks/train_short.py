"""Stage `train_short`; see tasks/runtime/training_stage.py."""

from tasks.runtime import training_stage

if __name__ == "__main__":
    training_stage.main("train_short")
