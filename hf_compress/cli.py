"""``hf-compress``: run a recipe; inspect, prune, measure, export or push a model.

Everything heavy is imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import CheckpointError, DataError, ExportError, HfCompressError, ModelError

if TYPE_CHECKING:
    from rich.console import Console

_HELP = "Make Hugging Face vision models smaller, and keep them ordinary Hugging Face models."
_DEBUG = "HF_COMPRESS_DEBUG"
_PICTURES, _MOST_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp"), 256

app = typer.Typer(help=_HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[str, typer.Argument(help="A local folder or a Hub id.", show_default=False)]
ImageSize = Annotated[
    int | None, typer.Option(help="Height and width in pixels; found from the model when not given.", min=1)
]
Images = Annotated[
    Path | None, typer.Option(help="Folder of images to calibrate on; up to 256 are read, from its folders too.")
]


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
) -> None:
    if version:
        typer.echo(f"hf-compress {__version__}")
        raise typer.Exit
    if debug:
        os.environ[_DEBUG] = "1"


# `--version` needs no command, which typer would ask for
app.registered_callback.invoke_without_command = True  # type: ignore[union-attr]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change a field: --set stages.train.epochs=2. Repeatable."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the result. [default: runs/NAME]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and describe; train and write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an earlier run left in the folder.")] = False,
) -> None:
    """Run a recipe; the same command continues a run that was interrupted."""
    with _errors():
        console = _console()
        with console.status("checking the recipe"):
            from .recipe import run_recipe
            from .recipe.table import comparison

        result = run_recipe(recipe, assignments or (), output, dry_run, restart=restart, say=_say(console))
        if dry_run:
            console.print(result.description, markup=False, highlight=False)
            return
        if result.was_finished:
            console.print(f"This run was finished before; nothing was done. {result.output}", markup=False)
        if result.metrics is not None:
            console.print(comparison(result.metrics, f"{result.output}"))


@app.command()
def inspect(model: Model, image_size: ImageSize = None) -> None:
    """List what can shrink: every axis, its size, and the parameters and MACs on it."""
    with _errors():
        from rich import box
        from rich.table import Table

        from .axes import find_axes

        loaded = _load(model)
        axes = find_axes(loaded, _example_inputs(model, loaded, image_size))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("axis", overflow="fold")
        table.add_column("size", justify="right")
        table.add_column("exact", overflow="fold")
        table.add_column("params", justify="right")
        table.add_column("MACs", justify="right")
        for axis in axes:
            exact = "yes" if axis.is_exact else f"no: {', '.join(axis.reasons)}"
            table.add_row(axis.name, str(axis.size), exact, f"{axis.params:,}", f"{axis.macs:,}")
        console = _console()
        console.print(table)
        console.print(
            f"{len(axes)} axes; {axes.params:,} parameters, {axes.macs:,} MACs for one image", highlight=False
        )
        for operator, module in axes.without_rule.items():
            console.print(f"no rule for {operator} (in {module}): its axes stay whole", highlight=False)


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Option(help="New folder for the smaller model.", show_default=False)],
    macs: Annotated[float | None, typer.Option(help="Budget: share of the MACs, or a number.")] = None,
    params: Annotated[float | None, typer.Option(help="Budget: share of the parameters, or a number.")] = None,
    latency: Annotated[
        float | None, typer.Option(help="Budget: share of the time, or milliseconds; from times measured here.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Instead of a budget: share removed from every axis.")] = None,
    scores: Annotated[str, typer.Option(help="How indices are ranked.")] = "magnitude",
    round_to: Annotated[int, typer.Option(help="Kept widths are multiples of this.")] = 1,
    min_keep: Annotated[int, typer.Option(help="Every axis keeps at least so many.")] = 1,
    inexact: Annotated[bool, typer.Option("--inexact", help="Also axes where removal is not exactly masking.")] = False,
    fold_shift: Annotated[
        bool, typer.Option(help="Carry what removed BatchNorm channels still emit into the next layer.")
    ] = True,
    image_size: ImageSize = None,
) -> None:
    """Remove the least important indices; half of the MACs when no budget is given."""
    with _errors():
        from .axes import find_axes
        from .surgery import prune as prune_model

        _check_output(output)
        loaded = _load(model)
        inputs = _example_inputs(model, loaded, image_size)
        before = find_axes(loaded, inputs).cost()
        prune_model(
            loaded,
            scores=scores,
            macs=macs,
            params=params,
            latency=latency,
            ratio=ratio,
            round_to=round_to,
            min_keep=min_keep,
            inexact=inexact,
            fold_shift=fold_shift,
            example_inputs=inputs,
        )
        _save(loaded, output, _processor(model))
        _report_costs(before, find_axes(loaded, inputs).cost(), output)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder. Choose another --output.")


def _save(loaded: Any, output: Path, processor: Any) -> None:
    beside = output.with_name(f"{output.name}.partial")
    loaded.save_pretrained(beside)
    if processor is not None:
        processor.save_pretrained(beside)
    if output.exists():
        output.rmdir()
    beside.rename(output)


def _report_costs(before: Any, after: Any, output: Path) -> None:
    console = _console()
    for name, old, new in (("MACs", before.macs, after.macs), ("parameters", before.params, after.params)):
        console.print(f"{name:<11}{old:>15,} -> {new:,} ({new / old:.1%})", highlight=False)
    console.print(f"saved in {output}", highlight=False, markup=False)


@app.command()
def factorize(
    model: Model,
    output: Annotated[Path, typer.Option(help="New folder for the smaller model.", show_default=False)],
    macs: Annotated[float | None, typer.Option(help="Budget: share of the MACs, or a number.")] = None,
    params: Annotated[float | None, typer.Option(help="Budget: share of the parameters, or a number.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of its energy that a layer may lose, 0 to 1.")] = None,
    scheme: Annotated[str, typer.Option(help="channel, spatial, decoupled, or best.")] = "best",
    targets: Annotated[
        list[str] | None, typer.Option(help="Pattern of layer names or a class; may be repeated.")
    ] = None,
    images: Images = None,
    image_size: ImageSize = None,
) -> None:
    """Put layers in two factors of low rank; half of the MACs when nothing is said.

    With --images the factors keep what layers give on these images, which costs far less accuracy.
    """
    with _errors():
        from .surgery import factorize as factorize_model
        from .surgery import factorize_report

        _check_output(output)
        loaded = _load(model)
        factorize_model(
            loaded,
            energy=energy,
            scheme=scheme,
            macs=0.5 if macs is None and params is None and energy is None else macs,
            params=params,
            targets=targets or None,
            batches=None if images is None else _calibration(model, loaded, images),
            example_inputs=_example_inputs(model, loaded, image_size),
        )
        _save(loaded, output, _processor(model))
        console = _console()
        console.print(str(factorize_report(loaded)), highlight=False, markup=False, soft_wrap=True)
        console.print(f"saved in {output}", highlight=False, markup=False)


@app.command()
def measure(
    model: Model,
    image_size: ImageSize = None,
    rounds: Annotated[int, typer.Option(help="Rounds of the latency measurement.", min=1)] = 15,
) -> None:
    """Parameters, MACs, bytes and latency for one image."""
    with _errors():
        from .measurement import describe_machine
        from .measurement import measure as measure_model

        loaded = _load(model)
        found = measure_model(loaded, _example_inputs(model, loaded, image_size), rounds=rounds)
        console = _console()
        for name, value in (
            ("parameters", f"{found.params:,}"),
            ("MACs", f"{found.macs:,}"),
            ("bytes", f"{found.bytes:,}"),
            ("latency", f"{found.latency_ms:.3f} ms"),
        ):
            console.print(f"{name:<11}{value:>15}", highlight=False)
        console.print(f"({describe_machine()})", style="dim", highlight=False, markup=False)


@app.command()
def export(
    model: Model,
    output: Annotated[Path | None, typer.Option(help="The file. [default: model.onnx in the model's folder]")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest accepted difference of any output.")] = 1e-4,
    int8: Annotated[
        bool, typer.Option("--int8", help="A file that computes in int8; give --images, unless layers are all linear.")
    ] = False,
    images: Images = None,
    image_size: ImageSize = None,
) -> None:
    """Write ONNX and compare it with the PyTorch model."""
    with _errors():
        from .export import export_onnx, int8_agreement

        if images is not None and not int8:
            raise ExportError("--images are for a file that computes in int8. Add --int8, or leave them out.")
        loaded = _load(model)
        name = "model_int8.onnx" if int8 else "model.onnx"
        target = output or (Path(model) if Path(model).is_dir() else Path()) / name
        inputs = _example_inputs(model, loaded, image_size)
        if int8:
            batches = None if images is None else _calibration(model, loaded, images)
            path = export_onnx(loaded, target, inputs, int8=True, calibration=batches)
            says = ""
            if batches is not None:
                import torch

                says = f"; {int8_agreement(loaded, path, torch.cat([batch['pixel_values'] for batch in batches]))}"
            _console().print(f"wrote {path}{says}", highlight=False, markup=False, soft_wrap=True)
            return
        path = export_onnx(loaded, target, inputs, tolerance=tolerance)
        _console().print(
            f"wrote {path}, equal to the PyTorch model within {tolerance:g}", highlight=False, markup=False
        )


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder with a saved model.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a folder to the Hub."""
    with _errors():
        from .hub.upload import push as push_folder

        _console().print(push_folder(folder, repo, private=private), highlight=False, markup=False)


