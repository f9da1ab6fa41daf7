"""Access to a network inside its DDP wrapper."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class CallsThrough(nn.Module):
    """A DDP wrapper that exposes the attributes and methods of its network."""

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
    """The network inside a DDP wrapper, or the network itself."""
    return module.wrapped.module if isinstance(module, CallsThrough) else module


def bare_state(method: nn.Module) -> dict[str, Tensor]:
    """The method's state dictionary without the names that DDP wrappers add."""
    return {key.replace("wrapped.module.", ""): value for key, value in method.state_dict().items()}
