"""What a pass changed in a tree of PyTorch modules, as data, and the same change made again on a copy of what it got.

A pruned network has other shapes than its source code builds; pickling the modules is out of the question, for a
pickle runs code. So the tensors are kept by name, with the plain attributes that changed (``out_channels``) and the
modules that became identities. Knows no pass and no file.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import msgspec

from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

Plain = int | float | bool | str | None | list[int | float | bool | str | None]

HIDDEN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Attributes of a module that hold its tensors and parts, which are kept apart."""


class Changes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a tree of modules differs from the one it was copied from, but for its tensors."""

    identities: tuple[str, ...] = ()
    attributes: dict[str, dict[str, Plain]] = {}
    tuples: tuple[tuple[str, str], ...] = ()
    frozen: tuple[str, ...] = ()


def between(before: torch.nn.Module, after: torch.nn.Module) -> Changes | None:
    """Return what changed, None where it cannot be told as data."""
    from torch import nn

    old, new = dict(before.named_modules()), dict(after.named_modules())
    identities = tuple(
        sorted(n for n in new if isinstance(new[n], nn.Identity) and type(old.get(n)) is not nn.Identity)
    )
    gone = {n for n in old if n not in new}
    if any(n not in old or (type(old[n]) is not type(m) and n not in identities) for n, m in new.items()):
        return None
    if any(not n.startswith(tuple(f"{i}." for i in identities)) for n in gone):
        return None
    attributes: dict[str, dict[str, Plain]] = {}
    tuples = []
    for name in new.keys() - set(identities):
        changed = _differing(old[name], new[name])
        if changed is None:
            return None
        if changed:
            attributes[name] = {key: list(v) if isinstance(v, tuple) else v for key, v in changed.items()}
            tuples += [(name, key) for key, v in changed.items() if isinstance(v, tuple)]
    frozen = tuple(sorted(n for n, p in after.named_parameters(remove_duplicate=False) if not p.requires_grad))
    return Changes(identities=identities, attributes=attributes, tuples=tuple(sorted(tuples)), frozen=frozen)


def _differing(old: torch.nn.Module, new: torch.nn.Module) -> dict[str, Any] | None:
    """Return the plain attributes that differ, None if one that is not plain was added or has another type."""
    before, after = ({k: v for k, v in vars(m).items() if k not in HIDDEN} for m in (old, new))
    changed = {}
    for key, value in after.items():
        if _is_plain(value):
            if key not in before or before[key] != value or type(before[key]) is not type(value):
                changed[key] = value
        elif key not in before or type(before[key]) is not type(value):
            return None
    return None if before.keys() - after.keys() else changed


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(isinstance(v, int | float | bool | str | None) for v in value)
    return isinstance(value, int | float | bool | str | None)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, also those that are not saved and those of several names."""
    named: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return named | dict(module.named_buffers(remove_duplicate=False))


def again(before: torch.nn.Module, changes: Changes, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Make the change on a copy of ``before``."""
    with extra("compress"):
        from torch import nn
    module = copy.deepcopy(before)
    for name in changes.identities:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Identity())
    were_tuples = set(changes.tuples)
    for name, attributes in changes.attributes.items():
        for key, value in attributes.items():
            new = tuple(value) if isinstance(value, list) and (name, key) in were_tuples else value
            vars(module.get_submodule(name))[key] = new
    _put(module, tensors, set(changes.frozen))
    return module


def _put(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], frozen: set[str]) -> None:
    from torch import nn

    made: dict[int, nn.Parameter] = {}  # weights of several names stay one
    for name in tensors_of(module).keys() - tensors.keys():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, None)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        part = module.get_submodule(owner)
        if leaf in part._buffers:  # noqa: SLF001  # the only place that tells a buffer without a tensor
            setattr(part, leaf, tensor)
        else:
            setattr(part, leaf, made.setdefault(id(tensor), nn.Parameter(tensor, name not in frozen)))
