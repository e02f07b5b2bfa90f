"""Fingerprints: which code made a run, and on which data.

A run keeps both in its config.json. When the loss in `lora.py` is edited, or the data are prepared
anew, the old run no longer answers the command that made it, and the training scripts say so.

Code is compared by its syntax tree, without comments and docstrings: a comment costs nobody a run.
"""
import ast
import functools
import hashlib
import json
import platform
from pathlib import Path

from data import read_json

VERSION = 1                                           # of this file's way to compute fingerprints
PROJECT = Path(__file__).resolve().parents[1]

# Read when the program starts. A file that is edited while it runs is not the code that runs.
SOURCES = {path: path.read_bytes() for path in [*PROJECT.glob("*.py"), *PROJECT.glob("*/*.py")]}

# The encoders reach a script through the harness, so they are added by hand.
ALWAYS = [PROJECT / "encoders.py"]

# These do not change what a training run computes from its settings (drop path and an encoder's
# sizes, which models.py applies, are settings). The models of step 1 stand in the settings of a
# joint run, by their hash.
NOT_THE_METHOD = {"harness/arguments.py", "harness/runs.py", "harness/models.py",
                  "harness/report.py", "harness/fingerprint.py", "harness/files.py",
                  "harness/stored.py", "harness/calibration.py", "harness/compare.py",
                  "train_unimodal.py", "train_joint.py", "evaluate.py"}
NOT_THE_METHOD_FOLDERS = {"paper", "prepare", "pretrained"}


# ---- Code ----

def of_code(script: str) -> dict[str, str]:
    """The script and the files of this project that it imports for the method: path -> hash."""
    wanted, found = [Path(script).resolve(), *ALWAYS], {}
    while wanted:
        path = wanted.pop()
        name = relative(path)
        if name not in found:
            found[name] = hash_of_code(path)
            for other in imports(path):
                if not is_not_the_method(relative(other)):
                    wanted.append(other)
    return dict(sorted(found.items()))


def is_not_the_method(name: str) -> bool:
    return name in NOT_THE_METHOD or name.split("/")[0] in NOT_THE_METHOD_FOLDERS


def relative(path: Path) -> str:
    if path.is_relative_to(PROJECT):
        return path.relative_to(PROJECT).as_posix()
    return str(path)


@functools.cache
def tree_of(path: Path) -> ast.Module | None:
    """The syntax tree of a file as it was when the program started, without its docstrings.

    None where there is no such file, or no Python in it.
    """
    source = SOURCES.get(path)
    if source is None and path.exists():
        source = path.read_bytes()
    try:
        tree = ast.parse(source or b"(")
    except SyntaxError:
        return None
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


@functools.cache
def hash_of_code(path: Path) -> str:
    tree = tree_of(path)
    if tree is None:
        return "none"
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


@functools.cache
def imports(path: Path) -> list[Path]:
    """The files of this project that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(tree_of(path) or ast.Module([], [])):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level > 0:                            # from . import x
                base = [path.parent.name, *base]
            base = ".".join(base)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    files = []
    for name in names:
        place = PROJECT / name.replace(".", "/")
        files += [place.with_suffix(".py"), place / "__init__.py"]
    return [file for file in files if file in SOURCES]


# ---- Data ----

WHOLE = 256 * 2 ** 20                                 # bytes: larger arrays are not read whole


@functools.cache
def of_data(folder: Path) -> str:
    """Hash of a prepared data set: what its dataset.json says of the data, and its arrays.

    For a large array it takes the hash that `prepare` wrote into dataset.json. Where nobody wrote
    one (arrays made by hand) it reads 64 blocks of 1 MiB, evenly spaced.
    """
    info = read_json(folder / "dataset.json")
    keys = ("classes", "multilabel", "modalities", "groups", "sample_groups", "tokenizer",
            "other_tokenizers")
    told = {key: info.get(key) for key in keys}
    total = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for file in sorted([*folder.glob("*/*.npy"), *folder.glob("*/ids.txt")]):
        name = file.relative_to(folder).as_posix()
        total.update(f"{name} {file.stat().st_size} ".encode())
        if file.stat().st_size <= WHOLE:
            total.update(sha256(file).encode())
        elif name in (info.get("sha256") or {}):
            total.update(str(info["sha256"][name]).encode())
        else:
            total.update(blocks_of(file))
    return total.hexdigest()[:16]


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def of_files(files: list[Path]) -> str:
    """12 digits for the content of some files. Of those above 256 MiB it reads 64 blocks."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name} {file.stat().st_size} ".encode())
        small = file.stat().st_size <= WHOLE
        total.update(sha256(file).encode() if small else blocks_of(file))
    return total.hexdigest()[:12]


