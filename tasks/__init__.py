"""The pipeline's stages, one module per stage of dvc.yaml, and the rooms with what they share."""
