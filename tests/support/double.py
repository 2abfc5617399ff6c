"""Float64 throughout, so that a law is measured and not the rounding of a machine's kernels.

A model in float64 is not enough: transformers takes softmax, norms and rotary angles in float32, whatever the model's
dtype, and one rounding there is a logit off by 1e-5. Inside `float64()` every float32 that code asks for by name is a
float64. Tests about dtypes stay outside of it.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode


class _Doubles(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        elif function is torch.Tensor.to or function is torch.Tensor.type:
            args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if kwargs is None:
            return function(*args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)


@contextmanager
def float64():
    """While entered, what would be float32 is float64: new tensors and models, and conversions asked for by name."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubles():
            yield
    finally:
        torch.set_default_dtype(before)
