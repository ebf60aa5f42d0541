"""Warning signs of divergence, measured on a training step from outside the model.

The modalities share weights and differ in entropy: each can win against the other by larger norms,
to which the softmax is blind until the numbers leave the range of their type (paper, section
2.3). The loss shows it late; the norm of the last layer's output, the paper's signal, shows it
early, and so do the logits. Measuring changes no bit of the training.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openchameleon.data.loader import Batch
from openchameleon.model.rope import apply_rope
from openchameleon.model.transformer import Block, Transformer
from openchameleon.train.parallel import whole
from openchameleon.train.step import document_mask

ALARM = "alarm/"
LEVELS = {"output_norm": 0.0, "log_z": 30.0, "attention_logit_max": 100.0}
"""The signs whose growth is an alarm, and the size below which it is not.

A norm has no scale of its own. Logits have: each doubling takes away a bit of what the type can
tell apart, and bfloat16 has steps of 1 from 128 on.
"""


class Alarm:
    """Says once that a sign of divergence has grown for long; made anew from the log on resuming.

    A sign has grown if the median of its last `RECENT` values is `GROWTH` times that of the second
    quarter of all its values, from half of the run back to a quarter. So the window grows with the
    run: what rises ever more slowly, as norms do in a sound training, is not told from what stays,
    what rises in proportion to the steps or faster is. One outlier, or two, are nothing.
    """

    RECENT, FIRST, GROWTH = 5, 16, 2.0

    def __init__(self, lines: Iterable[Mapping[str, Any]] = ()) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in LEVELS}
        self.said: set[str] = set()
        for line in lines:
            self.said |= {name for name in LEVELS if ALARM + name in line}
            # null in the log: it was not finite
            self._add({k: math.inf if line[k] is None else line[k] for k in LEVELS if k in line})

    def hear(self, signs: Mapping[str, float]) -> dict[str, float]:
        """Takes in one measurement; returns how many times larger a sign is that has just grown."""
        self._add(signs)
        grown = {}
        for name, values in self.values.items():
            if name in self.said or name not in signs or len(values) < self.FIRST:
                continue
            before = median(values[len(values) // 4 : len(values) // 2])
            now = median(values[-self.RECENT :])
            if now > max(LEVELS[name], self.GROWTH * before):
                self.said.add(name)
                grown[name] = now / before if before else math.inf
        return grown

    def _add(self, signs: Mapping[str, float]) -> None:
        for name in LEVELS.keys() & signs.keys():
            self.values[name].append(abs(signs[name]) if signs[name] == signs[name] else math.inf)


@contextmanager
def watched(model: Transformer, batches: Sequence[Batch]) -> Iterator[dict[str, float]]:
    """Measures the training step on `batches` that is taken inside; yields the dict it fills.

    It is filled as the step ends, and stays empty where the step fails:

    | name                | value, before the update where nothing else is said                |
    |---------------------|--------------------------------------------------------------------|
    | output_norm         | L2 norm of what the last layer gives, mean over positions          |
    | logit_max           | largest logit of the output head                                   |
    | log_z               | log of the sum of exponents of these logits, mean over positions   |
    | attention_logit_max | largest logit of attention, over all layers                        |
    | update_norm         | L2 norm of what the step added to the weights                      |
    | layer/I/NAME        | of layer I: output_norm, attention_logit_max, update_norm, and     |
    |                     | grad_norm as the optimizer sees it, after clipping                 |

    Logits of the head count where something is learned, the rest at every position. What depends
    on the batch is of this process's rows, and the same however they are cut into micro-batches.
    A measured step holds a second copy of the weights, and multiplies with the output head once
    more. It is taken without compiled code, in which no hooks are called: so of a compiled model,
    and of no other, the last digits may change.
    """
    signs: dict[str, float] = {}
    watch = _Watch(model, batches)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    handles = watch.attach()
    compiles = "torch._dynamo" in sys.modules  # to import it takes seconds
    try:
        with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
            yield signs
    finally:
        for handle in handles:
            handle.remove()
    signs |= watch.signs() | _weight_signs(model, before)


class _Watch:
    """What the hooks have seen of a step so far; it stays on the device until the step ends."""

    def __init__(self, model: Transformer, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.layers = [layer for layer in model.layers if isinstance(layer, Block)]
        self.n_done = self.n_positions = self.n_learned = 0  # the first: micro-batches
        self.inside: int | None = None  # the layer at work; None when one is computed again
        self.norm_sum: dict[int, Tensor] = {}
        self.attention_max: dict[int, Tensor] = {}
        self.last_norm_sum = self.log_z_sum = torch.zeros((), device=batches[0].inputs.device)
        self.logit_max = torch.full_like(self.log_z_sum, -math.inf)

    def attach(self) -> list[RemovableHandle]:
        """Hooks the model; returns the handles that take them off."""
        handles = [self.model.norm.register_forward_hook(_hook(self.see_last))]
        for i, layer in enumerate(self.layers):
            heads: dict[str, Tensor] = {}
            attention = layer.attention
            q_norm, k_norm = attention.q_normalization, attention.k_normalization
            handles += [
                layer.register_forward_pre_hook(partial(self.enter, i)),
                q_norm.register_forward_hook(_hook(partial(self.keep, heads, "q"))),
                k_norm.register_forward_hook(_hook(partial(self.keep, heads, "k"))),
                attention.register_forward_hook(_hook(partial(self.see_attention, i, heads))),
                layer.register_forward_hook(_hook(partial(self.see_output, i))),
            ]
        return handles

    def enter(self, layer: int, _: nn.Module, args: Any) -> None:
        self.inside = layer

    def keep(self, heads: dict[str, Tensor], name: str, args: Any, x: Tensor) -> None:
        heads[name] = x

    def see_attention(self, layer: int, heads: dict[str, Tensor], args: Any, _: Tensor) -> None:
        q, k = heads.pop("q"), heads.pop("k")
        if self.inside != layer:  # computed again, for the gradient
            return
        rope, mask = args[1], args[2]
        if mask is not None:  # in whatever form, it keeps documents apart
            mask = document_mask(self.batches[self.n_done].doc_ids)
        largest = _attention_max(apply_rope(q.float(), *rope), apply_rope(k.float(), *rope), mask)
        self.attention_max[layer] = largest.maximum(self.attention_max.get(layer, largest))

    def see_output(self, layer: int, args: Any, x: Tensor) -> None:
        self.norm_sum[layer] = self.norm_sum.get(layer, 0) + _norms(x).sum()
        self.inside = None

    def see_last(self, args: Any, hidden: Tensor) -> None:
        """What the last layer gave, and the logits of the micro-batch."""
        self.last_norm_sum = self.last_norm_sum + _norms(args[0]).sum()
        learned = self.batches[self.n_done].loss_weights > 0
        hidden, head = hidden[learned].float(), whole(self.model.output_weight).float()
        self.n_done += 1
        self.n_positions += learned.numel()
        self.n_learned += len(hidden)
        for start in range(0, len(hidden), 512):  # never the whole logits, as in the loss
            logits = hidden[start : start + 512] @ head.T
            self.log_z_sum = self.log_z_sum + logits.logsumexp(dim=1).sum()
            self.logit_max = self.logit_max.maximum(logits.max())

    def signs(self) -> dict[str, float]:
        """What was seen; nothing where no hook was called."""
        signs = {}
        if self.n_positions:
            signs["output_norm"] = float(self.last_norm_sum) / self.n_positions
        if self.n_learned:
            signs["logit_max"] = float(self.logit_max)
            signs["log_z"] = float(self.log_z_sum) / self.n_learned
        if self.attention_max:
            signs["attention_logit_max"] = max(map(float, self.attention_max.values()))
        for i, norm_sum in self.norm_sum.items():
            signs[f"layer/{i}/output_norm"] = float(norm_sum) / self.n_positions
            signs[f"layer/{i}/attention_logit_max"] = float(self.attention_max[i])
        return signs


def _hook(see: Callable[[Any, Tensor], None]) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that shows `see` arguments and output, outside of gradient and autocast."""

    @torch.no_grad()
    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        with torch.autocast(output.device.type, enabled=False):
            see(args, output)

    return hook