def blocks_of(file: Path) -> bytes:
    size, total = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as f:
        for i in range(64):
            f.seek(i * (size - 2 ** 20) // 63)
            total.update(f.read(2 ** 20))
    return total.digest()


# ---- Both, for a run ----

def of_run(script: str, data_folder: Path) -> dict:
    """What config.json keeps: {version, python, code: {path: hash}, data, data_folder}."""
    return dict(version=VERSION, python=python_version(), code=of_code(script),
                data=of_data(data_folder), data_folder=str(Path(data_folder).resolve()))


def python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def differences(before: dict | None, now: dict) -> list[str]:
    """What differs between two fingerprints: names of code files, or "the data"; [] if nothing."""
    if before is None:
        return ["this project (the run has no fingerprint)"]
    changed = []
    if before["version"] != now["version"] or before["python"] != now["python"]:
        # Syntax trees of two Pythons can't be compared, so nobody knows. Better once too often.
        changed.append(f"Python ({before['python']} then, {now['python']} now)")
    else:
        for name in sorted({*before["code"], *now["code"]}):
            if before["code"].get(name) != now["code"].get(name):
                changed.append(name)
    if before["data"] != now["data"]:
        changed.append("the data")
    return changed


def changed(folder: Path) -> list[str]:
    """What has changed since the run in `folder` was made, as `differences` says it.

    For programs that only show runs. The data are compared where they are still in their place.
    """
    config = read_json(folder / "config.json")
    before = config.get("fingerprint")
    if before is None:
        return differences(None, {})
    code = {name: hash_of_code(PROJECT / name) for name in before["code"]}
    where, data, generator = Path(before["data_folder"]), before["data"], {}
    if (where / "dataset.json").exists():
        data = of_data(where)
        generator = read_json(where / "dataset.json").get("made_by")
        generator = generator if isinstance(generator, dict) else {}
    now = dict(version=VERSION, python=python_version(), code=code, data=data)
    changes = differences(before, now)
    for name, old in generator.items():                   # a toy that would be made anew
        if old != hash_of_code(PROJECT / name) and name not in changes:
            changes.append(name)
    if has_other_models(folder, config["settings"]):
        changes.append("its uni-modal models")
    return changes


def has_other_models(folder: Path, settings: dict) -> bool:
    """Whether step 1 has been trained anew since a joint run started from it."""
    for base in (settings.get("unimodal") or {}).values():
        model = folder.parent / base["run"] / "model.safetensors"
        if model.exists() and "sha256" in base:
            if sha256_at(model, model.stat().st_mtime_ns) != base["sha256"]:
                return True
    return False


@functools.cache
def sha256_at(file: Path, time_ns: int) -> str:
    """Of a model that many runs started from: read once, as long as nobody writes it."""
    return sha256(file)


def check_stored_logits(folder: Path, where: Path) -> None:
    """Raises ValueError where the logits that a run has stored are not of the prepared data in
    `where`, or the models of step 1 are not those that it started from."""
    config = read_json(folder / "config.json")
    learnt_from = (config.get("fingerprint") or {}).get("data")
    if learnt_from not in (None, of_data(where)):
        raise ValueError(f"{where} is not what {folder} has learnt from: its stored logits are of"
                         " other samples; train it anew with --again")
    if has_other_models(folder, config["settings"]):
        raise ValueError(f"the uni-modal models of {folder} have been trained anew since; run the"
                         " command that made it again")


def sentence(changes: list[str]) -> str:
    """"lora.py has changed", "data.py and lora.py have changed"."""
    plural = len(changes) > 1 or changes[0] in ("the data", "settings", "its uni-modal models")
    verb = "have" if plural else "has"
    return f"{' and '.join(changes)} {verb} changed"


def say_changes(folder: Path) -> None:
    """One line, where the code or the data of a run have changed."""
    changes = changed(folder)
    if changes:
        print(f"{folder}: {sentence(changes)} since it was trained")
