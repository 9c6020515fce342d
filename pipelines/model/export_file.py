"""Exports a model to ONNX or torch.export and verifies that the file computes the same logits."""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipelines.model.load import LoadedModel, require_spec
from pipelines.runtime.errors import RunError
from shards.writer import name_path
from unet import UNet, average_logits
from unet.config import valid_input

METADATA = "metadata.json"
"""The extra file of a .pt2 with what an .onnx stores as metadata."""
TOLERANCE = 1e-4
"""Largest allowed difference from the model's logits, relative to the largest logit: ten times that
of float32 sums in another order."""
SEVERAL_IMAGES = "L['image'].size()[0] > 1"
"""Guard of torch.export on the batch size."""
RunFile = Callable[[Tensor], Tensor]
"""An exported file: images uint8 [B, C, H, W] -> logits float32 [B, K, H', W']."""
Size = tuple[int, int, int]
"""Number of images, height, width."""


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what torch prints, logs and warns about during export."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as null,
            redirect_stdout(null),
            redirect_stderr(null),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def one_line(error: Exception) -> str:
    """Return the start of an error message of torch or onnxruntime, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class ExportedEnsemble(nn.Module):
    """The exported module of several models: raw images -> logarithms of averaged probabilities."""

    def __init__(self, members: Sequence[UNet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(map(Exported, members))

    def forward(self, image: Tensor) -> Tensor:
        """Map uint8 [B, C, H, W] to float32 [B, K, H', W']."""
        return average_logits(member(image) for member in self.members)


class Exported(nn.Module):
    """The exported module of one model: raw images -> logits.

    Images are padded and logits cropped by index, because torch.export traces neither a branch nor
    a slice that depends on the size. The model then has nothing left to pad.
    """

    def __init__(self, model: UNet) -> None:
        super().__init__()
        self.model, self.spec = model, require_spec(model)

    def forward(self, image: Tensor) -> Tensor:
        """Map uint8 [B, C, H, W] to float32 [B, K, H', W']."""
        if self.model.config.padding == "valid":
            return self.model(self.spec.normalise(image))
        height, width = image.shape[-2:]
        for dim, side in ((2, height), (3, width)):
            padded = torch.arange(self.model.padded_side(side), device=image.device)
            image = image.index_select(dim, padded.clamp(max=side - 1))
        logits = self.model(self.spec.normalise(image))
        for dim, side in ((2, height), (3, width)):
            logits = logits.index_select(dim, torch.arange(side, device=image.device))
        return logits


class NormByRows(nn.Module):
    """Instance or group norm that averages rows first, then their means.

    onnxruntime sums a feature map pixel by pixel in float32, which loses precision as maps grow:
    with 16 channels at 1,000 x 1,000, logits were off by 5e-4 of the largest, and by 1e-2 on an
    image of one colour. By rows it is 4e-6 and 1e-5, in the same time (onnxruntime 1.32, CPU).
    """

    def __init__(self, norm: nn.GroupNorm | nn.InstanceNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.num_channels = len(norm.weight)
        self.num_groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else self.num_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        x = x - self.mean(x)
        scale = torch.rsqrt(self.mean(x.square()) + self.eps) * self.weight[:, None, None]
        return x * scale + self.bias[:, None, None]

    def mean(self, x: Tensor) -> Tensor:
        """Average each channel over its group: [B, C, H, W] -> [B, C, 1, 1]."""
        of_channels = x.mean(3, keepdim=True).mean(2, keepdim=True)
        if self.num_groups == self.num_channels:
            return of_channels
        groups = of_channels.unflatten(1, (self.num_groups, -1))
        return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)


def norms_by_rows(loaded: LoadedModel) -> LoadedModel:
    """Copy a model with its instance and group norms replaced by `NormByRows`."""
    model = copy.deepcopy(loaded.model)
    for name, module in loaded.model.named_modules():
        if isinstance(module, nn.GroupNorm | nn.InstanceNorm2d):
            model.set_submodule(name, NormByRows(module))
    return replace(loaded, model=model)


def fixed_padding(model: UNet) -> UNet:
    """Copy a model whose encoder of timm pads as TensorFlow does, with constants for the padding.

    It depends on the side, which torch.export cannot trace. But a U-Net pads images to multiples of
    its strides, so that each convolution gets a multiple of its own.
    """
    fixed = copy.deepcopy(model)
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or type(conv).__name__ != "Conv2dSame":
            continue
        plain = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # pyright: ignore[reportArgumentType] - torch's own attributes
            conv.stride,  # pyright: ignore[reportArgumentType]
            dilation=conv.dilation,  # pyright: ignore[reportArgumentType]
            groups=conv.groups,
            bias=conv.bias is not None,
        )
        plain.weight, plain.bias = conv.weight, conv.bias
        totals = [
            max(0, dilation * (kernel - 1) + 1 - stride)
            for kernel, dilation, stride in zip(
                conv.kernel_size, conv.dilation, conv.stride, strict=True
            )
        ]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        pad = nn.ZeroPad2d((left, right, top, bottom))
        fixed.set_submodule(name, nn.Sequential(pad, plain))
    return fixed


def fitting_sides(loaded: LoadedModel) -> tuple[int, int]:
    """Return the smallest side that the model takes, and the step to the next."""
    config = loaded.model.config
    valid = config.padding == "valid"
    return (valid_input(1, config.depth), 2**config.depth) if valid else (1, 1)


def sides_name(loaded: LoadedModel) -> str:
    """Describe the sides that an image may have."""
    min_side, step = fitting_sides(loaded)
    if step == 1:
        return "any height and width"
    return f"height and width {min_side}, {min_side + step}, {min_side + 2 * step}, ..."


def side_dim(name: str, loaded: LoadedModel) -> Dim:
    """Return the sides that an image may have, for torch.export."""
    min_side, step = fitting_sides(loaded)
    if step == 1:
        return Dim(name, min=min_side)
    return step * Dim(f"_{name}", min=min_side // step) + min_side % step


def refuse_windows(model: UNet) -> None:
    """Raise RunError for an encoder that pads its maps to whole windows: Swin, Swin V2.

    Whether a map is padded, shifted or one window is a branch on its size: torch.export traces it
    for one size (exactly), but not for all.
    """
    encoder = model.config.encoder
    if encoder is not None and "window_size" in encoder.backbone:
        raise RunError(
            f"encoder {encoder.source} ({encoder.architecture}) attends in windows, "
            "which torch.export cannot trace for images of any size; use a ConvNeXt or ResNet "
            "encoder for models to export"
        )


def trace(loaded: LoadedModel) -> ExportedProgram:
    """Trace the graph for any batch size, height and width that the model takes."""
    min_side, step = fitting_sides(loaded)
    channels = loaded.model.config.in_channels
    image = torch.zeros(2, channels, min_side + 3 * step, min_side + 4 * step, dtype=torch.uint8)
    dims = {0: Dim("batch", min=1), 2: side_dim("height", loaded), 3: side_dim("width", loaded)}
    # torch.export assumes that no side is ever 1, and at the bottom of a padded network it may be;
    # torch's own ONNX exporter sets the same option.
    oblivious = torch.fx.experimental._config.patch(  # pyright: ignore[reportAttributeAccessIssue]
        backed_size_oblivious=loaded.model.config.padding == "same"
    )
    members = [fixed_padding(member) for member in loaded.members]
    module = Exported(members[0]) if len(members) == 1 else ExportedEnsemble(members)
    with torch.no_grad(), oblivious:
        program = torch.export.export(
            module, (image,), dynamic_shapes={"image": dims}, strict=False
        )
    encoders = [member for member in members if member.encoder is not None]
    if encoders and hasattr(program, "_guards_code"):
        # Depthwise convolutions make torch ask for the memory format of their input, and so assume
        # several images; `compare_logits` runs one.
        program._guards_code = [code for code in program._guards_code if code != SEVERAL_IMAGES]
    for node in program.graph.nodes:
        # Stack traces contain paths of this machine.
        node.meta.pop("stack_trace", None)
    return program


def metadata(loaded: LoadedModel) -> dict[str, Any]:
    """Describe the file for users who have nothing else."""
    spec, lost = loaded.spec, loaded.model.config.margin
    models = [asdict(member.config) for member in loaded.members]
    return {
        "image": f"uint8 [batch, {len(spec.mean)}, height, width], {spec.channels}, values 0-255 "
        "as they are: normalisation is inside"
        + (f"; of 16-bit images {spec.image_range} become 0 and 255" if spec.image_range else ""),
        "sides": sides_name(loaded),
        "logits": "float32 [batch, classes, height, width]; a pixel's class is the largest"
        + f"; their softmax is the average of {len(models)} models" * (len(models) > 1)
        + (f"; {lost} pixels on each side of the image are not covered" if lost else ""),
        **asdict(spec),
        "model": models[0] if len(models) == 1 else models,
        "weights_sha256": loaded.digest,
        "producer": f"unet-shards {version('unet-shards')}",
    }


def write_onnx(loaded: LoadedModel, file: Path) -> None:
    """Write graph and weights as ONNX; weights of gigabytes go to a second file, `FILE.data`."""
    written = torch.onnx.export(
        trace(norms_by_rows(loaded)),
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes={"image": {0: "batch", 2: "height", 3: "width"}},
    )
    assert written is not None
    model, lost = written.model, 2 * loaded.model.config.margin
    if lost:
        shape = model.graph.outputs[0].shape
        assert shape is not None
        shape[2], shape[3] = f"height - {lost}", f"width - {lost}"
    for name, value in metadata(loaded).items():
        model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    with name_path(file):
        written.save(file)


def read_onnx(file: Path) -> RunFile:
    """Load a file into onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors are raised as well; do not print them twice.
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def write_torch(loaded: LoadedModel, file: Path) -> None:
    """Write graph and weights with torch.export.save, with the metadata as an extra file."""
    text = json.dumps(metadata(loaded), indent=1)
    # On a full disk, torch's own file writer aborts the process.
    buffer = io.BytesIO()
    torch.export.save(trace(loaded), buffer, extra_files={METADATA: text})
    with name_path(file), file.open("wb") as out:
        out.write(buffer.getbuffer())