@app.command("eye-openness")
def eye_openness(
    source: Annotated[
        str, typer.Argument(help="A video, a picture, a folder of pictures, or camera:0.", show_default=False)
    ],
    model: Annotated[str, typer.Option(help="A folder or Hub id of the model, or its .onnx file.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder of the tables and plots.", show_default=False)],
    eyes: Annotated[
        Path | None, typer.Option(help="Places of the eyes as CSV or JSON, in place of a face detector.")
    ] = None,
    detector: Annotated[str, typer.Option(help="auto, yuface, yunet or mediapipe.")] = "auto",
    detector_model: Annotated[Path | None, typer.Option(help="Model file, for yunet and mediapipe.")] = None,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write frames with the eyes framed.")] = False,
    whole_clip: Annotated[
        bool, typer.Option("--whole-clip", help="The person's levels from all frames, not from those before.")
    ] = False,
    fps: Annotated[float | None, typer.Option(help="Frames per second, where the file does not say.")] = None,
    window: Annotated[float, typer.Option(help="Seconds that PERCLOS looks back.")] = 60.0,
    count_blinks: Annotated[bool, typer.Option("--count-blinks", help="PERCLOS counts blinks as well.")] = False,
    seconds: Annotated[float, typer.Option(help="How long a camera records.")] = 30.0,
) -> None:
    """Openness of eyes: a curve, blinks and PERCLOS of a video; a table of photographs. Not a medical or safety device."""
    with _errors():
        import re

        from .applications.eye_openness import EyeReader, GivenEyes, Normalisation, run_eye_openness
        from .applications.eye_openness import locator as find_locator

        camera = re.fullmatch(r"camera:(\d+)", source)
        place: str | int = int(camera[1]) if camera else source
        if not camera and not Path(source).expanduser().exists():
            raise DataError(f"there is no file or folder {source}.")
        locate = GivenEyes.from_file(eyes) if eyes is not None else find_locator(detector, detector_model)
        reader = EyeReader.from_pretrained(model)
        found = run_eye_openness(
            place,
            reader,
            locate,
            output,
            how=Normalisation(whole_clip=whole_clip),
            fps=fps,
            window=window,
            exclude_blinks=not count_blinks,
            overlay=overlay,
            seconds=seconds,
        )
        console = _console()
        for note in found.notes:
            console.print(f"note: {note}", highlight=False, markup=False)
        if found.tracks is not None:
            for name, value in found.tracks.summary.items():
                shown = "not known" if value != value else f"{value:.4g}"
                console.print(f"{name.replace('_', ' '):<24}{shown:>12}", highlight=False)
        elif found.best is not None:
            console.print(f"eyes are most open in {found.best}", highlight=False, markup=False)
        console.print(
            f"wrote {', '.join(path.name for path in found.files)} in {output}", highlight=False, markup=False
        )


