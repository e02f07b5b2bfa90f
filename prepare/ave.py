"""AVE, audio-visual events: 4,143 clips of 10 s from YouTube, 28 classes.
3,339 clips to train, 402 to validate, 402 to test.

    python -m prepare.ave --source downloads/AVE_Dataset

Layout, as published: AVE/<id>.mp4, and trainSet.txt, valSet.txt, testSet.txt
with lines `class&id&quality&start&end`. Needs ffmpeg.

The lists hold only 4,097 videos: some videos stand there twice, for two
events. Each line is a sample of its own, as the published counts demand, with
ids <id>, <id>_1, ... A few videos are in two splits. That is so as published;
the script prints how many. By default a sample is the whole clip; with
--event-span it is only the seconds between start and end. Classes are in
alphabetical order (PMR has another order).
"""
from pathlib import Path

from prepare import options, write
from prepare.media import Item

HELP = ("AVE: download the videos by the link in github.com/YapengTian/AVE-ECCV18 (Google Drive), "
        "unpack them to downloads/AVE_Dataset, then "
        "`python -m prepare.ave --source downloads/AVE_Dataset` (writes 8 GB)")
PUBLISHED = {"train": 3339, "val": 402, "test": 402}


def read_list(path: Path, videos: Path, event_span: bool) -> list[Item]:
    """One item a line. We split at & and do not read CSV: class names contain commas."""
    items = []
    for n, line in enumerate(write.read_list(path).split("\n"), 1):
        if not line.strip() or line.startswith("Category&"):
            continue
        try:
            label, video, _, start, end = line.strip().split("&")
            span = (float(start), float(end)) if event_span else None
        except ValueError:
            raise ValueError(f"{path}, line {n}: expected class&id&quality&start&end, "
                             f"found {line.strip()!r}") from None
        file = write.below(videos, f"{video}.mp4")
        items.append(Item(video, label, {"audio": file, "visual": file}, span))
    return write.number_repeats(items)


def main(argv=None):
    p = options.parser(__doc__, "ave", frames=9)
    p.add_argument("--source", type=Path, default="downloads/AVE_Dataset",
                   help="the folder that holds trainSet.txt; default: %(default)s")
    p.add_argument("--event-span", action="store_true",
                   help="sound and frames of the labelled seconds only")
    args = options.parse(p, argv)

    videos = args.source / "AVE"
    lists = {split: args.source / f"{split}Set.txt" for split in PUBLISHED}
    for path in (*lists.values(), videos):
        if not path.exists():
            raise FileNotFoundError(f"no {path}. {HELP}")
    splits = {split: read_list(path, videos, args.event_span) for split, path in lists.items()}
    counts = {split: len(items) for split, items in splits.items()}
    write.check_counts(counts, PUBLISHED, args.allow_missing)

    found = {}     # split -> its videos
    for split, items in splits.items():
        found[split] = {item.source["visual"] for item in items}
    print("videos in two splits, as published: "
          f"train and val {len(found['train'] & found['val'])}, "
          f"train and test {len(found['train'] & found['test'])}")
    classes = write.all_classes(splits)
    print("classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(classes)))
    source = f"{args.source}; {'event spans' if args.event_span else 'whole clips'}"
    kinds = {"audio": "audio", "visual": "frames"}
    write.write_dataset(args, splits, kinds, classes, source)


if __name__ == "__main__":
    options.run(main)
