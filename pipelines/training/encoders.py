"""Training of an encoder: when it is frozen, and which batch norm it can have."""

from accelerate import Accelerator

from pipelines.runtime.errors import UsageError
from pipelines.training.options import TrainConfig
from unet import UNet


def refuse_encoder_batch_norm(
    model: UNet, config: TrainConfig, accelerator: Accelerator, batch_size: int
) -> None:
    """Raise UsageError if a trained encoder normalises over batches where that does not work.

    Args:
        model: the model before it is prepared.
        config: the run.
        accelerator: number of ranks and kind of device.
        batch_size: samples of a forward pass of one rank.
    """
    encoder = model.encoder
    if encoder is None or config.model.freeze_encoder or not encoder.has_batch_norm():
        return
    flag = f"--model.encoder {config.model.encoder} has batch norm"
    remedy = "freeze it (--model.freeze-encoder) or use an encoder without (ConvNeXt, Swin)"
    if accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        raise UsageError(f"{flag}, which is synchronised on GPUs only; {remedy}")
    if config.gradient_checkpointing:
        raise UsageError(
            f"{flag}: --gradient-checkpointing would update its running averages twice per batch; "
            f"{remedy}"
        )
    assert config.crop_size is not None
    if batch_size * (-(-config.crop_size // model.config.multiple)) ** 2 < 2:
        raise UsageError(
            f"{flag}, and sees one value per channel in crops of {config.crop_size} pixels, one "
            "per pass; raise --crop-size or --global-batch-size"
        )


def freeze_encoder(model: UNet, until: float, progress: float) -> bool:
    """Freeze the encoder while `progress`, the share of the run that is done, is below `until`.

    Returns whether gradients of its weights are to be dropped. They are computed all the same:
    ranks agree on what they exchange before the first step.
    """
    if model.encoder is None or until == 0:
        return False
    frozen = progress < until
    if frozen != model.encoder.frozen:
        model.encoder.set_frozen(frozen, model.training)
    return frozen


def drop_gradients(model: UNet) -> None:
    """Drop the gradients of the encoder, so that neither the optimizer nor clipping sees them."""
    assert model.encoder is not None
    for parameter in model.encoder.parameters():
        parameter.grad = None
