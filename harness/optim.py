"""Optimisers and learning rate schedules."""
import math

import torch


class BertAdam(torch.optim.Optimizer):
    """The optimiser that BERT was fine-tuned with (Sec. 4.1.2).

    Adam with four differences: no bias correction; each tensor's gradient is clipped to norm 1 by
    itself; weight decay is added to the update, so it does not pass through the moments; the rate
    rises for the share `warmup` of `t_total` steps, from 0, and then falls to 0. A warmup of -1
    leaves the rise out, a t_total of -1 the whole schedule. As in pytorch_pretrained_bert 0.6.2,
    which MMBT trains with.
    """

    def __init__(self, params, lr, warmup=-1, t_total=-1, weight_decay=0.01):
        defaults = dict(lr=lr, warmup=warmup, t_total=t_total, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p, group):
        state = self.state[p]
        if not state:
            state.update(step=torch.tensor(0), m=torch.zeros_like(p), v=torch.zeros_like(p))
        g = p.grad * torch.clamp(1 / (p.grad.norm() + 1e-6), max=1)
        state["m"].lerp_(g, 0.1)
        state["v"].lerp_(g * g, 0.001)
        update = state["m"] / (state["v"].sqrt() + 1e-6) + group["weight_decay"] * p
        p -= group["lr"] * self.factor(int(state["step"]), group) * update
        state["step"] += 1

    @staticmethod
    def factor(step: int, group: dict) -> float:
        """What the learning rate is multiplied with before `step`."""
        if group["t_total"] < 0:
            return 1.0
        x, warmup = step / group["t_total"], max(group["warmup"], 0)
        if x < warmup:
            return x / warmup
        return max((x - 1) / (warmup - 1), 0.0)


def make_optimizer(name: str, model, lr: float, weight_decay: float, steps: int = 0):
    """An optimiser of what requires a gradient in `model`.

    name: adamw, bertadam (language) or sgd (optical flow), as Sec. 4.1.2 says; steps: of the whole
    run, for BertAdam's schedule.
    """
    decayed, spared = [], []
    for parameter, p in model.named_parameters():
        if p.requires_grad:
            # Decay pulls towards zero. That is for the weights of linear layers, convolutions and
            # embeddings. A bias, a norm's gain, a class token, a position or a prompt has no reason
            # to be at zero; and A and B should not be pulled back to W0.
            if parameter.endswith("weight") and p.ndim > 1:
                decayed.append(p)
            else:
                spared.append(p)
    groups = [dict(params=decayed, weight_decay=weight_decay),
              dict(params=spared, weight_decay=0.0)]
    if name == "bertadam":
        return BertAdam(groups, lr, warmup=0.1, t_total=steps)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr, fused=True)


def set_lr(optimizer, settings: dict, step: int, steps: int, history: list[float]) -> None:
    """Set the learning rate before `step` of `steps`.

    history: the validation score of every epoch so far.
    """
    schedule = settings["schedule"]
    if isinstance(optimizer, BertAdam) and schedule == "cosine":
        schedule = "constant"                         # it has a schedule of its own
    for group in optimizer.param_groups:
        group["lr"] = settings["lr"] * lr_factor(schedule, step, steps, history)


def lr_factor(schedule: str, step: int, steps: int, history: list[float]) -> float:
    """What the learning rate is multiplied with.

    cosine: it rises for 5 % of the steps, then falls to zero. plateau: it is halved when two epochs
    in a row brought no improvement (App. A.2). constant: 1.
    """
    if schedule == "cosine":
        warmup = max(1, steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    factor, best, flat = 1.0, -math.inf, 0
    if schedule == "plateau":
        for score in history:
            if score > best:
                best, flat = score, 0
            else:
                flat += 1
            if flat == 2:
                factor, flat = factor / 2, 0
    return factor