def read_torch(file: Path) -> RunFile:
    """Load a file into torch."""
    return torch.export.load(file).module()


def sizes_to_try(loaded: LoadedModel) -> tuple[Size, ...]:
    """Return sizes to verify: the smallest, an uneven one, and a batch of about the crop size."""
    min_side, step = fitting_sides(loaded)
    uneven = (1, 37, 53) if step == 1 else (1, min_side + step, min_side)
    side = min_side + max(0, loaded.spec.crop_size - min_side) // step * step
    return (1, min_side, min_side), uneven, (2, side, side)


def size_name(size: Size) -> str:
    """Format a size: 37 x 53."""
    num_images, height, width = size
    return f"{height} x {width}" if num_images == 1 else f"{num_images} of {height} x {width}"


def compare_logits(loaded: LoadedModel, run_file: RunFile) -> float:
    """Run file and model on noise of several sizes and compare their logits.

    Logits within TOLERANCE give every pixel the same class, unless its two best are closer to each
    other than twice that.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        RunError: if the difference exceeds TOLERANCE or the file does not run, with the size.
    """
    generator = torch.Generator().manual_seed(0)
    differences = [0.0]
    for size in sizes_to_try(loaded):
        num_images, height, width = size
        shape = (num_images, loaded.model.config.in_channels, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = loaded.model.logits(image)
            try:
                logits = run_file(image)
            except Exception as error:  # onnxruntime and torch raise errors of many classes
                raise RunError(
                    f"the exported file fails at {size_name(size)}: {one_line(error)}; "
                    "no file is written"
                ) from error
        if logits.shape != expected.shape:
            raise RunError(
                f"the exported file gives logits {list(logits.shape)} at {size_name(size)}, the "
                f"model {list(expected.shape)}; no file is written"
            )
        largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = ((logits - expected).abs().max() / largest).item()
        # In this form NaN is refused too.
        if not difference <= TOLERANCE:
            raise RunError(
                f"the logits of the exported file differ from the model's by {difference:.1e} of "
                f"the largest at {size_name(size)}, more than {TOLERANCE:.0e}; no file is written"
            )
        differences.append(difference)
    return max(differences)
