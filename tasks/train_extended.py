"""Stage `train_extended`; see tasks/runtime/training_stage.py."""

from tasks.runtime import training_stage

if __name__ == "__main__":
    training_stage.main("train_extended")