def _norms(x: Tensor) -> Tensor:
    return x.float().norm(dim=-1)


def _attention_max(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The largest q k / sqrt(D) that attention may see: q (B, T, H, D), k (B, T, K, D).

    mask: bool (B, 1, T, T), None for causal. One head at a time: all of them would be too large.
    """
    n_positions, n_heads, head_dim = q.shape[1:]
    if mask is None:
        mask = torch.ones(1, 1, n_positions, n_positions, dtype=torch.bool, device=q.device).tril()
    hidden, shared = ~mask[:, 0], n_heads // k.shape[2]
    largest = [
        (q[:, :, h] @ k[:, :, h // shared].mT).masked_fill_(hidden, -math.inf).max()
        for h in range(n_heads)
    ]
    return torch.stack(largest).max() * head_dim**-0.5


@torch.no_grad()
def _weight_signs(model: Transformer, before: list[Tensor]) -> dict[str, float]:
    """Norms of gradients and updates, the weights having been `before`, whose memory is used."""
    updates = {}
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        updates[name] = old.sub_(parameter.detach())
    signs = {"update_norm": _norm(updates.values())}
    for i, layer in enumerate(model.layers):
        own = {f"layers.{i}.{name}": p for name, p in layer.named_parameters()}
        grads = [p.grad for p in own.values() if p.grad is not None]
        signs[f"layer/{i}/grad_norm"] = _norm(grads)
        signs[f"layer/{i}/update_norm"] = _norm(updates[name] for name in own)
    return signs


def _norm(tensors: Iterable[Tensor]) -> float:
    """The L2 norm of all together, those that are spread over other processes included."""
    meshes: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        meshes.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return math.hypot(*(float(whole(nn.utils.get_total_norm(t))) for t in meshes.values()))
