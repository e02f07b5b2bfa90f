"""Your own data -> the prepared format.

    python -m prepare.custom index.jsonl --name birds --frames 3 --size 256
    python train_joint.py --dataset birds --lora audio

The index has one JSON object a line; paths are relative to the index file:

    {"id": "wren-01", "split": "train", "label": "wren", "visual": "video/wren-01.mp4", "audio": "video/wren-01.mp4"}
    {"id": "wren-02", "split": "train", "label": "wren", "visual": "frames/wren-02", "audio": "sound/wren-02.wav"}
    {"id": "owl-07", "split": "test", "label": "owl", "visual": "pictures/owl-07.jpg", "audio": "sound/owl-07.flac"}

id      any text, once in the whole file
split   "train", "val" or "test". With no "val" line at all a tenth of train becomes validation: the same share of every class, and the same
        items every time
label   a class name; or a list of class names, on every line, for a multi-label data set
visual  one picture (.jpg, .png), a folder of pictures (frames, in the order of their numbers), or a video
audio   a WAV file, or anything ffmpeg reads: a video gives its sound
text    the text itself; needs --tokenizer with the vocabulary of the text encoder: vocab.txt (BERT), or vocab.json merges.txt (DeBERTa)
flow    a folder with u/ and v/, or with flow_x_*.jpg and flow_y_*.jpg: optical flow as grey pictures, 128 = no motion

Take the modalities you have, the same on every line. Where every `visual` is one picture they are stored as pictures, otherwise as
--frames frames of each, evenly spaced. Video and sound other than WAV need the ffmpeg program.
"""
import json
from pathlib import Path

from prepare import media

MODALITIES = {"visual": "frames", "audio": "audio", "text": "text", "flow": "flow"}      # modality -> kind


def problem_of(row, first: dict[str, int]) -> str | None:
    """What is wrong with one line of the index, by itself, and what to do. first: id -> the line that had it."""
    if not isinstance(row, dict):
        return 'not an object: write {"id": ..., "split": ..., "label": ..., ...}'
    if missing := [key for key in ("id", "split", "label") if key not in row]:
        return f"no {', '.join(map(repr, missing))}: every line needs id, split and label"
    if not isinstance(row["id"], str) or not row["id"].strip() or "\n" in row["id"]:
        return f"id {row['id']!r} is no text: put it in quotes, on one line"
    if row["id"] in first:
        return f"id {row['id']!r} is also on line {first[row['id']]}: give every sample its own"
    if row["split"] not in ("train", "val", "test"):
        return f"split {row['split']!r}: write train, val or test"
    if not all(isinstance(label, str) and label for label in (row["label"] if isinstance(row["label"], list) else [row["label"]])):
        return f"label {row['label']!r}: write a class name, or a list of class names, in quotes"
    if not row.keys() & MODALITIES.keys():
        return f"no modality: give at least one of {', '.join(MODALITIES)}"
    for modality in MODALITIES.keys() & row.keys():
        if not isinstance(row[modality], str) or not row[modality] and modality != "text":
            return f"{modality} is {row[modality]!r}: write {'the text' if modality == 'text' else 'a path'}, in quotes"


def read_index(path: Path) -> tuple[dict[str, list[media.Item]], dict[str, str]]:
    """Splits and kinds (modality -> kind) of an index file. ValueError lists the bad lines, what is wrong with each and what to do."""
    splits, items, first, ignored, bad = {"train": [], "val": [], "test": []}, {}, {}, set(), []
    # items: line -> Item; first: id -> line; bad: (line, problem)
    for n, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = problem_of(row, first)
        except json.JSONDecodeError as error:
            problem = f"not JSON ({error.msg}, column {error.colno}): write one object a line, with double quotes and no comma at its end"
        if problem:
            bad.append((n, problem))
            continue
        first[row["id"]] = n
        ignored |= row.keys() - MODALITIES.keys() - {"id", "split", "label"}
        source = {m: row[m] if m == "text" else path.parent / row[m] for m in MODALITIES if m in row}
        items[n] = media.Item(row["id"], row["label"], source)
        splits[row["split"]].append(items[n])

    used = [m for m in MODALITIES if any(m in item.source for item in items.values())]
    known = {label for item in splits["train"] for label in class_names(item)}
    first_list = next((n for n, item in items.items() if isinstance(item.label, list)), None)
    for n, item in items.items():                                                   # what only all lines together show
        if absent := [m for m in used if m not in item.source]:
            bad.append((n, f"no {', '.join(absent)}, which other lines have: every line needs the same modalities"))
        if first_list and isinstance(item.label, str):
            bad.append((n, f"label {item.label!r} is one name, but line {first_list} has a list: write lists on all lines, or on none"))
        if unseen := sorted(set(class_names(item)) - known):
            bad.append((n, f"class {unseen[0]!r} has no train line: nothing can learn it; add train lines, or take the class out"))
    for split in ("train", "test"):
        if not splits[split] and not bad:
            bad.append((n, f"the end, and no line had split {split!r}: mark some with it"))
    if bad:
        lines = [f"\n  line {n}: {problem}" for n, problem in sorted(bad)]
        more = f"\n  and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise ValueError(f"{path} has bad lines, nothing was written" + "".join(lines[:20]) + more)
    if ignored:
        print(f"ignored: {', '.join(sorted(ignored))} (modalities are {', '.join(MODALITIES)})")
    kinds = {m: MODALITIES[m] for m in used}
    if "visual" in used and all(item.source["visual"].suffix.lower() in media.IMAGES for item in items.values()):
        kinds["visual"] = "image"
    return splits, kinds


def class_names(item: media.Item) -> list[str]:
    return item.label if isinstance(item.label, list) else [item.label]


def main(argv=None):
    p = media.parser(__doc__, text=True, flow=True)
    p.add_argument("index", metavar="INDEX.jsonl", type=Path)
    args = media.parse(p, "custom", argv)
    splits, kinds = read_index(args.index)
    if not splits["val"]:
        splits["train"], splits["val"] = media.carve_val(splits["train"])
        print(f"no line has split val: {len(splits['val'])} of {len(splits['val']) + len(splits['train'])} train items become validation")
    classes = sorted({label for items in splits.values() for item in items for label in class_names(item)})
    print(f"{len(classes)} classes: {', '.join(classes[:50])}{', ...' if len(classes) > 50 else ''}")
    tokenizer = media.tokenizer(args) if "text" in kinds else None
    media.write_dataset(args, splits, kinds, classes, source=str(args.index), tokenizer=tokenizer)


if __name__ == "__main__":
    media.run(main)
