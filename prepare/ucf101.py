"""UCF101: 13,320 videos of 101 actions; RGB frames and optical flow. Three splits, the first 9,537 to train with and 3,783 to test.

    python -m prepare.ucf101 --source downloads/ucf101 --split 1

Layout, as published by Feichtenhofer et al. (2016), each in three parts to be joined before unpacking:
    jpegs_256/v_<Class>_gXX_cYY/frame000001.jpg ...        tvl1_flow/{u,v}/v_<Class>_gXX_cYY/frame000001.jpg ...
Instead of jpegs_256 the videos themselves will do, anywhere below --source (needs the ffmpeg program); the flow must be the published one.
The official lists need not be there: a video's group, gXX, decides. Groups 1-7 are the test of split 1, 8-14 of split 2, 15-21 of split 3;
groups 24 and 25, a tenth of train in every split, become validation: whole groups, because the videos of one are near copies.
Of each video --stacks stacks of --flow-length flow frames are kept, x and y interleaved.
"""
import re
from pathlib import Path

from prepare import media

HELP = ("UCF101: download RGB and flow, three parts each, by the links in github.com/feichtenhofer/twostreamfusion, join the parts with "
        "`cat`, unpack both to downloads/ucf101, then `python -m prepare.ucf101 --source downloads/ucf101` (writes 76 GB; 25 GB with "
        "--frames 3 --stacks 1)")
PUBLISHED = {1: {"train": 9537, "test": 3783}, 2: {"train": 9586, "test": 3734}, 3: {"train": 9624, "test": 3696}}


def videos(paths) -> dict[str, Path]:
    """Name -> path. The published files spell one class HandStandPushups here and HandstandPushups there; the class is the second."""
    return {f.stem.replace("HandStand", "Handstand"): f for f in paths if re.fullmatch(r"v_\w+_g\d\d_c\d\d", f.stem)}


def side_of(name: str, split: int) -> str:
    """train, val or test, from the group in v_<Class>_gXX_cYY. A group is one person or place filmed several times: never on two sides."""
    group = int(name[-6:-4])
    return "test" if (group - 1) // 7 == split - 1 else "val" if group >= 24 else "train"


def main(argv=None):
    p = media.parser(__doc__, "ucf101", frames=9, flow=True)
    p.add_argument("--source", type=Path, default="downloads/ucf101", help="the folder that holds tvl1_flow")
    p.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="which of the three official splits")
    args = media.parse(p, "ucf101", argv)
    rgb = videos((args.source / "jpegs_256").glob("*")) or videos(args.source.rglob("*.avi"))
    u, v = (videos((args.source / "tvl1_flow" / axis).glob("*")) for axis in "uv")
    if not rgb or not u or not v:
        raise FileNotFoundError(f"no {'jpegs_256/ or .avi videos' if not rgb else 'tvl1_flow/u and v'} in {args.source}. {HELP}")
    splits = {"train": [], "val": [], "test": []}
    for name in sorted(rgb.keys() | u.keys()):
        flow = tuple(found.get(name, args.source / f"tvl1_flow/{axis}/{name}") for axis, found in (("u", u), ("v", v)))
        files = {"visual": rgb.get(name, args.source / f"jpegs_256/{name}"), "flow": flow}
        splits[side_of(name, args.split)].append(media.Item(name, name.split("_")[1], files))
    found = {"train": len(splits["train"] + splits["val"]), "test": len(splits["test"])}
    media.check_counts(found, PUBLISHED[args.split], args.allow_missing)
    classes = sorted({item.label for items in splits.values() for item in items}, key=str.lower)     # the order of the official list
    print(f"{len(classes)} classes (published 101): {classes[0]} ... {classes[-1]}")
    media.write_dataset(args, splits, {"visual": "frames", "flow": "flow"}, classes, f"{args.source}; split {args.split}")


if __name__ == "__main__":
    media.run(main)
