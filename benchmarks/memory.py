"""Will it fit? `python -m benchmarks.memory DIRECTORY --workers 64 --length 8192` counts what one GPU has to hold.

DIRECTORY needs a parent's config.json only. Layers and loss run on fake tensors, without memory or a GPU, while the
bytes of all storages alive are counted; the rest is arithmetic. Not in it: what the allocator loses between blocks,
workspaces of kernels and NCCL, the CUDA context (leave about a tenth). For bfloat16 with activation checkpointing.
"""

import argparse
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_core import hf
from elastic_core.cut import Cut
from elastic_core.families import parameter_layout
from elastic_core.families.nemotron_h import Block, layers_of, pattern
from elastic_core.layout import Layout, layer_index
from elastic_core.losses import distillation_loss
from elastic_core.submodel import full_sizes

GB = 1e9


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that are still alive, but for those of `given`."""

    def __init__(self, given: Iterable[Tensor] = ()):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (key := value.untyped_storage()._cdata) not in self.sizes:
                storage = value.untyped_storage()
                self.sizes[key] = storage.nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def layer_bytes(config, layer: int, sequences: int, length: int) -> int:
    """At most alive while one layer is computed again and differentiated, without its weights."""
    layout = parameter_layout(config)
    cut = Cut(layout, torch.device("cpu"), full_sizes(config), tuple(range(len(pattern(config)))))
    prefix = f"model.layers.{layer}."
    mine = {name.removeprefix(prefix): dims for name, dims in layout.items() if name.startswith(prefix)}
    with FakeTensorMode():
        block = Block(config, layer, mine)
        for module in block.modules():  # as gathered: matrices in bfloat16
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.dim() == 2:
                    module.register_parameter(name, nn.Parameter(parameter.detach().to(torch.bfloat16)))
        x = torch.empty(sequences, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with Alive([x, *block.parameters()]) as alive:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = block(x, cut)
            y.backward(torch.empty_like(y))
    return alive.peak


def loss_bytes(config, sequences: int, length: int) -> int:
    """At most alive in the loss with a teacher, without hidden states and heads."""
    tokens = sequences * length
    with FakeTensorMode():
        hidden, teacher = (torch.empty(tokens, config.hidden_size, dtype=torch.bfloat16) for _ in range(2))
        heads = [torch.empty(config.vocab_size, config.hidden_size, dtype=torch.bfloat16) for _ in range(2)]
        labels = torch.empty(tokens, dtype=torch.int64)
        hidden.requires_grad_(), heads[0].requires_grad_()
        with Alive([hidden, teacher, *heads]) as alive, torch.autocast("cpu", dtype=torch.bfloat16):
            loss, *_ = distillation_loss(hidden, heads[0], labels, (teacher, heads[1]))
            loss.backward()
    return alive.peak


def count_parameters(layout: Layout) -> tuple[int, int]:
    """Numbers in matrices, which are sharded, and in everything else, which is not."""
    counts = [0, 0]
    for dims in layout.values():
        number = 1
        for dim in dims:
            number *= dim.size
        counts[len(dims) != 2] += number
    return counts[0], counts[1]


def estimate(config, shards: int, sequences: int, length: int, teacher_on_gpu: bool = True) -> dict[str, float]:
    """Bytes of one of `shards` workers, which share a copy of the weights, by reason.

    Their sum is an upper estimate: not all of them are there at the same moment.
    """
    layout = parameter_layout(config)
    matrices, rest = count_parameters(layout)
    root = count_parameters({name: dims for name, dims in layout.items() if layer_index(name) is None})[0]
    layers = [layers_of(config, character)[0] for character in dict.fromkeys(pattern(config))]
    largest = max(
        count_parameters({name: dims for name, dims in layout.items() if layer_index(name) == layer})[0]
        for layer in layers
    )
    return {
        "weights, gradients, moments: 16 B": 16 * (matrices / shards + rest),
        "teacher: 2 B": 2 * matrices / shards + 4 * rest if teacher_on_gpu else 0.0,
        "embeddings and heads of both, gathered": 2 * 2 * root,
        "their gradients, and as float32 on their way": (2 + 4) * root,
        "two gathered blocks, one block's gradients": (2 * 2 + 2 + 4) * largest,
        "inputs of the blocks": 2 * len(pattern(config)) * sequences * length * config.hidden_size,
        "the largest layer again, or the loss": float(
            max(
                *(layer_bytes(config, layer, sequences, length) for layer in layers),
                loss_bytes(config, sequences, length),
            )
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, default=1, help="that share one copy of the weights (shard_over)")
    parser.add_argument("--length", type=int, default=8192, help="sequence_length")
    parser.add_argument("--sequences", type=int, default=1, help="batch_size / microbatches / workers")
    parser.add_argument("--offload-teacher", action="store_true")
    arguments = parser.parse_args()
    config = hf.read_config(arguments.directory)
    on_gpu = not arguments.offload_teacher
    parts = estimate(config, arguments.workers, arguments.sequences, arguments.length, on_gpu)
    for name, number in (parts | {"together": sum(parts.values())}).items():
        print(f"{number / GB:8.1f} GB  {name}")


if __name__ == "__main__":
    main()
