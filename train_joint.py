"""Steps 2 and 3 of MMLoRA: freeze the fine-tuned uni-modal models, add rank-1 matrices (Eq. 2), train only those on the averaged prediction (Eq. 3).

    python train_joint.py                                             # the toy: every step of the method in a minute
    python train_joint.py --dataset crema_d --lora audio              # the paper's setting for CREMA-D
    python train_joint.py --dataset ave --rank 4                      # Table 10
    python train_joint.py --dataset ave --tune full                   # "Fully Fine-tuned UME", Table 5
    python train_joint.py --dataset ave --no-umft                     # App. C: LoRA straight on the pre-trained encoders
    python train_joint.py --separate-losses                           # the control: what LoRA gains without Eq. 3

Uni-modal models that are missing are trained first (step 1, `train_unimodal.py`). Epoch 0 of this script is the Uni-Modal Ensemble (UME): with B = 0
the adapted models are the uni-modal ones, so validation can only choose to stay there or to improve. Test is used once, at the end.
"""
import argparse
from pathlib import Path

import torch

import checkpoints
import data
import evaluate
import paper
import train_unimodal
from lora import add_lora, lora_state_dict, mean_logits, mean_prob_loss

METHODS = {"mmlora": "MMLoRA", "full": "Fully fine-tuned UME", "no-umft": "MMLoRA without UMFT", "separate": "Control: LoRA, separate losses"}


def train(args, seed: int) -> checkpoints.Run:
    """Train all missing uni-modal models, then the joint one; or return its run if it is finished already."""
    folder, info = train_unimodal.open_data(args, seed)
    setting, modalities = paper.settings_for(args.dataset), list(info["modalities"])
    if len(modalities) < 2:
        raise ValueError(f"{args.dataset} has only {modalities[0]}: joint training needs two modalities or more")
    lora = set(modalities) if args.lora == ["all"] else set(args.lora or setting["lora"] or modalities)
    if unknown := lora - set(modalities):
        raise ValueError(f"--lora {' '.join(sorted(unknown))}: {args.dataset} has {', '.join(modalities)}, or all")
    default = paper.encoders_for(args.dataset)
    encoders = {m: train_unimodal.encoder_of(args, m) for m in modalities}

    method = "full" if args.tune == "full" else "no-umft" if args.no_umft else "separate" if args.separate_losses else "mmlora"
    lr = paper.joint_lr(args.dataset, encoders, args.tune)
    settings = dict(method=method, dataset=args.dataset, seed=seed, encoders=encoders, fusion=args.fusion,
                    epochs=args.epochs or setting["epochs"], batch_size=args.batch_size or setting["batch_size"],
                    lr=args.lr or lr, precision=train_unimodal.precision(args), classes=info["classes"],
                    samples=info.get("counts"), **train_unimodal.recipe(setting))
    if args.tune == "lora":
        settings.update(lora=sorted(lora), rank=args.rank)
    if args.no_umft:
        unimodal = {}
        settings["pretrained"] = {m: train_unimodal.pretrained_of(args, m, encoders[m]) for m in modalities}
    else:                                                                     # --- step 1, Eq. 1 ---
        unimodal = {m: train_unimodal.train(args, m, seed, args.umft_epochs, args.umft_lr, reuse=True) for m in modalities}
        settings["unimodal"] = {m: dict(run=r.folder.name, sha256=checkpoints.sha256(r.folder / "model.safetensors")) for m, r in unimodal.items()}
    name = method if args.tune == "full" else f"{method}-{'all' if len(lora) == len(modalities) else '+'.join(sorted(lora))}-r{args.rank}"
    name += "".join(f"-{m}-{encoders[m]}" for m in modalities if encoders[m] != default.get(m)) + ("-logits" if args.fusion == "logits" else "")
    name += f"-lr{args.lr:g}" if args.lr not in (None, lr) else ""
    run = checkpoints.Run(Path(args.out) / args.dataset / f"{name}-s{seed}", settings, info)
    if run.result:
        return run

    torch.manual_seed(seed)
    models = torch.nn.ModuleDict()
    for m in modalities:
        if args.no_umft:
            models[m] = train_unimodal.pretrained_model(settings["pretrained"][m], encoders[m], info, m)
        else:
            models[m] = checkpoints.new_model(encoders[m], info, m)
            models[m].load_state_dict({k.removeprefix(f"{m}."): v for k, v in unimodal[m].tensors("model.safetensors").items()})
        if args.tune == "lora":                                               # --- step 2, Eq. 2 ---
            add_lora(models[m], args.rank) if m in lora else models[m].requires_grad_(False)
            if args.no_umft:
                models[m].head.requires_grad_(True)                           # nobody has trained it yet
    models.to(args.device)

    def objective(x, y):                                                      # --- step 3, Eq. 3 ---
        z = {m: models[m](x[m]) for m in modalities}                          # P_m(y|x) = softmax(z_m), with W0 + BA inside
        if args.separate_losses:
            return sum(mean_prob_loss({m: z[m]}, y) for m in z) / len(z), z   # Eq. 1 once more: nobody learns what the other one knows
        if args.fusion == "logits":
            z = mean_logits(z)
        return mean_prob_loss(z, y), z                                        # -log (1/M) sum_m P_m(y|x)

    stored = (lambda: lora_state_dict(models)) if method in ("mmlora", "separate") else None     # A and B are all that the uni-modal runs lack
    state = train_unimodal.fit(args, run, models, objective, info, folder, setting, args.fusion, stored)
    result = dict(method=method, dataset=args.dataset, seed=seed, fusion=args.fusion, encoders=encoders,
                  **train_unimodal.final_scores(args, run, models, info, folder, setting), best_epoch=state["best_epoch"],
                  trained_parameters=sum(p.numel() for p in models.parameters() if p.requires_grad), seconds=state["seconds"],
                  peak_memory_mib=train_unimodal.peak_memory_mib(args.device))
    if unimodal:      # the ensemble the run started from, out of what the uni-modal runs predicted on the same splits
        result["ume"] = {split: evaluate.all_scores({m: unimodal[m].tensors("logits.safetensors")[f"{split}.{m}"] for m in modalities}, data.Split(folder, split).labels, info)
                         for split in ("val", "test")}
    run.finish(result)
    return run


