"""How the creatures of the toy sound and look, and other things that are no creatures.

A creature has a call and a silhouette. The call is a tone: its pitch moves along a contour, and it
may be trilled. The encoders of the toy were pre-trained on other contours and shapes (OTHER_...).

Shapes: n samples; sounds are (n, 10240) float32, 0.64 s at 16 kHz; pictures (n, 3, size, size).
"""
import math

import torch
import torch.nn.functional as F

SAMPLES, RATE = 10240, 16000

# How the pitch of a call moves; u goes from 0 to 1 while it lasts.
CONTOURS = {
    "flat": lambda u: 0 * u,
    "rise": lambda u: u - 0.5,
    "fall": lambda u: 0.5 - u,
    "arch": lambda u: 0.5 - (2 * u - 1).abs(),
}
OTHER_CONTOURS = {
    "valley": lambda u: (2 * u - 1).abs() - 0.5,
    "wobble": lambda u: 0.5 * (4 * math.pi * u).sin(),
    "late rise": lambda u: (3 * u - 2).clamp_min(0) - 0.3,
    "late fall": lambda u: 0.3 - (3 * u - 2).clamp_min(0),
    "step up": lambda u: (20 * (u - 0.5)).sigmoid() - 0.5,
    "step down": lambda u: 0.5 - (20 * (u - 0.5)).sigmoid(),
}
# Signed distance to the edge, positive inside, in a frame of radius 1.
# r is the distance from the centre, a = |x|, b = |y|.
SILHOUETTES = {
    "disk": lambda x, y, r, a, b: 1 - r,
    "square": lambda x, y, r, a, b: 0.84 - torch.maximum(a, b),
    "ring": lambda x, y, r, a, b: 0.24 - (r - 0.74).abs(),
    "frame": lambda x, y, r, a, b: 0.2 - (torch.maximum(a, b) - 0.66).abs(),
    "triangle": lambda x, y, r, a, b: torch.minimum(0.6 - y, 0.6 * (y + 1) - a),
    "plus": lambda x, y, r, a, b: torch.maximum(bar(a, 0.28, b, 0.95), bar(b, 0.28, a, 0.95)),
    "crescent": lambda x, y, r, a, b: torch.minimum(
        0.95 - r, ((x - 0.45) ** 2 + y ** 2).sqrt() - 0.75),
    "bars": lambda x, y, r, a, b: torch.minimum(0.85 - b, 0.2 - (a - 0.55).abs()),
}
OTHER_SHAPES = {
    "diamond": lambda x, y, r, a, b: 0.7 * (1 - a - b),
    "cross": lambda x, y, r, a, b: torch.minimum(0.2 - 0.7 * (a - b).abs(), 1 - r),
    "half disk": lambda x, y, r, a, b: torch.minimum(1 - r, y),
    "bar": lambda x, y, r, a, b: bar(a, 0.25, b, 0.9),
    "lying bar": lambda x, y, r, a, b: bar(b, 0.25, a, 0.9),
    "two dots": lambda x, y, r, a, b: 0.38 - ((a - 0.55) ** 2 + y ** 2).sqrt(),
    "L": lambda x, y, r, a, b: torch.maximum(bar((x + 0.6).abs(), 0.22, b, 0.85),
                                             bar((y - 0.6).abs(), 0.22, a, 0.85)),
    "T": lambda x, y, r, a, b: torch.maximum(bar(a, 0.22, b, 0.85),
                                             bar((y + 0.6).abs(), 0.22, a, 0.85)),
}


def bar(across: torch.Tensor, width: float, along: torch.Tensor, length: float) -> torch.Tensor:
    """Signed distance to the edge of a bar."""
    return torch.minimum(width - across, length - along)


# ---- Sounds ----

