"""The U-Net and the mathematics around it: torch in, torch out.

Nothing here knows shards or ranks, or opens files other than weights.
"""

from unet.calibration import (
    BlockCounts,
    CalibrationCounts,
    Histograms,
    TemperatureCounts,
    observe_blocks,
)
from unet.config import PRESETS, UNetConfig, valid_input
from unet.encoder import Encoder, EncoderConfig, find_stages
from unet.ensemble import Ensemble, average_logits, members_of
from unet.losses import LossConfig, SegmentationLoss, inverse_frequency
from unet.masks import MaskRule, PredictedMasks, predict_mask, predict_masks
from unet.metrics import Empty, Scores, SegmentationScores, confusion_per_image
from unet.model import UNet
from unet.spec import DataSpec
from unet.surface import Surface, SurfaceScores
from unet.tiling import Block, NetworkGeometry, TileConfig, halve_tile, predict_blocks

__all__ = [
    "PRESETS",
    "Block",
    "BlockCounts",
    "CalibrationCounts",
    "DataSpec",
    "Empty",
    "Encoder",
    "EncoderConfig",
    "Ensemble",
    "Histograms",
    "LossConfig",
    "MaskRule",
    "NetworkGeometry",
    "PredictedMasks",
    "Scores",
    "SegmentationLoss",
    "SegmentationScores",
    "Surface",
    "SurfaceScores",
    "TemperatureCounts",
    "TileConfig",
    "UNet",
    "UNetConfig",
    "average_logits",
    "confusion_per_image",
    "find_stages",
    "halve_tile",
    "inverse_frequency",
    "members_of",
    "observe_blocks",
    "predict_blocks",
    "predict_mask",
    "predict_masks",
    "valid_input",
]
