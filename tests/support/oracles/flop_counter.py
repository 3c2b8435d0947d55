"""torch's own FLOP counter, told of the operations that it does not know."""

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


UNKNOWN = {  # to torch's counter: the same formulas as of attention on GPUs, and of a product that is added
    aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


def counted(function):
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        result = function()
    return result, counter.get_total_flops()
