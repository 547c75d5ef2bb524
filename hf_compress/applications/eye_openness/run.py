"""``hf-compress eye-openness``: a video, a camera or pictures in; tables, events and plots out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CheckpointError, DataError
from .faces import Face, Locator
from .frames import is_video, open_video, pictures_in, read_picture, record_camera, write_video
from .predicting import EyeReader, best_frame
from .report import draw_faces, overlay_frames, plot_tracks, track_table, write_events, write_table
from .tracks import RUNNING, USUAL_RULES, EventRules, EyeTracks, Normalisation, analyse


@dataclass(frozen=True)
class EyeReport:
    """What was found and written.

    Attributes:
        files: all that were written.
        tracks: of a video.
        faces: of a video, the followed face of every frame; of pictures, those of each.
        openness: of a video [frames, 2]; of pictures, per picture [faces, 2].
        best: of pictures, the name of the one whose most closed eye is most open.
    """

    files: list[Path]
    tracks: EyeTracks | None = None
    faces: Sequence[Any] = ()
    openness: Any = None
    best: str | None = None
    notes: list[str] = field(default_factory=list)


def read_video(
    source: str | Path | int,
    reader: EyeReader,
    locate: Locator,
    output: str | Path,
    *,
    how: Normalisation = RUNNING,
    rules: EventRules = USUAL_RULES,
    fps: float | None = None,
    window: float = 60.0,
    exclude_blinks: bool = True,
    overlay: bool = False,
    seconds: float = 30.0,
) -> EyeReport:
    """A video (or ``seconds`` of a camera) to openness.csv, openness.parquet, events.json, openness.png and overlay.mp4.

    One face is followed: the largest at first, then the one nearest to it. A frame without a face is NaN in every column.

    Args:
        source: a path, or the number of a camera.
        reader: the model.
        locate: finds faces in a frame.
        output: a folder; made when it is not there.
        how, rules, window, exclude_blinks: see :func:`~.tracks.analyse`.
        fps: in place of what the file says.
        overlay: whether to write overlay.mp4.

    Raises:
        DataError: when the video cannot be read, or shows no face at all.
    """
    if isinstance(source, int):
        frames, rate = record_camera(source, seconds)
        name = f"camera {source}"
    else:
        video = open_video(source, fps)
        frames, rate, name = video.frames(), video.fps, Path(source).name  # type: ignore[assignment]
    faces, rows = [], []
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for face, values in reader.frames(frames, locate):
            faces.append(face)
            rows.append(values)
    notes += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    openness = np.array(rows).reshape(-1, 2)
    if not np.isfinite(openness).any():
        seen = sum(face is not None for face in faces)
        raise DataError(
            f"{name}: no eye could be judged in {len(openness)} frames ({seen} with a face). Eyes have to be at least 8 pixels "
            "wide and looking towards the camera; give their places with --eyes where the detector misses them."
        )
    tracks = analyse(openness, rate, how, rules, window=window, exclude_blinks=exclude_blinks)
    folder = _folder(output)
    files = write_table(track_table(tracks), folder, "openness")
    files.append(write_events(tracks, folder / "events.json", name))
    files.append(plot_tracks(folder / "openness.png", tracks))
    if overlay:
        again = iter(frames) if isinstance(frames, list) else open_video(source, fps).frames()
        files.append(write_video(folder / "overlay.mp4", overlay_frames(again, faces, tracks), rate))
    return EyeReport(files, tracks, faces, openness, notes=notes)


def read_pictures(
    paths: Sequence[str | Path],
    reader: EyeReader,
    locate: Locator,
    output: str | Path,
    *,
    overlay: bool = False,
) -> EyeReport:
    """Pictures to openness.csv and openness.parquet, a row for every face; with ``overlay``, pictures with the eyes framed.

    A picture without a face has one row with NaN; one that cannot be read has a note.

    Raises:
        DataError: when no picture can be read.
    """
    import pandas

    folder = _folder(output)
    rows, notes, files = [], [], []
    all_faces: list[list[Face]] = []
    openness: list[np.ndarray] = []
    names: list[str] = []
    for path in map(Path, paths):
        try:
            image = read_picture(path)
        except DataError as error:
            notes.append(str(error))
            continue
        faces = sorted(locate(np.asarray(image)), key=lambda face: -face.eye_distance)
        found = reader.picture(image, faces)
        for number, values in enumerate(found if len(found) else np.full((1, 2), np.nan)):
            face = number if len(found) else None
            rows.append(
                {"picture": path.name, "face": face, "left": values[0], "right": values[1], "least": _least(values)}
            )
        all_faces.append(faces)
        openness.append(found)
        names.append(path.name)
        if overlay:
            drawn = folder / f"{path.stem}-eyes.png"
            draw_faces(image, faces, found).save(drawn)
            files.append(drawn)
    if not names:
        raise DataError(f"none of {len(paths)} pictures could be read: {notes[0] if notes else 'there are none'}")
    table = pandas.DataFrame(rows).astype({"face": "Int64"})
    best = best_frame(openness)
    written = write_table(table, folder, "openness")
    return EyeReport([*written, *files], None, all_faces, openness, None if best is None else names[best], notes)


def run_eye_openness(
    source: str | Path | int, reader: EyeReader, locate: Locator, output: str | Path, **options: Any
) -> EyeReport:
    """A video, a camera's number, a picture, or a folder of pictures; see :func:`read_video` and :func:`read_pictures`."""
    if isinstance(source, int) or (Path(source).is_file() and is_video(source)):
        return read_video(source, reader, locate, output, **options)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"there is no file or folder {source}.")
    pictures = pictures_in(path) if path.is_dir() else [path]
    return read_pictures(pictures, reader, locate, output, overlay=bool(options.get("overlay")))


def _least(values: np.ndarray) -> float:
    return float(np.nanmin(values)) if np.isfinite(values).any() else float("nan")


def _folder(output: str | Path) -> Path:
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{output} exists and is not a folder. Choose another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


__all__ = ["EyeReport", "read_pictures", "read_video", "run_eye_openness"]
