"""Public checkpoints: their configs, names and shapes turned into ours, and back."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tfm_ref.config import TransformerConfig
from tfm_ref.families import family_of
from tfm_ref.families.family import Family, HFConfig
from tfm_ref.families.names import read_names
from tfm_ref.models import Model, build


def config_from_hf(hf: Mapping[str, object]) -> TransformerConfig:
    """Read a config.json: the point in our space of choices that it describes.

    Args:
        hf: the settings, with "model_type"; as a file has them, or ``config.to_dict()``.

    Returns:
        Our config.

    Raises:
        ValueError: if the family is unknown, a setting is missing, or one has a value that our
            models do not have.

    Example:
        >>> from tfm_ref.zoo import MODELS
        >>> config_from_hf({
        ...     "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        ...     "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        ...     "intermediate_size": 14336, "max_position_embeddings": 8192,
        ...     "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        ... }) == MODELS["Llama-3-8B"].config
        True
    """
    settings = HFConfig(hf)
    return family_of(settings["model_type"]).config(settings)


def from_hf(state_dict: Mapping[str, Tensor], hf: Mapping[str, object]) -> Model:
    """Build the model of a public checkpoint, with its weights.

    Args:
        state_dict: its tensors, by the names of its family.
        hf: its config, as :func:`config_from_hf` takes it.

    Returns:
        The model with copies of the tensors, in their dtype, ready for inference (``eval``).

    Raises:
        ValueError: as :func:`config_from_hf`; or if tensors are missing, unexpected or of another
            shape, or copies of one tensor differ: the message lists them all.
    """
    family = family_of(HFConfig(hf)["model_type"])
    config = replace(config_from_hf(hf), **family.told_by_tensors(state_dict))
    with torch.device("meta"):
        model = build(config)
    model.load_state_dict(_ours(state_dict, family, model), assign=True)
    model.tie()
    return model.eval()


def load_safetensors(path: str | Path) -> Model:
    """Read a checkpoint folder: config.json, and tensors in one safetensors file or several.

    Nothing is unpickled, so that no file can run code.

    Args:
        path: the folder, as it is downloaded, or as ``save_pretrained`` writes it.

    Returns:
        The model with its weights, ready for inference.

    Raises:
        ValueError: as :func:`from_hf`, or if the folder lacks config.json or safetensors, or a
            file that its index names.
    """
    path = Path(path)
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in ["config.json", *files] if not (path / name).exists()]
    if absent:
        raise ValueError(f"{path} must hold {', '.join(absent)}")
    state = {}
    for name in files:
        state |= load_file(path / name)
    return from_hf(state, json.loads((path / "config.json").read_text(encoding="utf-8")))


def to_hf(model: Model, model_type: str) -> dict[str, Tensor]:
    """Give the weights of a model by the names of a family.

    Args:
        model: the model.
        model_type: the family, a name in :data:`tfm_ref.families.FAMILIES`.

    Returns:
        Tensors by name, copies included, experts one by one where the family's files have them so.

    Raises:
        ValueError: if the family is unknown, or has no place for some of the tensors.
    """
    state, given, lost = model.state_dict(), {}, set(model.state_dict())
    names = family_of(model_type).names_in(model.config)
    for ours, name, form, written in read_names(names, state, model.config):
        if written:
            given[name] = form.merge([state[n] for n in ours], model.config)
            lost -= set(ours)
    if lost:
        raise ValueError(f"{model_type} must have a place for {', '.join(sorted(lost))}")
    return _unstack_experts(given)


def _ours(state_dict: Mapping[str, Tensor], family: Family, model: Model) -> dict[str, Tensor]:
    """Give the tensors of a family by our names; all that is wrong with them is one error."""
    theirs, config = _in_one_spelling(state_dict, family), model.config
    wanted, found, wrong = model.state_dict(), {}, []
    unread, lines = set(theirs), list(read_names(family.names_in(config), wanted, config))
    for ours, name, form, _ in lines:
        if name not in theirs:
            continue
        unread.discard(name)
        shapes = [wanted[n].shape for n in ours]
        shape = form.merge([torch.empty(s, device="meta") for s in shapes], config).shape
        if theirs[name].shape != shape:
            wrong.append(f"{name} has shape {tuple(theirs[name].shape)}, not {tuple(shape)}")
            found |= dict.fromkeys(ours)
            continue
        for n, t in zip(ours, form.split(theirs[name], shapes, config), strict=True):
            if found.get(n) is not None and not torch.equal(found[n], t):
                wrong.append(f"{name} differs from its copy")
            found[n] = t.clone(memory_format=torch.contiguous_format)
    if config.tied_embeddings:
        table, matrix = found.get("embedding.tokens.weight"), found.get("head.proj.weight")
        if matrix is not None and table is not None and not torch.equal(matrix, table):
            wrong.append("the matrix of the logits differs from the table that it is tied to")
        found["head.proj.weight"] = table
    spelled = {n: line.theirs for line in reversed(lines) for n in line.ours}
    missing = dict.fromkeys(spelled[n] for n in wanted if n not in found)
    wrong += [f"{name} is missing" for name in missing]
    wrong += [f"{name} is unexpected" for name in sorted(unread)]
    if wrong:
        raise ValueError(f"the tensors must be those of the config: {'; '.join(wrong)}")
    return found


def _in_one_spelling(state_dict: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Rename what files of the first years, or of a body without a head, call otherwise."""
    modern = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    theirs = {}
    for name, t in state_dict.items():
        for old, new in modern.items():
            name = name.replace(old, new)
        if not re.fullmatch(family.ignored, name):
            theirs[name] = t
    if not any(name.startswith(family.prefix) for name in theirs):
        theirs = {family.prefix + name: t for name, t in theirs.items()}
    return _stack_experts(theirs)


def _stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the tensors of single experts into one for all, under a name with ``#``.

    What cannot be stacked, since numbers are missing or shapes differ, stays as it is.
    """
    stacked, single = {}, {}
    for name, t in tensors.items():
        number = re.search(r"\bexperts\.(?:expert_)?(\d+)\.", name)
        if number is None:
            stacked[name] = t
        else:
            common = name.replace(number[0], number[0].replace(number[1], "#"))
            single.setdefault(common, {})[int(number[1])] = name
    for common, names in single.items():
        parts = [tensors[names[i]] for i in sorted(names)]
        if sorted(names) == [*range(len(names))] and len({t.shape for t in parts}) == 1:
            stacked[common] = torch.stack(parts)
        else:
            stacked |= {name: tensors[name] for name in names.values()}
    return stacked


def _unstack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of all experts apart again."""
    return {
        name.replace("#", str(i)): part
        for name, t in tensors.items()
        for i, part in (enumerate(t) if "#" in name else [(0, t)])
    }
