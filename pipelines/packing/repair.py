"""Pairing flags that pair what the given ones do not."""

from dataclasses import replace
from pathlib import Path

from pipelines.packing.options import PairingOptions
from shards.folders.layout import score_mask
from shards.folders.pair_lists import find_dead_prefix, read_pair_columns
from shards.folders.suffixes import find_fit
from shards.folders.walk import list_images
from shards.sample import DataError


def repair_pairing(options: PairingOptions) -> PairingOptions | None:
    """Find the settings that pair the most files of the given folders or lists, if there are any.

    Ends, extensions and numbers of names are tried, then folders of masks beside those of the
    images, such as `Xannot` beside `X`; for lists, the folder in which their paths exist.
    """
    if options.pairs:
        names = [image for file in options.pairs for image, _ in read_pair_columns(file)]
        here = options.pairs[0].parent
        roots = (*options.images, here, here.resolve().parent)
        root = next((root for root in roots if find_dead_prefix(names, root) is not None), None)
        return None if root is None else replace(options, images=(root,), masks=(root,))
    beside = [b for folder in options.images if (b := find_masks_beside(folder)) is not None]
    choices = [options.masks, *([tuple(beside)] if len(beside) == len(options.images) else [])]
    fitted = [found for masks in choices if (found := fit_folders(options, masks)) is not None]
    return max(fitted, key=lambda found: found[0])[1] if fitted else None


def fit_folders(
    options: PairingOptions, masks: tuple[Path, ...]
) -> tuple[int, PairingOptions] | None:
    """Return the number of pairs with the best settings for these folders, and the settings."""
    try:
        left, right = (
            [f"{i}/{name}" for i, folder in enumerate(folders) for name in list_images(folder)]
            for folders in (options.images, masks)
        )
    except DataError:
        return None
    shared = [one.resolve() for one in options.images] == [other.resolve() for other in masks]
    fit = find_fit(left, right, shared=shared)
    if not fit.pairs or not fit.has_flags:
        return None
    settings = replace(
        options,
        masks=masks,
        image_suffix=fit.image_suffix,
        mask_suffix=fit.mask_suffix,
        image_ext=fit.image_ext,
        mask_ext=fit.mask_ext,
        pair_regex=fit.regex,
    )
    incomplete = fit.pairs < max(len(left), len(right)) and not shared
    return fit.pairs, replace(settings, skip_unpaired=options.skip_unpaired or incomplete)


def find_masks_beside(folder: Path) -> Path | None:
    """Return the folder beside one of images that is most likely named after its masks."""
    here = folder.resolve()
    found = [
        (other.name.startswith(here.name), score_mask(other.name), other.name)
        for other in here.parent.iterdir()
        if other.is_dir() and other != here
        if score_mask(other.name) > 0
    ]
    return folder.parent / max(found)[2] if found else None
