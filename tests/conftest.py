"""Shared fixtures: random hybrid configurations and models with every parameter randomised."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
