"""What is written for a video or for pictures: tables, events, plots, and frames with what was found drawn over them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...measurement.plots import _BLUE, _GREY, _ORANGE, _figure
from .faces import Face
from .tracks import EyeTracks

_EVENTS = {
    "blink": ("#C4CCD4", "blink"),
    "incomplete": ("#E3EBD3", "incomplete blink"),
    "long_closure": ("#F3D9A4", "closure above 0.5 s"),
    "microsleep": ("#F2B5B5", "closure above 1 s"),
    "wink": ("#BFD9E8", "one eye alone"),
}


def track_table(tracks: EyeTracks) -> Any:
    """A row for every frame, as a pandas table: time, left, right, relative left, right and mean, valid, PERCLOS."""
    import pandas

    frames = np.arange(len(tracks.raw))
    both = tracks.raw.shape[1] == 2
    sides = ("left", "right") if both else ("eye",)
    columns: dict[str, Any] = {"frame": frames, "time": frames / tracks.fps}
    for number, side in enumerate(sides):
        columns[side] = tracks.raw[:, number]
        columns[f"{side}_relative"] = tracks.relative[:, number]
    columns |= {
        "relative": tracks.mean_relative,
        "valid": np.isfinite(tracks.mean_relative),
        "perclos": tracks.perclos_curve,
    }
    return pandas.DataFrame(columns)


def write_table(table: Any, folder: Path, name: str) -> list[Path]:
    """Write a table as CSV and Parquet."""
    csv, parquet = folder / f"{name}.csv", folder / f"{name}.parquet"
    _write(csv, table.to_csv(index=False, float_format="%.5f"))
    partial = parquet.with_name(f".partial-{parquet.name}")
    table.to_parquet(partial, index=False)
    partial.replace(parquet)
    return [csv, parquet]


def write_events(tracks: EyeTracks, path: Path, source: str) -> Path:
    """Events and summary as JSON; what is not known is null."""
    summary = {name: None if math.isnan(value) else round(value, 5) for name, value in tracks.summary.items()}
    events = [
        {name: round(value, 5) if isinstance(value, float) else value for name, value in event.to_json().items()}
        for event in tracks.events
    ]
    content = {"source": source, "fps": tracks.fps, "summary": summary, "events": events}
    return _write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def plot_tracks(path: str | Path, tracks: EyeTracks) -> Path:
    """Openness of both eyes with the events behind it, and PERCLOS below.

    Args:
        path: the PNG to write.
        tracks: see :func:`~.tracks.analyse`.
    """
    times = np.arange(len(tracks.raw)) / tracks.fps
    has_perclos = bool(np.isfinite(tracks.perclos_curve).any())
    with _figure(path, 5.6 if has_perclos else 4.0) as axes:
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(
            1 + has_perclos, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [2, 1][: 1 + has_perclos]}
        )[:, 0]
        top, drawn = panels[0], {}
        for event in tracks.events:
            kind = "wink" if event.is_wink else event.kind
            kind = "incomplete" if kind == "blink" and not event.is_complete else kind
            colour, label = _EVENTS[kind]
            half = 0.5 / tracks.fps
            drawn[label] = top.axvspan(event.start - half, event.end - half, color=colour, linewidth=0)
        curves: tuple[tuple[int, str, str, Any], ...]
        if tracks.raw.shape[1] == 2:
            curves = ((0, _BLUE, "left eye", "-"), (1, _ORANGE, "right eye", (0, (4, 1.5))))
        else:
            curves = ((0, _BLUE, "eye", "-"),)
        for number, colour, label, style in curves:
            (drawn[label],) = top.plot(times, tracks.smoothed[:, number], color=colour, linewidth=1.6, linestyle=style)
        top.set_ylim(0, 1.02)
        top.set_ylabel("openness")
        top.set_xlim(0, max(times[-1], 1 / tracks.fps))
        if has_perclos:
            curve = 100 * tracks.perclos_curve
            panels[1].plot(times, curve, color=_GREY, linewidth=2)
            panels[1].set_ylim(0, max(10.0, 1.15 * float(np.nanmax(curve))))
            panels[1].set_ylabel("PERCLOS, %")
        panels[-1].set_xlabel("seconds")
        names = list(drawn)
        figure.legend(
            [drawn[n] for n in names], names, loc="outside upper center", ncols=2, handlelength=1.4, fontsize=11
        )
    return Path(path)


def draw_faces(image: Image.Image, faces: Sequence[Face], openness: np.ndarray, note: str = "") -> Image.Image:
    """A copy of a picture with a frame around every eye and its openness beside it.

    Args:
        image: RGB.
        faces: found or given.
        openness: [faces, 2].
        note: a line at the top.
    """
    canvas = image.copy()
    pen = ImageDraw.Draw(canvas)
    size = max(10, min(28, image.width // 24))
    for face, values in zip(faces, np.asarray(openness).reshape(len(faces), 2), strict=True):
        for (x, y), value in zip((face.left, face.right), values, strict=True):
            if not math.isfinite(x + y + face.eye_distance):
                continue
            half = 0.325 * face.eye_distance
            is_known = math.isfinite(value)
            colour = (89, 89, 89) if not is_known else (213, 94, 0) if value < 0.25 else (0, 114, 178)
            pen.rectangle(
                (x - half, y - half * 2 / 3, x + half, y + half * 2 / 3), outline=colour, width=max(1, size // 8)
            )
            _label(pen, (x, y + half * 2 / 3 + 0.7 * size), f"{value:.2f}" if is_known else "?", size, colour)
    if note:
        _label(pen, (canvas.width / 2, 0.8 * size), note, size, (89, 89, 89))
    return canvas


def _label(pen: Any, place: tuple[float, float], text: str, size: int, colour: tuple[int, int, int]) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    box = pen.textbbox(place, text, font=font, anchor="mm")
    pen.rectangle((box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 1), fill=(255, 255, 255))
    pen.text(place, text, fill=colour, font=font, anchor="mm")


def overlay_frames(
    frames: Iterator[np.ndarray], faces: Sequence[Face | None], tracks: EyeTracks
) -> Iterator[np.ndarray]:
    """Frames with boxes, numbers, and the name of an event that is going on."""
    running = {}
    for event in tracks.events:
        name = "wink" if event.is_wink else event.kind.replace("_", " ")
        running.update(dict.fromkeys(range(event.start_frame, event.end_frame + 1), f"{name} ({event.eye})"))
    for number, (frame, face) in enumerate(zip(frames, faces, strict=False)):
        known = [] if face is None else [face]
        drawn = draw_faces(Image.fromarray(frame), known, tracks.raw[[number]][: len(known)], running.get(number, ""))
        yield np.asarray(drawn)


__all__ = ["draw_faces", "overlay_frames", "plot_tracks", "track_table", "write_events", "write_table"]
