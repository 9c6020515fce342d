"""Images on their way from decoding processes to the one that predicts."""

import gc

import torch

from pipelines.inference.decoding import DecodedInput, SharedChunk, restore_images, share_images
from pipelines.runtime.shared_memory import PLACES, Buffers


def images(*shapes: tuple[int, int, int] | None) -> list[DecodedInput]:
    """Some decoded images; None: an input that could not be read."""
    return [
        DecodedInput(f"k{i}", f"k{i}.png", None, "is empty")
        if shape is None
        else DecodedInput(f"k{i}", f"k{i}.png", torch.randint(0, 256, shape, dtype=torch.uint8))
        for i, shape in enumerate(shapes)
    ]


def same(found: list[DecodedInput], expected: list[DecodedInput]) -> bool:
    return all(
        (a.key, a.source, a.error) == (b.key, b.source, b.error)
        and ((a.image is b.image is None) or torch.equal(a.image, b.image))
        for a, b in zip(found, expected, strict=True)
    )


def test_images_of_any_sizes_and_errors_are_returned_unchanged() -> None:
    buffers = Buffers(2, 10_000)
    items = images((3, 7, 5), None, (3, 1, 1), (3, 30, 40))
    shared = share_images(items, buffers, 1)
    assert isinstance(shared, SharedChunk)
    assert shared.place in range(PLACES, 2 * PLACES)
    assert not any(item.image is not None for item in shared.items)
    assert same(restore_images(shared, buffers), items)


def test_what_has_no_room_is_sent_as_it_is() -> None:
    buffers = Buffers(1, 150)
    for items in (images((3, 8, 8)), images((3, 5, 5), (3, 5, 6)), images(None, None)):
        assert share_images(items, buffers, 0) is items
    fits = images((3, 5, 10))
    shared = [share_images(fits, buffers, 0) for _ in range(PLACES)]
    assert all(isinstance(one, SharedChunk) for one in shared)
    assert share_images(fits, buffers, 0) is fits


def test_memory_is_reused_once_all_images_of_a_chunk_are_freed() -> None:
    buffers = Buffers(1, 1_000)
    items = images((1, 10, 10), (1, 20, 20))
    shared = [share_images(items, buffers, 0) for _ in range(PLACES)]
    assert isinstance(shared[0], SharedChunk)
    found = restore_images(shared[0], buffers)
    del found[0]
    gc.collect()
    assert share_images(items, buffers, 0) is items
    found.clear()
    gc.collect()
    again = share_images(items, buffers, 0)
    assert isinstance(again, SharedChunk)
    assert again.place == shared[0].place
