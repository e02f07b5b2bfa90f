"""MM-IMDB: 25,959 films, poster and plot, 23 genres, several per film.
15,552 films to train, 2,608 to validate, 7,799 to test.

    python -m prepare.mm_imdb --source downloads/mmimdb

Layout, as published: split.json and dataset/<id>.json, dataset/<id>.jpeg.
Some films have several plots; the longest is taken, as GMU (Arevalo et al.
2017) and MMBT do.

Genres are in the order of their frequency. The four rarest genres are dropped,
as everybody does, but their films stay. A film that is left without a genre
has a row of zeros.

The plots are stored twice: as token ids of DeBERTa (text.npy) and of BERT
(text.wordpiece.npy). Both vocabularies are downloaded. With --tokenizer there
is one array only, with the ids of your own vocabulary.
"""
import json
from collections import Counter
from pathlib import Path

from prepare import media, options, write
from prepare.media import Item

HELP = ("MM-IMDB: `curl -LO https://archive.org/download/mmimdb/mmimdb.tar.gz`, "
        "unpack it to downloads/mmimdb, then "
        "`python -m prepare.mm_imdb --source downloads/mmimdb` (writes 5 GB)")
PUBLISHED = {"train": 15552, "val": 2608, "test": 7799}
# By frequency. Dropped: News (64 films), Adult (4), Talk-Show (2), Reality-TV (1).
GENRES = """Drama Comedy Romance Thriller Crime Action Adventure Horror Documentary Mystery Sci-Fi
    Fantasy Family Biography War History Music Animation Musical Western Sport Short
    Film-Noir""".split()


def read_film(folder: Path, film: str, dropped: Counter) -> Item:
    """One film; the genres that are dropped are counted in `dropped`.

    Where the .json is missing or broken, an error stands for the text: the film is unreadable.
    """
    path, poster = write.below(folder, f"{film}.json"), write.below(folder, f"{film}.jpeg")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        genres, plots = info["genres"], info["plot"]
        if not isinstance(genres, list) or not isinstance(plots, list):
            raise TypeError("no lists")
        plot = max(plots, key=len)
    except FileNotFoundError as error:
        return Item(film, [], {"visual": poster, "text": error})
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        why = ValueError(f"{path}: expected JSON with a list `genres` and a list `plot` "
                         f"({error!r})")
        return Item(film, [], {"visual": poster, "text": why})
    dropped.update(genre for genre in genres if genre not in GENRES)
    label = [genre for genre in genres if genre in GENRES]
    return Item(film, label, {"visual": poster, "text": plot})


def main(argv=None):
    p = options.parser(__doc__, "mm_imdb", frames=1, text=True)
    p.add_argument("--source", type=Path, default="downloads/mmimdb",
                   help="the folder that holds split.json; default: %(default)s")
    args = options.parse(p, argv)

    folder, split_file = args.source / "dataset", args.source / "split.json"
    if not split_file.exists() or not folder.is_dir():
        raise FileNotFoundError(f"no split.json and dataset/ in {args.source}. {HELP}")
    tokenizer, others = media.tokenizers(args, "deberta_vocab")
    try:
        lists = json.loads(write.read_list(split_file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{split_file} is no JSON ({error})") from None
    if not isinstance(lists, dict) or not all(
            isinstance(lists.get(name), list) for name in ("train", "dev", "test")):
        raise ValueError(f"{split_file}: expected lists of ids under train, dev and test")

    dropped = Counter()
    splits = {}
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        splits[split] = [read_film(folder, str(film), dropped) for film in lists[name]]
    counts = {split: len(items) for split, items in splits.items()}
    write.check_counts(counts, PUBLISHED, args.allow_missing)
    names = ", ".join(f"{genre} ({n})" for genre, n in dropped.most_common())
    print(f"genres dropped: {names or 'none'}")
    kinds = {"visual": "image", "text": "text"}
    source = f"{args.source}; longest plot"
    write.write_dataset(args, splits, kinds, GENRES, source, tokenizer, others)


if __name__ == "__main__":
    options.run(main)
