"""The house of the design, as far as a program can judge it: which module imports which,
what stands in a script, how wide a line is. Nothing is run."""
import ast
import difflib
import functools
from pathlib import Path

import pytest

from running import ROOT

TOP = {"lora.py", "encoders.py", "data.py", "train_unimodal.py", "train_joint.py", "evaluate.py"}
# What baselines share, and no script.
SHARED = {"baselines/__init__.py", "baselines/__main__.py", "baselines/parts.py"}


def python_files() -> list[Path]:
    """All but tests and hidden folders."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        folders = path.relative_to(ROOT).parts[:-1]
        if "tests" not in folders and not any(f.startswith((".", "__")) for f in folders):
            found.append(path)
    return found


FILES = python_files()
BASELINES = [p.relative_to(ROOT).as_posix() for p in FILES if p.parent == ROOT / "baselines"]
SCRIPTS = ["train_unimodal.py", "train_joint.py", *(b for b in BASELINES if b not in SHARED)]
# Copies of train_joint.py with one idea changed.
COPIES = ("separate", "separate_full", "logits", "full_ume", "no_umft", "small", "all_linear",
          "drop_modality")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


# ---- Which module imports which ----

def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imported_names(name: str, path: Path) -> set[str]:
    """Whatever a module imports, anywhere in it;
    also by importlib.import_module(f"prepare.{x}")."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")
            if path.name != "__init__.py":
                package = package[:-1]
            above = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and call_name(node).endswith("import_module"):
            what = node.args[0]
            if isinstance(what, ast.Constant):
                names.add(what.value)
            elif isinstance(what, ast.JoinedStr) and isinstance(what.values[0], ast.Constant):
                names |= {m for m in MODULES if m.startswith(what.values[0].value)}
            else:
                raise AssertionError(f"{path}:{node.lineno}: nobody can tell what is imported")
    return names


def call_name(node: ast.Call) -> str:
    """"data.inputs" for data.inputs(...), "" for what has no name, as (a + b).sum()."""
    words, func = [], node.func
    while isinstance(func, ast.Attribute):
        words.append(func.attr)
        func = func.value
    if not isinstance(func, ast.Name):
        return ""
    return ".".join([func.id, *reversed(words)])


@functools.cache
def edges() -> dict[str, set[str]]:
    """Module -> modules of this project that it imports. A package counts as its __init__.py."""
    found = {}
    for name, path in MODULES.items():
        wanted = imported_names(name, path)
        found[name] = {other for other in wanted if other in MODULES and other != name}
    return found


