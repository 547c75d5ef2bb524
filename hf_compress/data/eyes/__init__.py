"""Eyes: rendered ones with exact labels, faces and videos of them, and adapters for folders that you own."""

from .faces import Blink, Faces, blink_track, render_face_video, render_faces
from .folders import (
    EyeFolder,
    EyePicture,
    cew,
    face_synthetics,
    mrl_eye,
    open_closed_folder,
    rt_bene,
    shipped_faces,
)
from .geometry import aperture_ratio, eye_aspect_ratio
from .renderer import EyeRenderer
from .samples import CLOSED_MAX, OPEN_MIN, UNLABELLED, EyeSamples, MixedEyes, SyntheticEyes, WeakEyes, eye_collator
from .sheets import contact_sheet

__all__ = [
    "CLOSED_MAX",
    "OPEN_MIN",
    "UNLABELLED",
    "Blink",
    "EyeFolder",
    "EyePicture",
    "EyeRenderer",
    "EyeSamples",
    "Faces",
    "MixedEyes",
    "SyntheticEyes",
    "WeakEyes",
    "aperture_ratio",
    "blink_track",
    "cew",
    "contact_sheet",
    "eye_aspect_ratio",
    "eye_collator",
    "face_synthetics",
    "mrl_eye",
    "open_closed_folder",
    "render_face_video",
    "render_faces",
    "rt_bene",
    "shipped_faces",
]
