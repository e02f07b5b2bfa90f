"""CREMA-D: six emotions, spoken by 91 actors; face and voice. 7,442 clips of 2-3 s, 6,698 to train with and 744 to test.

    git clone https://github.com/CheyneyComputerScience/CREMA-D downloads/CREMA-D       # with git-lfs installed
    python -m prepare.crema_d --source downloads/CREMA-D

Layout: AudioWAV/<name>.wav and VideoFlash/<name>.flv, as published (needs the ffmpeg program), or frames that were extracted before,
Image-01-FPS/<name>/*.jpg, which are taken when they are there. The class is the third part of a name, 1001_DFA_ANG_XX. The test split is
the one of OGM-GE (CVPR 2022) and PMR (CVPR 2023), `splits/crema_d_test.txt`; all 91 actors are on both sides of it. A tenth of the others
becomes validation.
"""
import re
from pathlib import Path

from prepare import media

HELP = ("CREMA-D: install git-lfs, `git clone https://github.com/CheyneyComputerScience/CREMA-D downloads/CREMA-D` (AudioWAV 0.6 GB and "
        "VideoFlash 2.4 GB are what is used), then `python -m prepare.crema_d --source downloads/CREMA-D` (writes 14 GB)")
CLASSES = ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]
PUBLISHED = {"all": 7442, "train": 6698, "test": 744}


def main(argv=None):
    p = media.parser(__doc__, "crema_d", frames=9)
    p.add_argument("--source", type=Path, default="downloads/CREMA-D", help="the folder that holds AudioWAV")
    args = media.parse(p, "crema_d", argv)
    video = {f.stem: f for f in sorted(args.source.glob("VideoFlash/*.flv")) + sorted(args.source.glob("Image-01-FPS/*"))}
    audio = {f.stem: f for f in args.source.glob("AudioWAV/*.wav")}
    if not audio or not video:
        raise FileNotFoundError(f"no {'AudioWAV/*.wav' if not audio else 'VideoFlash/*.flv'} in {args.source}. {HELP}")
    items = []
    for name in sorted(n for n in audio.keys() | video.keys() if re.fullmatch(r"\d{4}_[A-Z]{3}_(%s)_[A-Z]+" % "|".join(CLASSES), n)):
        files = {"audio": args.source / f"AudioWAV/{name}.wav", "visual": video.get(name, args.source / f"VideoFlash/{name}.flv")}
        items.append(media.Item(name, name.split("_")[2], files))
    test_names = set((Path(__file__).parent / "splits/crema_d_test.txt").read_text().split())
    train, test = [i for i in items if i.id not in test_names], [i for i in items if i.id in test_names]
    media.check_counts({"all": len(items), "train": len(train), "test": len(test)}, PUBLISHED, args.allow_missing)
    train, val = media.carve_val(train)
    splits = {"train": train, "val": val, "test": test}
    media.write_dataset(args, splits, {"audio": "audio", "visual": "frames"}, CLASSES, source=str(args.source))


if __name__ == "__main__":
    media.run(main)
