"""`--layout auto`: recognise a layout or annotations in a folder, and print the command."""

import os
from pathlib import Path

from pipelines.packing.propose_annotations import join_command, propose_annotations
from pipelines.runtime.terminal import print_lines
from shards.annotations.layouts import recognise_layout
from shards.folders.walk import walk_files
from shards.images.files import IMAGE_EXTENSIONS
from shards.sample import DataError


def propose_layout(root: Path, verb: str) -> int:
    """Print the command for what lies in a folder; returns exit code 0.

    Raises DataError if nothing is recognised.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; correct --layout auto FOLDER")
    found = recognise_layout(root)
    if found is not None:
        print(join_command(verb, ["--layout", found, str(root)]))
        return 0
    files = list(walk_files(str(root)))
    images = [n for n in files if os.path.splitext(n.lower())[1] in IMAGE_EXTENSIONS]
    proposal = propose_annotations(root, files, images)
    if proposal is None:
        raise DataError(
            f"{root} has no layout and no annotations that are known; for masks that are images, "
            f"run unet check {root}"
        )
    print(join_command(verb, proposal.words))
    print_lines(proposal.notes)
    return 0
