"""Pictures to features at four scales: ResNet as Caffe has it, deformable convolutions in its last stages, and a feature pyramid."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suture.core.driving import DrivingConfig
from suture.models.uniad.layers import LEVELS

EXPANSION, TAPS = 4, 9


class FrozenNorm(nn.Module):
    """BatchNorm2d as in evaluation."""

    def __init__(self, width: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_parameter(name, nn.Parameter(torch.empty(width), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-5)


class DeformableConvolution(nn.Module):
    """DCNv2, 3 × 3 with one offset group: each tap samples where an offset says, and counts as much as a mask says."""

    def __init__(self, given: int, made: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(made, given, 3, 3))
        self.conv_offset = nn.Conv2d(given, 3 * TAPS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] to [N,made,H,W]. The places and what is sampled there are float32."""
        batch, channels, height, width = x.shape
        found = self.conv_offset(x).float()
        offsets = found[:, : 2 * TAPS].reshape(batch, TAPS, 2, height, width)  # down, right
        base = _taps(height, width)
        y = (offsets[:, :, 0] + base[0]) * (2 / height) + (1 / height - 1)
        x_ = (offsets[:, :, 1] + base[1]) * (2 / width) + (1 / width - 1)
        grid = torch.stack([x_, y], -1).reshape(batch, TAPS * height, width, 2)
        seen = F.grid_sample(x.float(), grid, align_corners=False)
        seen = seen * found[:, 2 * TAPS :].sigmoid().reshape(batch, 1, TAPS * height, width)
        seen = seen.reshape(batch, channels * TAPS, height, width).to(x.dtype)
        return F.conv2d(seen, self.weight.reshape(len(self.weight), -1, 1, 1))


def _taps(height: int, width: int) -> Tensor:
    """float32 [2, taps, height, width]: row and column that each tap has without an offset."""
    y, x = (torch.arange(side, dtype=torch.float32, device="cpu") for side in (height, width))
    down, right = (each.reshape(-1) for each in torch.meshgrid(*[torch.arange(-1.0, 2.0, device="cpu")] * 2, indexing="ij"))
    rows = down[:, None, None] + y[:, None].expand(height, width)
    return torch.stack([rows, right[:, None, None] + x.expand(height, width)])


class Bottleneck(nn.Module):
    def __init__(self, given: int, inner: int, stride: int, deformable: bool):
        super().__init__()
        made = inner * EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(given, inner, 1, stride, bias=False), FrozenNorm(inner)
        self.conv2 = DeformableConvolution(inner, inner) if deformable else nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = FrozenNorm(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, made, 1, bias=False), FrozenNorm(made)
        if stride != 1 or given != made:
            self.downsample = nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), FrozenNorm(made))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.downsample(x) if hasattr(self, "downsample") else x
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + kept).relu()


class ResNet(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width = config.backbone_width
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), FrozenNorm(width)
        given = width
        for stage, (count, deformable) in enumerate(zip(config.blocks, config.stage_with_dcn)):
            blocks = []
            for block in range(count):
                blocks.append(Bottleneck(given, width << stage, 2 if stage and not block else 1, deformable))
                given = (width << stage) * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N,3,H,W] to what the last three stages give, at 1/8, 1/16 and 1/32."""
        x = self.layer1(F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1))
        found = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            found.append(x)
        return found


class Convolution(nn.Module):
    """mmcv's ConvModule without a norm."""

    def __init__(self, given: int, made: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(given, made, kernel, stride, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Pyramid(nn.Module):
    def __init__(self, config: DrivingConfig):
        super().__init__()
        width, made = config.backbone_width, config.embed_dims
        given = [(width << stage) * EXPANSION for stage in (1, 2, 3)]
        self.lateral_convs = nn.ModuleList(Convolution(each, made, 1) for each in given)
        self.fpn_convs = nn.ModuleList([*(Convolution(made, made, 3) for _ in given), Convolution(made, made, 3, 2)])

    def forward(self, given: list[Tensor]) -> list[Tensor]:
        """The three to four levels, coarser ones added to finer ones; the fourth is made of the third."""
        found = [lateral(x) for lateral, x in zip(self.lateral_convs, given)]
        for level in (1, 0):
            found[level] = found[level] + _doubled(found[level + 1])
        found = [conv(x) for conv, x in zip(self.fpn_convs, found)]
        return [*found, self.fpn_convs[LEVELS - 1](found[-1])]


def _doubled(x: Tensor) -> Tensor:
    """Each pixel four times: the nearest, of a picture of twice the height and width."""
    batch, channels, height, width = x.shape
    spread = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    return spread.reshape(batch, channels, 2 * height, 2 * width)


class Backbone(nn.Module):
    """The part."""

    def __init__(self, img_backbone: ResNet, img_neck: Pyramid):
        super().__init__()
        self.img_backbone, self.img_neck = img_backbone, img_neck

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """[1, cameras, 3, H, W], BGR without the mean, to four levels [1, cameras, C, h, w]."""
        return [level[None] for level in self.img_neck(self.img_backbone(pictures[0]))]
