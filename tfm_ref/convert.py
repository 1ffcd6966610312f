"""Public checkpoints: their configs, names and shapes turned into ours, and back."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tfm_ref.config import TransformerConfig
from tfm_ref.families import Family, choices_of, family_of
from tfm_ref.models import DecoderLM, Encoder, EncoderDecoder, build
from tfm_ref.multi_head import MultiHeadAttention
from tfm_ref.validation import check_size

Model = Encoder | DecoderLM | EncoderDecoder

# --- forms: how one tensor of theirs holds ours


class Form(NamedTuple):
    """Take a tensor of theirs apart, and put it together again.

    Args:
        split: from their tensor, our shapes and our config to our tensors.
        merge: from our tensors and our config to theirs.
    """

    split: Callable[[Tensor, list[torch.Size], TransformerConfig], list[Tensor]]
    merge: Callable[[list[Tensor], TransformerConfig], Tensor]


def _turned(t: Tensor) -> Tensor:
    """Swap the axes of a matrix, of each matrix in a stack, and leave a vector as it is."""
    return t.mT if t.ndim > 1 else t


def _split_groups(t: Tensor, shapes: list[torch.Size], config: TransformerConfig) -> list[Tensor]:
    """Take apart rows of the query heads of a group, their key head, and their value head."""
    g = config.n_kv_heads or config.n_heads
    r = config.n_heads // g
    return [part.flatten(0, 2) for part in t.unflatten(0, (g, r + 2, -1)).split([r, 1, 1], 1)]


def _merge_groups(ts: list[Tensor], config: TransformerConfig) -> Tensor:
    g = config.n_kv_heads or config.n_heads
    heads = config.n_heads // g, 1, 1
    grouped = [t.unflatten(0, (g, s, -1)) for t, s in zip(ts, heads, strict=True)]
    return torch.cat(grouped, 1).flatten(0, 2)


FORMS = {
    "": Form(lambda t, shapes, c: [t], lambda ts, c: ts[0]),
    "turned": Form(lambda t, shapes, c: [_turned(t)], lambda ts, c: _turned(ts[0])),
    "rows": Form(
        lambda t, shapes, c: list(t.split([shape[0] for shape in shapes])),
        lambda ts, c: torch.cat(ts),
    ),
    "columns": Form(
        lambda t, shapes, c: list(_turned(t).split([shape[0] for shape in shapes])),
        lambda ts, c: _turned(torch.cat(ts)),
    ),
    "groups": Form(_split_groups, _merge_groups),
    "row": Form(lambda t, shapes, c: [t[0]], lambda ts, c: ts[0][None]),
    "gain - 1": Form(lambda t, shapes, c: [t + 1], lambda ts, c: ts[0] - 1),
    "turned halves": Form(
        lambda t, shapes, c: list(t.mT.chunk(2, 1)), lambda ts, c: torch.cat(ts, 1).mT
    ),
    "halves": Form(lambda t, shapes, c: list(t.chunk(2, 1)), lambda ts, c: torch.cat(ts, 1)),
    "woven": Form(
        lambda t, shapes, c: [
            t[..., i::2] if len(shapes[0]) == 2 else t[..., i::2].mT for i in (0, 1)
        ],
        lambda ts, c: torch.stack([t if t.ndim == 2 else t.mT for t in ts], -1).flatten(-2),
    ),
}
"""How a tensor of theirs holds ours, by name.

