"""Kept indices of every parameter, written without named dimensions: an independent oracle."""


def in_groups(size: int, kept: int, groups: int = 1) -> list[int]:
    """The units of a plain or grouped axis that survive, unit by unit."""
    return [i for i in range(size) if i % (size // groups) < kept // groups]


def index_sets(config, submodel) -> dict[str, tuple[list[int], ...]]:
    """Kept indices of every dimension of the kept layers' parameters, written without `elastic_core.model.dims`."""
    submodel = submodel.resolve(config)
    vocab = list(range(config.vocab_size))
    hidden = in_groups(config.hidden_size, submodel.hidden_size)
    sets = {
        "model.embeddings.weight": (vocab, hidden),
        "model.norm_f.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    seen = {"linear_attention": 0, "full_attention": 0, "mlp": 0}
    for i, kind in enumerate(config.layers_block_type):
        ordinal, seen[kind] = seen[kind], seen[kind] + 1
        if i not in submodel.kept_layers:
            continue

        def width(value, ordinal=ordinal):
            return value[ordinal] if isinstance(value, tuple) else value

        if kind == "mlp":
            ffn = in_groups(config.intermediate_size, width(submodel.intermediate_size))
            mixer = {"up_proj.weight": (ffn, hidden), "down_proj.weight": (hidden, ffn)}
            if config.mlp_bias:
                mixer |= {"up_proj.bias": (ffn,), "down_proj.bias": (hidden,)}
        elif kind == "full_attention":
            heads = in_groups(
                config.num_attention_heads, width(submodel.num_attention_heads), config.num_key_value_heads
            )
            query = [h * config.head_dim + d for h in heads for d in range(config.head_dim)]
            key = list(range(config.num_key_value_heads * config.head_dim))
            mixer = {
                "q_proj.weight": (query, hidden),
                "k_proj.weight": (key, hidden),
                "v_proj.weight": (key, hidden),
                "o_proj.weight": (hidden, query),
            }
        else:
            heads = in_groups(config.mamba_num_heads, width(submodel.mamba_num_heads), config.n_groups)
            inner = [h * config.mamba_head_dim + d for h in heads for d in range(submodel.mamba_head_dim)]
            full, states = config.mamba_num_heads * config.mamba_head_dim, config.n_groups * config.ssm_state_size
            conv = inner + [full + s for s in range(2 * states)]
            projection = inner + [full + row for row in conv] + [2 * (full + states) + h for h in heads]
            mixer = {
                "in_proj.weight": (projection, hidden),
                "conv1d.weight": (conv, [0], list(range(config.conv_kernel))),
                "dt_bias": (heads,),
                "A_log": (heads,),
                "D": (heads,),
                "norm.weight": (inner,),
                "out_proj.weight": (hidden, inner),
            }
            if config.use_conv_bias:
                mixer["conv1d.bias"] = (conv,)
            if config.use_bias:
                mixer |= {"in_proj.bias": (projection,), "out_proj.bias": (hidden,)}
        sets[f"model.layers.{i}.norm.weight"] = (hidden,)
        sets |= {f"model.layers.{i}.mixer.{name}": dims for name, dims in mixer.items()}
    return sets
