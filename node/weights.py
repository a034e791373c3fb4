"""The model's tensors as a checkpoint stores them: parameters and persistent buffers, under the checkpoint's names.

For most models these are the model's own names. But transformers renames some tensors on loading, and it joins others:
the experts of a layer are separate matrices in the files of Qwen3-MoE, and one parameter in the model. vLLM and
from_pretrained read the names of the files. So what is saved, and what is handed to vLLM, is converted back by
transformers' own rules, those that save_pretrained uses; what is read in shares is converted by those of
from_pretrained.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import NamedTuple

from torch import Tensor
from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


def stored_tensors(model) -> dict[str, Tensor]:
    """The tensors that a checkpoint must hold, by the model's names. Of weights that are tied, only the first.

    Persistent buffers belong to them, for example the routers' e_score_correction_bias, which is no parameter.
    """
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


class Group(NamedTuple):
    """Tensors of the model that are converted together: almost always a single one, which is only renamed."""

    names: list[str]  # in the model
    stored_name: str | None  # in a checkpoint; None if more than the name is changed


def stored_groups(model) -> list[Group]:
    """All stored_tensors of the model, in their order."""
    if getattr(model, "_weight_conversions", None) is None:  # from_pretrained sets it; else as save_pretrained does
        rules = get_model_conversion_mapping(model, add_legacy=False)
        model._weight_conversions = [rule for rule in rules if not isinstance(rule, PrefixChange)]
    reverse = [rule.reverse_transform() for rule in model._weight_conversions[::-1]]
    renamings = [rule for rule in reverse if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in reverse if isinstance(rule, WeightConverter)]
    groups: dict[str, Group] = {}
    for name in stored_tensors(model):
        first_stored_name, converter = rename_source_key(name, renamings, converters, reverse=True)
        group = groups.setdefault(first_stored_name, Group([], None if converter else first_stored_name))
        group.names.append(name)
    return list(groups.values())


def to_stored(model, group: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a group, with the names and shapes that a checkpoint has for them."""
    return revert_weight_conversion(model, group)


class Source(NamedTuple):
    """Tensors of a checkpoint that one or a few tensors of the model are made from, by a rule of transformers."""

    first_name: str  # in the model
    parts: list[tuple[str, str]]  # (name in the checkpoint, the rule's pattern for it), in the order of joining
    rule: WeightConverter


def find_sources(model, stored_names: Iterable[str]) -> tuple[dict[str, str], list[Source]]:
    """Which of a checkpoint's tensors make which of the model's.

    Returns the model's name by the stored name, for tensors that are only renamed, and the sources of the others.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    rule_of = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    tensors, renamed, sources = stored_tensors(model), {}, {}
    for stored_name in sorted(stored_names, key=dot_natural_key):
        name, pattern = rename_source_key(stored_name, renamings, converters, model.base_model_prefix, tensors)
        if name not in tensors and stored_name in tensors:
            name, pattern = stored_name, None  # saved under the model's own name
        if name in tensors and pattern is None:
            renamed[stored_name] = name
        elif name in tensors:
            source = sources.setdefault(name, Source(name, [], deepcopy(rule_of[pattern])))
            source.parts.append((stored_name, pattern))
    model._weight_conversions = [rule for rule in rules if rule.was_used()]  # to_stored undoes these, no others
    return renamed, list(sources.values())


def from_stored(model, source: Source, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The model's tensors that a source makes, by their names. read gives the tensor of a stored name."""
    for stored_name, pattern in source.parts:
        # A function, not the tensor: so transformers can free the parts while it joins them.
        source.rule.add_tensor(source.first_name, stored_name, pattern, partial(read, stored_name))
    made = source.rule.convert(source.first_name, model=model, config=model.config)
    return {name: x[0] if isinstance(x, list) else x for name, x in made.items()}
