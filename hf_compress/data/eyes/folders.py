"""Pictures of eyes from folders that you own, with the label open or closed, or with lid landmarks.

Nothing is ever fetched, and nothing of these data sets comes with this package. Read the terms of a data set before you
use it; what the docstrings say about licences is what its authors or its public pages say, and is no legal advice.
"""

from __future__ import annotations

import csv
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ...errors import DataError
from .geometry import eye_aspect_ratio
from .samples import UNLABELLED, EyeSamples, to_pixel_values

logger = logging.getLogger(__name__)

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
_OPEN = {"open", "opened", "openeye", "openeyes", "openedeyes", "openlefteyes", "openrighteyes"}
_CLOSED = {"closed", "close", "closedeye", "closedeyes", "closeeyes", "closedlefteyes", "closedrighteyes"}


@dataclass(frozen=True)
class EyePicture:
    """One eye in a file.

    Attributes:
        path: the file.
        eye_state: 1 open, 0 closed, -100 unknown.
        person: whoever must not be in training and test at once; None when the file does not tell.
        mirror: whether it is a right eye, to be mirrored.
        eyes: when the file shows a face: the centres of the eye at the left of the picture and of the other one, pixels
            [2, 2]. ``mirror`` then says which of them is meant, the person's right eye being at the left.
        aperture_ratio: distance of the lids over that of the corners; NaN when unknown.
    """

    path: Path
    eye_state: int = UNLABELLED
    person: str | None = None
    mirror: bool = False
    eyes: tuple[tuple[float, float], tuple[float, float]] | None = None
    aperture_ratio: float = math.nan

    def read(self, image_size: tuple[int, int]) -> np.ndarray:
        """The eye, uint8 [height, width, 3], as a left one.

        Raises:
            DataError: when the file cannot be read, or the eye in it is too small.
        """
        try:
            with Image.open(self.path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL raises for damage
            raise DataError(f"{self.path} cannot be read as a picture ({error}).") from error
        if self.eyes is not None:
            # here, so that data alone does not load transformers
            from ...models.eye_openness.image_processing_eye_openness import crop_eye

            (x0, y0), (x1, y1) = self.eyes
            distance, angle = math.hypot(x1 - x0, y1 - y0), math.atan2(y1 - y0, x1 - x0)
            centre = self.eyes[0] if self.mirror else self.eyes[1]
            return np.asarray(crop_eye(image, centre, distance, angle, mirror=self.mirror, size=image_size))
        if min(image.size) < 4:
            raise DataError(f"{self.path} has {image.width}x{image.height} pixels; that shows no eye.")
        image = ImageOps.mirror(image) if self.mirror else image
        # cut to the shape of the crop, not stretched: stretching would change how open an eye looks
        return np.asarray(ImageOps.fit(image, image_size[::-1], Image.Resampling.BOX))


class EyeFolder(EyeSamples):
    """A map-style data set of eyes in files; see :func:`open_closed_folder` and its neighbours, which find them.

    Samples are those of :mod:`~.samples`; openness is NaN.

    Args:
        pictures: the eyes.
        name: for messages.
        image_size: height and width of the samples. Files of single eyes are cut to its shape in the middle.
        domain: the samples' ``domain_ids``.
        needs_both: refuse a set with open or with closed eyes alone.
        check: read every file once, now, and leave out those that cannot be read; they are counted in ``unreadable``
            and logged. Otherwise a damaged file is an error when it is reached.

    Raises:
        DataError: when nothing is left, or one class alone.
    """

    def __init__(
        self,
        pictures: Iterable[EyePicture],
        name: str = "eyes",
        *,
        image_size: tuple[int, int] = (32, 48),
        domain: int = 1,
        needs_both: bool = True,
        check: bool = True,
    ):
        self.name, self.image_size, self.domain, self.needs_both = name, image_size, domain, needs_both
        self.pictures, self.unreadable = list(pictures), 0
        found = len(self.pictures)
        if check:
            self.pictures = [picture for picture in self.pictures if self._can_be_read(picture)]
            self.unreadable = found - len(self.pictures)
        if self.unreadable:
            logger.warning("%s: %d of %d pictures cannot be used and are left out.", name, self.unreadable, found)
        if not self.pictures:
            raise DataError(
                f"{name}: none of {found} pictures can be read." if found else f"{name}: there are no pictures."
            )
        self.eye_states = np.array([picture.eye_state for picture in self.pictures])
        counts = {"closed": int((self.eye_states == 0).sum()), "open": int((self.eye_states == 1).sum())}
        if needs_both and not all(counts.values()):
            raise DataError(f"{name} has {counts['closed']} closed and {counts['open']} open eyes; both are needed.")
        self.length = len(self.pictures)

    def _can_be_read(self, picture: EyePicture) -> bool:
        try:
            picture.read(self.image_size)
        except DataError as error:
            logger.info("%s: %s", self.name, error)
            return False
        return True

    @property
    def persons(self) -> list[str | None]:
        """Who is in each picture, as far as files tell."""
        return [picture.person for picture in self.pictures]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        chosen = [self.pictures[index] for index in indices]
        return {
            "pixel_values": to_pixel_values(np.stack([picture.read(self.image_size) for picture in chosen])),
            "openness": np.full(len(chosen), np.nan, np.float32),
            "aperture_ratio": np.array([picture.aperture_ratio for picture in chosen], np.float32),
            "eye_state": np.array([picture.eye_state for picture in chosen], np.int64),
            "domain_ids": np.full(len(chosen), self.domain, np.int64),
        }

    def split(self, share: float = 0.2, seed: int = 0) -> tuple[EyeFolder, EyeFolder]:
        """Two parts without a common person, the second with about ``share`` of the pictures.

        A picture whose file tells no person counts as a person of its own; when no file tells, a warning says so.

        Raises:
            DataError: when there are too few persons, or a part has one class alone where both are needed.
        """
        if not 0 < share < 1:
            raise DataError(f"share={share} is not possible; give a number between 0 and 1.")
        groups: dict[str, list[int]] = {}
        for index, person in enumerate(self.persons):
            groups.setdefault(f"person {person}" if person is not None else f"picture {index}", []).append(index)
        if all(person is None for person in self.persons):
            logger.warning("%s: files do not tell persons apart, so the same person may be in both parts.", self.name)
        if len(groups) < 2:
            raise DataError(f"{self.name} shows one person alone and cannot be split by person.")
        names = sorted(groups)
        wanted = share * len(self)
        held_out: list[int] = []
        for place in np.random.default_rng(seed).permutation(len(names)):
            members = groups[names[place]]
            # a person is held out when that comes nearer to the share, and never the last one
            if len(held_out) + len(members) / 2 < wanted and len(held_out) + len(members) < len(self):
                held_out.extend(members)
        if not held_out:
            held_out = min(groups.values(), key=len)
        is_held_out = np.zeros(len(self), dtype=bool)
        is_held_out[held_out] = True
        first, second = (
            EyeFolder(
                [self.pictures[index] for index in np.flatnonzero(chosen)],
                f"{part} of {self.name}",
                image_size=self.image_size,
                domain=self.domain,
                needs_both=self.needs_both,
                check=False,
            )
            for part, chosen in (("the training part", ~is_held_out), ("the held-out part", is_held_out))
        )
        return first, second

    def __repr__(self) -> str:
        counts = Counter(self.eye_states.tolist())
        persons = len({person for person in self.persons if person is not None})
        return (
            f"EyeFolder({self.name}: {counts[1]} open, {counts[0]} closed, {counts[UNLABELLED]} unlabelled, "
            f"{persons or 'unknown'} persons)"
        )


def open_closed_folder(root: str | Path, *, person: str | None = None, **arguments: Any) -> EyeFolder:
    """Crops of single eyes in folders called ``open`` and ``closed`` (or ``Open_Eyes``, ``closed_eyes``, ...), at any depth.

    Args:
        root: the folder above them.
        person: regular expression with one group that finds the person in a path below ``root``, such as ``r"(s\\d+)_"``.
        arguments: of :class:`EyeFolder`.

    Raises:
        DataError: when there are no such folders, they are empty, or hold one class alone.
    """
    folder = _folder(root)
    pattern = _pattern(person)

    def pictures() -> Iterator[EyePicture]:
        for path in _files(folder):
            states = {_state(part) for part in path.relative_to(folder).parts[:-1]} - {None}
            if len(states) == 1:
                below = path.relative_to(folder).as_posix()
                found = pattern.search(below) if pattern else None
                yield EyePicture(path, states.pop() or 0, found.group(1) if found else None)

    return _made(pictures(), folder, "pictures in folders called open and closed", arguments)


def cew(root: str | Path, *, left_is_of_picture: bool = False, **arguments: Any) -> EyeFolder:
    """Closed Eyes in the Wild (Song, Tan, Liu and Chen, Pattern Recognition 2014), 2,423 faces.

    Licence: none is stated that we know of; the authors offer it for research. Open eyes come from LFW.

    Reads either form: ``dataset_B_Eye_Images`` (folders ``closedLeftEyes``, ``closedRightEyes``, ``openLeftEyes``,
    ``openRightEyes`` with crops of 24x24), where right eyes are mirrored, or ``dataset_B_FacialImages`` (``ClosedFace``,
    ``OpenFace`` and two files ``EyeCoordinatesInfo_*.txt``). Both eyes of a face count as one person, and so do all
    pictures that bear one name.

    Args:
        root: the folder with these folders.
        left_is_of_picture: whether "left" in a folder's name means the left of the picture, which is the person's right
            eye. We could not look at the data, and take it for the person's own. It matters little for training when
            pictures are also flipped at random.
        arguments: of :class:`EyeFolder`.

    Raises:
        DataError: when the folder does not look like this.
    """
    folder = _folder(root)

    def pictures() -> Iterator[EyePicture]:
        for state, side in ((0, "Left"), (0, "Right"), (1, "Left"), (1, "Right")):
            for path in _files(folder / f"{'open' if state else 'closed'}{side}Eyes"):
                yield EyePicture(path, state, _cew_person(path.name), (side == "Right") != left_is_of_picture)
        for state, name in ((0, "Closed"), (1, "Open")):
            coordinates = folder / f"EyeCoordinatesInfo_{name}Face.txt"
            for line in _lines(coordinates):
                fields = line.split()
                try:
                    file, (x0, y0, x1, y1) = fields[0], map(float, fields[1:5])
                except (ValueError, IndexError) as error:
                    raise DataError(f"{coordinates}: {line!r} is not a file name and four numbers.") from error
                eyes = sorted([(x0, y0), (x1, y1)])
                for mirror in (True, False):
                    path = folder / f"{name}Face" / Path(file).name
                    yield EyePicture(path, state, _cew_person(file), mirror, (eyes[0], eyes[1]))

    return _made(pictures(), folder, "closedLeftEyes, openLeftEyes, ... or ClosedFace and OpenFace", arguments)


def mrl_eye(root: str | Path, **arguments: Any) -> EyeFolder:
    """MRL Eye, 84,898 infrared crops of 37 persons (mrl.cs.vsb.cz/eyedataset).

    Licence: none is stated that we know of; offered for research.

    Reads files called ``s0001_00001_0_0_0_0_0_01.png`` at any depth: person, number, gender, glasses, **state** (0 closed,
    1 open), reflections, lighting, sensor. Files do not tell left eyes from right ones, so nothing is mirrored.

    Args:
        root: a folder above the files.
        arguments: of :class:`EyeFolder`.

    Raises:
        DataError: when there are no files with such names.
    """
    folder = _folder(root)
    form = re.compile(r"(s\d{4})_\d+_[01]_[01]_([01])_[012]_[01]_\d+")

    def pictures() -> Iterator[EyePicture]:
        for path in _files(folder):
            if found := form.fullmatch(path.stem):
                yield EyePicture(path, int(found.group(2)), found.group(1))

    return _made(pictures(), folder, "files called like s0001_00001_0_0_0_0_0_01.png", arguments)


def rt_bene(root: str | Path, *, left_is_of_picture: bool = False, **arguments: Any) -> EyeFolder:
    """RT-BENE (Cortacero, Fischer and Demiris, ICCV workshops 2019), more than 200,000 crops of 17 persons.

    Licence: CC BY-NC-SA 4.0. Commercial use is excluded by its authors.

    Reads ``s000_blink_labels.csv`` (file name, 0 open, 1 closed; 0.5, on which annotators disagreed, is left out) and
    ``s000_noglasses/natural/left`` and ``right``. The label of a frame holds for both eyes. Pictures of ``right`` are
    mirrored. About 5 % are closed: mix with ``MixedEyes(..., balanced=True)``.

    Args:
        root: the folder with the csv files.
        left_is_of_picture: as for :func:`cew`.
        arguments: of :class:`EyeFolder`.

    Raises:
        DataError: when there are no such files.
    """
    folder = _folder(root)

    def pictures() -> Iterator[EyePicture]:
        for labels in sorted(folder.glob("s[0-9][0-9][0-9]_blink_labels.csv")):
            person = labels.name[:4]
            eyes = folder / f"{person}_noglasses" / "natural"
            for number, row in enumerate(csv.reader(_lines(labels)), start=1):
                try:
                    name, closed = Path(row[0]).name, float(row[1])
                except (ValueError, IndexError) as error:
                    raise DataError(f"{labels}, line {number}: {row} is not a file name and a number.") from error
                if closed not in (0.0, 1.0):
                    continue
                for side in ("left", "right"):
                    path = eyes / side / name.replace("left", side)
                    if path.is_file():  # frames in which an eye was not found have no picture of it
                        yield EyePicture(path, int(1 - closed), person, (side == "right") != left_is_of_picture)

    return _made(pictures(), folder, "s000_blink_labels.csv with s000_noglasses/natural/left", arguments)


def face_synthetics(root: str | Path, **arguments: Any) -> EyeFolder:
    """FaceSynthetics (Wood et al., ICCV 2021, github.com/microsoft/FaceSynthetics), 100,000 rendered faces.

    Licence: its own, for non-commercial research.

    Reads ``000000.png`` with ``000000_ldmks.txt`` (70 lines x y). Eyes get an ``aperture_ratio`` and no state: the eye
    aspect ratio of landmarks 36 to 41 and 42 to 47, times 9/8, because these lie at a third and two thirds of the lid,
    where a parabola has 8/9 of its height. No person is known to appear twice.

    Args:
        root: the folder with the files.
        arguments: of :class:`EyeFolder`; ``domain`` is 0 unless given, for these are synthetic.

    Raises:
        DataError: when there are no such files, or one is not as described.
    """
    folder = _folder(root)

    def pictures() -> Iterator[EyePicture]:
        for marks in sorted(folder.rglob("[0-9]*_ldmks.txt")):
            try:
                points = np.array([[float(x) for x in line.split()] for line in _lines(marks)])
                if points.shape != (70, 2) or not np.isfinite(points).all():
                    raise ValueError(f"numbers of the shape {points.shape}")
            except ValueError as error:
                raise DataError(f"{marks} is not 70 lines of x and y ({error}).") from error
            corners = points[[[36, 39], [42, 45]]].mean(axis=1)
            eyes = tuple((float(x), float(y)) for x, y in corners)
            for mirror, first in ((True, 36), (False, 42)):
                ratio = float(eye_aspect_ratio(points[first : first + 6])) * 9 / 8
                path = marks.with_name(marks.name.replace("_ldmks.txt", ".png"))
                yield EyePicture(path, person=marks.name, mirror=mirror, eyes=(eyes[0], eyes[1]), aperture_ratio=ratio)

    arguments = {"domain": 0, "needs_both": False, **arguments}
    return _made(pictures(), folder, "000000.png with 000000_ldmks.txt", arguments)


def _made(pictures: Iterator[EyePicture], folder: Path, expected: str, arguments: dict[str, Any]) -> EyeFolder:
    found = list(pictures)
    if not found:
        raise DataError(f"{folder} holds no {expected}. Give the folder that has them; nothing is downloaded.")
    return EyeFolder(found, str(folder), **arguments)


def _folder(root: str | Path) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. Nothing is downloaded: give the place of your own copy.")
    return folder


def _files(folder: Path) -> list[Path]:
    """Pictures at any depth, in a fixed order; the hidden twins that macOS leaves in archives are none."""
    found = folder.rglob("*")
    return sorted(p for p in found if p.suffix.lower() in _PICTURES and not p.name.startswith(".") and p.is_file())


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]


