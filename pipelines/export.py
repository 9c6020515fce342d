"""`unet export`: a checkpoint as one file that other programs run, checked against the model."""

import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipelines.checkpoint import LoadedModel, flush_to_disk, load_model
from pipelines.config import RunError, UsageError, refuse_url, run_command
from unet.model import valid_input

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
METADATA = "metadata.json"
"""The extra file of a .pt2 that holds what an .onnx holds as its metadata."""
TOLERANCE = 1e-4
"""Largest difference from the model's logits that is taken, as a share of the largest of them: ten
times what sums of float32 in another order make."""

RunFile = Callable[[Tensor], Tensor]
"""Pictures uint8 [B, C, H, W] -> logits float32 [B, K, H', W'], by an exported file."""
Size = tuple[int, int, int]
"""Number of pictures, height, width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a checkpoint as one file that onnxruntime or torch runs without this program.

    It takes `image`, uint8 [batch, channels, height, width], and gives `logits`, float32 [batch,
    classes, height, width]. Normalisation and padding are inside; classes, palette and what else is
    known of the data are its metadata. The file is loaded again and must give the model's logits at
    several sizes before it gets its name; one that has this name is replaced.
    """

    checkpoint: str
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
    out: Path
    """The file to write: .onnx, or .pt2 with `--format torch`."""
    format: Literal["onnx", "torch"] = "onnx"
    """`onnx`: for onnxruntime and others that read ONNX. `torch`: for torch.export.load."""

    def __post_init__(self) -> None:
        refuse_url("--out", self.out)
        suffix = SUFFIX[self.format]
        if self.out.suffix != suffix:
            raise ValueError(f"--out {self.out} must end in {suffix} with --format {self.format}")


def run(config: ExportConfig) -> int:
    """Export, check, rename, and say what was checked."""
    if config.format == "onnx":
        require_onnx()
    if config.out.is_dir():
        raise UsageError(f"--out {config.out} is a folder; give the file to write")
    loaded = load_model(config.checkpoint)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{config.out.name}.", suffix=".tmp", dir=config.out.parent
    ) as folder:
        file = Path(folder) / config.out.name
        run_file = export(loaded, config.format, file)
        difference = check(loaded, run_file)
        num_bytes = sum(part.stat().st_size for part in file.parent.iterdir())
        put_in_place(file, config.out)
    sizes = ", ".join(size_name(size) for size in sizes_to_try(loaded))
    print(f"{config.out}: {num_bytes / 1e6:,.1f} MB, for pictures of {sides_name(loaded)}")
    print(
        f"Loaded again and run on {sizes}: its logits differ from the model's by at most "
        f"{difference:.1g} of the largest (allowed: {TOLERANCE:.1g})"
    )
    return 0


def require_onnx() -> None:
    """Raise UsageError where a library that writes or runs ONNX is not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise UsageError(
            f"--format onnx needs {' and '.join(missing)}: pip install 'unet-shards[export]'"
        )


def export(loaded: LoadedModel, form: str, file: Path) -> RunFile:
    """Write the file and load it. Raises RunError where torch or onnxruntime does not manage."""
    try:
        with quiet():
            if form == "onnx":
                write_onnx(loaded, file)
                return read_onnx(file)
            write_torch(loaded, file)
            return read_torch(file)
    except OSError:
        raise
    except Exception as error:  # exporters raise whatever the graph provokes
        raise RunError(
            f"torch {torch.__version__} cannot export this model as {form}: {one_line(error)}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch prints, logs and warns of, which is for those who write exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def one_line(error: Exception) -> str:
    """The beginning of what torch or onnxruntime says, without its line breaks."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class Exported(nn.Module):
    """What is exported: pictures as they are read -> logits, as the model gives them.

    Picture and logits are padded and cropped by index: torch.export follows neither a branch nor a
    slice that depends on the size. The model then finds nothing left to pad.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model, self.spec = loaded.model, loaded.spec

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, K, H', W']."""
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
    """Instance or group norm with means that are taken of each row, and then of these.

    onnxruntime's own sums up a map pixel by pixel in float32, which loses digits as maps grow: with
    16 channels at 1,000 x 1,000 logits were off by 5e-4 of the largest, and by 1e-2 on a picture of
    one colour. By rows it is 4e-6 and 1e-5, in the same time (onnxruntime 1.32, CPU).
    """

    def __init__(self, norm: nn.GroupNorm | nn.InstanceNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.num_channels = len(norm.weight)
        self.num_groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else self.num_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        x = x - self.mean(x)
        scale = torch.rsqrt(self.mean(x.square()) + self.eps) * self.weight[:, None, None]
        return x * scale + self.bias[:, None, None]

    def mean(self, x: Tensor) -> Tensor:
        """Each channel's mean over its group: [B, C, H, W] -> [B, C, 1, 1]."""
        of_channels = x.mean(3, keepdim=True).mean(2, keepdim=True)
        if self.num_groups == self.num_channels:
            return of_channels
        groups = of_channels.unflatten(1, (self.num_groups, -1))
        return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)


def norms_by_rows(loaded: LoadedModel) -> LoadedModel:
    """A copy whose instance and group norms are `NormByRows`."""
    model = copy.deepcopy(loaded.model)
    for name, module in loaded.model.named_modules():
        if isinstance(module, nn.GroupNorm | nn.InstanceNorm2d):
            model.set_submodule(name, NormByRows(module))
    return replace(loaded, model=model)


def fitting_sides(loaded: LoadedModel) -> tuple[int, int]:
    """The smallest side of a picture that the model takes, and the step to the next."""
    config = loaded.model.config
    valid = config.padding == "valid"
    return (valid_input(1, config.depth), 2**config.depth) if valid else (1, 1)


