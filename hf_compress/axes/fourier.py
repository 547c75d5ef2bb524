"""Rules of Fourier transforms and of complex tensors.

A transform mixes everything along its dimensions, which therefore stay whole, and nothing across the others: what is zero
there stays zero. Real and imaginary part of an element belong together.
"""

from __future__ import annotations

from math import log2, prod

from .algebra import Index, fixed, freeze
from .rules import _broadcast, _dirty_after_sum, _same
from .tracing import LAYOUT, Call, Value, plain_shape, rule

LAYOUT.update("view_as_real view_as_complex real.__get__ imag.__get__ imag resolve_conj".split())


def transform_macs(points: int, is_real: bool) -> int:
    """Multiply-accumulates of one fast Fourier transform over so many points, all its dimensions together.

    A complex transform is counted as 5 N log2 N floating-point operations and one that is real on a side as half of that,
    the convention of Frigo & Johnson 2005 ("The Design and Implementation of FFTW3"); a multiply-accumulate is two of them.
    """
    return round((1.25 if is_real else 2.5) * points * log2(points)) if points > 1 else 0


@rule("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", "input n dim norm")
@rule("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn fft_rfftn fft_irfftn", "input s dim norm")
def transform(call: Call) -> Value:
    x, sizes = call.value("input"), plain_shape(call.output)
    asked = call["s"] if call["s"] is not None else call["n"]
    lengths = [asked] if isinstance(asked, int) else asked
    which = call["dim"]
    if which is None:
        count = len(lengths) if lengths else {"2": 2, "n": len(x.dims)}.get(call.name[-1], 1)
        which = range(-count, 0)
    chosen = [int(d) % len(x.dims) for d in ([which] if isinstance(which, int) else which)]
    dims = list(x.dims)
    for position in chosen:
        freeze(dims[position], "Fourier transform")
        dims[position] = fixed(sizes[position], "Fourier transform")
    is_real, from_real = "rfft" in call.name or "hfft" in call.name, call.name.startswith(("fft_rfft", "fft_ihfft"))
    whole = [x.dims[d].size for d in chosen] if from_real else [sizes[d] for d in chosen]  # the side with every point
    points = prod(int(length) for length in (lengths if from_real and lengths else whole))
    others = [dim for position, dim in enumerate(dims) if position not in chosen]
    call.tracer.count(transform_macs(points, is_real), *others)
    return Value(dims, x.dirty)


@rule("fft_fftshift fft_ifftshift", "input dim")
def shift(call: Call) -> Value:
    x, which = call.value("input"), call["dim"]
    for position in range(len(x.dims)) if which is None else [which] if isinstance(which, int) else which:
        freeze(x.dims[position], "rolled")
    return Value(list(x.dims), x.dirty)


@rule("view_as_real", "input")
def view_as_real(call: Call) -> Value:
    x = call.value("input")
    return Value([*x.dims, fixed(2, "real and imaginary part")], x.dirty)


@rule("view_as_complex", "input")
def view_as_complex(call: Call) -> Value:
    x = call.value("input")
    freeze(x.dims[-1], "real and imaginary part")
    return Value(list(x.dims[:-1]), x.dirty)


@rule("real.__get__ imag.__get__ imag resolve_conj", "input")
def one_part(call: Call) -> Value:
    return _same(call)


@rule("complex", "real imag")
def from_parts(call: Call) -> Value:
    parts = [call.value("real"), call.value("imag")]
    dims, _ = _broadcast(parts, plain_shape(call.output))
    return Value(dims, _dirty_after_sum(dims, parts))


@rule("polar", "abs angle")
def polar(call: Call) -> Value:
    size, angle = call.value("abs"), call.value("angle")
    dims: list[Index] = _broadcast([size, angle], plain_shape(call.output))[0]
    return Value(dims, _dirty_after_sum(dims, [size]))
