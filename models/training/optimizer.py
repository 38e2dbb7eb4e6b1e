"""An optimizer that is Muon for convolutions and linear layers, and AdamW for everything else."""

from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_SIDE = 8  # a matrix narrower than this, such as the first and last convolution's, is AdamW's


class MuonAndAdamW:
    """AdamW's step for vectors and thin matrices, and for others Muon's, which orthogonalises the momentum.

    torch.optim.Muon takes matrices only. A convolution's weight is given to it as a matrix [out, in * kh * kw] that
    shares its memory. Steps are scaled to the size of AdamW's (arXiv:2502.16982), so that one learning rate does for
    both. Not meant for embeddings.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float = 0.01) -> None:
        self.matrices = [p for p in params if p.ndim > 1 and min(p.shape[:2]) > SMALLEST_SIDE]
        taken = {id(p) for p in self.matrices}
        rest = [p for p in params if id(p) not in taken]
        self.views = [nn.Parameter(_matrix(p.data, p)) for p in self.matrices]
        if any(view.data_ptr() != p.data_ptr() for view, p in zip(self.views, self.matrices, strict=True)):
            raise ValueError("got a weight whose memory is neither contiguous nor channels-last; make it one of them")
        self.muon = torch.optim.Muon(self.views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        for p, view in zip(self.matrices, self.views, strict=True):
            view.grad = None if p.grad is None else _matrix(p.grad, p)
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        for p in self.matrices:
            p.grad = None
        self.adamw.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def _matrix(x: Tensor, weight: Tensor) -> Tensor:
    """x, a weight [out, in, ...] or its gradient, as a matrix of `out` rows, columns in weight's own order."""
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).flatten(1) if channels_last else x.flatten(1)