@contextmanager
def _errors() -> Iterator[None]:
    """One line in red and exit code 1 for errors that this package raises on purpose."""
    try:
        yield
    except HfCompressError as error:
        if os.environ.get(_DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        else:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.secho("interrupted; a run continues with the same command", err=True)
        raise typer.Exit(130) from None


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=False)


def _say(console: Console) -> Any:
    def say(line: str) -> None:
        sys.stderr.flush()  # Trainer's bar is written there
        console.print(line, style="bold", highlight=False, markup=False)

    return say


def _load(name: str) -> Any:
    from .hub.loading import load_as_saved

    return load_as_saved(name).eval()


def _processor(name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except Exception:  # a checkpoint without one; its errors have no common class
        return None


def _calibration(name: str, model: Any, folder: Path) -> list[dict[str, Any]]:
    """Images of a folder as the model's image processor makes them, in batches of 32."""
    from PIL import Image

    from .axes import example_inputs_for

    if not folder.is_dir():
        raise DataError(f"--images: there is no folder {folder}.")
    processor = _processor(name)
    if processor is None:
        raise ModelError(f"--images: {name} has no image processor. Save the one of the dense model beside it.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)
    if not files:
        raise DataError(f"--images: {folder} holds no image ({', '.join(_PICTURES)}).")
    files = files[:: -(-len(files) // _MOST_PICTURES)]  # from all over the folder, which may be sorted by class
    mode = "L" if example_inputs_for(model)["pixel_values"].shape[1] == 1 else "RGB"
    batches = []
    for start in range(0, len(files), 32):
        pictures = []
        for path in files[start : start + 32]:
            try:
                with Image.open(path) as picture:
                    pictures.append(picture.convert(mode))
            except OSError as error:
                raise DataError(f"--images: {path} cannot be read ({error}). Take it out of the folder.") from error
        batches.append({"pixel_values": processor(images=pictures, return_tensors="pt")["pixel_values"]})
    return batches


def _example_inputs(name: str, model: Any, image_size: int | None) -> Any:
    """One blank image of the size that is asked for, else that the image processor makes, else that the model names."""
    from .axes import example_inputs_for

    inputs = example_inputs_for(model)
    pixels = inputs["pixel_values"]
    size = (image_size, image_size) if image_size is not None else None
    processor = _processor(name) if size is None else None
    if processor is not None:
        from PIL import Image

        size = tuple(processor(Image.new("RGB", (256, 256)), return_tensors="pt")["pixel_values"].shape[-2:])
    if size is None:
        return inputs
    return {"pixel_values": pixels.new_zeros((1, pixels.shape[1], *size))}


def main() -> None:
    """The entry point ``hf-compress``."""
    app(prog_name="hf-compress")


if __name__ == "__main__":
    main()
