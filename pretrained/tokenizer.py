"""Text to token ids: BERT's WordPiece, and GPT-2's byte-level BPE as DeBERTa v1 uses it.

Both take the same three steps, and each step is a method to call and look at:

    words(text)     cut the text into words, by fixed rules
    pieces(word)    cut one word into pieces of the vocabulary, which was learned from much text
    encode(text)    look up the ids of the pieces, cut to `max_length`, add [CLS] and [SEP]

They differ in a word that nobody has seen. WordPiece builds it from known pieces; if a character
has no piece, the word becomes [UNK]. Byte-level BPE starts from the 256 bytes. These spell every
string there is, emoji too, so [UNK] never occurs. (torch only opens one of the file formats.)
"""
import functools
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")

# Words to remember, and of how many characters at most: 15 MB of English, 100 MB at worst.
CACHED_WORDS, CACHED_LENGTH = 2**16, 32
MOST_IDS = 2**24     # far more than any vocabulary has


class Tokenizer:
    """What the two share: ids, truncation, and a cache (a few thousand words are most of a text).

    kind         "wordpiece" or "byte_bpe"
    vocab        piece -> id, for all that `encode` can produce
    vocab_size   rows that an embedding table needs
    pad_id       0: encoders take `ids != 0` for the attention mask
    fingerprint  12 hexadecimal digits of SHA-256, over all that decides an id. Ids of another
                 vocabulary are nonsense to an encoder, but cause no error. So prepared data
                 record which tokenizer made them.
    """

    def __init__(self, kind: str, file: str | Path, ids: dict[str, int], producible: Iterable[str],
                 merges: Iterable[tuple[str, str]] = ()):
        known = [*SPECIAL_TOKENS, *producible]
        missing = [piece for piece in known if piece not in ids]
        if missing:
            raise ValueError(f"{file}: {missing[0]!r} and {len(missing) - 1} more pieces are"
                             f" missing; is it the vocabulary of this {kind}?")
        largest = max(ids.values())
        if min(ids.values()) < 0 or largest >= MOST_IDS:
            raise ValueError(f"{file}: its ids go from {min(ids.values())} to {largest}; no"
                             " embedding table has such rows")
        if ids["[PAD]"] != 0:
            raise ValueError(f"{file}: [PAD] is id {ids['[PAD]']},"
                             " but prepared data are padded with 0")
        self.kind = kind
        self.vocab = {piece: ids[piece] for piece in known}
        self.vocab_size = largest + 1
        self.pad_id, self.cls_id, self.sep_id = (ids[token] for token in SPECIAL_TOKENS[:3])
        rows = sorted(f"{id} {piece}" for piece, id in self.vocab.items())
        lines = [kind, *rows, *map(" ".join, merges)]
        self.fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
        self._cached_ids = functools.lru_cache(CACHED_WORDS)(self._ids)

    def _ids(self, word: str) -> tuple[int, ...]:
        return tuple(self.vocab[piece] for piece in self.pieces(word))

    def tokenize(self, text: str) -> list[str]:
        """All pieces of `text`, to look at: no special tokens, not truncated."""
        return [piece for word in self.words(text) for piece in self.pieces(word)]

    def encode(self, text: str, max_length: int = 512) -> list[int]:
        """The ids of [CLS], the first `max_length` - 2 pieces, [SEP]; not padded.

        "[SEP]" written in the text is text like any other. Raises ValueError when `max_length`
        leaves no room for the two special tokens.
        """
        if max_length < 2:
            raise ValueError(f"max_length is {max_length}, but [CLS] and [SEP] alone take 2")
        ids = []
        room = max_length - 2
        for word in self.words(text):
            if len(ids) >= room:
                break
            ids += self._cached_ids(word) if len(word) <= CACHED_LENGTH else self._ids(word)
        return [self.cls_id, *ids[:room], self.sep_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, to look at. [PAD], [CLS] and [SEP] are left out; the text is what
        `encode` saw of it: of WordPiece without case and accents, with a space around each word."""
        of_id = {id: piece for piece, id in self.vocab.items()}
        left_out = (self.pad_id, self.cls_id, self.sep_id)
        return self.join([of_id.get(id, "[UNK]") for id in ids if id not in left_out])


class CharacterTable(dict):
    """A table for `str.translate` that asks `rule(character)` once for each character it meets.

    Unicode has a million characters, a data set some hundreds.
    """

    def __init__(self, rule):
        self.rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]


# ---- WordPiece ----

MAX_WORD = 100  # characters; BERT takes a longer word for noise, one [UNK]

# Chinese characters (and Japanese kanji) stand without spaces, so each is a word of its own.
# Kana and Hangul are not among them.
IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
              (0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F))


def bert_character(c: str) -> str:
    """What becomes of a character of lower-cased, decomposed text.

    It becomes a space, or nothing, or a word of its own, or it stays as it is.
    """
    category = unicodedata.category(c)
    if c in "\t\n\r" or category[0] == "Z":
        return " "
    # These go: control (Cc), zero-width (Cf) and private characters (Co), halves of surrogate pairs
    # (Cs), accents (Mn), and U+FFFD, which a decoder leaves where it failed. Unassigned ones (Cn)
    # stay and end in [UNK]. An old Python calls new emoji unassigned: ids must not depend on that.
    if category in ("Cc", "Cf", "Co", "Cs", "Mn") or c == "\ufffd":
        return ""
    # To BERT, all ASCII but letters and digits is punctuation: so are $ + < = > ^ ` | ~, which
    # Unicode calls symbols. The euro sign, no ASCII, is not.
    is_punctuation = category[0] == "P" or (c.isascii() and not c.isalnum())
    if is_punctuation or any(first <= ord(c) <= last for first, last in IDEOGRAPHS):
        return f" {c} "
    return c


class WordPiece(Tokenizer):
    """BERT's tokenizer, uncased: words without case and accents, cut into the longest known pieces.

    A piece that continues a word is marked with ##. So the word "ing" and the ending "##ing" have
    an embedding each.

    >>> tokenizer = WordPiece("tests/fixtures/encoders/tokenizer_wordpiece/vocab.txt")
    >>> tokenizer.words("Crème, re-cooking")      # è is e and an accent, and the accent goes
    ['creme', ',', 're', '-', 'cooking']
    >>> tokenizer.pieces("cooking")               # "cooking", "cookin", "cooki" are no pieces
    ['cook', '##ing']
    >>> tokenizer.encode("Crème, re-cooking")     # [CLS] creme , re - cook ##ing [SEP]
    [6, 278, 20, 276, 21, 273, 297, 7]

    `vocab_txt`: one piece a line, its id is the number of the line, from 0 (`vocab.txt` of
    google-bert/bert-base-uncased has 30522 lines). Raises FileNotFoundError, or ValueError when
    the file is no such vocabulary. Source: google-research/bert, `tokenization.py`.
    """

    def __init__(self, vocab_txt: str | Path):
        # Not splitlines(): it also cuts at rare characters that may be pieces.
        pieces = _read(vocab_txt).rstrip("\n").split("\n")
        ids = {piece: id for id, piece in enumerate(pieces)}
        super().__init__("wordpiece", vocab_txt, ids, producible=ids)
        self.characters = CharacterTable(bert_character)

    def words(self, text: str) -> list[str]:
        # One letter's lower case depends on its place in the word: capital sigma is ς at the end.
        # Python follows that rule, huggingface/tokenizers does not. Nor do we.
        lower = text.replace("Σ", "σ").lower()
        decomposed = unicodedata.normalize("NFD", lower)
        return decomposed.translate(self.characters).split()

    def pieces(self, word: str) -> list[str]:
        if len(word) > MAX_WORD:
            return ["[UNK]"]
        pieces = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(len(word), start, -1):  # the longest first
                if mark + word[start:end] in self.vocab:
                    break
            else:
                return ["[UNK]"]  # for the whole word, not only for its rest
            pieces.append(mark + word[start:end])
            start = end
        return pieces

    def join(self, pieces: list[str]) -> str:
        return " ".join(pieces).replace(" ##", "")


# ---- Byte-level BPE ----

def _byte_characters() -> list[str]:
    """A visible character for each byte, so that a vocabulary can be a text file.

    It is the byte's own character if that is visible, else the next one from U+0100 (space: Ġ).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}  # ! - ~, ¡ - ¬, ® - ÿ
    others = itertools.count(0x100)
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()

# GPT-2's pattern asks of a character: a letter, a number, white space, or anything else? Python's
# `re` can ask that of ASCII only, so it looks at stand-ins (see below).
# A space goes with the word after it. Of several spaces the last one does; those before it are a
# word, \s+(?!\S).
GPT2_PATTERN = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def gpt2_stand_in(c: str) -> str:
    """An ASCII character of the same kind as `c`."""
    if c.isascii():
        return c
    if c.isalpha():
        return "A"  # a capital: no contraction ('s, 't, ...) has one
    if c.isnumeric():
        return "0"
    if c.isspace():
        return "\n"  # not " ": other white space never joins the word after it
    return "!"


class ByteBPE(Tokenizer):
    """GPT-2's byte-level byte-pair encoding, with DeBERTa's ids. Case and spaces are kept.

    It merges the bytes of a word, pair by pair, in the order of `rank`. That is the order in which
    the pairs were learned, the most frequent first. So a frequent word ends as one piece, a rare
    one as several.

    >>> tokenizer = ByteBPE("tests/fixtures/encoders/tokenizer_bpe/bpe_encoder.bin")
    >>> list(tokenizer.words("She's cooked  crème"))     # of two spaces, the first is a word
    ['She', "'s", ' cooked', ' ', ' crème']
    >>> [tokenizer.rank[pair] for pair in [("k", "e"), ("c", "o"), ("ke", "d")]]
    [28, 42, 82]
    >>> tokenizer.pieces("cooked")    # c o o k e d -> c o o ke d -> co o ke d -> co o ked
    ['co', 'o', 'ked']
    >>> tokenizer.pieces(" café")     # Ġ is the space; é is two bytes, C3 A9, here one piece
    ['Ġcaf', 'Ã©']
    >>> tokenizer.encode("cooked café")                  # [CLS] co o ked Ġcaf Ã© [SEP]
    [1, 130, 417, 296, 42, 39, 2]

    Either `ByteBPE(vocab_json, merges_txt)` or `ByteBPE(bpe_encoder_bin)`. All three files are in
    microsoft/deberta-base; both ways give the same ids and the same fingerprint. Raises
    FileNotFoundError, or ValueError when files are none of this or do not belong together.
    Source: openai/gpt-2, `encoder.py`; microsoft/DeBERTa, `gpt2_tokenizer.py`.
    """

    def __init__(self, vocab: str | Path, merges: str | Path | None = None):
        files = vocab
        if merges is None:
            ids, pairs = _read_bpe_encoder(vocab)
        else:
            ids, pairs = _read_vocab_and_merges(vocab, merges)
            files = f"{vocab} with {merges}"
        # The files also name pieces that no text leads to ("<|endoftext|>"). The two forms of the
        # files may differ in these, so they are left out.
        producible = [*BYTE_CHARACTERS, *(left + right for left, right in pairs)]
        super().__init__("byte_bpe", files, ids, producible, pairs)
        self.rank = {pair: rank for rank, pair in enumerate(pairs)}
        self.stand_ins = CharacterTable(gpt2_stand_in)

    def words(self, text: str) -> Iterable[str]:
        # One stand-in for one character: so a match's position is its position in `text`, too.
        for match in GPT2_PATTERN.finditer(text.translate(self.stand_ins)):
            yield text[match.start():match.end()]

    def pieces(self, word: str) -> list[str]:
        word_bytes = word.encode("utf-8", errors="replace")  # half a surrogate pair has none: "?"
        pieces = [BYTE_CHARACTERS[byte] for byte in word_bytes]
        while len(pieces) > 1:
            pairs = zip(pieces, pieces[1:])
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            merged = []
            for piece in pieces:  # join the pair wherever it occurs, from the left
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        return pieces

    def join(self, pieces: list[str]) -> str:
        # A character may be cut after some of its bytes, at the end of a text.
        spelt = [c for piece in pieces for c in piece if c in BYTE_CHARACTERS]
        return bytes(map(BYTE_CHARACTERS.index, spelt)).decode("utf-8", errors="replace")


# ---- Files ----

def load_tokenizer(*paths: str | Path) -> Tokenizer:
    """The tokenizer that these files are for.

    One .txt is WordPiece. One .json and one .txt, in any order, or one .bin, is ByteBPE.
    Raises FileNotFoundError or ValueError, with one line that says what is wrong.
    """
    paths = sorted(map(Path, paths), key=lambda path: path.suffix)
    kinds = {(".txt",): WordPiece, (".json", ".txt"): ByteBPE, (".bin",): ByteBPE}
    kind = kinds.get(tuple(path.suffix for path in paths))
    if kind is None:
        raise ValueError("tokenizer files are vocab.txt (BERT), or vocab.json with merges.txt,"
                         " or bpe_encoder.bin (DeBERTa);"
                         f" got {' '.join(map(str, paths)) or 'none'}")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer file {path}: get it from huggingface.co,"
                                    " where it stands beside the encoder's weights")
    return kind(*paths)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text, so not a vocabulary") from None


