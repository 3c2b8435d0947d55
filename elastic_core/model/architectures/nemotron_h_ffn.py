"""Feed-forward layers of nemotron_h: the MLP, and the mixture of experts (MoE), which also has a shared expert, an MLP.

Elastic widths of an MoE:

- `experts.i`: the routed experts. The layer's router has groups, and every group keeps the same number of experts. A
  row of the router and an entry of its correction bias belong to each expert.
- `expert_ffn.i`: the neurons of every routed expert. Each expert ranks its own neurons; all keep the same number.
- `shared_ffn.i`: the neurons of the shared expert.

Gates on experts (soft mode): the output of an expert is multiplied by its gate. A gate of `FADING` or more does not
change which experts a token chooses. With a smaller gate, log(gate / FADING) is added to the score of the expert, so
fewer tokens choose it. With gates of 0 and 1 the result is exactly that of the slice, and it is continuous near them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.model.dims import Fixed, Layout, Units
from elastic_core.model.documents import Documents
from elastic_core.model.layers import add_parameters, part_of
from elastic_core.model.ops.activation import activation
from elastic_core.model.ops.expert_products import ExpertProducts
from elastic_core.model.slicing import Slice

FADING = 0.1  # with a gate below this value, an expert is chosen less often
# Added to the scores to choose experts, but not to weight their outputs. A buffer in transformers; never trained.
CORRECTION = "gate.e_score_correction_bias"
MOE_KEYS = (  # of config.json; n_groups is not one of them, it counts the groups of Mamba heads
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size"),
    *("moe_shared_expert_intermediate_size", "moe_shared_expert_overlap", "n_group", "topk_group", "norm_topk_prob"),
    *("routed_scaling_factor", "output_router_logits"),
)


def moe_requirements(config) -> list[tuple[bool, str]]:
    """Conditions on a configuration with MoE layers, each as (holds, message if it does not hold)."""
    sizes = ("n_group", "topk_group", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size")
    sizes += ("moe_shared_expert_intermediate_size",)
    given = {name: getattr(config, name) for name in sizes}
    given = {name: size for name, size in given.items() if (name, size) != ("moe_latent_size", None)}
    positive = [(size >= 1, f"{name}={size}; allowed: 1 or more") for name, size in given.items()]
    if not all(holds for holds, _ in positive):
        return positive
    experts, groups = config.n_routed_experts, config.n_group
    return [
        (experts % groups == 0, f"n_routed_experts={experts} is not a multiple of n_group={groups}"),
        (1 <= config.topk_group <= groups, f"topk_group={config.topk_group}; allowed: 1 to n_group={groups}"),
        (
            experts >= fewest_experts(config),
            f"n_routed_experts={experts}; allowed: {fewest_experts(config)} or more with n_group={groups}, "
            f"topk_group={config.topk_group} and num_experts_per_tok={config.num_experts_per_tok}",
        ),
    ]


def fewest_experts(config) -> int:
    """The smallest number of experts for routing.

    A group needs two experts, because its score is the sum of its two best experts. The chosen groups together need as
    many experts as a token uses.
    """
    return config.n_group * max(2, -(-config.num_experts_per_tok // config.topk_group))


def moe_units(config, i: int) -> Iterator[Units]:
    """The elastic widths of MoE layer `i`."""
    yield Units(f"experts.{i}", config.n_routed_experts, config.n_group, fewest_experts(config))
    yield Units(f"expert_ffn.{i}", config.moe_intermediate_size)
    yield Units(f"shared_ffn.{i}", config.moe_shared_expert_intermediate_size)


def mlp_layout(config, hidden: Units, ffn: Units) -> Layout:
    """The parameters of an MLP and their dimensions."""
    layout = {"up_proj.weight": (ffn, hidden), "down_proj.weight": (hidden, ffn)}
    if config.mlp_bias:
        layout |= {"up_proj.bias": (ffn,), "down_proj.bias": (hidden,)}
    return layout


def moe_layout(config, i: int, keys: dict[str, Units]) -> Layout:
    """The parameters of an MoE and their dimensions.

    The routed experts read and write hidden channels, or a latent space of fixed size if the configuration has one.
    """
    hidden, experts, ffn = keys["hidden"], keys[f"experts.{i}"], keys[f"expert_ffn.{i}"]
    has_latent = config.moe_latent_size is not None
    space = Fixed(config.moe_latent_size) if has_latent else hidden
    layout = {
        "gate.weight": (experts, hidden),
        CORRECTION: (experts,),
        "experts.up_proj": (experts, ffn, space),
        "experts.down_proj": (experts, space, ffn),
    }
    shared = mlp_layout(config, hidden, keys[f"shared_ffn.{i}"])
    layout |= {f"shared_experts.{name}": dims for name, dims in shared.items()}
    if has_latent:
        layout |= {"fc1_latent_proj.weight": (space, hidden), "fc2_latent_proj.weight": (hidden, space)}
        if config.mlp_bias:
            layout |= {"fc1_latent_proj.bias": (space,), "fc2_latent_proj.bias": (hidden,)}
    return layout


class MLP(nn.Module):
    """W2 · act(W1 x), without a gate projection. It computes every position by itself, whatever its document."""

    def __init__(self, config, layer: int, layout: Layout, axis: str = "ffn"):
        super().__init__()
        self.layout, self.layer, self.units = layout, layer, f"{axis}.{layer}"
        self.act = activation(config.mlp_hidden_act)
        add_parameters(self, layout)

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        x = F.linear(
            x, sliced.weight(self, self.layout, "up_proj.weight"), sliced.weight(self, self.layout, "up_proj.bias")
        )
        sliced.observe(self.units, x)
        x = self.act(x)
        weight = sliced.writing_weight(self, self.layout, "down_proj.weight", self.layer, self.units)
        sliced.observe(self.units, x, weight)
        return F.linear(x, weight, sliced.writing_bias(self, self.layout, "down_proj.bias", self.layer))


class MoE(nn.Module):
    """Σ weight · W2 · act(W1 x) over the experts of a token, plus the shared expert.

    The router has sigmoid scores. A token first chooses groups of experts and then experts within these groups. Every
    position is computed by itself, whatever its document.
    """

    def __init__(self, config, layer: int, layout: Layout):
        super().__init__()
        shared = part_of(layout, "shared_experts")
        self.layout = {name: dims for name, dims in layout.items() if not name.startswith("shared_experts.")}
        self.layer, self.units, self.ffn_units = layer, f"experts.{layer}", f"expert_ffn.{layer}"
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.norm_topk_prob, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.act = activation(config.mlp_hidden_act)
        self.products = ExpertProducts(self.act)
        add_parameters(self, self.layout)
        self.get_parameter(CORRECTION).requires_grad_(False)
        self.shared_experts = MLP(config, layer, shared, "shared_ffn")

    def forward(self, x: Tensor, sliced: Slice, documents: Documents | None = None) -> Tensor:
        tokens = x.flatten(0, 1)  # (T, hidden)
        chosen, weights = self._route(tokens, sliced)
        if "fc1_latent_proj.weight" not in self.layout:
            y, gate = self._experts(tokens, chosen, weights, sliced), sliced.write_gate(self.layer)
            y = y if gate is None else y * gate.to(y.dtype)
        else:
            weight, bias = (sliced.weight(self, self.layout, f"fc1_latent_proj.{part}") for part in ("weight", "bias"))
            y = self._experts(F.linear(tokens, weight, bias), chosen, weights, sliced)
            weight = sliced.writing_weight(self, self.layout, "fc2_latent_proj.weight", self.layer)
            y = F.linear(y, weight, sliced.writing_bias(self, self.layout, "fc2_latent_proj.bias", self.layer))
        return y.view(*x.shape[:2], -1) + self.shared_experts(x, sliced)

    def _route(self, x: Tensor, sliced: Slice) -> tuple[Tensor, Tensor]:
        """The indices and weights of each token's experts, both (T, k). x (T, hidden).

        Computed in float32 or higher for any type of x. But if FSDP gathers the router's matrix in bfloat16, the matrix
        is rounded.
        """
        wide, gate = torch.promote_types(x.dtype, torch.float32), sliced.gate(self.units)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), sliced.weight(self, self.layout, "gate.weight").to(wide)).sigmoid()  # (T, E)
        choice = scores.detach() + sliced.weight(self, self.layout, CORRECTION).to(wide)
        if gate is not None:
            choice = choice + (gate.detach().to(wide) / FADING).clamp(max=1).log()
        if self.n_group > 1:
            choice = _in_best_groups(choice.unflatten(-1, (self.n_group, -1)), self.topk_group)
        chosen = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.scaling
        return chosen, weights if gate is None else weights * gate.to(wide)[chosen]

    def _experts(self, x: Tensor, chosen: Tensor, weights: Tensor, sliced: Slice) -> Tensor:
        """The weighted sum of the routed experts' outputs: x (T, in), chosen and weights (T, k) → (T, in)."""
        up, down = (sliced.weight(self, self.layout, f"experts.{name}_proj") for name in ("up", "down"))
        order = chosen.flatten().argsort(stable=True)  # (token, expert) pairs, sorted by expert
        # Pairs are only permuted, and the gradient of a permutation is a permutation. So every sum has a fixed order,
        # and results are the same in every run.
        pairs = x[:, None].expand(-1, self.top_k, -1).flatten(0, 1).index_select(0, order)  # (T·k, in)
        gate = sliced.gate(self.ffn_units)
        gate = None if gate is None else gate.to(x.dtype)
        inner, y = self.products(pairs, chosen.flatten()[order], up, down, gate)
        if sliced.is_observed:
            self._observe(chosen, weights, order, inner, y, down, sliced)
        y = y.index_select(0, order.argsort()).view(*chosen.shape, -1)  # (T, k, in)
        return (y * weights[..., None]).sum(1).to(y.dtype)

    def _observe(self, chosen, weights, order: Tensor, inner: Tensor, y: Tensor, down: Tensor, sliced: Slice) -> None:
        """Give the observer the weighted output norm of each token's experts, and their weighted neurons."""
        sorted_weights = weights.flatten()[order]
        magnitudes = (y.to(weights.dtype).norm(dim=-1) * sorted_weights)[order.argsort()].view_as(chosen)
        of_experts = weights.new_zeros(len(chosen), sliced.sizes[self.units]).scatter(1, chosen, magnitudes)
        sliced.observe(self.units, of_experts[None])
        owners, sorted_weights = chosen.flatten()[order], sorted_weights[:, None]
        sliced.observe(self.ffn_units, inner * sorted_weights, owners=owners)
        sliced.observe(self.ffn_units, self.act(inner) * sorted_weights, down, owners)


def _in_best_groups(choice: Tensor, topk_group: int) -> Tensor:
    """Scores (T, groups, experts per group) → (T, experts), with −inf outside the best groups of each token.

    The score of a group is the sum of its two best experts.
    """
    best = choice.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1, sorted=False).indices
    is_out = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter(1, best, False)
    return choice.masked_fill(is_out[..., None], -torch.inf).flatten(1)
