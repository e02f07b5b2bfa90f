"""CREMA-D: six emotions, spoken by 91 actors; face and voice. 7,442 clips of
2-3 s, 6,698 to train with and 744 to test.

    git clone https://github.com/CheyneyComputerScience/CREMA-D \\
        downloads/CREMA-D                         # with git-lfs installed
    python -m prepare.crema_d --source downloads/CREMA-D

Layout: AudioWAV/<name>.wav and VideoFlash/<name>.flv, as published (needs the
ffmpeg program). Frames that were extracted before, Image-01-FPS/<name>/*.jpg,
are taken instead when they are there. The class is the third part of a name,
1001_DFA_ANG_XX.

The test split is the one of OGM-GE (CVPR 2022) and PMR (CVPR 2023), in
`splits/crema_d_test.txt`. All 91 actors are on both sides of it. A tenth of
the others becomes validation.
"""
import re
from pathlib import Path

from prepare import options, write
from prepare.media import Item

HELP = ("CREMA-D: install git-lfs, "
        "`git clone https://github.com/CheyneyComputerScience/CREMA-D downloads/CREMA-D` "
        "(AudioWAV 0.6 GB and VideoFlash 2.4 GB are what is used), then "
        "`python -m prepare.crema_d --source downloads/CREMA-D` (writes 14 GB)")
CLASSES = ["ANG", "DIS", "FEA", "HAP", "NEU", "SAD"]
PUBLISHED = {"all": 7442, "train": 6698, "test": 744}
NAME = re.compile(r"\d{4}_[A-Z]{3}_(%s)_[A-Z]+" % "|".join(CLASSES))
TEST_NAMES = Path(__file__).parent / "splits/crema_d_test.txt"


def main(argv=None):
    p = options.parser(__doc__, "crema_d", frames=9)
    p.add_argument("--source", type=Path, default="downloads/CREMA-D",
                   help="the folder that holds AudioWAV; default: %(default)s")
    args = options.parse(p, argv)

    audio = {f.stem: f for f in args.source.glob("AudioWAV/*.wav")}
    if not audio:
        raise FileNotFoundError(f"no AudioWAV/*.wav in {args.source}. {HELP}")
    video = {f.stem: f for f in sorted(args.source.glob("VideoFlash/*.flv"))}
    video.update({f.stem: f for f in sorted(args.source.glob("Image-01-FPS/*"))})
    if not video:
        raise FileNotFoundError(f"no VideoFlash/*.flv in {args.source}. {HELP}")

    test_names = set(TEST_NAMES.read_text().split())
    train, test = [], []
    for name in sorted(audio.keys() | video.keys()):
        if not NAME.fullmatch(name):
            continue
        # A file that is missing keeps the path where it should be, so that it is counted.
        source = {"audio": args.source / f"AudioWAV/{name}.wav",
                  "visual": video.get(name, args.source / f"VideoFlash/{name}.flv")}
        side = test if name in test_names else train
        side.append(Item(name, name.split("_")[2], source))
    counts = {"all": len(train) + len(test), "train": len(train), "test": len(test)}
    write.check_counts(counts, PUBLISHED, args.allow_missing)
    train, val = write.carve_val(train)
    splits = {"train": train, "val": val, "test": test}
    kinds = {"audio": "audio", "visual": "frames"}
    write.write_dataset(args, splits, kinds, CLASSES, source=str(args.source))


if __name__ == "__main__":
    options.run(main)
