"""`--layout auto`: recognise a layout or annotations in a folder, and print the command."""

import os
import shlex
from collections import Counter
from pathlib import Path

from shards.annotations.layouts import recognise_layout
from shards.annotations.signatures import recognise_file
from shards.annotations.source import PER_IMAGE
from shards.folders.walk import walk_files
from shards.images.files import IMAGE_EXTENSIONS
from shards.sample import DataError

MAX_LOOKED_AT = 200
"""Files of annotations that are looked at."""


def propose_layout(root: Path, verb: str) -> int:
    """Print the command for what lies in a folder; returns exit code 0.

    Raises DataError if nothing is recognised.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; correct --layout auto FOLDER")
    found = recognise_layout(root)
    if found is not None:
        print(shlex.join(["unet", verb, "--layout", found, str(root), "--out", "SHARDS"]))
        return 0
    files = sorted(walk_files(str(root)))
    texts = [n for n in files if os.path.splitext(n.lower())[1] in (".json", ".xml", ".txt")]
    kinds = {name: kind for name in texts[:MAX_LOOKED_AT] if (kind := recognise_file(root / name))}
    images = Counter(
        os.path.dirname(name)
        for name in files
        if os.path.splitext(name.lower())[1] in IMAGE_EXTENSIONS
    )
    if not kinds or not images:
        raise DataError(
            f"{root} has no layout and no annotations that are known; for masks that are images, "
            f"run unet check {root}"
        )
    kind = Counter(kinds.values()).most_common(1)[0][0]
    chosen = [name for name, other in kinds.items() if other == kind]
    if kind in PER_IMAGE:
        place = os.path.commonpath([os.path.dirname(name) for name in chosen])
    else:
        place = chosen[0]
    folder = os.path.commonpath([*images]) if len(images) > 1 else next(iter(images))
    words = ["--images", str(root / folder), "--annotations", str(root / place)]
    print(
        shlex.join(
            ["unet", verb, *words, "--annotation-format", kind, "--out", "SHARDS"],
        )
    )
    if len(chosen) > 1 and kind not in PER_IMAGE:
        print(f"{len(chosen)} files of annotations: pack each into a folder of its own")
    return 0