def _read_vocab_and_merges(vocab_json: str | Path, merges_txt: str | Path):
    """(piece -> id, the merges in the order of their ranks)"""
    try:
        ids = json.loads(_read(vocab_json))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{vocab_json}: not JSON, {error}") from None
    if not isinstance(ids, dict) or not all(type(id) is int for id in ids.values()):
        raise ValueError(f"{vocab_json}: expected one JSON object, piece to id")
    pairs = []
    for line in _read(merges_txt).rstrip("\n").split("\n"):
        if line.startswith("#version"):
            continue
        pair = tuple(line.split(" "))
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{merges_txt}: {line!r} is no merge,"
                             " which is two pieces with a space between")
        pairs.append(pair)
    return ids, pairs


def _read_bpe_encoder(path: str | Path):
    """(piece -> id, the merges in the order of their ranks)

    The file is a dict. `encoder`: piece -> GPT-2's id. `dict_map`: rows (GPT-2's id as a string,
    count) in the order of DeBERTa's ids. `vocab`: the merges.
    """
    import torch  # here and not above: it takes seconds, and nothing else needs it

    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        gpt2 = {str(id): piece for piece, id in file["encoder"].items()}
        # The order is RoBERTa's, which rounds its table up with rows that are no GPT-2 id
        # ("madeupword0000"). These keep their name.
        pieces = [gpt2.get(row, row) for row, count in file["dict_map"]]
        pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *pieces, "[MASK]"]
        pairs = [(left, right) for left, right in file["vocab"]]
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load alone raises half a dozen kinds
        kind = type(error).__name__
        raise ValueError(f"{path}: not DeBERTa's bpe_encoder.bin ({kind})") from None
    return {piece: id for id, piece in enumerate(pieces)}, pairs
