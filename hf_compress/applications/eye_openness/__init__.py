"""Eye openness in videos, camera pictures and photographs: curves, blinks, closures and PERCLOS.

Not a medical and not a safety device.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .faces import Face, GivenEyes, Locator, MediaPipeFaces, OpenCVYuNet, YuFace, locator
    from .pipeline import EyeOpennessPipeline
    from .predicting import EyeReader, best_frame, closed_eyes
    from .run import EyeReport, read_pictures, read_video, run_eye_openness
    from .tracks import EventRules, EyeEvent, EyeTracks, Normalisation, analyse, blink_scores, find_events, perclos

_HOMES = {
    **dict.fromkeys(("Face", "GivenEyes", "Locator", "MediaPipeFaces", "OpenCVYuNet", "YuFace", "locator"), "faces"),
    "EyeOpennessPipeline": "pipeline",
    **dict.fromkeys(("EyeReader", "best_frame", "closed_eyes"), "predicting"),
    **dict.fromkeys(("EyeReport", "read_pictures", "read_video", "run_eye_openness"), "run"),
    **dict.fromkeys(
        ("EventRules", "EyeEvent", "EyeTracks", "Normalisation", "analyse", "blink_scores", "find_events", "perclos"),
        "tracks",
    ),
}
__all__ = [  # noqa: RUF022  by file
    "Face", "GivenEyes", "Locator", "MediaPipeFaces", "OpenCVYuNet", "YuFace", "locator",
    "EyeOpennessPipeline",
    "EyeReader", "best_frame", "closed_eyes",
    "EyeReport", "read_pictures", "read_video", "run_eye_openness",
    "EventRules", "EyeEvent", "EyeTracks", "Normalisation", "analyse", "blink_scores", "find_events", "perclos",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
