"""Reading: one recording -> the arrays that are stored of it.

`read_wave`, `read_frames` and `read_flow` turn one file or folder into one array.
`read_item` does it for all modalities of one sample. `write.py` writes whole data sets.

Shapes: F frames, S flow stacks of L flow frames, s pixels a side, n samples of sound at 16 kHz.
torchvision and torchaudio take seconds to import. So only the functions that use them import them.
"""
import functools
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import wave
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import log_mel
from pretrained import checkpoints
from pretrained.tokenizer import Tokenizer, load_tokenizer

RATE = 16000     # samples a second
# One file may not stop all others. These are far more than any clip needs.
SECONDS = 600               # to decode one file with ffmpeg
HOURS = 4                   # of sound in one file
PIXELS = 2 ** 27            # of one picture: 12,000 x 11,000
IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
# Kind of tokenizer -> the name of its public vocabulary in `pretrained.checkpoints.PUBLIC`.
VOCABULARIES = {"wordpiece": "bert_vocab", "byte_bpe": "deberta_vocab"}


# What ffmpeg may open: files that hold all that they show. Playlists (.m3u8, ffconcat) name other
# files, or addresses in the network.
PROTOCOLS = "file,pipe"
DEMUXERS = ("aac,ac3,aiff,amr,ape,asf,au,avi,caf,dv,eac3,flac,flv,gif,h264,hevc,ivf,m4v,matroska,"
            "webm,mov,mp4,mp3,mpc,mpeg,mpegts,mpegvideo,mxf,nut,ogg,rm,tta,w64,wav,wv,yuv4mpegpipe,"
            "bmp_pipe,j2k_pipe,jpeg_pipe,pcx_pipe,pgm_pipe,png_pipe,ppm_pipe,tiff_pipe,webp_pipe")


# ---- Files ----

class NoFFmpeg(RuntimeError):
    """No file is at fault, so this must not count as an unreadable item."""


