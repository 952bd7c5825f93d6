"""Comparing: a network and a copy that lost slices: how they run, are cut, and are compared."""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from swdlib.labels import storage_of

# Outputs that differ by less, relative to the largest, are equal; else double precision decides.
CLOSE, CLOSE_IN_DOUBLE = 1e-5, 1e-9
NOT_DECIDED = 1e-4  # where a network runs in its own precision alone


class Differs(ValueError):
    """A smaller network computes something else than the masked one."""


# Running ------------------------------------------------------------------------------------------


@contextmanager
def unfused() -> Iterator[None]:
    """A context in which attention runs as the operations that it is made of."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def plain(mode: TorchDispatchMode) -> Iterator[None]:
    """A context without gradients and fused kernels, with random numbers that repeat."""
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), unfused(), mode:
            torch.manual_seed(0)
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """A context with the model in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def call(model: nn.Module, example: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if type(example) is tuple else model(example)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a network's output, however nested in containers and objects."""
    if isinstance(output, Tensor):
        return [output]
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, list | tuple | set | frozenset):
        values = output
    elif is_dataclass(output) and not isinstance(output, type):
        values = [getattr(output, f.name) for f in fields(output)]
    elif hasattr(output, "__dict__") and not callable(output):
        values = vars(output).values()
    return [tensor for value in values for tensor in tensors_of(value)]


# Inputs -------------------------------------------------------------------------------------------