def a_circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, [a, b, a]; [] where there is none."""
    done = set()

    def visit(name, way):
        if name in way:
            return [*way[way.index(name):], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            circle = visit(other, [*way, name])
            if circle:
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        circle = visit(name, [])
        if circle:
            return circle
    return []


def test_the_search_for_circles_finds_them():
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert a_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_search_for_imports_finds_them(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("import data, harness.optim\nfrom . import parts\nfrom .mla import train\n"
                    "def f():\n    from harness import runs as r\n    import importlib\n"
                    "    importlib.import_module(f'prepare.{r}')\n")
    found = imported_names("baselines.some", file)
    wanted = {"data", "harness.optim", "baselines.parts", "baselines.mla", "harness.runs",
              "prepare.ave", "prepare.toy"}
    assert wanted <= found and "lora" not in found


def test_there_is_no_circle():
    assert len(edges()) > 40 and "harness.metrics" in edges()["train_joint"]
    assert a_circle(edges()) == []


def room_of(module: str) -> tuple[int, str]:
    """-> (floor, room). Arrows point from a floor to a lower one, or stay in a room."""
    own = {"lora": 0, "encoders": 0, "data": 0, "paper": 1, "paper.settings": 1,
           "train_unimodal": 4, "train_joint": 5, "evaluate": 6,
           "paper.results": 6, "paper.tables": 6}
    if module in own:
        room = "what is read" if own[module] == 0 else module.split(".")[0]
        return own[module], room
    folder = module.split(".")[0]
    return {"pretrained": 1, "prepare": 2, "harness": 3, "baselines": 5,
            "lessons": 7, "results": 7}[folder], folder


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module):
    floor, room = room_of(module)
    for other in edges()[module]:
        other_floor, other_room = room_of(other)
        same_room = other_floor == floor and other_room == room
        assert other_floor < floor or same_room, f"{module} imports {other}"


def test_what_stands_on_top_is_imported_by_nobody():
    users = {name: [m for m in edges() if name in edges()[m]] for name in MODULES}
    assert users["evaluate"] == [] and users["train_joint"] == [] and users["paper.tables"] == []
    assert users["paper.results"] == ["paper.tables"]
    for name in MODULES:
        if name.startswith(("baselines.", "lessons.")) and name != "baselines.parts":
            assert users[name] == [], f"{name} is imported by {users[name]}"
    # An edit of Eq. 2 or 3 must not move what measures, nor step 1 (see harness/fingerprint.py).
    for name in ("train_unimodal", "harness.metrics", "harness.optim", "harness.runs"):
        assert "lora" not in edges()[name]


# ---- The rooms ----

def test_six_files_on_top():
    assert {path.name for path in ROOT.glob("*.py")} == TOP


def test_every_folder_is_a_package():
    """Or an installed package named `harness` or `paper` would win. Nobody imports an exercise."""
    for folder in {path.parent for path in FILES} - {ROOT}:
        if folder.parent == ROOT / "lessons":
            continue
        assert (folder / "__init__.py").exists(), folder


def test_no_file_shadows_an_installed_package():
    for path in FILES:
        assert path.name not in ("tokenize.py", "tokenizers.py", "datasets.py"), path


def test_lines_fit_on_a_wall():
    for path in [*FILES, *sorted(ROOT.glob("tests/*.py"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.relative_to(ROOT)}:{number}"


# ---- The flat script ----

def train_of(script: str) -> ast.FunctionDef:
    functions = [n for n in tree_of(ROOT / script).body if isinstance(n, ast.FunctionDef)]
    return next(function for function in functions if function.name == "train")


def the_loop(script: str) -> tuple[ast.For, ast.For]:
    """The loops over epochs and over batches: `for index in run.progress(...)`. They stand in the
    function `train` itself, one in the other."""
    found = []
    for epochs in train_of(script).body:
        if isinstance(epochs, ast.For):
            for batches in epochs.body:
                if isinstance(batches, ast.For) and isinstance(batches.iter, ast.Call) and (
                        call_name(batches.iter) == "run.progress"):
                    found.append((epochs, batches))
    assert len(found) == 1, script
    return found[0]


def calls_in(*nodes) -> list[str]:
    return [call_name(n) for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call)]


def test_which_scripts_there_are():
    assert len(SCRIPTS) == 2 + 17
    for script in SCRIPTS:
        assert 'if __name__ == "__main__":' in (ROOT / script).read_text(), script
    for name in SHARED:
        assert "__main__" not in (ROOT / name).read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_whole_loop_stands_in_the_script(script):
    epochs, batches = the_loop(script)
    assert ast.unparse(epochs.iter) == "range(first_epoch, settings['epochs'] + 1)"
    steps = [ast.unparse(node) for node in ast.walk(batches) if isinstance(node, ast.Call)]
    assert any(step.endswith(".backward()") for step in steps)
    assert "optimizer.zero_grad()" in steps and "optimizer.step()" in steps
    for name in ("optim.set_lr", "data.parts", "run.count"):
        assert name in calls_in(batches), name
    for name in ("models.train", "data.epoch_rng", "data.batches", "run.end_of_epoch"):
        assert name in calls_in(*epochs.body), name
    around = calls_in(train_of(script))
    for name in ("arguments.open_data", "runs.Run", "data.Split", "torch.manual_seed",
                 "optim.make_optimizer", "run.resume", "run.load_best", "run.finish"):
        assert name in around, name
    # A batch is not rebound to its parts, or what comes after them trains on the last part alone.
    for node in ast.walk(batches):
        if isinstance(node, ast.For) and "data.parts" in calls_in(node.iter):
            assert ast.unparse(node.iter).startswith("data.parts(batch, ")
            assert "batch" not in ast.unparse(node.target)


@pytest.mark.parametrize("script", ["train_unimodal.py", "train_joint.py"])
def test_scripts_are_short(script):
    assert len((ROOT / script).read_text().splitlines()) < 150


# Of torch: every reader knows them.
TORCHS = ("zero_grad", "backward", "step")
BUILTINS = ("len", "sum", "range", "zip", "dict", "enumerate")


@pytest.mark.parametrize("script", ["train_unimodal.py", "train_joint.py", "baselines/concat.py",
                                    "baselines/frozen.py", *(f"baselines/{c}.py" for c in COPIES)])
def test_one_step_calls_seven_functions_by_name_at_most(script):
    _, batches = the_loop(script)
    names = {name for name in calls_in(*batches.body) if name.split(".")[-1] not in TORCHS}
    names.discard("")     # (share * loss).backward()
    if script.startswith("baselines"):
        names -= set(BUILTINS)
    assert len(names) <= 7, sorted(names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_calls_back_into_the_script(script):
    """A function of the script goes to `metrics.predict` and nowhere else in the loop:
    one looks for what happens in a step from top to bottom."""
    own = {n.name for n in ast.walk(train_of(script)) if isinstance(n, ast.FunctionDef)}
    _, batches = the_loop(script)
    for node in ast.walk(batches):
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            assert not [a for a in given if isinstance(a, ast.Name) and a.id in own]
            assert not [a for a in given if isinstance(a, ast.Lambda)]


def code_of(file: str) -> list[str]:
    """The lines of a file without comments and docstrings, in one spelling."""
    tree = ast.parse((ROOT / file).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree).splitlines()


SETTINGS = "    settings = arguments.joint_settings(args, seed, info, "
MMLORA = f"-{SETTINGS}'mmlora', unimodal, tune='lora', lora=lora, fusion='prob')"
STORES_ALL = """\
-        run.end_of_epoch(0, predict(val_split), lora_state_dict(models))
+        run.end_of_epoch(0, predict(val_split), models.state_dict())
-        run.end_of_epoch(epoch, predict(val_split), lora_state_dict(models))
+        run.end_of_epoch(epoch, predict(val_split), models.state_dict())"""
STORES_TRAINED = STORES_ALL.replace("models.state_dict()", "parts.trained(models, optimizer)")
# Copy -> all that `diff train_joint.py baselines/COPY.py` has to say: the one idea.
IDEA = {
    "separate": f"""\
