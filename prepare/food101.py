"""UPMC Food-101: 101 dishes, photos found on the web and the text they were found with. 67,972 to train with, 22,716 to test.

    python -m prepare.food101 --source downloads/food101

Images lie in images/{train,test}/<class>/<file>.jpg. Two texts are about, and they are two different tasks:
titles  texts/train_titles.csv and test_titles.csv, no header, `file,title,class`: the page's title. Today's mirror has these
pages   texts_txt/<class>/<file>.txt, the text of the whole page, from the original archive, whose server is gone
--text says which; by default titles where they are there. Tokens by BERT's vocabulary (downloaded unless --tokenizer says otherwise).
A tenth of train becomes validation.
"""
import csv
from pathlib import Path

from prepare import media

HELP = ("Food-101: download kaggle.com/datasets/gianmarco96/upmcfood101, unpack it to downloads/food101, then "
        "`python -m prepare.food101 --source downloads/food101` (writes 18 GB)")
PUBLISHED = {"train": 67972, "test": 22716}


def read_titles(path: Path, images: Path) -> list[media.Item]:
    """Items of a headerless list. A title may be empty or hold commas and quotes, so this is for a CSV reader."""
    items = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        for n, row in enumerate(csv.reader(file), 1):
            if len(row) != 3:
                raise ValueError(f"{path}, line {n}: expected file,title,class, found {len(row)} fields")
            items.append(media.Item(Path(row[0]).stem, row[2], {"visual": images / row[2] / row[0], "text": row[1]}))
    return media.number_repeats(items)


def main(argv=None):
    p = media.parser(__doc__, "food101", frames=1, text=True)
    p.add_argument("--source", type=Path, default="downloads/food101", help="the folder that holds images")
    p.add_argument("--text", choices=("titles", "pages"), help="which texts; default: titles if they are there")
    args = media.parse(p, "food101", argv)
    text = args.text or ("titles" if (args.source / "texts").is_dir() else "pages")
    if not (args.source / "images").is_dir() or not (args.source / ("texts" if text == "titles" else "texts_txt")).is_dir():
        raise FileNotFoundError(f"no images/ and {'texts/' if text == 'titles' else 'texts_txt/'} in {args.source}. {HELP}")
    print({"titles": "text: titles of the pages", "pages": "text: whole pages"}[text])
    tokenizer = media.tokenizer(args, "bert_vocab")
    if text == "titles":
        splits = {side: read_titles(args.source / f"texts/{side}_titles.csv", args.source / f"images/{side}") for side in PUBLISHED}
    else:
        splits = {side: [media.Item(f.stem, f.parent.name, {"visual": f, "text": args.source / f"texts_txt/{f.parent.name}/{f.stem}.txt"})
                         for f in sorted((args.source / f"images/{side}").glob("*/*.jpg"))] for side in PUBLISHED}
    media.check_counts({side: len(items) for side, items in splits.items()}, PUBLISHED, args.allow_missing)
    classes = sorted({item.label for items in splits.values() for item in items})
    print(f"{len(classes)} classes (published 101): {classes[0]} ... {classes[-1]}")
    train, val = media.carve_val(splits["train"])
    splits = {"train": train, "val": val, "test": splits["test"]}
    media.write_dataset(args, splits, {"visual": "image", "text": "text"}, classes, f"{args.source}; {text}", tokenizer)


if __name__ == "__main__":
    media.run(main)
