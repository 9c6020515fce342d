"""The U-Net and the mathematics around it: torch in, torch out.

Nothing here knows shards or ranks, or opens files other than weights. Metrics are imported from
`unet.metrics`, `unet.surface` and `unet.calibration`, because torchmetrics takes long to import.
"""

from unet.config import PRESETS, UNetConfig, valid_input
from unet.encoder import Encoder, EncoderConfig, find_stages
from unet.ensemble import Ensemble, average_logits, members_of
from unet.losses import LossConfig, SegmentationLoss, inverse_frequency
from unet.masks import MaskRule, PredictedMasks, predict_mask, predict_masks
from unet.model import UNet
from unet.spec import DataSpec
from unet.tiling import Block, NetworkGeometry, TileConfig, halve_tile, predict_blocks

__all__ = [
    "PRESETS",
    "Block",
    "DataSpec",
    "Encoder",
    "EncoderConfig",
    "Ensemble",
    "LossConfig",
    "MaskRule",
    "NetworkGeometry",
    "PredictedMasks",
    "SegmentationLoss",
    "TileConfig",
    "UNet",
    "UNetConfig",
    "average_logits",
    "find_stages",
    "halve_tile",
    "inverse_frequency",
    "members_of",
    "predict_blocks",
    "predict_mask",
    "predict_masks",
    "valid_input",
]
