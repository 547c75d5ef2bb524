"""Many small pictures on one, to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...errors import DataError


def contact_sheet(images: np.ndarray, *, columns: int = 10, zoom: int = 3, gap: int = 2) -> Image.Image:
    """Pictures in rows.

    Args:
        images: uint8 [rows, columns, height, width, 3], such as ``EyeRenderer().sequence(count=8)["images"]``, or
            [pictures, height, width, 3].
        columns: pictures in a row, for the second form.
        zoom: how many times as large every pixel is shown.
        gap: white pixels between pictures.

    Raises:
        DataError: for arrays of another shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3 or not images.size or columns < 1:
        raise DataError(
            f"pictures are uint8 [rows, columns, height, width, 3] or [pictures, height, width, 3], not {images.dtype} "
            f"{list(images.shape)}."
        )
    if images.ndim == 5:
        columns, images = images.shape[1], images.reshape(-1, *images.shape[2:])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    height, width = images.shape[1:3]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)


__all__ = ["contact_sheet"]
