"""The U-Net and the mathematics around it: torch in, torch out.

Nothing here opens a file but weights, asks for a rank, or knows what a shard is.
"""

from unet.losses import LossConfig, SegmentationLoss
from unet.metrics import Scores, SegmentationScores
from unet.model import PRESETS, DataSpec, UNet, UNetConfig
from unet.tiling import TileConfig, predict_mask

__all__ = [
    "PRESETS",
    "DataSpec",
    "LossConfig",
    "Scores",
    "SegmentationLoss",
    "SegmentationScores",
    "TileConfig",
    "UNet",
    "UNetConfig",
    "predict_mask",
]
