"""UPMC Food-101: 101 dishes, photos found on the web and the text they were
found with. 67,972 to train with, 22,716 to test.

    python -m prepare.food101 --source downloads/food101

Images lie in images/{train,test}/<class>/<file>.jpg. There are two kinds of
text, and they make two different tasks:

titles  texts/train_titles.csv and test_titles.csv, lines `file,title,class`
        without a header: the title of the page. Today's mirror has these
pages   texts_txt/<class>/<file>.txt: the text of the whole page. The original
        archive has these, but its server is gone

--text says which; by default titles, where they are there. A tenth of train
becomes validation.

The texts are stored twice: as token ids of BERT (text.npy) and of DeBERTa
(text.byte_bpe.npy). Both vocabularies are downloaded. With --tokenizer there
is one array only, with the ids of your own vocabulary.
"""
from pathlib import Path

from prepare import media, options, write
from prepare.media import Item

HELP = ("Food-101: download kaggle.com/datasets/gianmarco96/upmcfood101, "
        "unpack it to downloads/food101, then "
        "`python -m prepare.food101 --source downloads/food101` (writes 18 GB)")
PUBLISHED = {"train": 67972, "test": 22716}


def read_titles(source: Path, side: str) -> list[Item]:
    """Items of a list. A title may be empty or hold commas and quotes, so we read CSV."""
    path, items = source / f"texts/{side}_titles.csv", []
    for n, row in write.csv_rows(path):
        if len(row) != 3:
            raise ValueError(f"{path}, line {n}: expected file,title,class, "
                             f"found {len(row)} fields")
        name, title, label = row
        image = write.below(source / f"images/{side}", label, name)
        items.append(Item(Path(name).stem, label, {"visual": image, "text": title}))
    return write.number_repeats(items)


def read_pages(source: Path, side: str) -> list[Item]:
    """Items of a folder of images; the text of each lies in a file of its own."""
    items = []
    for image in sorted((source / f"images/{side}").glob("*/*.jpg")):
        label = image.parent.name
        page = source / f"texts_txt/{label}/{image.stem}.txt"
        items.append(Item(image.stem, label, {"visual": image, "text": page}))
    return items


def main(argv=None):
    p = options.parser(__doc__, "food101", frames=1, text=True)
    p.add_argument("--source", type=Path, default="downloads/food101",
                   help="the folder that holds images; default: %(default)s")
    p.add_argument("--text", choices=("titles", "pages"),
                   help="which texts; default: titles if they are there")
    args = options.parse(p, argv)

    text = args.text
    if not text:
        text = "titles" if (args.source / "texts").is_dir() else "pages"
    texts = "texts" if text == "titles" else "texts_txt"
    if not (args.source / "images").is_dir() or not (args.source / texts).is_dir():
        raise FileNotFoundError(f"no images/ and {texts}/ in {args.source}. {HELP}")
    print("text: titles of the pages" if text == "titles" else "text: whole pages")
    tokenizer, others = media.tokenizers(args, "bert_vocab")

    read = read_titles if text == "titles" else read_pages
    found = {side: read(args.source, side) for side in PUBLISHED}
    counts = {side: len(items) for side, items in found.items()}
    write.check_counts(counts, PUBLISHED, args.allow_missing)
    classes = write.all_classes(found)
    print(f"{len(classes)} classes (published 101): {classes[0]} ... {classes[-1]}")
    train, val = write.carve_val(found["train"])
    splits = {"train": train, "val": val, "test": found["test"]}
    kinds = {"visual": "image", "text": "text"}
    source = f"{args.source}; {text}"
    write.write_dataset(args, splits, kinds, classes, source, tokenizer, others)


if __name__ == "__main__":
    options.run(main)
