"""The tokenizers against recorded ids of the public implementations, and against naive versions of
each of their steps."""
import doctest
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from pretrained import tokenizer
from pretrained.tokenizer import BYTE_CHARACTERS, ByteBPE, WordPiece, load_tokenizer

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests/fixtures/encoders"
VOCAB_TXT = FIXTURES / "tokenizer_wordpiece/vocab.txt"
BPE = FIXTURES / "tokenizer_bpe"
VOCAB_JSON, MERGES_TXT, BPE_BIN = BPE / "vocab.json", BPE / "merges.txt", BPE / "bpe_encoder.bin"
FILES = {"wordpiece": [VOCAB_TXT], "bpe": [VOCAB_JSON, MERGES_TXT], "bpe_bin": [BPE_BIN]}

# Characters on both sides of every rule: kinds of spaces, contractions, numbers that are no digits,
# letters, symbols, invisible, broken.
TRICKY = (" \t\n\r\x0b\x1c\x85\xa0\u2003\u2028\u3000" "'strevmldSTA" "019²½Ⅷ٣一〇"
          "ab éÉe\u0301ßẞΣσςİǅÅ\u212b한か豈𠮷" ".,-_$^~`|¡«—…€°©"
          "\x00\x07\xad\u200b\ufeff\ufffd\ue000❤\ufe0f🍕")


@pytest.fixture(params=FILES)
def any_tokenizer(request):
    return load_tokenizer(*FILES[request.param])


def random_texts(alphabet: str, count: int = 3000, seed: int = 0):
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in range(count)]


# The whole: recorded ids

@pytest.mark.parametrize("files", FILES)
def test_recorded_ids(files):
    encode = load_tokenizer(*FILES[files]).encode
    cases = json.loads((FILES[files][0].parent / "cases.json").read_text())
    assert len(cases) == 40
    for case in cases:
        # One case spells out [SEP], which is plain text to us.
        ids = case.get("ids_specials_as_text", case["ids"])
        ids_len12 = case["ids_len12"] if ids == case["ids"] else ids[:11] + ids[-1:]
        assert encode(case["text"]) == ids, case["text"]
        assert encode(case["text"], max_length=12) == ids_len12, case["text"]


def test_the_docstrings_examples(monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, attempted = doctest.testmod(tokenizer)
    assert failed == 0 and attempted >= 10


def test_needs_no_torch():
    check = ("import sys; from pretrained import tokenizer;"
             " tokenizer.load_tokenizer(*sys.argv[1:]).encode('a');"
             " assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", check, VOCAB_JSON, MERGES_TXT], cwd=ROOT, check=True)


# WordPiece

@pytest.mark.parametrize("text, pieces", [
    ("", []),
    (" \t\n\r\u3000 ", []),
    # All dropped, half a surrogate pair too.
    ("\x00\x07\u200b\ufeff\ufffd\ud800", []),
    ("a" * 100, ["a"] + ["##a"] * 99),
    ("a" * 101, ["[UNK]"]),
    ("a" * 100 + " " + "a" * 101 + " dog", ["a"] + ["##a"] * 99 + ["[UNK]", "dog"]),
    # Counted without accents and punctuation.
    ("a" * 100 + "\u0301.", ["a"] + ["##a"] * 99 + ["."]),
    # A known beginning does not save the word.
    ("dog\u0928\u093e", ["[UNK]"]),
    # The capital does not know that it is the last, but a final sigma stays one.
    ("ΟΔΟΣ", ["ο", "##δ", "##ο", "##σ"]),
    ("οδος", ["ο", "##δ", "##ο", "##ς"]),
    # Python calls the first and the last of these spaces, BERT drops them; and the soft hyphen.
    ("do\x0bg do\u00adg do\x1cg", ["dog", "dog", "dog"]),
    ("dog\u2028dog\u00a0dog", ["dog", "dog", "dog"]),
    ("[SEP] [PAD]", ["[", "s", "##e", "##p", "]", "[", "p", "##a", "##d", "]"]),
    # Unassigned: no letter, but not dropped either.
    ("dog\U000e0080dog", ["[UNK]"]),
    # NFD, not NFKD: ² is not 2.
    ("x²+y", ["x", "##²", "+", "y"]),
])
def test_wordpiece_edges(text, pieces):
    assert WordPiece(VOCAB_TXT).tokenize(text) == pieces


def test_vocab_txt_ids_are_line_numbers(tmp_path):
    lines = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n\x85\n\u2028\ndog\n"     # 9 by splitlines()
    (tmp_path / "vocab.txt").write_text(lines, encoding="utf-8")
    assert WordPiece(tmp_path / "vocab.txt").encode("dog") == [2, 6, 3]
    assert WordPiece(tmp_path / "vocab.txt").vocab_size == 7