def sides_name(loaded: LoadedModel) -> str:
    """The sides that a picture may have, in words."""
    least, step = fitting_sides(loaded)
    if step == 1:
        return "any height and width"
    return f"height and width {least}, {least + step}, {least + 2 * step}, ..."


def side_dim(name: str, loaded: LoadedModel) -> Dim:
    """The sides that a picture may have, for torch.export."""
    least, step = fitting_sides(loaded)
    if step == 1:
        return Dim(name, min=least)
    return step * Dim(f"_{name}", min=least // step) + least % step


def trace(loaded: LoadedModel) -> ExportedProgram:
    """The graph for any batch size and any height and width that the model takes."""
    least, step = fitting_sides(loaded)
    channels = loaded.model.config.in_channels
    image = torch.zeros(2, channels, least + 3 * step, least + 4 * step, dtype=torch.uint8)
    dims = {0: Dim("batch", min=1), 2: side_dim("height", loaded), 3: side_dim("width", loaded)}
    # torch.export takes it that no side is ever 1, and at the bottom of a padded network it may be;
    # torch's own ONNX exporter asks for the same.
    oblivious = torch.fx.experimental._config.patch(  # pyright: ignore[reportAttributeAccessIssue]
        backed_size_oblivious=loaded.model.config.padding == "same"
    )
    with torch.no_grad(), oblivious:
        program = torch.export.export(
            Exported(loaded), (image,), dynamic_shapes={"image": dims}, strict=False
        )
    for node in program.graph.nodes:
        # It names the folders of this machine.
        node.meta.pop("stack_trace", None)
    return program


def metadata(loaded: LoadedModel) -> dict[str, Any]:
    """What someone must know who has nothing but the file."""
    spec, lost = loaded.spec, loaded.model.config.margin
    return {
        "image": f"uint8 [batch, {len(spec.mean)}, height, width], {spec.channels}, values 0-255 "
        "as they are: normalisation is inside"
        + (f"; of 16-bit pictures {spec.image_range} become 0 and 255" if spec.image_range else ""),
        "sides": sides_name(loaded),
        "logits": "float32 [batch, classes, height, width]; a pixel's class is the largest"
        + (f"; {lost} pixels on each side of the image are not covered" if lost else ""),
        **asdict(spec),
        "model": asdict(loaded.model.config),
        "weights_sha256": loaded.digest,
        "producer": f"unet-shards {version('unet-shards')}",
    }


def write_onnx(loaded: LoadedModel, file: Path) -> None:
    """The graph and its weights as ONNX; weights of gigabytes in a second file, `FILE.data`."""
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
    written.save(file)


def read_onnx(file: Path) -> RunFile:
    """The file as onnxruntime runs it on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # It is raised too; nothing below `fatal` is said twice.
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])


def write_torch(loaded: LoadedModel, file: Path) -> None:
    """The graph and its weights as torch.export.save writes them, with one file more."""
    text = json.dumps(metadata(loaded), indent=1)
    torch.export.save(trace(loaded), file, extra_files={METADATA: text})


def read_torch(file: Path) -> RunFile:
    """The file as torch runs it."""
    return torch.export.load(file).module()


def sizes_to_try(loaded: LoadedModel) -> tuple[Size, ...]:
    """The smallest picture, an uneven one, and two of about the size that the model knows."""
    least, step = fitting_sides(loaded)
    uneven = (1, 37, 53) if step == 1 else (1, least + step, least)
    side = least + max(0, loaded.spec.crop_size - least) // step * step
    return (1, least, least), uneven, (2, side, side)


def size_name(size: Size) -> str:
    """A size as people write it: 37 x 53."""
    num_images, height, width = size
    return f"{height} x {width}" if num_images == 1 else f"{num_images} of {height} x {width}"


def check(loaded: LoadedModel, run_file: RunFile) -> float:
    """Run file and model on noise of several sizes and compare their logits.

    Logits that differ by no more than TOLERANCE of the largest give every pixel the same class,
    unless its two best are closer to each other than twice that.

    Returns:
        The largest difference, as a share of the largest logit.

    Raises:
        RunError: the difference is larger, or the file does not run, with the size.
    """
    generator = torch.Generator().manual_seed(0)
    differences = [0.0]
    for size in sizes_to_try(loaded):
        num_images, height, width = size
        shape = (num_images, loaded.model.config.in_channels, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = loaded.model(loaded.spec.normalise(image))
            try:
                logits = run_file(image)
            except Exception as error:  # runtimes too raise what they like
                raise RunError(
                    f"the exported file fails at {size_name(size)}: {one_line(error)}; "
                    "nothing is written"
                ) from error
        if logits.shape != expected.shape:
            raise RunError(
                f"the exported file gives logits {list(logits.shape)} at {size_name(size)}, the "
                f"model {list(expected.shape)}; nothing is written"
            )
        largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = ((logits - expected).abs().max() / largest).item()
        # Written so that NaN is refused too.
        if not difference <= TOLERANCE:
            raise RunError(
                f"the logits of the exported file differ from the model's by {difference:.1e} of "
                f"the largest at {size_name(size)}, more than {TOLERANCE:.0e}; nothing is written"
            )
        differences.append(difference)
    return max(differences)


def put_in_place(file: Path, out: Path) -> None:
    """Give the file its name; what lies beside it first, so that a file that is there is whole."""
    parts = sorted(file.parent.iterdir(), key=lambda part: part == file)
    if len(parts) > 1:
        # An older one would be read with the new weights.
        out.unlink(missing_ok=True)
    for part in parts:
        flush_to_disk(part)
        part.replace(out.with_name(part.name))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(ExportConfig, run, argv, "export")


if __name__ == "__main__":
    sys.exit(main())