-from lora import add_lora, lora_state_dict, mean_prob_loss
+from lora import add_lora, lora_state_dict
{MMLORA}
+{SETTINGS}'separate', unimodal, tune='lora', lora=lora, fusion='prob')
-                loss = mean_prob_loss(logits, y)
+                loss = sum((metrics.cross_entropy(z, y) for z in logits.values())) / len(logits)\
""",
    "logits": f"""\
-from lora import add_lora, lora_state_dict, mean_prob_loss
+from lora import add_lora, lora_state_dict, mean_logits, mean_prob_loss
{MMLORA}
+{SETTINGS}'logits', unimodal, tune='lora', lora=lora, fusion='logits')
+                logits = mean_logits(logits)""",
    "full_ume": f"""\
-from harness.models import load_unimodal
-from lora import add_lora, lora_state_dict, mean_prob_loss
+from harness.models import load_unimodal, set_drop_path
+from lora import mean_prob_loss
-    lora = arguments.lora_modalities(args, info)
{MMLORA}
+{SETTINGS}'full', unimodal, tune='full', fusion='prob')
-        models[m].requires_grad_(False)
-        if m in lora:
-            add_lora(models[m], args.rank)
+        set_drop_path(models[m], settings)
{STORES_ALL}
-    arguments.add_lora_arguments(p)""",
    "no_umft": f"""\
-import train_unimodal
-from harness.models import load_unimodal
-from lora import add_lora, lora_state_dict, mean_prob_loss
+from harness.models import pretrained_model
+from lora import add_lora, mean_prob_loss
-    unimodal = {{}}
-    for m in modalities:
-        unimodal[m] = train_unimodal.train(arguments.of_step_1(args), m, seed)
{MMLORA}
+{SETTINGS}'no-umft', tune='lora', lora=lora, fusion='prob')
-        models[m] = load_unimodal(unimodal[m], info)
+        models[m] = pretrained_model(settings, m, info)
+        models[m].head.requires_grad_(True)
{STORES_ALL}
-    arguments.add_step_1(p)""",
    "all_linear": f"""\
