"""The command line of the prepare scripts: the options they share, and errors in one line."""
import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from data import PLAIN_NAME
from paper.settings import SETTINGS


def parser(doc: str, script: str, frames: int = 3, text: bool = False, flow: bool = False,
           own_name: bool = True) -> argparse.ArgumentParser:
    """The options all scripts have; a script adds its own.

    own_name: the data set is called like the script. Else the user must choose a name.
    """
    p = argparse.ArgumentParser(prog=f"python -m prepare.{script}", description=doc,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    a = p.add_argument
    a("--data-root", default="data", metavar="FOLDER",
      help="prepared data sets live here, one folder each; default: data")
    a("--name", default=script if own_name else None, required=not own_name,
      help="folder to make, and what --dataset then says"
           + ("; default: %(default)s" if own_name else ""))
    a("--size", type=int, default=256,
      help="stored pictures are squares of this many pixels; training crops from them;"
           " default: %(default)s")
    a("--frames", type=int, default=frames,
      help="frames stored per video, evenly spaced; training draws some of them;"
           " default: %(default)s")
    a("--clips", type=int, default=3,
      help="2 s clips of sound, evenly placed; 1 is enough for recordings under 2 s;"
           " default: %(default)s")
    if flow:
        a("--stacks", type=int, default=3,
          help="flow stacks stored per video, evenly spaced; default: %(default)s")
        a("--flow-length", type=int, default=10,
          help="consecutive flow frames in a stack, two channels each; default: %(default)s")
    if text:
        a("--tokenizer", nargs="+", metavar="FILE",
          help="a vocabulary of your own: vocab.txt (BERT), vocab.json merges.txt, or "
               "bpe_encoder.bin (DeBERTa)")
        a("--max-length", type=int, default=512,
          help="tokens; longer texts are cut; default: %(default)s")
    a("--workers", type=int, default=os.cpu_count(),
      help="files decoded at the same time; default: all cores, here %(default)s")
    a("--allow-missing", type=float, default=0.01, metavar="SHARE",
      help="stop when more of a split than this is unreadable; default: %(default)s")
    a("--overwrite", action="store_true", help="make it again although it is already there")
    return p


def parse(p: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Parse and check the command line. `args.command` is the command as it was typed.

    A data set that is already there ends the program. A folder that is no data set is an error.
    """
    args = p.parse_args(argv)
    for option in ("size", "frames", "clips", "stacks", "flow_length", "max_length", "workers"):
        if getattr(args, option, 1) < 1:
            p.error(f"--{option.replace('_', '-')} must be at least 1")
    if not 0 <= args.allow_missing <= 1:
        p.error("--allow-missing is a share between 0 and 1")
    check_name(args.name, p.prog.split(".")[-1])
    words = sys.argv[1:] if argv is None else argv
    args.command = f"{p.prog} {shlex.join(words)}"
    folder = Path(args.data_root) / args.name
    if folder.exists() and not (folder / "dataset.json").exists():
        raise ValueError(f"{folder} exists but is no prepared data set: "
                         "choose another --name or --data-root, or move it away")
    if folder.exists() and not args.overwrite:
        print(f"{folder} is already there (--overwrite makes it again)")
        raise SystemExit(0)
    return args


def check_name(name: str, script: str) -> None:
    """Raise ValueError for a name that is no plain one, or that another data set has."""
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError(f"--name {name!r}: the name of one folder, of letters, digits, _ - and .")
    taken = SETTINGS.keys() - {script, "custom"}
    if re.sub(r"-s\d+$", "", name) in taken:     # toy-s0 is where the toy of seed 0 lies
        raise ValueError(f"--name {name}: that is a data set of the paper or a toy, and --dataset"
                         " would take yours for it; choose another name")


def run(main) -> None:
    """Call main(). A trouble that we expect becomes one line on stderr, with exit code 1."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:     # torch says more than one line
        sys.exit(f"error: {(str(error) or 'not enough memory').splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