turned: a matrix that multiplies from the right; rows, columns: several beside one another;
groups: by group of query heads that share a key head; row: with one more axis; gain - 1: a gain
that is stored less 1; halves: of all experts, gate and up; turned halves: the same, each matrix
turned; woven: the same, number by number.
"""


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
    return TransformerConfig(**choices_of(hf))


class Line(NamedTuple):
    """One line of a table of names, for one layer and one kind of parameter."""

    ours: list[str]
    theirs: str
    form: Form
    written: bool


def _lines(family: Family, model: Model) -> Iterator[Line]:
    """Read the table of a family, with the layers and parameters that a model has."""
    state, c = model.state_dict(), model.config
    names = family.gated_names if c.gated and family.gated_names else family.names
    for line in filter(None, names.splitlines()):
        other, ours, theirs, form = re.fullmatch(
            r"(\| )?(\S+) +(\S+) *(?:\[(.*)\])?", line
        ).groups()
        head, dot, joined = ours.rpartition(".")
        in_full = theirs.endswith((".weight", ".bias")) or ".experts." in theirs
        for layer in range(max(c.n_layers, c.n_encoder_layers) if "*" in ours else 1):
            for kind in ("",) if in_full else ("", ".weight", ".bias"):
                full = [
                    f"{head}{dot}{name}{kind}".replace("*", str(layer))
                    for name in joined.split("+")
                ]
                if all(name in state for name in full):
                    name = f"{theirs}{kind}".replace("*", str(layer))
                    yield Line(full, name, FORMS[form or ""], written=other is None)


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
    config = config_from_hf(hf)
    family = family_of(hf["model_type"])
    config = replace(config, **family.told_by_tensors(state_dict))
    with torch.device("meta"):
        model = build(config)
    theirs = {_modern(name): t for name, t in state_dict.items()}
    theirs = {n: t for n, t in theirs.items() if not re.fullmatch(family.ignored, n)}
    if not any(name.startswith(family.prefix) for name in theirs):
        theirs = {family.prefix + name: t for name, t in theirs.items()}
    theirs = _stack_experts(theirs)
    wanted, found, wrong = model.state_dict(), {}, []
    unread, lines = set(theirs), list(_lines(family, model))
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
    model.load_state_dict(found, assign=True)
    model.tie()
    return model.eval()


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
    for ours, name, form, written in _lines(family_of(model_type), model):
        if written:
            given[name] = form.merge([state[n] for n in ours], model.config)
            lost -= set(ours)
    if lost:
        raise ValueError(f"{model_type} must have a place for {', '.join(sorted(lost))}")
    return _unstack_experts(given)


def pool_kv_heads(model: nn.Module, n_kv_heads: int) -> nn.Module:
    """Give attention fewer key and value heads: each the mean of those whose place it takes.

    ``W_K'[j] = mean(W_K[j s], ..., W_K[j s + s - 1])`` with s = heads / n_kv_heads, and so W_V and
    the biases. What is made so is near to the model, not equal, and trained further: uptraining.

    Args:
        model: a model, or any module with :class:`~tfm_ref.multi_head.MultiHeadAttention` in it.
        n_kv_heads: number of key and value heads of every attention.

    Returns:
        A changed copy.

    Raises:
        ValueError: if there is no such attention, or n_kv_heads is not an integer of at least 1
            that divides the number of key and value heads of each.

    Reference:
        Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from
        Multi-Head Checkpoints", section 2.1, whose uptraining takes 5 % of the steps of
        pre-training. In its section 2.2 the self-attention of an encoder stays as it is; here,
        none does. Norms of keys serve all heads, and stay.

    Example:
        >>> config = TransformerConfig(vocab_size=10, d_model=8, n_layers=1, n_heads=4, d_ff=16)
        >>> pool_kv_heads(DecoderLM(config), 2).config.n_kv_heads
        2
    """
    check_size("n_kv_heads", n_kv_heads)
    pooled = deepcopy(model)
    attentions = [m for m in pooled.modules() if isinstance(m, MultiHeadAttention)]
    for heads in {attention.n_kv_heads for attention in attentions} or {0}:
        if not heads or heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads ({n_kv_heads}) must divide the heads of keys and values of each "
                f"MultiHeadAttention; got {heads or 'none'}"
            )
    for attention in attentions:
        widths = {attention.k_proj: attention.head_dim, attention.v_proj: attention.v_head_dim}
        attention.n_kv_heads = n_kv_heads
        for projection, width in widths.items():
            for name, t in list(projection.named_parameters()):
                mean = t.detach().unflatten(0, (n_kv_heads, -1, width)).mean(1).flatten(0, 1)
                setattr(projection, name, nn.Parameter(mean, t.requires_grad))
            projection.out_features = len(projection.weight)
    for module in pooled.modules():
        if hasattr(module, "config"):
            module.config = replace(module.config, n_kv_heads=n_kv_heads)
    return pooled


def _modern(name: str) -> str:
    """Rename what files of the first years call otherwise."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


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
