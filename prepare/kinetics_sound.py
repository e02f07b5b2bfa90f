"""Kinetics-Sounds: the classes of Kinetics-400 that can be seen and heard, in
10 s clips from YouTube. Two versions are in use:

    # 32 classes, 22,728 / 1,593 clips, as in the paper
    python -m prepare.kinetics_sound --source downloads/k400
    # 31 classes, 14,799 / 2,597 clips, the lists of OGM-GE
    python -m prepare.kinetics_sound --source downloads/k400 \\
        --lists my_train.txt my_test.txt

32 classes: the train and validation side of Kinetics-400, cut down to these
classes. The labels come from annotations/train.csv and val.csv, with lines
`label,youtube_id,time_start,time_end,...`, if they are there. Else they come
from the folders, train/<class>/<clip>.mp4 and val/<class>/<clip>.mp4.
31 classes: without strumming_guitar. The lists have lines
`clip,10,class number` (or with blanks between), and the numbers follow the
alphabetical order.

Clips are found by name, <youtube id>_<start>_<end>, anywhere below --source.
They may have been extracted before, as visual/<clip>/*.jpg and
audio/<clip>.wav. Video needs the ffmpeg program. Kinetics' validation side is
the test here; a tenth of train becomes validation. Videos vanish from YouTube,
so copies differ: --allow-missing 0.1 is usual, and dataset.json lists what is
missing.
"""
import textwrap
from pathlib import Path

from prepare import options, write
from prepare.media import Item

HELP = ("Kinetics-Sounds: get the train and val videos of Kinetics-400 "
        "(github.com/cvdfoundation/kinetics-dataset; the 32 classes that "
        "`python -m prepare.kinetics_sound --help` lists) with annotations/train.csv and val.csv "
        "to downloads/k400, then "
        "`python -m prepare.kinetics_sound --source downloads/k400` (writes 47 GB)")
CLASSES = """blowing_nose blowing_out_candles bowling chopping_wood dribbling_basketball laughing
    mowing_lawn playing_accordion playing_bagpipes playing_bass_guitar playing_clarinet
    playing_drums playing_guitar playing_harmonica playing_keyboard playing_organ playing_piano
    playing_saxophone playing_trombone playing_trumpet playing_violin playing_xylophone
    ripping_paper shoveling_snow shuffling_cards singing stomping_grapes strumming_guitar
    tap_dancing tapping_guitar tapping_pen tickling""".split()
PUBLISHED = {32: {"train": 22728, "test": 1593}, 31: {"train": 14799, "test": 2597}}
VIDEOS = (".mp4", ".mkv", ".webm", ".avi")


def read_list(path: Path) -> list[tuple[str, str | int]]:
    """(clip, class name) of each line of Kinetics' annotations; or (clip, class number)."""
    rows = []
    for n, row in write.csv_rows(path):
        if len(row) == 1:
            row = row[0].split()
        if not row or row[0] == "label":
            continue
        try:
            if len(row) >= 4:
                clip = f"{row[1]}_{int(row[2]):06}_{int(row[3]):06}"
                rows.append((clip, row[0].replace(" ", "_")))
            else:
                rows.append((row[0], int(row[-1])))
        except ValueError:
            raise ValueError(f"{path}, line {n}: expected label,youtube_id,start,end or "
                             f"clip,10,class number, found {row}") from None
    return rows


def read_folders(files, side: Path) -> list[tuple[str, str]]:
    """(clip, class name) of the files that lie in side/<class>/."""
    return [(f.stem, f.parent.name.replace(" ", "_")) for f in files if f.parent.parent == side]


def main(argv=None):
    names = textwrap.fill(", ".join(CLASSES), 78)
    p = options.parser(f"{__doc__}\nThe 32 classes:\n{names}", "kinetics_sound", frames=9)
    p.add_argument("--source", type=Path, default="downloads/k400",
                   help="the folder somewhere below which the clips lie; default: %(default)s")
    p.add_argument("--lists", type=Path, nargs=2, metavar=("TRAIN", "TEST"),
                   help="list files, see above; default: those found in --source")
    args = options.parse(p, argv)

    # Where the clips are: name -> file or folder.
    extracted = (args.source / "visual").is_dir() and (args.source / "audio").is_dir()
    if extracted:
        visual = {f.name: f for f in (args.source / "visual").iterdir()}
        audio = {f.stem: f for f in (args.source / "audio").rglob("*.wav")}
    else:
        files = sorted(args.source.rglob("*"))
        visual = audio = {f.stem: f for f in files if f.suffix in VIDEOS}
    if not visual:
        raise FileNotFoundError(f"no videos below {args.source}. {HELP}")

    # Which clips belong to which class.
    lists = args.lists
    annotations = [args.source / "annotations/train.csv", args.source / "annotations/val.csv"]
    if not lists and annotations[0].exists():
        lists = annotations
    if lists:
        train, test = read_list(lists[0]), read_list(lists[1])
    elif extracted:
        raise ValueError(f"{args.source} has extracted media but no annotations/train.csv: "
                         "say what is what with --lists TRAIN TEST")
    else:
        train = read_folders(visual.values(), args.source / "train")
        test = read_folders(visual.values(), args.source / "val")
    numbers = {label for _, label in train + test if isinstance(label, int)}
    classes = CLASSES
    if max(numbers, default=31) != 31:
        classes = [name for name in CLASSES if name != "strumming_guitar"]
    if not numbers <= set(range(len(classes))):
        raise ValueError(f"{lists[0]}: class numbers go up to {max(numbers)}, "
                         "but there are 31 (0 to 30) or 32 classes")

    def items(rows):
        found = {}
        for clip, label in rows:
            if isinstance(label, int):
                label = classes[label]
            if label in classes:     # the annotations hold all of Kinetics-400
                missing = write.below(args.source, clip)
                source = {"audio": audio.get(clip, missing), "visual": visual.get(clip, missing)}
                found[clip] = Item(clip, label, source)
        return list(found.values())

    train, test = items(train), items(test)
    print(f"{len(classes)} classes: " + ", ".join(f"{i} {c}" for i, c in enumerate(classes)))
    counts = {"train": len(train), "test": len(test)}
    write.check_counts(counts, PUBLISHED[len(classes)], args.allow_missing)
    train, val = write.carve_val(train)
    splits = {"train": train, "val": val, "test": test}
    labels_from = " and ".join(map(str, lists)) if lists else "folders"
    source = f"{args.source}; labels from {labels_from}"
    kinds = {"audio": "audio", "visual": "frames"}
    write.write_dataset(args, splits, kinds, classes, source)


if __name__ == "__main__":
    options.run(main)