def check_file(path: Path) -> None:
    """Raise one line about a file that cannot be right. Nothing is decoded, so this is quick."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is a pipe or a device, no file")
    if path.is_file() and (size := path.stat().st_size) < 1024:
        if path.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git-LFS pointer, not the file: "
                             f"run `git lfs pull` in {path.parent}")
        if size == 0:
            raise ValueError(f"{path} is an empty file")


def ffmpeg(path: Path, options: list[str], chunk: int, span=None):
    """Decode one file with the ffmpeg program. Yields its output, `chunk` bytes at a time.

    span: (start, end) in seconds, only this part. Raises ValueError for a file that ffmpeg cannot
    read, or not within SECONDS.
    """
    if not shutil.which("ffmpeg"):
        raise NoFFmpeg(f"{path} needs the ffmpeg program to be read: "
                       "install ffmpeg (apt, brew and conda have it) and run this again")
    seek = ["-ss", str(span[0]), "-t", str(span[1] - span[0])] if span else []
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-max_pixels", str(PIXELS),
               "-protocol_whitelist", PROTOCOLS, "-format_whitelist", DEMUXERS,
               *seek, "-i", f"file:{path}", *options, "-"]
    with (tempfile.TemporaryFile() as log,
          subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process):
        too_long = threading.Timer(SECONDS, process.kill)
        too_long.start()
        try:
            while data := process.stdout.read(chunk):
                yield data
            process.wait()
        finally:     # also where nobody wants the rest
            too_long.cancel()
            process.kill()
        if process.returncode == -signal.SIGKILL:
            raise ValueError(f"{path}: ffmpeg took over {SECONDS} s, or all memory; cut the file")
        log.seek(0)
        told = log.read(2000).decode(errors="replace").strip()
        if re.search("partial file|ended prematurely", told):     # ffmpeg itself goes on, with 0
            raise ValueError(f"{path} is cut short: fetch it again")
        if process.returncode:
            reason = told.split("\n")[0]
            if "not on whitelist" in reason:
                reason = "not one of the formats that hold sound and pictures themselves"
            raise ValueError(f"{path}: ffmpeg cannot read it ({reason})")


# ---- Sound ----

def read_wave(path, span=None) -> torch.Tensor:
    """The sound of a file, float32 (n,) in [-1, 1) at 16 kHz. span: (start, end) in seconds.

    We take channel 0 and not a mix, as ImageBind does. WAV files of integers need no ffmpeg.
    """
    path = Path(path)
    check_file(path)
    try:
        x, rate = read_pcm(path)
    except (wave.Error, EOFError, RuntimeError) as error:     # RuntimeError: a chunk beyond the end
        if path.suffix.lower() == ".wav" and "unknown format" not in str(error) and (
                not shutil.which("ffmpeg")):
            raise ValueError(f"{path}: no WAV file, or a damaged one ({error})") from None
        x = decode_sound(path, span)     # another format, or a WAV file of floats
    else:
        x = resample(path, x, rate)
        if span:
            x = x[int(span[0] * RATE):int(span[1] * RATE)]
    if not len(x):
        raise ValueError(f"{path}: no sound in it")
    return x


def decode_sound(path: Path, span=None) -> torch.Tensor:
    """As `read_wave`, with ffmpeg."""
    options = ["-map", "0:a:0", "-af", "pan=mono|c0=c0", "-ar", str(RATE), "-f", "f32le"]
    decoded = bytearray()
    for data in ffmpeg(path, options, 1 << 20, span):
        decoded += data
        if len(decoded) > HOURS * 3600 * RATE * 4:
            raise ValueError(f"{path}: more than {HOURS} hours of sound; cut it")
    return torch.from_numpy(np.frombuffer(decoded, "<f4"))


def resample(path: Path, x: torch.Tensor, rate: int) -> torch.Tensor:
    """(n,) at `rate` -> (m,) at 16 kHz."""
    if rate == RATE:
        return x
    if not 1000 <= rate <= 1_000_000:
        raise ValueError(f"{path}: {rate} samples a second in its header; no sound has that")
    # torchaudio's filters have rate / gcd x 16000 / gcd numbers: for 44,101 Hz they fill 12 GB.
    # An odd rate becomes a simple fraction of 16 kHz. That changes it by 1 in 8,000 or less.
    ratio = Fraction(rate, RATE)
    if ratio.numerator * ratio.denominator > 2 ** 24:
        ratio = ratio.limit_denominator(int((2 ** 24 / ratio) ** 0.5))
    import torchaudio
    return torchaudio.functional.resample(x, ratio.numerator, ratio.denominator)


def read_pcm(path: Path) -> tuple[torch.Tensor, int]:
    """Channel 0 of a WAV file of integers, float32 (n,) in [-1, 1), and its samples a second."""
    with wave.open(str(path), "rb") as file:
        rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
        if width > 4:
            raise wave.Error(f"{width} bytes a sample")
        promised, there = file.getnframes(), path.stat().st_size // (channels * width)
        if min(promised, there) > HOURS * 3600 * rate:
            raise ValueError(f"{path}: more than {HOURS} hours of sound; cut it")
        data = np.frombuffer(file.readframes(min(promised, there)), np.uint8)
    # A program that writes into a pipe does not know the length: it promises 2 or 4 GiB.
    in_a_pipe = promised * channels * width > 2 ** 31 - 2 ** 16
    if len(data) // (channels * width) < promised - rate / 10 and not in_a_pipe:
        raise ValueError(f"{path} is cut short: fetch it again")
    whole = len(data) // (channels * width) * channels * width
    first = data[:whole].reshape(-1, channels, width)[:, 0]     # (n, bytes), lowest byte first
    if width == 1:
        first = first ^ 128     # only 8-bit WAV is unsigned
    # All widths become 32 bits: the bytes of a sample go to the upper end.
    integers = np.zeros((len(first), 4), np.uint8)
    integers[:, 4 - width:] = first
    samples = integers.view("<i4")[:, 0] / 2.0**31
    return torch.from_numpy(samples.astype(np.float32)), rate


def audio_clips(sound: torch.Tensor, clips: int = 3) -> torch.Tensor:
    """ImageBind's evenly placed 2 s clips: the first starts at 0, the last ends at the end.

    (n,) -> (clips, 128, 204) float32.
    """
    # ImageBind computes with fractions, but the duration was a float before: 2.9 s are a hair
    # less than 2.9, and a clip starts one sample sooner. We do the same.
    spare = max(Fraction(len(sound) / RATE) - 2, 0)
    starts = [int(i * spare / max(clips - 1, 1) * RATE) for i in range(clips)]
    # ImageBind also subtracts the mean of each clip. We leave that out: it changes nothing,
    # because every frame of the spectrogram loses its own mean.
    return log_mel(torch.stack([sound[s:s + 2 * RATE] for s in starts]))


# ---- Pictures and video ----

def centres(n: int, k: int) -> list[int]:
    """The centres of k equal segments of 0..n-1. They repeat when n is smaller than k."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def by_number(file: Path) -> list:
    """A key to sort files by: frame_2 stands before frame_10."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def images(folder: Path, pattern: str = "*") -> list[Path]:
    """The pictures of a folder, in the order of their numbers. Other files are ignored."""
    files = [f for f in folder.glob(pattern) if f.suffix.lower() in IMAGES]
    if not files:
        raise ValueError(f"{folder}: no .jpg or .png ({pattern}) in this folder")
    return sorted(files, key=by_number)


def check_picture_size(path: Path) -> None:
    """Raise ValueError for a picture that would fill the memory, before it is decoded.

    The header of a PNG, GIF or JPEG file says how large it is. WebP has 16,383 pixels a side.
    """
    width, height = 1, 1
    with open(path, "rb") as file:
        head = file.read(24).ljust(24)
        if head.startswith(b"\x89PNG"):
            width, height = struct.unpack(">II", head[16:24])
        elif head.startswith(b"GIF8"):
            width, height = struct.unpack("<HH", head[6:10])
        elif head.startswith(b"\xff\xd8"):
            file.seek(2)
            # Segments: FF, a kind, the length. The kinds C0 to CF, but for three, have the size.
            while len(segment := file.read(9)) == 9 and segment[0] == 0xFF:
                kind, length = struct.unpack(">xBH", segment[:4])
                if kind == 0xFF:     # FF FF is filling
                    file.seek(-8, 1)
                    continue
                if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                    height, width = struct.unpack(">HH", segment[5:])
                    break
                file.seek(length - 7, 1)
    if width * height > PIXELS:
        raise ValueError(f"{path}: {width} x {height} pixels fill the memory; make it smaller")


def read_image(path: Path, size: int, mode: str = "RGB") -> torch.Tensor:
    """One picture, uint8 (3, s, s), or (1, s, s) with mode GRAY.

    The shorter side becomes `size` (bicubic, antialiased); then the central square is cut out.
    """
    from torchvision.io import decode_image
    check_file(path)
    check_picture_size(path)
    try:
        x = decode_image(str(path), mode=mode, apply_exif_orientation=True)
        if x.ndim == 4:     # an animated GIF under another name: its first frame
            x = x[0]
        if x.dtype == torch.uint16:     # 16 bits a channel: 65535 becomes 255
            x = ((x.int() + 128) // 257).to(torch.uint8)
        shorter, longer = sorted(x.shape[-2:])
        if longer > 200 * shorter:     # as wide as `size` it would fill the memory
            raise ValueError(f"{path}: {longer} x {shorter} pixels are too narrow; crop it")
        h, w = (side * size // shorter for side in x.shape[-2:])
        x = F.interpolate(x[None], (h, w), mode="bicubic", antialias=True)[0]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: no picture that can be read ({reason})") from None
    top, left = round((h - size) / 2), round((w - size) / 2)
    return x[:, top:, left:][:, :size, :size]


def read_frames(path, frames: int, size: int, span=None) -> np.ndarray:
    """Evenly spaced frames, uint8 (F, 3, s, s).

    path: a folder of pictures, one picture (it is repeated), or a video.
    span: (start, end) in seconds, only this part of the video.
    """
    path = Path(path)
    if path.is_dir():
        files = images(path)
    elif path.suffix.lower() in IMAGES:
        files = [path]
    else:
        return read_video(path, frames, size, span)
    return torch.stack([read_image(files[i], size) for i in centres(len(files), frames)]).numpy()


def read_video(path: Path, frames: int, size: int, span=None) -> np.ndarray:
    """Evenly spaced frames of a video, uint8 (F, 3, s, s).

    We decode from the beginning to the end. We do not jump to the frames we want, because many
    headers lie about the duration (.flv often has none). So we know only at the end which frames
    we want. The memory stays bounded: when 16 F frames are kept, every second one is dropped,
    and from then on every second one is skipped; and so on.
    """
    check_file(path)
    fit = (f"fps=25,scale={size}:{size}:force_original_aspect_ratio=increase:flags=bicubic,"
           f"crop={size}:{size}")
    options = ["-map", "0:v:0", "-vf", fit, "-f", "rawvideo", "-pix_fmt", "rgb24"]
    bytes_each = 3 * size * size
    kept, stride, seen = [], 1, 0
    for frame in ffmpeg(path, options, bytes_each, span):
        if seen % stride == 0 and len(frame) == bytes_each:
            kept.append(frame)
            if len(kept) == 16 * frames:
                kept = kept[::2]
                stride = 2 * stride
        seen += 1
    if not kept:
        where = f" between {span[0]} and {span[1]} s" if span else ""
        raise ValueError(f"{path}: no picture in it{where}")
    picked = [kept[min(round(c / stride), len(kept) - 1)] for c in centres(seen, frames)]
    pixels = np.frombuffer(b"".join(picked), np.uint8).reshape(frames, size, size, 3)
    return pixels.transpose(0, 3, 1, 2)


def read_flow(path, stacks: int, length: int, size: int) -> np.ndarray:
    """Optical flow, uint8 (S, 2L, s, s): S evenly spaced stacks of L consecutive flow frames.

    The channels are x1 y1 x2 y2 ... (the order of two-stream networks).
    path: a folder with u/ and v/, or with flow_x* and flow_y*, or a pair of folders (u, v).
    On disk there may be more of x than of y: we cut both to the shorter. A clip of fewer than
    L flow frames repeats its last one.
    """
    if isinstance(path, (tuple, list)):
        u, v = images(path[0]), images(path[1])
    elif (path / "u").is_dir():
        u, v = images(path / "u"), images(path / "v")
    else:
        u, v = images(path, "flow_x*"), images(path, "flow_y*")
    n = min(len(u), len(v))

    @functools.cache     # stacks may overlap
    def pair(i):
        return torch.cat([read_image(u[i], size, "GRAY"), read_image(v[i], size, "GRAY")])

    picked = []
    for start in centres(max(n - length + 1, 1), stacks):
        numbers = [min(start + i, n - 1) for i in range(length)]
        picked.append(torch.cat([pair(i) for i in numbers]))     # (2L, s, s)
    return torch.stack(picked).numpy()


# ---- Text ----

def tokenizer(args, public: str | None = None) -> Tokenizer:
    """The tokenizer that --tokenizer names, else the one of the public vocabulary `public`."""
    if args.tokenizer:
        return load_tokenizer(*args.tokenizer)
    if not public:
        raise ValueError("text needs --tokenizer: the vocab.txt of BERT, or vocab.json and "
                         "merges.txt, or bpe_encoder.bin, of DeBERTa")
    return load_tokenizer(checkpoints.download(public))


def tokenizers(args, public: str) -> tuple[Tokenizer, list[Tokenizer]]:
    """The data set's own tokenizer (Table 2), and the others whose ids are stored beside.

    BERT and DeBERTa have different vocabularies, and the paper's tables use both encoders.
    So we store the ids of both. With --tokenizer there is only this one.
    """
    own = tokenizer(args, public)
    if args.tokenizer:
        print(f"text: {own.kind} token ids of {' '.join(args.tokenizer)}; "
              "encoders with another vocabulary can't read these data")
        return own, []
    return own, [tokenizer(args, name) for name in VOCABULARIES.values() if name != public]


def token_ids(text: str, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """int32 (L,): the ids of `text`, cut to `length`, then 0 as padding."""
    ids = tokenizer.encode(text, length)
    return np.array(ids + [0] * (length - len(ids)), np.int32)


# ---- One sample ----

class Item(NamedTuple):
    """One sample, and where its recordings are."""
    id: str
    label: str | list[str]          # a class name, or a list of them (multi-label)
    source: dict                    # modality -> path, pair of paths, text, or an exception
    span: tuple | None = None       # (start, end) in seconds: only this part of the recording


def read_item(item: Item, kinds: dict[str, str], args, tokenizer=None, others=()) -> dict:
    """All arrays that are stored of one item: name -> array, uint8, float16 or int32.

    kinds    modality -> frames, image, flow, audio or text
    args     what these kinds need of frames, size, clips, stacks, flow_length, max_length
    others   more tokenizers: their ids get names of their own, "text.<kind of tokenizer>"

    One recording that is in no data set needs no `others`:
    read_item(Item("clip", "", {"text": "a storm"}), {"text": "text"}, args, tokenizer)

    Raises ValueError, whose one line names the file, when this item cannot be read.
    """
    row = {}
    for modality, kind in kinds.items():
        source = item.source[modality]
        try:
            if kind == "text":
                text = source
                if isinstance(source, Path):
                    text = source.read_text(encoding="utf-8", errors="replace")
                row[modality] = token_ids(text, tokenizer, args.max_length)
                for other in others:
                    row[f"{modality}.{other.kind}"] = token_ids(text, other, args.max_length)
            else:
                row[modality] = read_media(source, kind, args, item.span)
        except NoFFmpeg:
            raise
        except Exception as error:     # decoders raise many kinds, some of them without a word
            raise ValueError(one_line(error, source, item.id)) from None
    return row


def read_media(source, kind: str, args, span) -> np.ndarray:
    """The array of one recording that is no text."""
    if kind == "frames":
        return read_frames(source, args.frames, args.size, span)
    if kind == "image":
        return read_frames(source, 1, args.size, span)
    if kind == "flow":
        return read_flow(source, args.stacks, args.flow_length, args.size)
    clips = audio_clips(read_wave(source, span), args.clips).half().numpy()
    if not np.isfinite(clips).all():
        raise ValueError("NaN, infinity or far too large numbers in its sound")
    return clips


def one_line(error: Exception, source, id: str) -> str:
    """What an error says, with the file that it is about."""
    said = str(error).strip() or type(error).__name__
    said = " ".join(said.split())[:300]
    paths = source if isinstance(source, (tuple, list)) else [source]
    paths = [str(path) for path in paths if isinstance(path, Path)]
    if not paths:
        return f"the text of {id}: {said}"
    return said if any(path in said for path in paths) else f"{paths[0]}: {said}"
