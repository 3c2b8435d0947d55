"""Random mixtures of experts."""

import torch
from transformers import AutoModelForCausalLM

SEEDS = range(8)


def load(directory, dtype=torch.float32):
    """The directory as transformers has it; its grouped products take no rows of odd sizes."""
    options = {"experts_implementation": "eager", "trust_remote_code": True}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()