def tones(contour: torch.Tensor, trilled: torch.Tensor, rng: torch.Generator,
          table: dict = CONTOURS, pitch=(-0.3, 0.3), timbres=False) -> tuple[torch.Tensor, dict]:
    """Calls without noise, and what was drawn for them: `pitch`, `duration`, `timbre`, (n,) each.

    contour: (n,) index into `table`; trilled: (n,) bool; pitch: range in octaves around 700 Hz;
    timbres: whether only the second, only the third or both overtones are strong.
    """
    n = len(contour)

    def uniform(low, high):     # (n, 1): a number for each call
        return low + (high - low) * torch.rand(n, 1, generator=rng)

    t = torch.arange(SAMPLES) / RATE
    duration = uniform(0.28, 0.50)
    begin = uniform(0, 1) * (0.60 - duration)
    s = (t - 0.02 - begin) / duration                               # (n, samples)
    inside = (s >= 0) & (s <= 1)
    s = s.clamp(0, 1)
    moves = torch.stack([move(s) for move in table.values()])[contour, torch.arange(n)]
    octave = uniform(*pitch)
    hertz = 700 * 2 ** (octave + uniform(0.6, 1.4) * moves)
    # In double precision, because the sum runs over 10,240 steps.
    phase = torch.cumsum(hertz.double(), 1) * (2 * math.pi / RATE) % (2 * math.pi)
    phase = phase.float()
    second, third = uniform(0.2, 0.8), uniform(0.2, 0.8)
    timbre = torch.zeros(n, 1, dtype=torch.int64)
    if timbres:
        timbre = torch.randint(3, (n, 1), generator=rng)
        second = torch.where(timbre == 0, 0.1, second + 0.2)
        third = torch.where(timbre == 1, 0.1, third + 0.2)
    wave = phase.sin()
    wave = wave + second * (2 * phase).sin()
    wave = wave + third * (3 * phase).sin()
    trill = torch.cos(2 * math.pi * uniform(14, 22) * t + uniform(0, 2 * math.pi))
    trill = 1 - 0.9 * (0.5 + 0.5 * trill)
    loudness = (math.pi * s).sin().clamp_min(0).sqrt() * inside
    wave = wave * loudness * torch.where(trilled[:, None], trill, 1.0)
    return wave, dict(pitch=octave[:, 0], duration=duration[:, 0], timbre=timbre[:, 0])


def noises(n: int, rng: torch.Generator) -> torch.Tensor:
    """Anything from white to pink."""
    noise = torch.fft.rfft(torch.randn(n, SAMPLES, generator=rng))
    frequency = torch.fft.rfftfreq(SAMPLES, 1 / RATE).clamp_min(80)
    slope = 0.9 * torch.rand(n, 1, generator=rng)
    return torch.fft.irfft(noise / frequency ** slope, SAMPLES)


def mix(wave: torch.Tensor, noise: torch.Tensor, decibel: torch.Tensor) -> torch.Tensor:
    """A tone in noise. decibel: (n, 1), how much louder the tone is."""
    wave = wave / rms(wave) + noise / rms(noise) * 10 ** (-decibel / 20)
    return 0.1 * wave / rms(wave)


def rms(x: torch.Tensor) -> torch.Tensor:
    """(n, samples) -> (n, 1), the root of the mean square."""
    return x.square().mean(1, keepdim=True).sqrt()


# ---- Pictures ----

def masks(shape: torch.Tensor, rng: torch.Generator, size: int = 36, table: dict = SILHOUETTES,
          turn: float = 0.25) -> tuple[torch.Tensor, dict]:
    """Silhouettes, (n, 1, size, size) from 0 to 1, and what was drawn: `size`, `angle`, `x`, `y`.

    shape: (n,) index into `table`; turn: the largest angle. The middle 8/9 of a picture is what
    the encoder sees.
    """
    n = len(shape)

    def uniform(low, high):     # (n, 1, 1): a number for each picture
        return low + (high - low) * torch.rand(n, 1, 1, generator=rng)

    grid = ((torch.arange(size) + 0.5) / size * 2 - 1) * 9 / 8      # the inner 8/9 is [-1, 1]
    half, angle = uniform(0.5, 0.7), uniform(-turn, turn)
    dx, dy = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    x = (grid[None, :] - dx) / half                                 # (n, 1, size)
    y = (grid[:, None] - dy) / half                                 # (n, size, 1)
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    r = (x ** 2 + y ** 2).sqrt()                                    # (n, size, size)
    distances = [edge(x, y, r, x.abs(), y.abs()) for edge in table.values()]
    distance = torch.stack(distances)[shape, torch.arange(n)]
    drawn = dict(size=half.view(n), angle=angle.view(n), x=dx.view(n), y=dy.view(n))
    return (24 * half * distance).sigmoid()[:, None], drawn


def paint(mask: torch.Tensor, contrast: torch.Tensor, rng: torch.Generator,
          hue: torch.Tensor | None = None) -> torch.Tensor:
    """Pictures, uint8: a ground, the silhouette, clutter, the noise of the camera.

    contrast: (n,), of the silhouette; hue: (n,) 0..2, its strongest colour, any without.
    """
    n, size = len(mask), mask.shape[-1]

    def uniform(low, high, channels):     # (n, channels, 1, 1)
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=rng)

    ground, colour = uniform(0.1, 0.4, 3), uniform(0.3, 1, 3)
    if hue is not None:
        strongest = F.one_hot(hue, 3).view(n, 3, 1, 1) == 1
        colour = torch.where(strongest, 1.0, 0.6 * colour)
    image = ground + mask * contrast.view(n, 1, 1, 1) * colour
    clutter = torch.randn(n, 3, 6, 6, generator=rng)
    image = image + 0.06 * F.interpolate(clutter, size=size, mode="bilinear")
    noise = uniform(0.05, 0.15, 1) * torch.randn(n, 3, size, size, generator=rng)
    image = image + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)
