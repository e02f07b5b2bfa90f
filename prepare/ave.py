"""AVE, audio-visual events: 4,143 clips of 10 s from YouTube, 28 classes, 3,339 / 402 / 402 to train, validate and test.

    python -m prepare.ave --source downloads/AVE_Dataset

Layout, as published: AVE/<id>.mp4, and trainSet.txt, valSet.txt, testSet.txt with lines `class&id&quality&start&end`. Needs ffmpeg.
The lists hold only 4,097 videos: some stand there twice, for two events. Each line is a sample of its own, as the published counts
demand, with ids <id>, <id>_1, ... A few videos are in two splits; that is so as published, and is printed. By default a sample is the
whole clip; --event-span keeps the seconds between start and end only. Classes are in alphabetical order (PMR's is another).
"""
from pathlib import Path

from prepare import media

HELP = ("AVE: download the videos by the link in github.com/YapengTian/AVE-ECCV18 (Google Drive), unpack them to downloads/AVE_Dataset, "
        "then `python -m prepare.ave --source downloads/AVE_Dataset` (writes 8 GB)")
PUBLISHED = {"train": 3339, "val": 402, "test": 402}


def read_list(path: Path, videos: Path, event_span: bool) -> list[media.Item]:
    """One item a line. Split at & and not as CSV: class names contain commas and blanks, and ids may start with a minus."""
    items = []
    for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip() or line.startswith("Category&"):
            continue
        try:
            label, video, _, start, end = line.strip().split("&")
            span = (float(start), float(end)) if event_span else None
        except ValueError:
            raise ValueError(f"{path}, line {n}: expected class&id&quality&start&end, found {line.strip()!r}") from None
        file = videos / f"{video}.mp4"
        items.append(media.Item(video, label, {"audio": file, "visual": file}, span))
    return media.number_repeats(items)


def main(argv=None):
    p = media.parser(__doc__, "ave", frames=9)
    p.add_argument("--source", type=Path, default="downloads/AVE_Dataset", help="the folder that holds trainSet.txt")
    p.add_argument("--event-span", action="store_true", help="sound and frames of the labelled seconds only")
    args = media.parse(p, "ave", argv)
    lists = {split: args.source / f"{split}Set.txt" for split in PUBLISHED}
    for path in (*lists.values(), args.source / "AVE"):
        if not path.exists():
            raise FileNotFoundError(f"no {path}. {HELP}")
    splits = {split: read_list(path, args.source / "AVE", args.event_span) for split, path in lists.items()}
    media.check_counts({split: len(items) for split, items in splits.items()}, PUBLISHED, args.allow_missing)
    videos = {split: {item.source["visual"] for item in items} for split, items in splits.items()}
    shared = ", ".join(f"train and {other} {len(videos['train'] & videos[other])}" for other in ("val", "test"))
    print(f"videos in two splits, as published: {shared}")
    classes = sorted({item.label for items in splits.values() for item in items})
    print("classes: " + ", ".join(f"{i} {name}" for i, name in enumerate(classes)))
    source = f"{args.source}; {'event spans' if args.event_span else 'whole clips'}"
    media.write_dataset(args, splits, {"audio": "audio", "visual": "frames"}, classes, source)


if __name__ == "__main__":
    media.run(main)
