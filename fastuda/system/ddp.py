"""A DDP wrap that still shows the network inside, and how to look behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class CallsThrough(nn.Module):
    """A DDP wrap that still shows the attributes and methods of the network inside."""

    def __init__(self, wrapped: DistributedDataParallel):
        super().__init__()
        self.wrapped = wrapped
        self.called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            wrapped: Any = super().__getattr__("wrapped")
            return getattr(wrapped.module, name)


def bare(module: Any) -> Any:
    """The network inside a wrap, or the network itself."""
    return module.wrapped.module if isinstance(module, CallsThrough) else module


def bare_state(method: nn.Module) -> dict[str, Tensor]:
    """The method's state under the names that it has without wraps."""
    return {key.replace("wrapped.module.", ""): value for key, value in method.state_dict().items()}
