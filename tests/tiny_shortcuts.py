"""Random shortcuts of tiny models, and the reference of what they must do: ordinary modules in place of layers."""

import torch
from torch import nn

from dynadepth.models.fingerprint import fingerprint
from dynadepth.models.rebuild import rebuild
from dynadepth.models.structure import layer_stack
from dynadepth.shortcuts.maps import LinearShortcut, Shortcuts


def random_shortcuts(model, *, seed=0, without=()):
    """Return maps of several ranks, strong enough to matter; layers in `without` have none."""
    stack = layer_stack(model)
    width, generator = stack.hidden_size, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5

    maps = []
    for layer in range(stack.num_layers):
        kind = layer % 4
        down, up = (None, None) if kind == 2 else (normal(width, width), None)
        if kind in (0, 3):
            down, up = normal(width, 3 + kind), normal(3 + kind, width)
        maps.append(None if layer in without else LinearShortcut(down, up, normal(width)))
    return Shortcuts(maps=maps, fingerprint=fingerprint(model), rank=3, base_model="tiny")


class Jump(nn.Module):
    """An ordinary module that computes a shortcut, written from the formula."""

    def __init__(self, shortcut):
        super().__init__()
        self.shortcut = (shortcut.A, shortcut.B, shortcut.b)

    def forward(self, states, *_, **__):
        down, up, bias = (
            None if each is None else each.to(states.device, states.dtype) for each in self.shortcut
        )
        if down is None:
            return states + bias
        moved = states @ down
        return states + (moved if up is None else moved @ up) + bias


def rebuilt_with_shortcuts(model, plan, shortcuts):
    """Return the model rebuilt as its visits, with modules between them that compute the skipped layers' shortcuts.

    They are hooked to the neighbouring visits, so that caches and masks still find the visits at their places.
    """
    plan = [int(action) for action in plan]
    rebuilt = rebuild(model, plan)
    layers = layer_stack(rebuilt).layers
    place, leading = 0, []
    for layer_idx, action in enumerate(plan):
        shortcut = shortcuts.maps[layer_idx]
        if action == 0 and shortcut is not None:
            if place:
                layers[place - 1].register_forward_hook(_After(Jump(shortcut)))
            else:
                leading.append(Jump(shortcut))
        place += action
    if leading:
        layers[0].register_forward_pre_hook(_Before(nn.Sequential(*leading)), with_kwargs=True)
    return rebuilt


class _After:
    def __init__(self, jump):
        self.jump = jump

    def __call__(self, _module, _args, output):
        if isinstance(output, torch.Tensor):
            return self.jump(output)
        return type(output)([self.jump(output[0]), *output[1:]])


class _Before:
    def __init__(self, jumps):
        self.jumps = jumps

    def __call__(self, _module, args, kwargs):
        if args:
            return (self.jumps(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.jumps(kwargs["hidden_states"])}