def naive_bert_words(text: str) -> list[str]:
    """The order of google-research/bert: clean the text, space out ideographs, split; then case,
    accents and punctuation word by word."""
    clean = "".join(" " if c in "\t\n\r" or unicodedata.category(c) == "Zs" else c for c in text
                    if c in "\t\n\r"
                    or not (c in "\0\ufffd"
                            or unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs")))
    ideographs = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
    clean = "".join(f" {c} " if unicodedata.name(c, "").startswith(ideographs) else c
                    for c in clean)
    words = []
    for word in clean.split():
        new = True
        for c in unicodedata.normalize("NFD", "".join(map(str.lower, word))):
            if unicodedata.category(c) == "Mn":
                continue
            if unicodedata.category(c).startswith("P") or c in "$+<=>^`|~":
                words.append(c)
                new = True
            else:
                words[len(words):] = [c] if new else [words.pop() + c]
                new = False
    return words


def test_bert_words_equal_the_naive_order_of_steps():
    words = WordPiece(VOCAB_TXT).words
    assigned = [chr(c) for c in (*range(0x2CEB0), *range(0x2F800, 0x2FA20))
                if unicodedata.category(chr(c)) != "Cn"]
    for text in random_texts(TRICKY) + [f"a{c}b {c}" for c in assigned]:
        assert words(text) == naive_bert_words(text), ascii(text)


def naive_wordpiece(vocab, word: str) -> list[str]:
    """Sort the vocabulary by length, take the first piece that fits, go on."""
    pieces, rest = [], word
    while rest:
        mark = "##" if pieces else ""
        fitting = [piece for piece in vocab
                   if (mark + rest).startswith(piece) and piece.startswith("##") == bool(pieces)]
        if not fitting:
            return ["[UNK]"]
        pieces.append(max(fitting, key=len))
        rest = rest[len(pieces[-1].removeprefix("##")):]
    return pieces


def test_wordpiece_takes_the_longest_piece():
    wordpiece = WordPiece(VOCAB_TXT)
    vocab = [piece for piece in wordpiece.vocab if not piece.startswith("[")]
    for word in filter(None, random_texts("coaffableckidnromsugps語", 500)):
        assert wordpiece.pieces(word) == naive_wordpiece(vocab, word), word


# Byte-level BPE

def test_byte_characters():
    assert len(set(BYTE_CHARACTERS)) == 256
    assert all(c.isprintable() and c != " " for c in BYTE_CHARACTERS)
    # As in the published vocabularies.
    assert [BYTE_CHARACTERS[byte] for byte in b" \nA\xff\xad"] == ["Ġ", "Ċ", "A", "ÿ", "Ń"]


def kind_of(c: str) -> str:
    """L, N, S or O: letter, number, white space (Unicode's White_Space: Z* and six control
    characters), other."""
    major = unicodedata.category(c)[0]
    return major if major in "LN" else "S" if major == "Z" or c in "\t\n\x0b\x0c\r\x85" else "O"


def naive_gpt2_words(text: str) -> list[str]:
    r"""One alternative after the other, by hand:

    `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    """
    contractions = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    kinds, words, start = [kind_of(c) for c in text], [], 0
    while start < len(text):
        contraction = next((c for c in contractions if text.startswith(c, start)), None)
        body = start + (text[start] == " " and start + 1 < len(text))
        if contraction:
            end = start + len(contraction)
        elif kinds[body] != "S":
            end = next((i for i in range(body, len(text)) if kinds[i] != kinds[body]), len(text))
        else:
            end = next((i for i in range(start, len(text)) if kinds[i] != "S"), len(text))
            end -= end < len(text) and end - start > 1
        words.append(text[start:end])
        start = end
    return words


def test_gpt2_words_equal_the_pattern_by_hand():
    words = ByteBPE(BPE_BIN).words
    contractions = [f"x{c}y" for c in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'x", "'S")]
    for text in contractions + random_texts(TRICKY) + random_texts(" '\nstre1."):
        assert list(words(text)) == naive_gpt2_words(text), ascii(text)


def test_stand_ins_are_of_the_same_kind():
    for c in map(chr, range(0x30000)):  # beyond are only ideographs and unassigned characters
        stand_in = tokenizer.gpt2_stand_in(c)
        assert stand_in.isascii() and kind_of(stand_in) == kind_of(c), ascii(c)
        assert stand_in == c or stand_in not in "' strevmld"  # what the pattern names it must mean


def naive_bpe(rank, word: bytes) -> list[str]:
    """Merge one pair at a time, the one of lowest rank, the leftmost of these."""
    pieces = [BYTE_CHARACTERS[byte] for byte in word]
    while pairs := [(rank[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:]))
                    if pair in rank]:
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def test_bpe_merges_equal_one_at_a_time():
    bpe = ByteBPE(BPE_BIN)
    merged = 0
    every_byte = "".join(map(chr, range(256)))
    words = (random_texts("coked thainxzyegr", 2000) + random_texts("ax", 300)
             + random_texts(every_byte, 1000))
    for word in words:
        assert bpe.pieces(word) == naive_bpe(bpe.rank, word.encode()), word
        merged += len(word.encode()) - len(bpe.pieces(word))
    assert merged > 5_000  # so there was something to compare


@pytest.mark.parametrize("text, pieces", [
    ("", []),
    (" ", ["Ġ"]),
    ("   a", ["Ġ", "Ġ", "Ġa"]),              # the last space goes with the word
    ("\na", ["Ċ", "a"]),                     # a line break does not
    ("the the", ["the", "Ġthe"]),            # so the first word and the second differ
    ("it's IT'S", ["i", "t", "'s", "Ġ", "I", "T", "'", "S"]),  # contractions are lower-case
    ("\ud800", ["?"]),                       # half a surrogate pair
    ("[SEP]", ["[", "S", "E", "P", "]"]),
])
def test_bpe_edges(text, pieces):
    assert ByteBPE(BPE_BIN).tokenize(text) == pieces


def test_bpe_spells_every_string():
    byte_of = {c: byte for byte, c in enumerate(BYTE_CHARACTERS)}
    bpe = ByteBPE(BPE_BIN)
    for text in random_texts(TRICKY, 500):
        assert bytes(byte_of[c] for piece in bpe.tokenize(text) for c in piece).decode() == text


def test_both_forms_of_the_bpe_files_agree():
    bpe, from_bin = ByteBPE(VOCAB_JSON, MERGES_TXT), ByteBPE(BPE_BIN)
    assert ((bpe.fingerprint, bpe.vocab, bpe.rank)
            == (from_bin.fingerprint, from_bin.vocab, from_bin.rank))
    assert bpe.vocab_size == from_bin.vocab_size == 521
    for text in random_texts(TRICKY, 500):
        assert bpe.encode(text) == from_bin.encode(text)


def test_bpe_encoder_bin_with_filler_rows(tmp_path):
    """The public file has rows that are no GPT-2 id, which take up ids all the same."""
    file = torch.load(BPE_BIN, weights_only=True)
    file["dict_map"].append(("madeupword0000", 0))
    torch.save(file, tmp_path / "bpe_encoder.bin")
    bpe, filled = ByteBPE(BPE_BIN), ByteBPE(tmp_path / "bpe_encoder.bin")
    assert filled.vocab_size == bpe.vocab_size + 1
    assert (filled.fingerprint, filled.vocab) == (bpe.fingerprint, bpe.vocab)  # no text leads to it


# What both share

def test_truncation_at_the_border(any_tokenizer):
    text = "the dog. " * 6
    full = any_tokenizer.encode(text)
    for max_length in range(2, len(full) + 3):
        expected = (full if max_length >= len(full)
                    else full[: max_length - 1] + [any_tokenizer.sep_id])
        assert any_tokenizer.encode(text, max_length) == expected
    for pieces, length in [(509, 511), (510, 512), (511, 512), (10_000, 512)]:
        assert len(any_tokenizer.encode(" 1" * pieces)) == length
    seen = any_tokenizer._cached_ids.cache_info().misses
    any_tokenizer.encode(" ".join(map(str, range(10_000, 20_000))))
    # What is cut off is not looked at.
    assert any_tokenizer._cached_ids.cache_info().misses <= seen + 512
    with pytest.raises(ValueError, match="max_length is 1"):
        any_tokenizer.encode(text, 1)


def test_specials_in_the_text_are_text(any_tokenizer):
    ids = any_tokenizer.encode("[CLS] [SEP] [PAD] [UNK]")
    specials = (any_tokenizer.cls_id, any_tokenizer.sep_id, any_tokenizer.pad_id)
    assert [ids.count(special) for special in specials] == [1, 1, 0]


def test_nothing_crashes(any_tokenizer):
    # Around and in the surrogates.
    for text in random_texts("".join(map(chr, range(0xD7F0, 0xE010))) + TRICKY, 500):
        ids = any_tokenizer.encode(text)
        assert 2 <= len(ids) <= 512 and all(0 <= id < any_tokenizer.vocab_size for id in ids)


def test_cache_is_bounded_and_changes_nothing(any_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 5)
    small = load_tokenizer(*FILES["wordpiece" if any_tokenizer.kind == "wordpiece" else "bpe"])
    texts = random_texts("the cooked", 300)
    assert [small.encode(text) for text in texts] == [any_tokenizer.encode(text) for text in texts]
    assert (small._cached_ids.cache_info().currsize == 5
            < any_tokenizer._cached_ids.cache_info().currsize)
    before = any_tokenizer._cached_ids.cache_info()
    any_tokenizer.encode("x" * 5000)
    assert any_tokenizer._cached_ids.cache_info() == before  # long words are not kept


def test_load_tokenizer_and_its_errors(tmp_path):
    assert (isinstance(load_tokenizer(VOCAB_TXT), WordPiece)
            and load_tokenizer(VOCAB_TXT).kind == "wordpiece")
    assert isinstance(load_tokenizer(MERGES_TXT, str(VOCAB_JSON)), ByteBPE)
    assert load_tokenizer(BPE_BIN).kind == "byte_bpe"
    bad = {name: tmp_path / name
           for name in ("a.json", "list.json", "latin.txt", "m.txt", "b.bin", "pad.txt")}
    bad["a.json"].write_text("{")
    bad["list.json"].write_text('["a"]')
    bad["latin.txt"].write_bytes(b"caf\xe9")
    bad["m.txt"].write_text("#version: 0.2\na b\nabc\n")
    bad["b.bin"].write_bytes(b"junk")
    bad |= {name: tmp_path / name for name in ("deep.json", "far.json", "under.json", "gap.txt")}
    ids = json.loads(VOCAB_JSON.read_text(encoding="utf-8"))
    bad["deep.json"].write_text('{"x":' * 100_000)
    bad["far.json"].write_text(json.dumps(ids | {"x": 2 ** 31}))
    bad["under.json"].write_text(json.dumps(ids | {"x": -1}))
    bad["gap.txt"].write_text("#version: 0.2\n a\n")
    bad["pad.txt"].write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.bin")
    for paths, error, message in [
        ([], ValueError, "got none"),
        ([VOCAB_JSON], ValueError, "got .*vocab.json"),
        ([VOCAB_TXT, VOCAB_TXT], ValueError, "tokenizer files are"),
        ([tmp_path / "vocab.txt"], FileNotFoundError, "no tokenizer file .*vocab.txt"),
        ([tmp_path / "x.json", MERGES_TXT], FileNotFoundError, "no tokenizer file .*x.json"),
        ([MERGES_TXT], ValueError, r"'\[PAD\]' and 3 more pieces are missing"),
        ([VOCAB_JSON, VOCAB_TXT], ValueError, r"'\[PAD\]' is no merge"),
        ([VOCAB_JSON, bad["m.txt"]], ValueError, "'abc' is no merge"),
        ([bad["a.json"], MERGES_TXT], ValueError, "not JSON"),
        ([bad["list.json"], MERGES_TXT], ValueError, "expected one JSON object"),
        ([bad["deep.json"], MERGES_TXT], ValueError, "deep.json: not JSON"),
        ([bad["far.json"], MERGES_TXT], ValueError, "far.json .*: its ids go from 0 to 2147483648"),
        ([bad["under.json"], MERGES_TXT], ValueError, "under.json .*: its ids go from -1 to"),
        ([VOCAB_JSON, bad["gap.txt"]], ValueError, "' a' is no merge"),
        ([bad["latin.txt"]], ValueError, "not UTF-8"),
        ([bad["b.bin"]], ValueError, "not DeBERTa's bpe_encoder.bin"),
        ([tmp_path / "model.bin"], ValueError, "not DeBERTa's bpe_encoder.bin"),
        ([bad["pad.txt"]], ValueError, r"\[PAD\] is id 3"),
    ]:
        with pytest.raises(error, match=message) as raised:
            load_tokenizer(*paths)
        assert "\n" not in str(raised.value)
    (tmp_path / "merges.txt").write_text("q q\n")
    with pytest.raises(ValueError, match="'qq' and 0 more pieces are missing"):
        ByteBPE(VOCAB_JSON, tmp_path / "merges.txt")


def test_fingerprint_tells_apart_whatever_changes_ids(tmp_path):
    lines = VOCAB_TXT.read_text(encoding="utf-8").split("\n")
    merges = MERGES_TXT.read_text(encoding="utf-8").split("\n")
    (tmp_path / "same.txt").write_bytes("\r\n".join(lines).encode())  # saved on Windows
    lines[20:22] = lines[21:19:-1]
    merges[8:10] = merges[9:7:-1]
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    assert (load_tokenizer(tmp_path / "same.txt").fingerprint
            == load_tokenizer(VOCAB_TXT).fingerprint)
    fingerprints = {load_tokenizer(*paths).fingerprint for paths in (
        [VOCAB_TXT], [tmp_path / "vocab.txt"], [VOCAB_JSON, MERGES_TXT],
        [VOCAB_JSON, tmp_path / "merges.txt"])}
    assert len(fingerprints) == 4 and all(len(fingerprint) == 12 for fingerprint in fingerprints)
