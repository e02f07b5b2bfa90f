"""Your own data -> the prepared format.

    python -m prepare.custom index.jsonl --name birds --frames 3 --size 256
    python train_joint.py --dataset birds --lora audio

The index has one JSON object a line. Here each takes two lines to fit the
screen; in the file it must stand on one. Paths are relative to the index file
and stay in its folder (link what lies elsewhere with ln -s):

    {"id": "wren-01", "split": "train", "label": "wren",
     "visual": "video/wren-01.mp4", "audio": "video/wren-01.mp4"}
    {"id": "wren-02", "split": "train", "label": "wren",
     "visual": "frames/wren-02", "audio": "sound/wren-02.wav"}
    {"id": "owl-07", "split": "test", "label": "owl",
     "visual": "pictures/owl-07.jpg", "audio": "sound/owl-07.flac"}

id      any text, once in the whole file
split   "train", "val" or "test". With no "val" line at all a tenth of train
        becomes validation: the same share of every class, and the same items
        every time
label   a class name; or a list of class names, on every line, for a
        multi-label data set
visual  one picture (.jpg, .png), a folder of pictures (frames, in the order of
        their numbers), or a video
audio   a WAV file, or what ffmpeg reads: a video gives its sound
text    the text itself; needs --tokenizer with the vocabulary of the text
        encoder: vocab.txt (BERT), or vocab.json merges.txt (DeBERTa)
flow    a folder with u/ and v/, or with flow_x_*.jpg and flow_y_*.jpg: optical
        flow as grey pictures, 128 = no motion

Take the modalities you have, the same on every line. Where every `visual` is
one picture they are stored as pictures, otherwise as --frames frames of each,
evenly spaced. Video and sound other than WAV need the ffmpeg program.
"""
import json
from pathlib import Path

from prepare import media, options, write
from prepare.media import Item

SPLITS = ("train", "val", "test")
# modality -> kind
MODALITIES = {"visual": "frames", "audio": "audio", "text": "text", "flow": "flow"}


def is_line(text) -> bool:
    """A text of one line, and not half of a character, as an escape in JSON may be."""
    if not isinstance(text, str) or not text.strip() or text.splitlines() != [text]:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def problem_of(row, first: dict[str, int]) -> str | None:
    """What is wrong with one line by itself, and what to do. first: id -> the line that had it."""
    if not isinstance(row, dict):
        return 'not an object: write {"id": ..., "split": ..., "label": ..., ...}'
    if missing := [repr(key) for key in ("id", "split", "label") if key not in row]:
        return f"no {', '.join(missing)}: every line needs id, split and label"
    id, split, label = row["id"], row["split"], row["label"]
    if not is_line(id):
        return f"id {id!r} is no text: put it in quotes, on one line"
    if id in first:
        return f"id {id!r} is also on line {first[id]}: give every sample its own"
    if split not in SPLITS:
        return f"split {split!r}: write train, val or test"
    names = label if isinstance(label, list) else [label]
    if not all(map(is_line, names)):
        return f"label {label!r}: write a class name, or a list of class names, in quotes"
    if not row.keys() & MODALITIES.keys():
        return f"no modality: give at least one of {', '.join(MODALITIES)}"
    for modality in MODALITIES.keys() & row.keys():
        value = row[modality]
        if modality == "text":
            if not isinstance(value, str):     # it may be empty
                return f"text is {value!r}: write the text, in quotes"
        elif not is_line(value) or "\0" in value:
            return f"{modality} is {value!r}: write a path, in quotes"
        elif Path(value).is_absolute() or ".." in Path(value).parts:
            return (f"{modality} {value!r} leads out of the folder of the index: copy or link "
                    "(ln -s) the files into it")


def problems_together(items: dict[int, Item], splits: dict[str, list[Item]]) -> list:
    """What only all lines together show: a list of (line, problem). items: line -> Item."""
    used = [m for m in MODALITIES if any(m in item.source for item in items.values())]
    lines_with_lists = [n for n, item in items.items() if isinstance(item.label, list)]
    known = set()
    for item in splits["train"]:
        known.update(write.class_names(item))
    bad = []
    for n, item in items.items():
        if absent := [m for m in used if m not in item.source]:
            bad.append((n, f"no {', '.join(absent)}, which other lines have: "
                           "every line needs the same modalities"))
        if lines_with_lists and isinstance(item.label, str):
            bad.append((n, f"label {item.label!r} is one name, but line {lines_with_lists[0]} "
                           "has a list: write lists on all lines, or on none"))
        if unseen := sorted(set(write.class_names(item)) - known):
            bad.append((n, f"class {unseen[0]!r} has no train line: nothing can learn it; "
                           "add train lines, or take the class out"))
    return bad


def read_index(path: Path) -> tuple[dict[str, list[Item]], dict[str, str]]:
    """-> splits and kinds (modality -> kind) of an index file.

    Raises ValueError with the bad lines, what is wrong with each, and what to do.
    """
    splits = {split: [] for split in SPLITS}
    items, first = {}, {}     # line -> Item, id -> line
    ignored, bad = set(), []     # keys that we do not know; (line, problem)
    for n, line in enumerate(write.read_list(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = problem_of(row, first)
        except (ValueError, RecursionError) as error:
            problem = (f"not JSON ({error}): write one object a line, with double quotes and no "
                       "comma at its end")
        if problem:
            bad.append((n, problem))
            continue
        first[row["id"]] = n
        ignored |= row.keys() - MODALITIES.keys() - {"id", "split", "label"}
        source = {}
        for m in MODALITIES:
            if m in row:
                source[m] = row[m] if m == "text" else path.parent / row[m]
        items[n] = Item(row["id"], row["label"], source)
        splits[row["split"]].append(items[n])

    bad += problems_together(items, splits)
    for split in ("train", "test"):
        if not splits[split] and not bad:
            bad.append((n, f"the end, and no line had split {split!r}: mark some with it"))
    if bad:
        lines = [f"\n  line {n}: {problem}" for n, problem in sorted(bad)]
        more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ValueError(f"{path} has bad lines, nothing was written{''.join(lines[:20])}{more}")
    if ignored:
        print(f"ignored: {', '.join(sorted(ignored))} (modalities are {', '.join(MODALITIES)})")

    modalities = next(iter(items.values())).source     # all lines have the same
    kinds = {m: MODALITIES[m] for m in modalities}
    if "visual" in kinds:
        suffixes = {item.source["visual"].suffix.lower() for item in items.values()}
        if suffixes <= media.IMAGES:
            kinds["visual"] = "image"
    return splits, kinds


def main(argv=None):
    p = options.parser(__doc__, "custom", text=True, flow=True, own_name=False)
    p.add_argument("index", metavar="INDEX.jsonl", type=Path)
    args = options.parse(p, argv)

    splits, kinds = read_index(args.index)
    if not splits["val"]:
        n = len(splits["train"])
        splits["train"], splits["val"] = write.carve_val(splits["train"])
        print(f"no line has split val: {len(splits['val'])} of {n} train items become validation")
    classes = write.all_classes(splits)
    more = ", ..." if len(classes) > 50 else ""
    print(f"{len(classes)} classes: {', '.join(classes[:50])}{more}")
    tokenizer = media.tokenizer(args) if "text" in kinds else None
    source = str(args.index)
    write.write_dataset(args, splits, kinds, classes, source, tokenizer)


if __name__ == "__main__":
    options.run(main)