def rows(runs: list[checkpoints.Run]) -> list:
    """The closing table: every modality alone, their ensemble under both averages, and what joint training made of it."""
    out, results = [], [r.result for r in runs]
    if "ume" in results[0]:
        for m, run in runs[0].settings["unimodal"].items():
            alone = [checkpoints.read_json(r.folder.parent / r.settings["unimodal"][m]["run"] / "result.json") for r in runs]
            out.append((f"{m} alone (UMFT)", [(x["test"][m], x) for x in alone]))
        out += [(f"UME, {name} averaged", [(r["ume"]["test"][rule], dict(trained_parameters=0, seconds=0)) for r in results]) for rule, name in (("prob", "probabilities"), ("logits", "logits"))]
    return out + [row(beside) for beside in (mmlora_beside(runs) if results[0]["method"] in ("full", "separate") else [])] + [row(runs)]


def row(runs: list[checkpoints.Run]) -> tuple:
    """One method's line of the table: its label, and for each seed the test scores and the result."""
    settings = runs[0].settings
    name = METHODS[settings["method"]] + (f", rank {settings['rank']}, LoRA on {' + '.join(settings['lora'])}" if "rank" in settings else "")
    name += ", logits" if settings["fusion"] == "logits" else ""
    return name + (f", lr {settings['lr']:g}" if "-lr" in runs[0].folder.name else ""), [(r.result["test"][r.result["fusion"]], r.result) for r in runs]


def mmlora_beside(runs: list[checkpoints.Run]) -> list[list[checkpoints.Run]]:
    """What full fine-tuning and the control are compared with: the MMLoRA runs on the same uni-modal models, where they are finished for all
    the seeds; of several learning rates the best on validation."""
    found, seed = {}, f"-s{runs[0].settings['seed']}"
    for name in sorted(f.parent.name.removesuffix(seed) for f in runs[0].folder.parent.glob(f"mmlora-*{seed}/result.json")):
        folders = [r.folder.with_name(f"{name}-s{r.settings['seed']}") for r in runs]
        if all((f / "result.json").exists() for f in folders):
            same = [checkpoints.Run(f, checkpoints.read_json(f / "config.json")["settings"]) for f in folders]
            if all(a.settings["unimodal"] == b.settings["unimodal"] for a, b in zip(same, runs)):
                found.setdefault(name.split("-lr")[0], []).append(same)
    return [max(rates, key=train_unimodal.validation) for rates in found.values()]


def main():
    parser = train_unimodal.common_arguments(argparse.ArgumentParser(description=__doc__))
    a = parser.add_argument
    a("--lora", nargs="+", metavar="MODALITY", help="whose models get LoRA: audio, visual, text, flow, or all; default: the paper's choice for the data set")
    a("--rank", type=train_unimodal.positive(int), default=1, help="rank r of the update (Eq. 2)")
    a("--tune", choices=("lora", "full"), default="lora", help="full: train all weights of the uni-modal models on Eq. 3")
    a("--no-umft", action="store_true", help="skip step 1 (App. C); the heads are then trained along with LoRA")
    a("--separate-losses", action="store_true", help="the control: every modality's LoRA on its own loss (Eq. 1), their predictions averaged only afterwards")
    a("--fusion", choices=("prob", "logits"), default="prob", help="what is averaged, in the loss and at test: Eq. 3 says probabilities")
    a("--umft-epochs", type=train_unimodal.positive(int), help="epochs of uni-modal models that are missing")
    a("--umft-lr", type=train_unimodal.positive(float), help="their learning rate")
    args = parser.parse_args()
    if args.tune == "full" and (args.lora or args.no_umft):
        raise ValueError("--tune full trains all weights of fine-tuned models: it goes with neither --lora nor --no-umft")
    if args.separate_losses and (args.tune == "full" or args.no_umft or args.fusion == "logits"):
        raise ValueError("--separate-losses is the control of MMLoRA itself: it goes with none of --tune full, --no-umft, --fusion logits")
    runs = train_unimodal.tuned(args, train)
    table = rows(runs)
    evaluate.print_table(table, *train_unimodal.open_data(args, runs[0].settings["seed"]))
    for run in runs if args.plot else ():
        evaluate.plot(run.folder)


if __name__ == "__main__":
    train_unimodal.run(main)
