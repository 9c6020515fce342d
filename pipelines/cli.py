"""`unet VERB ...`: imports only the verb that runs, so that `unet --help` is fast."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

VERBS = {
    "separate": "split a folder that mixes images and masks",
    "check": "check a data set before packing: problems, class shares, a contact sheet",
    "pack": "pack images and masks into WebDataset shards with a manifest",
    "index": "make a data set of shards from other tools, without rewriting them",
    "unpack": "restore the folders of images and masks from shards",
    "plan": "choose settings for a data set, this device and a number of minutes",
    "train": "train a U-Net on shards, or resume",
    "evaluate": "score a checkpoint on a split, exactly",
    "compare": "compare scores on the same images, with p-values",
    "predict": "predict masks for an image, a folder, a list or shards, as shards",
    "export": "export a checkpoint to ONNX or torch.export, verified against the model",
    "report": "make one page about a run: curves, scores, best and worst images",
    "demo": "run the full workflow on generated sample images",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    verb, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if verb in ("-h", "--help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(f"unet {version('unet-shards')}")
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(VERBS)}"
        print(f"unet: unknown command {verb!r}; {hint}", file=sys.stderr)
        return 2
    return import_module(f"pipelines.{verb}").main(rest)


def help_text() -> str:
    """Format the list of verbs, one line each."""
    lines = [f"  {verb:<10}{summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: unet VERB [FLAGS]",
            "",
            "U-Net segmentation on WebDataset shards, from a laptop to a cluster.",
            "",
            *lines,
            "",
            "unet VERB --help lists the flags of a verb. On multiple devices:",
            "  accelerate launch --config_file accelerate_config.yaml -m pipelines.train FLAGS",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
