"""ResNet-50, with the names and sizes of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

_EXPANSION = 4  # channels of a block's output, for each channel inside


class ResNet(nn.Module):
    """A residual network of bottleneck blocks (He et al., 2016), ResNet-50 by default.

    The stride is in the 3×3 convolution, and the scale of each block's last batch norm is zero at
    first, both as in Goyal et al. (2017). State dicts have torchvision's names.

    Parameters
    ----------
    classes
        Number of outputs.
    depths
        Number of blocks of each stage.
    width
        Channels of the first stage, inside its blocks.

    Examples
    --------
    >>> import torch
    >>> from topkast_paper.resnet50 import ResNet
    >>> with torch.device("meta"):
    ...     model = ResNet()
    >>> sum(param.numel() for param in model.parameters())
    25557032
    >>> ResNet(classes=10, depths=(1, 1), width=8)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, classes: int = 1000, *, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        self.stages = len(depths)
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            blocks = nn.Sequential()
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(_Bottleneck(channels, inner, stride))
                channels = _EXPANSION * inner
            self.add_module(f"layer{stage + 1}", blocks)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width)."""
        hidden = self.maxpool(relu(self.bn1(self.conv1(images))))
        for stage in range(self.stages):
            hidden = self.get_submodule(f"layer{stage + 1}")(hidden)
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outputs = _EXPANSION * inner
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = relu(self.bn1(self.conv1(inputs)))
        hidden = relu(self.bn2(self.conv2(hidden)))
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        return relu(self.bn3(self.conv3(hidden)) + shortcut)
