"""Kinetics-Sounds: the classes of Kinetics-400 that can be seen and heard, 10 s clips from YouTube. Two versions are about:

    python -m prepare.kinetics_sound --source downloads/k400                                   # 32 classes, 22,728 / 1,593: as the paper
    python -m prepare.kinetics_sound --source downloads/k400 --lists my_train.txt my_test.txt  # 31 classes, 14,799 / 2,597: OGM-GE's lists

32 classes: the train and validation side of Kinetics-400, cut down to these classes. The labels come from annotations/train.csv and val.csv
(label,youtube_id,time_start,time_end,...) if they are there, else from the folders, train/<class>/<clip>.mp4 and val/<class>/<clip>.mp4.
31 classes: without strumming_guitar; lines `clip,10,class number` (or separated by blanks), numbers in alphabetical order.
Clips are found by name, <youtube id>_<start>_<end>, wherever they lie below --source; or, extracted before, as visual/<clip>/*.jpg and
audio/<clip>.wav. Video needs the ffmpeg program. Kinetics' validation side is the test here; a tenth of train becomes validation. Videos
vanish from YouTube, so copies differ: --allow-missing 0.1 is usual, and what is missing is listed in dataset.json.
"""
import csv
from pathlib import Path

from prepare import media

HELP = ("Kinetics-Sounds: get the train and val videos of Kinetics-400 (github.com/cvdfoundation/kinetics-dataset; the 32 classes that "
        "`python -m prepare.kinetics_sound --help` lists) with annotations/train.csv and val.csv to downloads/k400, then "
        "`python -m prepare.kinetics_sound --source downloads/k400` (writes 47 GB)")
CLASSES = """blowing_nose blowing_out_candles bowling chopping_wood dribbling_basketball laughing mowing_lawn playing_accordion
    playing_bagpipes playing_bass_guitar playing_clarinet playing_drums playing_guitar playing_harmonica playing_keyboard playing_organ
    playing_piano playing_saxophone playing_trombone playing_trumpet playing_violin playing_xylophone ripping_paper shoveling_snow
    shuffling_cards singing stomping_grapes strumming_guitar tap_dancing tapping_guitar tapping_pen tickling""".split()
PUBLISHED = {32: {"train": 22728, "test": 1593}, 31: {"train": 14799, "test": 2597}}


def read_list(path: Path) -> list[tuple[str, str | int]]:
    """(clip, class name or number) of every line, from Kinetics' own annotations or from `clip,10,number`."""
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        for n, row in enumerate(csv.reader(file), 1):
            row = row[0].split() if len(row) == 1 else row
            try:
                if len(row) >= 4 and row[0] != "label":
                    rows.append((f"{row[1]}_{int(row[2]):06}_{int(row[3]):06}", row[0].replace(" ", "_")))
                elif row and row[0] != "label":
                    rows.append((row[0], int(row[-1])))
            except ValueError:
                raise ValueError(f"{path}, line {n}: expected label,youtube_id,start,end or clip,10,class number, found {row}") from None
    return rows


def main(argv=None):
    p = media.parser(__doc__ + f"\nThe 32 classes: {', '.join(CLASSES)}", "kinetics_sound", frames=9)
    p.add_argument("--source", type=Path, default="downloads/k400", help="the folder somewhere below which the clips lie")
    p.add_argument("--lists", type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="list files, see above")
    args = media.parse(p, "kinetics_sound", argv)
    extracted = (args.source / "visual").is_dir() and (args.source / "audio").is_dir()
    if extracted:
        visual, audio = {f.name: f for f in (args.source / "visual").iterdir()}, {f.stem: f for f in (args.source / "audio").rglob("*.wav")}
    else:
        visual = audio = {f.stem: f for f in sorted(args.source.rglob("*")) if f.suffix in (".mp4", ".mkv", ".webm", ".avi")}
    if not visual:
        raise FileNotFoundError(f"no videos below {args.source}. {HELP}")
    annotations = [args.source / f"annotations/{side}.csv" for side in ("train", "val")]
    lists = args.lists or (annotations if annotations[0].exists() else None)
    if lists:
        train, test = map(read_list, lists)
    elif extracted:
        raise ValueError(f"{args.source} has extracted media but no annotations/train.csv: say what is what with --lists TRAIN TEST")
    else:
        train, test = ([(f.stem, f.parent.name.replace(" ", "_")) for f in visual.values() if f.parent.parent == args.source / side]
                       for side in ("train", "val"))
    numbers = {label for _, label in train + test if isinstance(label, int)}
    classes = [c for c in CLASSES if c != "strumming_guitar" or max(numbers, default=31) == 31]
    if not numbers <= set(range(len(classes))):
        raise ValueError(f"{lists[0]}: class numbers go up to {max(numbers)}, but there are 31 (0 to 30) or 32 classes")

    def items(rows):
        found = {}
        for clip, label in rows:
            label = classes[label] if isinstance(label, int) else label
            if label in classes:                                                    # the annotations hold all of Kinetics-400
                files = {"audio": audio.get(clip, args.source / clip), "visual": visual.get(clip, args.source / clip)}
                found[clip] = media.Item(clip, label, files)
        return list(found.values())

    train, test = items(train), items(test)
    print(f"{len(classes)} classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(classes)))
    media.check_counts({"train": len(train), "test": len(test)}, PUBLISHED[len(classes)], args.allow_missing)
    train, val = media.carve_val(train)
    source = f"{args.source}; labels from {' and '.join(map(str, lists)) if lists else 'folders'}"
    media.write_dataset(args, {"train": train, "val": val, "test": test}, {"audio": "audio", "visual": "frames"}, classes, source)


if __name__ == "__main__":
    media.run(main)