+def target_all_linear(encoder: torch.nn.Module) -> None:
+    names = [name for name, layer in encoder.named_modules() if type(layer) is torch.nn.Linear]
+    encoder.lora_targets = (*encoder.lora_targets, *names)
+
{MMLORA}
+{SETTINGS}'all_linear', unimodal, tune='lora', lora=lora, fusion='prob')
+            target_all_linear(models[m].encoder)""",
    "drop_modality": f"""\
+OPTIONS = ('drop_modality',)
+
+def some_of(x: dict, lora: list, rate: float, rng: torch.Generator) -> dict:
+    away = torch.rand(len(x), generator=rng) < rate
+    left = {{m: v for (m, v), is_away in zip(x.items(), away) if not is_away}}
+    if not set(left) & set(lora):
+        return x
+    return left
{MMLORA}
+{SETTINGS}'drop_modality', unimodal, tune='lora', lora=lora, fusion='prob', options=OPTIONS)
-            batch = data.inputs(train_split, index, models, args.device, settings, rng)
+            x, y = data.inputs(train_split, index, models, args.device, settings, rng)
+            batch = (some_of(x, lora, args.drop_modality, rng), y)
+    p.add_argument('--drop-modality', type=arguments.rate, default=0.3, metavar='RATE', \
help='how often each modality is drawn away from a batch; default: 0.3')""",
}
IDEA["separate_full"] = IDEA["full_ume"].replace("'full', unimodal", "'separate_full', unimodal")
IDEA["separate_full"] = IDEA["separate_full"].replace("+from lora import mean_prob_loss\n", "")
IDEA["separate_full"] = IDEA["separate_full"].replace(STORES_ALL, f"""\
{STORES_ALL.splitlines()[0]}
{STORES_ALL.splitlines()[1]}
-                loss = mean_prob_loss(logits, y)
+                loss = sum((metrics.cross_entropy(z, y) for z in logits.values())) / len(logits)
{STORES_ALL.splitlines()[2]}
{STORES_ALL.splitlines()[3]}""")
IDEA["small"] = f"""\
+from baselines import parts
-from lora import add_lora, lora_state_dict, mean_prob_loss
+from lora import mean_prob_loss
+OPTIONS = ('what',)
...
-    lora = arguments.lora_modalities(args, info)
{MMLORA}
+{SETTINGS}'small', unimodal, tune='lora', lr=LR[args.what], fusion='prob', options=OPTIONS)
-        if m in lora:
-            add_lora(models[m], args.rank)
+        unfreeze(models[m], args.what)
{STORES_TRAINED}
-    arguments.add_lora_arguments(p)
+    p.add_argument('--what', choices=tuple(LR), required=True, help='what is trained on Eq. 3')"""


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_differs_in_its_idea_alone(copy):
    """So `diff` shows the method. Whoever changes the skeleton changes it in all of them; whoever
    changes the idea writes it here, too."""
    found = []
    ours, theirs = code_of("train_joint.py"), code_of(f"baselines/{copy}.py")
    for line in difflib.unified_diff(ours, theirs, n=0, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            found.append(line)
    wanted = IDEA[copy].splitlines()
    if "..." in wanted:                   # what stands before `train` may be long: see the file
        first = wanted.index("...")
        last = len(found) - (len(wanted) - first - 1)
        assert all(line.startswith("+") for line in found[first:last])
        found[first:last] = ["..."]
    assert found == wanted


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_epilogue_is_the_same_everywhere(script):
    """Behind the loop: load the best epoch, predict, finish.
    Test is opened there and nowhere else."""
    body = train_of(script).body
    behind = body[body.index(the_loop(script)[0]) + 1:]
    last = [ast.unparse(node) for node in behind]
    assert "run.load_best(models)" in last
    before = "\n".join(ast.unparse(node) for node in body[:-len(behind)])
    assert "'test'" not in before and "'test'" in "\n".join(last)
    assert last[-1].startswith("return run.finish({'val': predict(val_")
    assert last[-1].endswith(", models)")
