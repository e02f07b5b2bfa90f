"""UCF101: 13,320 videos of 101 actions; RGB frames and optical flow. There are
three splits. The first has 9,537 videos to train with and 3,783 to test.

    python -m prepare.ucf101 --source downloads/ucf101 --split 1

Layout, as published by Feichtenhofer et al. (2016), each in three parts that
must be joined before unpacking:

    jpegs_256/v_<Class>_gXX_cYY/frame000001.jpg ...
    tvl1_flow/{u,v}/v_<Class>_gXX_cYY/frame000001.jpg ...

Instead of jpegs_256 the videos themselves will do, anywhere below --source
(needs the ffmpeg program). The flow must be the published one.

The official lists need not be there, because the group of a video, gXX, says
where it belongs. Groups 1-7 are the test of split 1, 8-14 of split 2, 15-21 of
split 3. Groups 24 and 25, a tenth of train in every split, become validation:
whole groups, because the videos of one group are near copies.

Of each video --stacks stacks of --flow-length flow frames are kept, x and y
interleaved.
"""
import re
from pathlib import Path

from prepare import options, write
from prepare.media import Item

HELP = ("UCF101: download RGB and flow, three parts each, by the links in "
        "github.com/feichtenhofer/twostreamfusion, join the parts with `cat`, "
        "unpack both to downloads/ucf101, then "
        "`python -m prepare.ucf101 --source downloads/ucf101` "
        "(writes 76 GB; 25 GB with --frames 3 --stacks 1)")
PUBLISHED = {1: {"train": 9537, "test": 3783},
             2: {"train": 9586, "test": 3734},
             3: {"train": 9624, "test": 3696}}


def videos(paths) -> dict[str, Path]:
    """Name -> path.

    The published files spell one class HandStandPushups here and HandstandPushups there.
    The official name of the class is the second.
    """
    found = {}
    for path in paths:
        if re.fullmatch(r"v_\w+_g\d\d_c\d\d", path.stem):
            found[path.stem.replace("HandStand", "Handstand")] = path
    return found


def side_of(name: str, split: int) -> str:
    """train, val or test, from the group in v_<Class>_gXX_cYY.

    A group is one person or place that was filmed several times. It is never on two sides.
    """
    group = int(name[-6:-4])
    if (group - 1) // 7 == split - 1:
        return "test"
    return "val" if group >= 24 else "train"


def main(argv=None):
    p = options.parser(__doc__, "ucf101", frames=9, flow=True)
    p.add_argument("--source", type=Path, default="downloads/ucf101",
                   help="the folder that holds tvl1_flow; default: %(default)s")
    p.add_argument("--split", type=int, choices=(1, 2, 3), default=1,
                   help="which of the three official splits; default: 1")
    args = options.parse(p, argv)

    jpegs, flow = args.source / "jpegs_256", args.source / "tvl1_flow"
    rgb = videos(jpegs.glob("*")) or videos(args.source.rglob("*.avi"))
    u, v = videos((flow / "u").glob("*")), videos((flow / "v").glob("*"))
    if not rgb:
        raise FileNotFoundError(f"no jpegs_256/ or .avi videos in {args.source}. {HELP}")
    if not u or not v:
        raise FileNotFoundError(f"no tvl1_flow/u and v in {args.source}. {HELP}")

    splits = {"train": [], "val": [], "test": []}
    for name in sorted(rgb.keys() | u.keys()):
        # A folder that is missing keeps the path where it should be, so that it is counted.
        source = {"visual": rgb.get(name, jpegs / name),
                  "flow": (u.get(name, flow / "u" / name), v.get(name, flow / "v" / name))}
        item = Item(name, name.split("_")[1], source)
        splits[side_of(name, args.split)].append(item)
    counts = {"train": len(splits["train"] + splits["val"]), "test": len(splits["test"])}
    write.check_counts(counts, PUBLISHED[args.split], args.allow_missing)
    # In the order of the official list: capitals do not count.
    classes = sorted(write.all_classes(splits), key=str.lower)
    print(f"{len(classes)} classes (published 101): {classes[0]} ... {classes[-1]}")
    kinds = {"visual": "frames", "flow": "flow"}
    write.write_dataset(args, splits, kinds, classes, f"{args.source}; split {args.split}")


if __name__ == "__main__":
    options.run(main)