def _state(name: str) -> int | None:
    plain = re.sub(r"[^a-z]", "", name.lower())
    return 1 if plain in _OPEN else 0 if plain in _CLOSED else None


def _pattern(person: str | None) -> re.Pattern[str] | None:
    if person is None:
        return None
    try:
        pattern = re.compile(person)
    except re.error as error:
        raise DataError(f"person={person!r} is no regular expression ({error}).") from error
    if pattern.groups != 1:
        raise DataError(f"person={person!r} has {pattern.groups} groups; one has to find the person.")
    return pattern


def _cew_person(name: str) -> str:
    """``Aaron_Guiel_0001_L.jpg`` -> ``Aaron_Guiel``; ``closed_eye_0001.jpg_face_1_L.jpg`` -> ``closed_eye_0001.jpg_face_1``."""
    stem = re.sub(r"_[LR]$", "", Path(name).stem)
    return stem if stem.startswith("closed_eye") else re.sub(r"_\d+$", "", stem)


def shipped_faces() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Photographs of faces that come with packages that are installed here, for a look at what a model makes of them.

    They are "hopper" (Grace Hopper, United States Navy, in matplotlib) and, with scikit-image, "astronaut" (Eileen
    Collins, NASA), both in the public domain. Two open pairs of eyes measure nothing; they show that real pictures pass.

    Returns:
        name -> picture, and the centres of its eyes in pixels, the one at the left of the picture first, [2, 2]. The
        centres were marked by hand.
    """
    from matplotlib import cbook

    found: dict[str, tuple[Image.Image, np.ndarray]] = {}
    path = Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    if path.is_file():  # some distributions leave matplotlib's sample data out
        with Image.open(path) as image:
            found["hopper"] = image.convert("RGB"), np.array([[222.0, 190.0], [306.0, 187.0]])
    try:
        from skimage import data
    except ImportError:
        return found
    found["astronaut"] = Image.fromarray(data.astronaut()), np.array([[203.0, 101.0], [247.0, 103.5]])
    return found


__all__ = [
    "EyeFolder",
    "EyePicture",
    "cew",
    "face_synthetics",
    "mrl_eye",
    "open_closed_folder",
    "rt_bene",
    "shipped_faces",
]
