"""Channels: which slices of which parameters can only be removed together.

One forward pass on an example shows it. Operations carry labels on, and join those that must go
together, by the rules in RULES. What no rule knows pins its labels: a rule that is missing costs
units, never exactness.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from swdlib.comparing import call, plain, tensors_of
from swdlib.labels import FREE, PINNED, Labels, Owner, Place, place_of, storage_of


@dataclass
class _Operation:
    func: Any
    name: str
    bound: dict[str, Any]
    inputs: list[Tensor]
    made: list[Tensor]

    def along(self) -> list[int]:
        """The dimensions along which it indexes `self`."""
        if "dim" in self.bound:
            return [self.bound["dim"] % self.bound["self"].ndim]
        return [d for d, i in enumerate(self.bound["indices"]) if i is not None]


class Follower(TorchDispatchMode, Labels):
    """Lays labels beside all tensors that operations make under it."""

    def __init__(self, model: nn.Module) -> None:
        TorchDispatchMode.__init__(self)
        Labels.__init__(self, model)
        # What parameters meet element by element: joined at the end, along dimensions in which the
        # other still varies. A weight for each of a head's features does not tie the heads.
        self.later: list[tuple[Tensor, Tensor, Sequence[int]]] = []
        self.splits: list[tuple[Tensor, Place]] = []  # (pieces, ...) of one size
        self.heads: list[Tensor] = []
        self.filters: set[str] = set()
        self.ranges: dict[int, int] = {}  # of ids, by the storage that embeddings read them from
        self.steered = False  # whether a value decided which way the code took

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        arguments = func._schema.arguments
        bound = dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[-1]
        if name == "_local_scalar_dense":
            self.steered |= bool((self.of(args[0]) != FREE).all())
            return out
        known = all(storage_of(t) in self.beside for t in made)
        if known and (not func._schema.is_mutable or name in RESHAPED):
            self._see(name, bound, made)
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        others = [i for i in inputs if not self.loose(i)]
        weighty = len(others) < len(inputs)
        loose = weighty and all(bool((self.of(i) == FREE).all()) for i in others)
        if not weighty and not any(bool((self.of(i) > 0).any()) for i in others):
            fixed = any(bool((self.of(i) == PINNED).any()) for i in others)
            found = [torch.full([1] * t.ndim, PINNED if fixed else FREE) for t in made]
        else:
            name = name.removesuffix("_") if func._schema.is_mutable else name
            pointwise = torch.Tag.pointwise in func.tags
            rule = RULES.get(name, Follower._pointwise if pointwise else Follower._unknown)
            operation = _Operation(func, name, bound, inputs, made)
            try:
                given = rule(self, operation)
            except Exception:  # a form of the operation that the rule does not foresee
                given = self._unknown(operation)
            loose &= rule in (Follower._pointwise, Follower._move)
            found = given if isinstance(given, list) else [given] * len(made)
        for tensor, labels in zip(made, found, strict=False):
            if labels.ndim != tensor.ndim:  # a second output, such as statistics
                labels = torch.full([1] * tensor.ndim, PINNED)
            self.put(tensor, labels, loose)
        return out

    def _see(self, name: str, bound: Mapping[str, Any], views: list[Tensor]) -> None:
        """Note how a view arranges labels, and pieces of one size, which code may rely on."""
        if not views or self.beside[storage_of(views[0])].owner:
            return
        labels, dim = [self.of(view) for view in views], bound.get("dim", 0)
        for arranged in labels[:8]:
            self.record(arranged)
        if "split" in name and len({v.shape for v in views}) == 1 and labels[0].shape[dim] > 1:
            self.splits.append((torch.stack(labels), place_of(self.names)))
        elif name == "slice" and labels[0].shape[dim] > 1 and bound.get("step", 1) == 1:
            whole, count = bound["self"].shape[dim], views[0].shape[dim]
            if count < whole and whole % count == 0:
                pieces = self.of(bound["self"]).unflatten(dim, (whole // count, count))
                pieces = pieces.movedim(dim, 0)
                self.splits.append((pieces, place_of(self.names)))

    def _met(self, operands: Sequence[tuple[Tensor, Sequence[int], bool]], ndim: int) -> Tensor:
        """The labels where operands meet element by element: (labels, size, whether fixed).

        What is fixed, of parameters or without units, meets the units at the end.
        """
        units = [(labels, size) for labels, size, fixed in operands if not fixed]
        others = [(labels, size) for labels, size, fixed in operands if fixed]
        if not units:
            return self.merge(others, ndim)
        merged = self.merge(units, ndim)
        self.later += [(merged, labels, size) for labels, size in others]
        return merged

    def _operand(self, tensor: Tensor, behind: int = 0) -> tuple[Tensor, list[int], bool]:
        """Of an operand with so many dimensions behind its own: labels, size, whether fixed."""
        labels = self.of(tensor)
        size = [*tensor.shape, *[1] * behind]
        fixed = self.loose(tensor) or not bool((labels > 0).any())
        return labels.reshape([*labels.shape, *[1] * behind]), size, fixed

    def _pointwise(self, op: _Operation) -> Tensor:
        inputs = [self._operand(i) for i in op.inputs if i is not op.bound.get("out")]
        inputs = [i for i in inputs if not bool((i[0] == FREE).all())]
        return self._met(inputs, op.made[0].ndim)

    def _unknown(self, op: _Operation) -> list[Tensor]:
        for tensor in op.inputs:
            beside = self.beside.get(storage_of(tensor))
            if beside is not None and beside.owner:
                beside.owner.seen = True
                self.pin(beside.owner)
            else:
                self.joins.join(self.of(tensor), PINNED)
        return [torch.full([1] * t.ndim, PINNED) for t in op.made]

    def _move(self, op: _Operation) -> Tensor:
        """Data movement: the labels are moved as the elements are."""
        data = op.bound["self"]
        labels = self.of(data)
        picks = op.name in ("index", "index_select", "gather") and not self.loose(data)
        if picks and any(labels.shape[d] > 1 for d in op.along()):  # the code holds positions
            self.joins.join(labels, PINNED)
        ids = [i for i in op.bound.get("indices", ()) if i is not None]
        if op.name == "index" and any(i.numel() == 0 for i in ids):
            return torch.full([1] * op.made[0].ndim, PINNED)
        labels = labels.expand(data.shape)
        rest = {k: v for k, v in op.bound.items() if k != "self"}
        rest = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, rest)
        try:
            return op.func(labels, **rest)
        except RuntimeError:  # not for whole numbers; what is padded becomes FREE
            return (op.func((labels + 2).double(), **rest) - 2).long().clamp(min=FREE)

    def _joined(self, op: _Operation) -> Tensor:
        """Concatenation; where no units lie along its dimension, the pieces meet."""
        tensors = [t for t in op.bound["tensors"] if t.numel()]
        dim = op.bound.get("dim", 0) % op.made[0].ndim
        labels, sizes = [self.of(t) for t in tensors], [t.shape for t in tensors]
        if op.name == "stack":
            labels = [a.unsqueeze(dim) for a in labels]
            sizes = [t.unsqueeze(dim).shape for t in tensors]
        if all(a.shape[dim] == 1 for a in labels):
            flat = [[1 if d == dim else n for d, n in enumerate(size)] for size in sizes]
            return self.merge(list(zip(labels, flat, strict=True)), op.made[0].ndim)
        # Constants beside units have a size of their own.
        full = [a.masked_fill(a == FREE, PINNED) for a in labels]
        return torch.cat([a.expand(s) for a, s in zip(full, sizes, strict=True)], dim)

    def _padded(self, op: _Operation) -> Tensor:
        labels, pad = self.of(op.bound["self"]), op.bound["pad"]  # the last dimension is first
        pad = [n if labels.shape[-1 - i // 2] > 1 else 0 for i, n in enumerate(pad)]
        return nn.functional.pad(labels, pad, value=PINNED)

    def _reduced(self, op: _Operation) -> list[Tensor]:
        """What is reduced, sorted or normalised together goes together."""
        tensor = op.bound["self"]
        if op.name == "mean" and _in_attention(sys._getframe()):  # of its heads, which few use
            return [torch.full([1] * t.ndim, PINNED) for t in op.made]
        dims = op.bound.get("dim")
        if dims is None or dims == []:
            dims = range(tensor.ndim)
        dims = [dims] if isinstance(dims, int) else list(dims)
        dims = [d % max(tensor.ndim, 1) for d in dims]
        labels = self.joins.collapse(self.of(tensor), dims)
        less = labels.squeeze(dims) if dims else labels
        return [labels if t.ndim == tensor.ndim else less for t in op.made]

    def _spatial(self, op: _Operation) -> Tensor:
        """Pooling, resizing: places mix, channels do not."""
        tensor = op.inputs[0]
        places = next((int(c) for c in op.name if c.isdigit()), tensor.ndim - 2)
        return self.joins.collapse(self.of(tensor), range(tensor.ndim)[-places:])

    def _scattered(self, op: _Operation) -> Tensor:
        target = op.bound["self"]
        source = op.bound.get("src", op.bound.get("source", op.bound.get("values")))
        dims = op.along()
        if "indices" in op.bound and dims != list(range(len(dims))):
            return self._unknown(op)[0]
        labels = self.joins.collapse(self.of(target), dims)
        if isinstance(source, Tensor):
            given = self.of(source)
            if "indices" in op.bound:
                keep = target.ndim - len(dims)
                given = self.joins.collapse(given, range(given.ndim - keep))
                given = given.reshape(given.shape[given.ndim - keep :])
            else:
                given = self.joins.collapse(given, dims)
            self.joins.join(labels, given)
            labels = torch.where(labels == FREE, given, labels)
        return labels

    def _gated(self, op: _Operation) -> Tensor:
        dim = op.bound.get("dim", -1)
        labels = self.of(op.bound["self"])
        if labels.shape[dim] == 1:
            return labels
        one, other = labels.chunk(2, dim)
        self.joins.join(one, other)
        return one

    def _layer_norm(self, op: _Operation) -> list[Tensor]:
        x = op.bound["input"]
        over = range(x.ndim)[-len(op.bound["normalized_shape"]) :]
        return self._normed(op, self.joins.collapse(self.of(x), over))

    def _batch_norm(self, op: _Operation) -> list[Tensor]:
        x, labels = op.bound["input"], self.of(op.bound["input"])
        if op.bound.get("training", "running_mean" not in op.bound):
            labels = self.joins.collapse(labels, [d for d in range(x.ndim) if d != 1])
        return self._normed(op, labels, 1)

    def _group_norm(self, op: _Operation) -> list[Tensor]:
        x, groups = op.bound["input"], op.bound["group"]
        labels = self.joins.collapse(self.of(x), range(2, x.ndim))
        if labels.shape[1] > 1:
            labels = labels.unflatten(1, (groups, -1))
            size = labels.shape[2]
            labels = self.joins.collapse(labels, [2]).repeat_interleave(size, 2).flatten(1, 2)
        return self._normed(op, labels, 1)

    def _normed(self, op: _Operation, labels: Tensor, at: int = -1) -> list[Tensor]:
        for name in ("weight", "bias", "running_mean", "running_var"):
            if (p := op.bound.get(name)) is not None:
                labels = self._with_vector(labels, p, at)
        return [labels]

    def _with_vector(self, labels: Tensor, vector: Tensor, at: int = -1) -> Tensor:
        """Labels of a tensor that a vector along dimension `at` is added to or multiplied with."""
        behind = labels.ndim - 1 - at % labels.ndim
        operand = self._operand(vector, behind if vector.ndim == 1 else 0)
        return self._met([(labels, labels.shape, False), operand], labels.ndim)

    def _reads(self, weight: tuple[Owner, list[tuple[Tensor, int]]], dim: int, role: str) -> Tensor:
        labels, own = weight[1][dim]
        if own >= 0:
            weight[0].roles[own].add(role)
        return labels

    def _convolution(self, op: _Operation) -> Tensor:
        x, w, groups = op.bound["input"], op.bound["weight"], op.bound["groups"]
        if (weight := self.axes(w)) is None:
            return self._unknown(op)[0]
        self.filters.add(weight[0].name)
        flipped = bool(op.bound["transposed"])
        labels = self.joins.collapse(self.of(x), [d for d in range(x.ndim) if d != 1])
        labels = labels.flatten()
        if groups == 1:
            self.joins.join(labels, self._reads(weight, 0 if flipped else 1, "input"))
            out = self._reads(weight, 1 if flipped else 0, "weight")
        else:
            rows = self._reads(weight, 0, "weight")
            self.joins.join(weight[1][1][0], PINNED)
            each = rows.reshape(groups, -1)
            one = self.joins.collapse(each, [1])
            self.joins.join(labels.expand(x.shape[1]).reshape(groups, -1), one)
            out = one.expand(groups, op.made[0].shape[1] // groups).flatten()
            out = out if flipped else rows
        out = out.reshape(1, -1, *[1] * (x.ndim - 2))
        if (bias := op.bound.get("bias")) is not None:
            out = self._with_vector(out, bias, 1)
        return out

    def _product(self, op: _Operation) -> Tensor:
        """Of matrices (..., m, k) and (..., k, n), and of a vector."""
        added = op.name.startswith(("add", "badd"))  # to what comes before the factors
        a, b = list(op.bound.values())[added : added + 2]
        vector = b.ndim == 1
        b = b.unsqueeze(1) if vector else b
        out = self._multiply(a, b)
        out = out.squeeze(-1) if vector else out
        if added:
            both = [(out, op.made[0].shape, False), self._operand(op.bound["self"])]
            out = self._met(both, out.ndim)
        return out

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor:
        if (weight := self.axes(b)) is not None:
            return self._applied(self.of(a), weight, -2, -1)
        if (weight := self.axes(a)) is not None:
            return self._applied(self.of(b).mT, weight, -1, -2).mT
        left, right = (self._data(t) for t in (a, b))
        if left.shape[-1] == 1 and right.shape[-2] > 1:  # the other side is fixed along the sum
            self.joins.join(right, PINNED)
            right = torch.full_like(right[..., :1, :1], PINNED)
        elif right.shape[-2] == 1 and left.shape[-1] > 1:
            self.joins.join(left, PINNED)
            left = torch.full_like(left[..., :1, :1], PINNED)
        elif left.shape[-1] > 1:  # units are summed over: these make a head
            left = self.joins.collapse(left, [left.ndim - 1, left.ndim - 2])
            right = self.joins.collapse(right, [right.ndim - 1, right.ndim - 2])
            self.heads.append(torch.cat([left.flatten(), right.flatten()]))
        units = (left > 0) & (right > 0)
        self.joins.join(left.where(units, FREE), right.where(units, FREE))
        return torch.maximum(left, right)

    def _data(self, tensor: Tensor) -> Tensor:
        """The labels of a factor that is no weight; a buffer, such as frequencies, stays."""
        labels = self.of(tensor)
        if self.loose(tensor):
            self.joins.join(labels, PINNED)
            labels = torch.full([1] * tensor.ndim, PINNED)
        return labels

    def _applied(self, labels: Tensor, weight: Any, k: int, n: int) -> Tensor:
        """Of rows with these labels (..., m, k) and a weight, whose dims k and n are given."""
        for dim in range(len(weight[1]) - 2):
            self.joins.join(weight[1][dim][0], PINNED)
        read, made = self._reads(weight, k, "input"), self._reads(weight, n, "weight")
        if labels.shape[-1] == 1 and bool((labels > 0).any()):  # rows are units, such as heads
            self.joins.join(read, PINNED)
            self.joins.join(made, PINNED)
            return labels
        self.joins.join(labels, read)
        return made.reshape([1] * (labels.ndim - 1) + [-1])

    def _embedding(self, op: _Operation) -> Tensor:
        weight, ids = self.axes(op.bound["weight"]), op.bound["indices"]
        if weight is None:
            return self._unknown(op)[0]
        key = storage_of(ids)
        self.ranges[key] = min(self.ranges.get(key, 2**62), len(op.bound["weight"]))
        self.joins.join(weight[1][0][0], PINNED)
        return self._reads(weight, 1, "weight").reshape([1] * ids.ndim + [-1])


# The rules, by the names of ATen's operations. Views need none, since labels lie beside storages.
RULES: dict[str, Callable[[Follower, _Operation], Any]] = {
    name: rule
    for names, rule in (
        ("mm bmm _grouped_mm mv addmm baddbmm addmv", Follower._product),
        ("convolution", Follower._convolution),
        ("embedding", Follower._embedding),
        ("native_layer_norm", Follower._layer_norm),
        ("native_group_norm", Follower._group_norm),
        (
            "native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit "
            "_native_batch_norm_legit_no_training _batch_norm_with_update",
            Follower._batch_norm,
        ),
        (
            "flip roll repeat index index_select gather pixel_shuffle pixel_unshuffle im2col "
            "native_channel_shuffle channel_shuffle _reshape_copy view_copy unfold_copy diag_embed",
            Follower._move,
        ),
        ("cat stack", Follower._joined),
        ("constant_pad_nd", Follower._padded),
        ("copy", lambda labels, op: labels.of(op.inputs[1])),
        (
            "empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros "
            "new_ones new_full new_empty_strided",
            lambda labels, op: torch.full([1] * op.made[0].ndim, FREE),
        ),
        ("fill zero uniform normal bernoulli", lambda labels, op: labels.of(op.inputs[0])),
        (
            "sum mean amax amin max min prod any all argmax argmin var var_mean std std_mean norm "
            "linalg_vector_norm logsumexp median nansum _softmax _log_softmax _safe_softmax cumsum "
            "cumprod sort topk argsort",
            Follower._reduced,
        ),
        (
            "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d avg_pool1d "
            "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d "
            "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
            "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d "
            "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
            "_upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d "
            "replication_pad1d replication_pad2d replication_pad3d grid_sampler_2d grid_sampler_3d",
            Follower._spatial,
        ),
        (
            "roi_align roi_pool",
            lambda labels, op: labels.joins.collapse(labels.of(op.inputs[0]), [0, 2, 3]),
        ),
        ("scatter scatter_add scatter_reduce index_add index_put index_copy", Follower._scattered),
        ("glu", Follower._gated),
        (
            "_prelu_kernel native_dropout hardswish mish gelu relu6 threshold floor_divide "
            "heaviside copysign log_sigmoid_forward polar masked_fill tril triu where addcmul "
            "addcdiv lerp _conj_physical rrelu_with_noise",
            Follower._pointwise,
        ),
    )
    for name in names.split()
}

RESHAPED = {"transpose_", "t_", "squeeze_", "unsqueeze_", "detach_", "as_strided_"}  # in place


def _in_attention(frame: Any) -> bool:
    """Whether torch's attention, in few steps, called the function of this frame."""
    for _ in range(6):
        if frame is not None and frame.f_code.co_name == "multi_head_attention_forward":
            return True
        frame = frame and frame.f_back
    return False


def trace(model: nn.Module, examples: Sequence[Any]) -> Follower:
    """The labels of a model after a pass of each of the examples, in evaluation mode."""
    labels = Follower(model)
    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    for name, module in model.named_modules():
        owner = labels.owners.get(f"{name}.weight".removeprefix("."))
        if isinstance(module, norms) and owner is not None:
            owner.roles[0].add("scale")
        if isinstance(module, nn.RNNBase):  # its layers have one number of hidden units
            names = [n for n in module._flat_weights_names if "weight_hh" in n]
            owners = {id(o.tensor): o for o in labels.owners.values()}
            first, *rest = (owners[id(getattr(module, n))] for n in names)
            for other in rest:
                labels.joins.join(first.labels(1), other.labels(1))
            if module.proj_size:
                labels.joins.join(first.labels(1), PINNED)
    for example in examples:
        for tensor in tensors_of(example):
            labels.put(tensor, labels.of(tensor))
        with plain(labels):
            output = call(model, example)
        for tensor in tensors_of(output):
            labels.joins.join(labels.of(tensor), PINNED)
        if not labels.steered:
            break
    return labels
