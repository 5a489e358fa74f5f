"""Conv-Adapter: y = K * x + a (U phi(D * x + b) + c), a convolution of few channels beside a frozen one, and a factor.

Chen et al. 2022, arXiv 2208.07463, section 3, their "conv. parallel". D [w, C / w, k, k] convolves C input channels in
w = C / reduction groups (the nearest divisor of C) with kernel, stride and padding of the frozen one, U [out, w] is
pointwise; both and their biases start as `nn.Conv2d` does, a [out] at 1. It is beside every convolution in layers
but those of kernel 1 (in a ResNet theirs joins after the norm). phi is ReLU for a ResNet, `gelu` for a ConvNeXt.

>>> ConvAdapter().reduction
8
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from peftree.deltas import ACTIVATIONS, Rewrite, nearest_divisor, only
from peftree.methods.contract import Field, Method, Place, Site, Tags

CONV: tuple[Any, ...] = (functional.conv1d, functional.conv2d, functional.conv3d)


class ConvAdapter(Method):
    """Convolutional bottlenecks parallel to the convolutions of a network."""

    tags: ClassVar[Tags] = Tags(
        "additive", "arXiv 2208.07463", False, False, lr=1e-3, lr_from="the default of main.py", inference_cost="low"
    )
    sites: str = Field("conv@all", description="convolutions that get a parallel one")
    reduction: int = Field(8, ge=1, le=65536, description="input channels divided by those of the bottleneck")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="nonlinearity")

    def count(self, sites: Sequence[Site]) -> int:
        sizes = [(*self.widths(s), s.out_features, s.area) for s in sites if s.area > 1]
        return sum(channels * area + w + out * (w + 2) for channels, w, out, area in sizes)

    def widths(self, site: Site) -> tuple[int, int]:
        """Return the number of input channels and of those of the bottleneck."""
        channels = site.in_features // site.area * site.groups
        return channels, nearest_divisor(channels, max(1, channels // self.reduction))

    def build(self, place: Place) -> "Beside":
        only(place, ("conv",))
        if vars(place.module)["padding_mode"] != "zeros":
            raise place.refuse("pads with values other than zero", "Name other sites.")
        return Beside(place, *self.widths(place.site), self.activation)


class Beside(Rewrite):
    """D [w, C / w * k * k], b [w], U [out, w], c [out] and a [out]; nothing for a kernel of 1."""

    maps = True

    def __init__(self, place: Place, channels: int, w: int, activation: str) -> None:
        super().__init__()
        site, conv, self.activation = place.site, vars(place.module), activation
        self.shape = (w, channels // w, *conv["kernel_size"])
        self.how = {"stride": conv["stride"], "padding": conv["padding"], "dilation": conv["dilation"], "groups": w}
        if site.area > 1:
            fan, out = channels // w * site.area, site.out_features
            self.D, self.b, self.a = place.kaiming(w, fan), place.bias(w, fan), place.ones(out)
            self.U, self.c = place.kaiming(out, w), place.bias(out, w)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._parameters:
            return y
        D, b, U, c, a = (t.to(x.dtype) for t in (self.D, self.b, self.U, self.c, self.a))
        convolve, ones = CONV[len(self.shape) - 3], (1,) * (len(self.shape) - 2)
        inner = ACTIVATIONS[self.activation](convolve(x, D.view(self.shape), b, **self.how))
        more: Tensor = a.view(-1, *ones) * convolve(inner, U.view(*U.shape, *ones), c)
        return y + more
