"""Several U-Nets as one: the average of their class probabilities."""

from collections.abc import Iterable, Sequence
from itertools import chain
from math import log

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unet.config import UNetConfig
from unet.model import UNet
from unet.spec import DataSpec


class Ensemble(nn.Module):
    """Averages the class probabilities of U-Nets for the same classes and the same images.

    Each member normalises images as its own data spec states. With `on_host`, the members stay in
    host memory, and each is copied to the device of the images when it runs: the memory of one
    model there, for the time of the copies.

    Raises ValueError for fewer than two members, one without a data spec, or members that lose
    different margins of an image.
    """

    def __init__(self, members: Iterable[UNet], *, on_host: bool = False) -> None:
        super().__init__()
        self.members, self.on_host = [*members], on_host
        if not on_host:
            # Registered, so that `.to` moves them.
            self.models = nn.ModuleList(self.members)
        if len(self.members) < 2:
            raise ValueError(f"an ensemble has at least 2 members, got {len(self.members)}")
        for member in self.members:
            member.require_spec()
        if len({member.config.margin for member in self.members}) > 1:
            raise ValueError("the members of an ensemble must have the same margin")
        self.eval()

    @property
    def config(self) -> UNetConfig:
        """Architecture of the first member; the others have the same channels, classes, margin."""
        return self.members[0].config

    @property
    def margin(self) -> int:
        """Pixels that the logits of every member lack on each side of the image."""
        return self.config.margin

    @property
    def multiple(self) -> int:
        """Factor by which the contracting path of the first member downsamples."""
        return self.config.multiple

    @property
    def mirrors(self) -> tuple[tuple[int, ...], ...]:
        """Dimensions to flip for each mirror image that all members were trained with."""
        return min((member.mirrors for member in self.members), key=len)

    @property
    def spec(self) -> DataSpec:
        """Data spec of the first member; the normalisation of the others may differ."""
        return self.members[0].require_spec()

    def logits(self, pixels: Tensor) -> Tensor:
        """Compute the logarithms of the averaged probabilities of images uint8 [B, C, H, W].

        Returns float32 [B, num_classes, H', W']: their softmax is the average.
        """
        return average_logits(self.run(member, pixels) for member in self.members)

    def run(self, member: UNet, pixels: Tensor) -> Tensor:
        """Compute the logits of one member."""
        if not self.on_host:
            return member.logits(pixels)
        tensors = {
            name: tensor.to(pixels.device, non_blocking=True)
            for name, tensor in chain(member.named_parameters(), member.named_buffers())
        }
        return functional_call(member, tensors, (member.require_spec().normalise(pixels),))


def average_logits(parts: Iterable[Tensor]) -> Tensor:
    """Return the logarithm of the mean of the probabilities of logits [B, K, H, W], in float32.

    As logarithms, probabilities that round to 0 keep their order. The sum is in the order of
    `parts`, one of which is in memory at a time.
    """
    total, count = torch.empty(0), 0
    for logits in parts:
        share = logits.log_softmax(dim=1, dtype=torch.float32)
        total = torch.logaddexp(total, share) if count else share
        count += 1
    return total - log(count)


def members_of(model: UNet | Ensemble) -> Sequence[UNet]:
    """Return the members of an ensemble, or the model as the only one."""
    return model.members if isinstance(model, Ensemble) else (model,)
