"""Random hybrid models and token ids: what a benchmark needs where there is neither a parent nor data."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NemotronHConfig

from elastic_core import ElasticModel
from elastic_core.data.loader import Batch


@dataclass(frozen=True)
class Shape:
    """A hybrid model with all kinds of layers, and the sequences that one microbatch of it takes."""

    name: str
    hidden: int
    pattern: str
    vocab: int
    length: int
    sequences: int
    head: int = 64
    groups: int = 2

    def config(self) -> NemotronHConfig:
        return NemotronHConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=4 * self.hidden, head_dim=self.head,
            layers_block_type=NemotronHConfig._pattern_to_list(self.pattern), conv_kernel=4,
            num_attention_heads=self.hidden // self.head, num_key_value_heads=2, mamba_head_dim=self.head,
            mamba_num_heads=2 * self.hidden // self.head, n_groups=self.groups, ssm_state_size=self.head,
        )  # fmt: skip


@dataclass(frozen=True)
class RandomTokens:
    """Stands in for the data: token ids that are a function of the sequence's number.

    Every row has documents of `document` tokens (None: it is one document).
    """

    vocab: int
    length: int
    document: int | None = None

    def batch(self, first: int, count: int) -> Batch:
        rows = [
            torch.randint(0, self.vocab, (self.length + 1,), generator=torch.Generator().manual_seed(first + i))
            for i in range(count)
        ]
        ids = torch.stack(rows)
        numbers = torch.arange(self.length) // (self.document or self.length)
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), numbers.repeat(count, 1))


@torch.no_grad()
def random_model(config: NemotronHConfig, seed: int) -> ElasticModel:
    """Every parameter random and of a visible size, so that none hides a mistake."""
    model, generator = ElasticModel(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            parameter.copy_(1 + 0.1 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(noise - 2 if name.endswith("dt_bias") else 0.5 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def scan_inputs(
    device: torch.device, length: int, heads=8, channels=64, groups=2, states=64, sequences=1
) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D of one sequence, or of several."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, dt = draw(sequences, length, heads, channels), F.softplus(draw(sequences, length, heads) - 2)
    A, D = -torch.exp(draw(heads)), draw(heads)
    B, C = draw(sequences, length, groups, states), draw(sequences, length, groups, states)
    return tuple(value.to(device) for value in (x, dt, A, B, C, D))
