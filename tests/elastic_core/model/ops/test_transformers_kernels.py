"""transformers' nemotron_h on a CPU, where packages are installed whose functions run on GPUs only."""

import importlib
import sys
import types

import pytest
import torch
from transformers import NemotronHConfig

from elastic_core.model.ops import transformers_kernels


def on_gpus_only(*args, **keywords):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")


@pytest.fixture
def modeling(monkeypatch):
    """transformers' module, imported again on a machine with a GPU: it has taken the functions of the packages."""
    names = ("causal_conv1d_fn", "causal_conv1d_update")
    names += ("mamba_split_conv1d_scan_combined", "selective_state_update", "mamba_chunk_scan_combined")
    for package in ("causal_conv1d", "mamba_ssm"):
        module = types.ModuleType(package)
        module.__dict__.update(dict.fromkeys(names, on_gpus_only))
        monkeypatch.setitem(sys.modules, package, module)
    found = importlib.util.find_spec(transformers_kernels.MODELING)
    name = f"{transformers_kernels.MODELING}_of_this_test"
    spec = importlib.util.spec_from_file_location(name, found.origin)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_tensors_in_cpu_memory_take_the_torch_functions(modeling):
    config = NemotronHConfig(
        vocab_size=16, hidden_size=8, layers_block_type=["mamba", "full_attention"], num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, ssm_state_size=4, mamba_num_heads=2, mamba_head_dim=4, n_groups=1,
        intermediate_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = modeling.NemotronHForCausalLM(config), torch.arange(6)[None]
    with pytest.raises(RuntimeError, match="is_cuda"):  # what this is about
        model.eval()(ids)
    transformers_kernels.choose_by_device(modeling)
    transformers_kernels.choose_by_device(modeling)
    for is_training in (True, False):  # in training, transformers asks for one kernel for the whole layer
        assert model.train(is_training)(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 9)  # the step with a state
    with pytest.raises(RuntimeError, match="is_cuda"):  # packed sequences: the torch functions would mix them
        modeling.causal_conv1d_fn(torch.zeros(1, 4, 6), torch.zeros(4, 4), seq_idx=torch.zeros(1, 6))


def test_tensors_on_a_gpu_still_take_the_kernels(modeling):
    transformers_kernels.choose_by_device(modeling)
    with pytest.raises(RuntimeError, match="is_cuda"):
        modeling.causal_conv1d_fn(torch.zeros(1, 4, 6, device="meta"), torch.zeros(4, 4, device="meta"))


def test_the_installed_transformers_has_the_functions():
    module = importlib.import_module(transformers_kernels.MODELING)
    for name in transformers_kernels.FUNCTIONS:
        assert hasattr(getattr(module, name), "__wrapped__"), name
