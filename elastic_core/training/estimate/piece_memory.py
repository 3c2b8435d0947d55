"""The memory, in bytes, that each piece of a training step allocates. A piece is a layer, or final norm and loss.

The piece is run, forward and backward, on tensors without storage (torch's fake or meta tensors), and the bytes that
its tensors would need are counted. So this takes no memory and computes nothing. Layers of one type need the same
memory, so only one of them is run. `step_memory` adds up the pieces of a step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._composable.checkpoint_activation import checkpoint

from elastic_core.model import architectures
from elastic_core.model.dims import layer_index
from elastic_core.model.documents import Documents
from elastic_core.model.layers import LOW_PRECISION, Norm, has_mask, part_of
from elastic_core.model.ops.expert_products import ExpertProducts
from elastic_core.model.ops.parts import Part, PartDocuments
from elastic_core.model.slicing import Slice
from elastic_core.model.submodel import full_sizes
from elastic_core.training.distributed.placement import matrices_to_
from elastic_core.training.estimate import kernel_memory
from elastic_core.training.estimate.live_bytes import PieceMemory, TrainingSetting, extrapolate, measure
from elastic_core.training.losses import KeptLogits, distillation_loss
from elastic_core.training.state_matching import NUMBERS_PER_CHUNK, state_loss

# For longer sequences, the memory is extrapolated from two lengths: it grows linearly with the number of chunks. The
# loss has chunks of up to 1,024 tokens. On a CPU the scan has short blocks, and to run thousands of them takes minutes.
LOSS_LENGTHS = (2048, 4096)
SCAN_LENGTH = 1024
_COUNTED: dict[tuple, Pieces] = {}  # of Pieces.of


class Pieces:
    """The memory of the pieces of a training step that trains the full model.

    With `gates`, as while the router learns: every axis has gates, and the gates get gradients. Rows have several
    documents, as packed rows have; how many does not matter.
    """

    def __init__(self, config, setting: TrainingSetting, gates: bool = False):
        self.config, self.setting, self.gates = config, setting, gates
        self.architecture, self.layout = architectures.of(config), architectures.parameter_layout(config)
        self.pattern, self.sharing = architectures.pattern(config), setting.execution.context_parallel
        self._full = self._make_slice()  # made here, outside any fake mode, so that its indices are real tensors
        self.without_kernels: Pieces | None = None

    @classmethod
    def of(cls, config, setting: TrainingSetting, gates: bool = False) -> Self:
        """The pieces of a configuration, the same in every call: counting is slow, and what was counted is kept."""
        key = cls, config.to_json_string(use_diff=False), setting, gates
        if key not in _COUNTED:
            _COUNTED[key] = cls(copy.deepcopy(config), setting, gates)
        return _COUNTED[key]

    @functools.cache  # noqa: B019 (the cache keeps instances alive; there are only a few per process)
    def with_kernels(self) -> Pieces:
        """The same pieces on a GPU with `mamba_ssm` and `causal_conv1d`: other layers with a scan, if without gates."""
        other = copy.copy(self)
        other.without_kernels = self
        return other

    @property
    def has_kernels(self) -> bool:
        """Whether there is a kernel for layers with a scan: in 16 bits, on a GPU, without gates or shared sequences."""
        is_possible = self.setting.gpu and self.setting.dtype in LOW_PRECISION and not self.gates and self.sharing == 1
        scans = (self.architecture.scan_block(self.config, layer, 1) for layer in range(len(self.pattern)))
        return is_possible and any(block is not None for block in scans)

    @functools.cache  # noqa: B019
    def layer(self, character: str, sequences: int, length: int) -> PieceMemory:
        """The memory of one layer on (sequences, length) tokens. `character` is its type in the layer pattern."""
        count = functools.partial(self._count_layer, character, sequences)
        block = self.architecture.scan_block(self.config, self.pattern.index(character), sequences)
        if block is None and self.without_kernels is not None:
            return self.without_kernels.layer(character, sequences, length)
        if block is None or self.setting.gpu:
            return count(length)
        short = max(SCAN_LENGTH, 2 * block)
        return extrapolate(count, length, (short, 2 * short))

    @functools.cache  # noqa: B019
    def tail(self, tokens: int, has_teacher: bool = True, kept_logits: int = 0) -> PieceMemory:
        """The memory of final norm and loss on `tokens` tokens, without the teacher's hidden states.

        The loss is distillation, from a teacher or from its `kept_logits`; or without either cross-entropy.
        """
        if self.without_kernels is not None:
            return self.without_kernels.tail(tokens, has_teacher, kept_logits)
        return extrapolate(lambda count: self._count_tail(count, has_teacher, kept_logits), tokens, LOSS_LENGTHS)

    @functools.cache  # noqa: B019
    def states(self, tokens: int) -> PieceMemory:
        """The memory of the state loss of one layer on `tokens` tokens. What it keeps is the teacher's states."""
        chunk = max(1, NUMBERS_PER_CHUNK // self.config.hidden_size)
        return extrapolate(self._count_states, tokens, (2 * chunk, 3 * chunk))  # exact: chunks need the same

    def _count_states(self, tokens: int) -> PieceMemory:
        """`states` without extrapolation."""
        with FakeTensorMode():
            source = torch.empty(1, tokens, self.config.hidden_size, dtype=self.setting.dtype, requires_grad=True)
            weights = torch.empty(1, tokens, dtype=torch.float64)
            return measure(
                lambda x: state_loss(x, torch.empty_like(x), weights, 0.0), source, self.setting, nn.Module()
            )

    def mask(self, sequences: int, length: int) -> float:
        """The bytes of the mask that hides other documents. All layers use the same one, and no piece counts it."""
        has_attention = bool(architectures.kept_state(self.config)["kv_cache"])
        if (
            self.sharing > 1
            or length == 1
            or not has_attention
            or not has_mask(length, self.setting.dtype, self.setting.gpu)
        ):
            return 0.0
        return float(sequences * length**2 * self.setting.dtype.itemsize)

    def _documents(self, sequences: int, length: int) -> Documents | None:
        """Two documents in every row. None if layers allocate the same without: fused kernels make no copies.

        Where several workers share a row, it is one document, and this is its last part: no other part needs more.
        """
        if length == 1 or (self.setting.gpu and self.setting.dtype in LOW_PRECISION):
            return None
        ids = (torch.arange(length) >= length // 2).long().repeat(sequences, 1)
        return Documents(ids, ids.device)

    def _part_documents(self, sequences: int, length: int, on_meta: bool) -> PartDocuments:
        """The last part, of `length` positions, of rows that workers share."""
        ids = torch.zeros(sequences, length * self.sharing, dtype=torch.int64)
        part = Part(self.sharing - 1, self.sharing, lambda x: x[None].expand(self.sharing, *x.shape).contiguous())
        documents = PartDocuments(ids, torch.device("meta" if on_meta else "cpu"), part)
        documents.with_halo(architectures.smallest_part(self.config))  # made here, outside any fake mode
        return documents

    def _count_layer(self, character: str, sequences: int, length: int) -> PieceMemory:
        """`layer` without extrapolation."""
        index = self.pattern.index(character)
        architecture = self.architecture
        # A layer with a scan runs on the meta device, where the scan has the block sizes of a GPU. Attention runs on
        # fake CPU tensors: on the meta device torch would choose the attention that stores all scores, while on fake
        # tensors it chooses the fused one, as on a GPU.
        on_meta = self.setting.gpu and architecture.scan_block(self.config, index, sequences) is not None
        has_fused_attention = self.setting.gpu and self.setting.dtype in LOW_PRECISION and not on_meta
        if self.sharing > 1 and not has_fused_attention:
            documents = self._part_documents(sequences, length, on_meta)
        else:
            documents = None if on_meta else self._documents(sequences, length)
        with torch.device("meta") if on_meta else FakeTensorMode(allow_non_fake_inputs=True):
            if documents is not None and self.mask(sequences, length):
                documents.mask(self.setting.dtype)  # before anything is counted
            block = self._make_block(index)
            if on_meta and self.without_kernels is not None:
                architecture.set_scan_kernel(block, kernel_memory.find)
            if self.setting.execution.activation_checkpointing:
                checkpoint(block, preserve_rng_state=False)
            shape = (sequences, length, self.config.hidden_size)
            source = torch.empty(shape, dtype=self.setting.dtype, requires_grad=True)
            sliced = self._slice()
            memory = measure(lambda x: block(x, sliced, documents), source, self.setting, block)
        if self.sharing > 1 and has_fused_attention:
            memory = self._with_earlier_keys(memory, index, sequences, length)
        return self._with_casts(memory, block) if on_meta else memory

    def _with_earlier_keys(self, memory: PieceMemory, layer: int, sequences: int, length: int) -> PieceMemory:
        """Add the keys and values of all parts, for fused attention: gathered and picked, and in the backward pass
        their gradients. The fused kernel itself cannot run on tensors without storage.
        """
        layout = architectures.kept_state(self.config)["kv_cache"]
        width = sum(
            dims[0].count(full_sizes(self.config)) for name, dims in layout.items() if layer_index(name) == layer
        )
        size = 2.0 * sequences * length * self.sharing * width * self.setting.dtype.itemsize
        is_kept = not self.setting.execution.activation_checkpointing
        return dataclasses.replace(
            memory,
            kept=memory.kept + size * is_kept,
            forward=memory.forward + size,
            backward=memory.backward + 2 * size,
        )

    def _with_casts(self, memory: PieceMemory, block: nn.Module) -> PieceMemory:
        """Add what autocast needs on a GPU without sharding. On the meta device there is no autocast.

        Autocast keeps a bfloat16 copy of every matrix until the backward pass. Gradients of matrices are in float32,
        and not in bfloat16 as counted.
        """
        setting = self.setting
        if setting.distributed or setting.precision == "float32":
            return memory
        copies = sum(p.untyped_storage().nbytes() for p in block.parameters() if p.dtype == torch.bfloat16)
        return PieceMemory(
            memory.output,
            memory.kept + (0 if setting.execution.activation_checkpointing else copies),
            memory.forward + copies,
            memory.backward + 2 * copies,
            memory.gradients + copies,
        )

    def _count_tail(self, tokens: int, has_teacher: bool = True, kept_logits: int = 0) -> PieceMemory:
        """`tail` without extrapolation."""
        config = self.config
        shape, dtype = (1, tokens, config.hidden_size), self.setting.dtype
        with FakeTensorMode():
            tail = nn.Module()
            name = f"model.{self.architecture.FINAL_NORM}"
            tail.norm = Norm(f"{name}.weight", self.architecture.norm_eps(config), part_of(self.layout, name))
            tail.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self._in_training_precision(tail)
            teacher = None
            if has_teacher:
                teacher = torch.empty(shape, dtype=dtype), torch.empty(tail.head.shape, dtype=dtype)
            if kept_logits:
                ids = torch.empty(*shape[:2], kept_logits, dtype=torch.int64)
                teacher = KeptLogits(ids, torch.empty(*shape[:2], kept_logits + 1, dtype=torch.float16))
            weights = float(teacher is None), float(teacher is not None)
            labels, sliced = torch.empty(shape[:2], dtype=torch.int64), self._slice()
            source = torch.empty(shape, dtype=dtype, requires_grad=True)
            return measure(
                lambda x: distillation_loss(tail.norm(x, sliced), tail.head, labels, teacher, *weights)[0],
                source, self.setting, tail,
            )  # fmt: skip

    def _make_block(self, layer: int) -> nn.Module:
        """The layer, as it computes on the device that is counted for."""
        block = self.architecture.Block(self.config, layer, part_of(self.layout, f"model.layers.{layer}"))
        for part in block.modules():
            if isinstance(part, ExpertProducts):
                part.on_gpu = self.setting.gpu
        return self._in_training_precision(block)

    def _in_training_precision(self, module: nn.Module) -> nn.Module:
        """Give the weights of `module` the type that they have when a layer computes, and return it.

        FSDP gathers matrices in the stage's precision. Without FSDP they are float32, and autocast converts them. There
        is no autocast on the meta device, so there they get the stage's precision too.
        """
        on_meta = next(module.parameters()).device.type == "meta"
        if self.setting.precision == "bfloat16" and (self.setting.distributed or on_meta):
            matrices_to_(module, torch.bfloat16)
        return module

    def _slice(self) -> Slice:
        """The full model, with fake gates if `gates` is set."""
        if not self.gates:
            return self._full
        units = architectures.units(self.config)
        gates = {key: torch.empty(unit.size, requires_grad=True) for key, unit in units.items()}
        return self._make_slice(gates | {"depth": torch.empty(len(self.pattern), requires_grad=True)})

    def _make_slice(self, gates: dict[str, Tensor] | None = None) -> Slice:
        device = gates["depth"].device if gates else torch.device("cpu")
        return Slice(self.layout, device, full_sizes(self.config), tuple(range(len(self.pattern))), gates)
