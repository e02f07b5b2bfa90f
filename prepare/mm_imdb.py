"""MM-IMDB: 25,959 films, poster and plot, 23 genres, several per film. 15,552 / 2,608 / 7,799 to train, validate and test.

    python -m prepare.mm_imdb --source downloads/mmimdb

Layout, as published: split.json and dataset/<id>.json, dataset/<id>.jpeg. Of the plots of a film the longest is taken, as GMU (Arevalo et
al. 2017) and MMBT do; tokens by DeBERTa's vocabulary (downloaded unless --tokenizer says otherwise). Genres stand in the order of their
frequency; the four rarest are dropped, as everybody does, the films that had them stay. A film left without a genre has a row of zeros.
"""
import json
from collections import Counter
from pathlib import Path

from prepare import media

HELP = ("MM-IMDB: `curl -LO https://archive.org/download/mmimdb/mmimdb.tar.gz`, unpack it to downloads/mmimdb, then "
        "`python -m prepare.mm_imdb --source downloads/mmimdb` (writes 5 GB)")
PUBLISHED = {"train": 15552, "val": 2608, "test": 7799}
# By frequency. Dropped: News (64 films), Adult (4), Talk-Show (2), Reality-TV (1).
GENRES = """Drama Comedy Romance Thriller Crime Action Adventure Horror Documentary Mystery Sci-Fi Fantasy Family Biography War History
    Music Animation Musical Western Sport Short Film-Noir""".split()


def read_film(folder: Path, film: str, dropped: Counter) -> media.Item:
    """A film whose .json is missing keeps the path of it as its text, and is counted as unreadable for that."""
    path, poster = folder / f"{film}.json", folder / f"{film}.jpeg"
    if not path.exists():
        return media.Item(film, [], {"visual": poster, "text": path})
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        dropped.update(g for g in info["genres"] if g not in GENRES)
        return media.Item(film, [g for g in info["genres"] if g in GENRES], {"visual": poster, "text": max(info["plot"], key=len)})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a list `genres` and a list `plot` ({error!r})") from None


def main(argv=None):
    p = media.parser(__doc__, "mm_imdb", frames=1, text=True)
    p.add_argument("--source", type=Path, default="downloads/mmimdb", help="the folder that holds split.json")
    args = media.parse(p, "mm_imdb", argv)
    if not (args.source / "split.json").exists() or not (args.source / "dataset").is_dir():
        raise FileNotFoundError(f"no split.json and dataset/ in {args.source}. {HELP}")
    tokenizer = media.tokenizer(args, "deberta_vocab")
    lists, dropped = json.loads((args.source / "split.json").read_text()), Counter()
    if not isinstance(lists, dict) or {"train", "dev", "test"} - lists.keys():
        raise ValueError(f"{args.source / 'split.json'}: expected lists of ids under train, dev and test")
    films = {"train": lists["train"], "val": lists["dev"], "test": lists["test"]}
    splits = {split: [read_film(args.source / "dataset", film, dropped) for film in films[split]] for split in films}
    media.check_counts({split: len(items) for split, items in splits.items()}, PUBLISHED, args.allow_missing)
    print("genres dropped: " + (", ".join(f"{genre} ({n})" for genre, n in dropped.most_common()) or "none"))
    media.write_dataset(args, splits, {"visual": "image", "text": "text"}, GENRES, f"{args.source}; longest plot", tokenizer)


if __name__ == "__main__":
    media.run(main)