def inputs_like(example: Any, ranges: Mapping[int, int], count: int) -> list[Any]:
    """`count` random inputs of the example's kind.

    Numbers are drawn from the example's own, or uniformly if these are all alike; ids from the
    range of the embedding that reads them, in `ranges` by storage. Other integers stay.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.numel() == 0:
            return x
        if x.is_floating_point():
            if x.numel() > 1 and x.min() < x.max():
                picked = torch.randint(x.numel(), x.shape, generator=generator)
                return x.flatten()[picked.to(x.device)]
            return torch.rand(x.shape, generator=generator).to(x)
        limit = ranges.get(storage_of(x))
        if limit is None or x.dtype == torch.bool:
            return x
        return torch.randint(limit, x.shape, generator=generator).to(x)

    return [tree_map(drawn, example) for _ in range(count)]


# Cutting ------------------------------------------------------------------------------------------

# What a module calls the lengths of its parameters: attribute -> (parameter, dimension).
SIZES: tuple[tuple[type[nn.Module], dict[str, tuple[str, int]]], ...] = (
    (nn.Linear, {"out_features": ("weight", 0), "in_features": ("weight", 1)}),
    (nn.Embedding, {"embedding_dim": ("weight", 1)}),
    (nn.EmbeddingBag, {"embedding_dim": ("weight", 1)}),
    (_NormBase, {"num_features": ("weight", 0)}),
    (nn.GroupNorm, {"num_channels": ("weight", 0)}),
    (nn.PReLU, {"num_parameters": ("weight", 0)}),
    (nn.RNNBase, {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)}),
    (nn.RNNCellBase, {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)}),
)


def twin(model: nn.Module) -> nn.Module:
    """A copy of the model's modules that shares its parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def replace(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, wherever modules hold these."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    by_id = {id(held[name]): tensor for name, tensor in changed.items()}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if id(tensor) in by_id:
                    new = by_id[id(tensor)]
                    if isinstance(tensor, nn.Parameter) and not isinstance(new, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                        by_id[id(tensor)] = new
                    setattr(module, name, new)


@torch.no_grad()
def cut(model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
    """Cut parameters and buffers, in place, down to the slices kept along (name, dimension).

    ValueError for a module that cannot be cut so.
    """
    of_tensors: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, dim), stays in kept.items():
        if not stays.all():
            of_tensors[name][dim] = stays.nonzero().squeeze(1)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    changed = {name: _smaller(held[name], dims) for name, dims in of_tensors.items()}
    before = {
        module: {name: p.shape for name, p in module._parameters.items() if p is not None}
        for module in model.modules()
    }
    replace(model, changed)
    for module, shapes in before.items():
        now = {name: p.shape for name, p in module._parameters.items() if p is not None}
        if now != shapes:
            _tell(module, shapes)
    for module in list(before):
        if isinstance(module, nn.MultiheadAttention):
            _swap(model, module)


def _smaller(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    smaller = tensor.detach()
    for dim, slices in dims.items():
        smaller = smaller.index_select(dim, slices.to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return smaller.clone(memory_format=layout)


def _tell(module: Any, before: Mapping[str, torch.Size]) -> None:
    """Correct what a module says of its own sizes."""
    for kind, sizes in SIZES:
        if isinstance(module, kind):
            for attribute, (name, dim) in sizes.items():
                setattr(module, attribute, getattr(module, name).shape[dim])
    if isinstance(module, _ConvNd):
        weight, old = module.weight.shape, before["weight"]
        if module.groups > 1:  # only whole groups are removed
            module.groups = module.groups * weight[0] // old[0]
        sides = weight[0], weight[1] * module.groups
        flipped = isinstance(module, _ConvTransposeNd)
        module.out_channels, module.in_channels = sides[::-1] if flipped else sides
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * len(module.weight) // before["weight"][0]
    elif hasattr(module, "nf") and hasattr(module, "nx"):  # Conv1D of Hugging Face
        module.nx, module.nf = module.weight.shape


def _swap(model: nn.Module, attention: nn.MultiheadAttention) -> None:
    """Put an Attention wherever one that lost heads stands."""
    if attention.in_proj_weight is None or len(attention.in_proj_weight) == 3 * attention.embed_dim:
        return
    smaller = Attention(attention)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is attention:
                setattr(parent, name, smaller)
        if isinstance(parent, nn.TransformerEncoder):
            parent.use_nested_tensor = False  # only its fused path takes these


@torch.no_grad()
def mask(model: nn.Module, kept: Mapping[tuple[str, int], Tensor]) -> None:
    """Put zeros, in copies of the parameters, where `cut` would remove slices."""
    parameters = dict(model.named_parameters())
    changed: dict[str, Tensor] = {}
    for (name, dim), stays in kept.items():
        if name in parameters and not stays.all():
            if name not in changed:
                changed[name] = parameters[name].detach().clone()
            gone = (~stays).nonzero().squeeze(1).to(changed[name].device)
            changed[name].index_fill_(dim, gone, 0)
    replace(model, changed)


class Attention(nn.Module):
    """A torch.nn.MultiheadAttention that has lost heads, called like the original.

    The original requires its heads together to be as wide as its input. Built from one whose
    weights are already cut, by whole heads.
    """

    # The fused path of torch.nn.TransformerEncoderLayer names it, and TorchScript reads all paths.
    merge_masks = nn.MultiheadAttention.merge_masks

    def __init__(self, cut: nn.MultiheadAttention) -> None:
        super().__init__()
        self._qkv_same_embed_dim = False  # keeps TransformerEncoderLayer off its fused path
        self.embed_dim, self.head_dim = cut.embed_dim, cut.head_dim
        self.dropout, self.batch_first = cut.dropout, cut.batch_first
        self.num_heads = len(cut.in_proj_weight) // (3 * cut.head_dim)
        self.in_proj_weight, self.in_proj_bias = cut.in_proj_weight, cut.in_proj_bias
        self.out_proj = cut.out_proj
        self.training = cut.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values and, if asked for, the attention weights, like the original.

        ValueError for an `attn_mask` of another number of heads, and for `is_causal` without one.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing: give it too")
        length_first = query.ndim == 3 and not self.batch_first
        inputs = [x.transpose(0, 1) if length_first else x for x in (query, key, value)]
        q, k, v = (self._heads(x, third) for third, x in enumerate(inputs))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = shares @ v
            weights = shares.mean(-3) if average_attn_weights else shares
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(heads.transpose(-3, -2).flatten(-2))
        return out.transpose(0, 1) if length_first else out, weights

    def _heads(self, x: Tensor, third: int) -> Tensor:
        """The query, key or value of each head, shape (..., heads, length, head_dim)."""
        weight = self.in_proj_weight.chunk(3)[third]
        bias = None if self.in_proj_bias is None else self.in_proj_bias.chunk(3)[third]
        heads = F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(-3, -2)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores, shape (..., heads or 1, length or 1, keys)."""
        if attn is not None and attn.ndim == 3:
            heads = q.shape[:-2]
            left = q[..., 0, 0].numel()
            if len(attn) != left:
                raise ValueError(
                    f"attn_mask has a mask for each of {len(attn)} heads of the batch, but "
                    f"{left} are left (batch size x num_heads): pass one of shape "
                    "(length, keys) for all heads, or drop those of the removed heads"
                )
            attn = attn.unflatten(0, heads)
        if padding is not None:
            padding = padding[..., None, None, :]
        total: Tensor | None = None
        for mask in (attn, padding):
            if mask is not None:
                if mask.dtype == torch.bool:
                    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -math.inf)
                total = mask if total is None else total + mask
        return total


# Comparing ----------------------------------------------------------------------------------------


class Decisions(TorchDispatchMode):
    """Records whole numbers and truth values that a network draws from real ones, or repeats them.

    A rounding may change which boxes are suppressed or which expert is chosen. The network that
    repeats another's decisions is compared by what it decides on.
    """

    def __init__(self, recorded: "Decisions | None" = None) -> None:
        super().__init__()
        self.recorded = recorded
        self.made: list[tuple[Any, list[Tensor], list[Tensor]]] = []
        self.difference = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves, tree = tree_flatten(out)
        whole = [x for x in leaves if _is_whole(x)]
        real = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.is_floating_point()]
        if not (whole and real) or func._schema.is_mutable:
            return out
        step = len(self.made)
        self.made.append((func, [r.clone() for r in real], [w.clone() for w in whole]))
        if self.recorded is None:
            return out
        if step >= len(self.recorded.made) or self.recorded.made[step][0] is not func:
            raise Differs("it takes another way through its code")
        _, theirs, decided = self.recorded.made[step]
        if [r.shape for r in real] != [t.shape for t in theirs]:
            return out  # of units
        self.difference = max(self.difference, *map(_difference, real, theirs))
        given = iter(decided)
        return tree_unflatten([next(given).clone() if _is_whole(x) else x for x in leaves], tree)


def _is_whole(x: Any) -> bool:
    return isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest of `theirs` that is finite."""
    if ours.shape != theirs.shape:
        raise Differs(f"an output has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
    if not theirs.numel():
        return 0.0
    if theirs.is_complex():
        ours, theirs = torch.view_as_real(ours), torch.view_as_real(theirs)
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    if bool(same.all()):
        return 0.0
    if not theirs.is_floating_point():
        return torch.inf
    ours, theirs = ours.double(), theirs.double()
    apart = float(torch.where(same, 0.0, (ours - theirs).abs()).max())
    size = float(torch.where(theirs.isfinite(), theirs.abs(), 0.0).max())
    return apart / size if apart <= torch.finfo(torch.float64).max and size else torch.inf


def difference(small: nn.Module, masked: nn.Module, example: Any) -> float:
    """How far the outputs of both are apart, each relative to its size."""
    record = Decisions()
    with in_eval(masked), plain(record):
        theirs = tensors_of(call(masked, example))
    repeat = Decisions(record)
    with in_eval(small), plain(repeat):
        ours = tensors_of(call(small, example))
    if len(ours) != len(theirs):
        raise Differs(f"it has {len(ours)} outputs, not {len(theirs)}")
    return max([repeat.difference, *map(_difference, ours, theirs)])


def require_equal(small: nn.Module, masked: nn.Module, examples: Sequence[Any]) -> None:
    """Raise Differs if the outputs differ by more than rounding on one of the examples."""
    norms = [m for m in small.modules() if isinstance(m, _InstanceNorm) and not m.affine]
    hooks = [norm.register_forward_pre_hook(_update_features) for norm in norms]
    try:
        apart = max(difference(small, masked, example) for example in examples)
        if apart <= CLOSE:
            return
        limit = CLOSE_IN_DOUBLE
        try:
            doubled = [copy.deepcopy(net).double() for net in (small, masked)]
            precise = [tree_map(_double, example) for example in examples]
            apart = max(difference(doubled[0], doubled[1], example) for example in precise)
        except Differs:
            raise
        except Exception:  # its code asks for one precision
            eps = max(torch.finfo(p.dtype).eps for p in small.parameters())
            limit = max(NOT_DECIDED, 4 * eps)
    finally:
        for hook in hooks:
            hook.remove()
    if not apart <= limit:
        raise Differs(f"outputs differ by {apart:.1g} of the largest")


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _update_features(norm: Any, inputs: tuple[Tensor, ...]) -> None:
    # An instance norm without parameters is not cut, but warns if its number of features is wrong.
    norm.num_features = inputs[0].shape[-norm._get_no_batch_dim()]
