"""Config: every setting of a run, checked before any work, with defaults at three scales."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD

from swdlib import published, structures
from swdlib.comparing import in_eval
from swdlib.criteria import CRITERIA, batch_norm_scale, magnitude
from swdlib.data.load import DATASETS, AnyDataset
from swdlib.masks import ALLOCATIONS
from swdlib.models import MODELS, build_model, check_model
from swdlib.published import REFERENCES, STD
from swdlib.recipes import RECIPES, Phase, Prune, Recipe, Train, ranked
from swdlib.runs.devices import Precision, check_tracker
from swdlib.runs.training import Options
from swdlib.schedules import Cosine, Growth, Piecewise, Schedule, Steps, check_count
from swdlib.swd import Update

STRUCTURES = structures.STRUCTURES | published.STRUCTURES
BUDGETS = ("equal", "published")
NORMALISATIONS = ("measured", "published")

# "paper" is the published set-up, as in the authors' code (see `published`); others are smaller.
_NAMES = ("dataset", "model", "width", "epochs", "finetune_epochs", "batch_size", "lr")
_SCALES = {
    "smoke": ("digits", "cnn", 16, 30, 6, 64, 0.2),
    "laptop": ("cifar10", "resnet20", 8, 10, 2, 128, 0.2),
    "paper": ("cifar10", "tessier_resnet20", 64, 300, 50, 128, 0.1),
}
PROFILES: dict[str, dict[str, Any]] = {
    name: {
        **dict(zip(_NAMES, scale, strict=True)),
        **{"weight_decay": 5e-4, "precision": "fp32"},
        **{"structure": "weights", "budget": "equal", "normalisation": "measured"},
        **{"lr_schedule": "triangle", "nesterov": True},
    }
    for name, scale in _SCALES.items()
}
PROFILES["paper"] |= {
    **{"structure": "tessier_parameters", "budget": "published", "normalisation": "published"},
    **{"lr_schedule": "steps", "nesterov": False},
}

# "paper" on ImageNet. Published are a ResNet-50 and the crops. The rest is not: epochs, batch size,
# learning rate and weight decay are the usual ones of torchvision's ResNet-50, fine-tuning is a
# sixth of the epochs as on CIFAR-10, and bf16 saves time.
PAPER_ON_IMAGENET = {
    "model": "tessier_resnet50",
    "epochs": 90,
    "finetune_epochs": 15,
    "batch_size": 256,
    "weight_decay": 1e-4,
    "precision": "bf16",
}

COUNTS = ("width", "epochs", "finetune_epochs", "iterations", "batch_size", "accumulate", "every")

LR_SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "steps": lambda lr: Steps(lr, 0.1, (1 / 3, 2 / 3)),  # as published
    "cosine": lambda lr: Cosine(lr, lr / 100),
    "triangle": lambda lr: Piecewise(((0.0, lr / 10), (0.2, lr), (1.0, lr / 100))),
}

# Structures whose units have batch-norm scales.
WITH_SCALES = ("filters", "filters_and_channels", "tessier_scales", "tessier_filters")

# Some recipes take these settings, but a run uses them with every recipe.
ALWAYS_USED = ("weight_decay", "seed")


# A field with one of these defaults is None until its value is looked up.
BY_PROFILE = object()  # the profile's value, which may depend on the dataset
BY_RECIPE = object()  # the default of the recipe's parameter of that name


def _setting(default: Any, meaning: str, *choices: str) -> Any:
    given = None if default in (BY_PROFILE, BY_RECIPE) else default
    metadata = {"meaning": meaning, "choices": choices, "default": default}
    return field(default=given, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every setting of a run: the parameters of notebooks, and the flags of the command line.

    A field that is left at None takes the value of the profile or, if only recipes use it, the
    recipe's default. A setting that the recipe does not use is set to None (the sparsity to 0), so
    that equal runs have equal configurations. Raises ValueError that names the field, its value and
    what is allowed.
    """

    profile: str = _setting("smoke", "scale of the run", *PROFILES)
    dataset: str = _setting(BY_PROFILE, "dataset", *DATASETS)
    data_root: str | None = _setting(None, "folder that holds the dataset")
    normalisation: str = _setting(BY_PROFILE, "standard deviations of images", *NORMALISATIONS)
    model: str = _setting(BY_PROFILE, f"{', '.join(MODELS)}, or a torchvision classifier")
    width: int | None = _setting(BY_PROFILE, "maps of the first stage")
    recipe: str = _setting("swd", "method", *RECIPES)
    budget: str = _setting(
        BY_PROFILE, "whether fine-tuning is part of the epochs or follows them", *BUDGETS
    )
    structure: str = _setting(BY_PROFILE, "what is pruned together", *STRUCTURES)
    criterion: str = _setting(BY_RECIPE, "what is pruned first", *CRITERIA)
    allocation: str = _setting(BY_RECIPE, "how layers share the sparsity", *ALLOCATIONS)
    sparsity: float = _setting(0.9, "fraction of weights removed, in [0, 1)")
    epochs: int = _setting(
        BY_PROFILE, "epochs in all; before the first cut with budget 'published'"
    )
    finetune_epochs: int = _setting(
        BY_PROFILE, "epochs of them after cuts; after each with budget 'published'"
    )
    iterations: int = _setting(BY_RECIPE, "cuts")
    batch_size: int = _setting(BY_PROFILE, "images in a step")
    lr: float = _setting(BY_PROFILE, "highest learning rate")
    lr_schedule: str = _setting(BY_PROFILE, "learning-rate schedule", *LR_SCHEDULES)
    momentum: float = _setting(0.9, "momentum of SGD, in [0, 1)")
    nesterov: bool = _setting(BY_PROFILE, "Nesterov's momentum")
    weight_decay: float = _setting(BY_PROFILE, "weight decay mu, of all weights and of SWD")
    a: float = _setting(BY_RECIPE, "strength of SWD where it is constant")
    a_min: float = _setting(BY_RECIPE, "strength of SWD at the start")
    a_max: float = _setting(BY_RECIPE, "strength of SWD at the end")
    growth: str = _setting(BY_RECIPE, "how the strength of SWD grows", *get_args(Growth))
    growth_end: float = _setting(BY_RECIPE, "share of training when it is at its highest")
    update: str = _setting(BY_RECIPE, "how SWD acts", *get_args(Update))
    ramp_begin: float = _setting(BY_RECIPE, "share of training when the sparsity starts to rise")
    ramp_end: float = _setting(BY_RECIPE, "share of training when the sparsity is reached")
    every: int = _setting(BY_RECIPE, "steps from one choice of masks to the next")
    l1: float = _setting(BY_RECIPE, "L1 penalty on the scales of batch normalisation")
    seed: int = _setting(0, "seed of weights, batch order and augmentation")
    holdout: float = _setting(0.0, "fraction of training images measured instead of the test's")
    precision: str = _setting(BY_PROFILE, "arithmetic", *get_args(Precision))
    accumulate: int = _setting(1, "parts that a batch is worked through in")
    clip: float | None = _setting(None, "largest gradient norm")
    compile: bool = _setting(False, "use torch.compile")
    channels_last: bool = _setting(True, "lay images channels last: faster convolutions")
    device: str = _setting("auto", "where it runs", "auto", "cpu", "cuda", "mps")
    tracker: str | None = _setting(None, "also send figures to tensorboard, wandb, mlflow, ...")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is None:
                value = self._default(setting.name, setting.metadata["default"])
            if value is not None:
                value = _typed(setting.name, setting.type, value)
                choices = setting.metadata["choices"]
                if choices and value not in choices:
                    allowed = ", ".join(choices)
                    raise ValueError(f"{setting.name} must be one of {allowed}, not {value!r}")
            object.__setattr__(self, setting.name, value)
        if self.tracker is not None:
            check_tracker(self.tracker)
        check_model(self.model, self.width)
        self._check_ranges()
        self._rank_as_published()
        self._check_recipe()
        self._blank_unused()

    def settings(self) -> dict[str, Any]:
        """The fields and their values, as a record keeps them."""
        return asdict(self)

    def title(self) -> str:
        """A line that names the run."""
        width = "" if self.width is None else f" of width {self.width}"
        cut = f" at sparsity {self.sparsity:g}" if self.sparsity else ""
        return (
            f"{self.recipe}{cut}: {self.model}{width} on {self.dataset}, "
            f"{self.epochs_in_all()} epochs, seed {self.seed}"
        )

    def epochs_in_all(self) -> int:
        """The epochs of all phases."""
        return sum(phase.epochs for phase in self.phases() if isinstance(phase, Train))

    def normalised(self, data: AnyDataset) -> AnyDataset:
        """The data with the normalisation that these settings say."""
        return replace(data, std=STD[self.dataset]) if self.normalisation == "published" else data

    def build(self, data: AnyDataset) -> nn.Module:
        """The network for `data`, its weights drawn from the seed; seeds torch's generators.

        ValueError if it cannot take images of that size.
        """
        shape = {"channels": data.channels, "size": data.size}
        torch.manual_seed(self.seed)
        model = build_model(self.model, **shape, classes=data.classes, width=self.width)
        try:
            with in_eval(model), torch.inference_mode():
                model(torch.zeros(1, data.channels, data.size, data.size))
        except (RuntimeError, AssertionError, ValueError) as error:
            size = f"{data.size} x {data.size} pixels"
            message = f"model {self.model!r} cannot take images of {size}: {error}"
            raise ValueError(message) from error
        return model

    def phases(self, example: Tensor | None = None) -> list[Phase]:
        """The phases of the recipe with these settings.

        `example` is an input of the network, a batch of any size: to train, structures that reach
        through several layers (filters, channels) need it.
        """
        settings = self.settings()
        settings["lr"] = LR_SCHEDULES[self.lr_schedule](self.lr)
        if self.structure is not None:
            settings["structure"] = STRUCTURES[self.structure](example)
        given = {name: settings[name] for name in self._parameters()}
        criterion = CRITERIA[self.criterion] if self.criterion else None
        allocation = ALLOCATIONS[self.allocation] if self.allocation else None
        return ranked(self._recipe()(**given), criterion, allocation)

    def options(self, **more: Any) -> dict[str, Any]:
        """The options for `train` with these settings; those in `more` replace or extend them."""
        optimizer = partial(
            SGD,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )
        shared = {f.name for f in fields(Options)} & {f.name for f in fields(self)}
        return {"optimizer": optimizer, **{name: getattr(self, name) for name in shared}, **more}

    def _default(self, name: str, default: Any) -> Any:
        if default is BY_RECIPE:
            parameter = self._parameters().get(name)
            return parameter.default if parameter else None
        if default is not BY_PROFILE:
            return default
        if name == "width" and self.model not in MODELS:
            return None  # torchvision's networks have none
        if name == "budget" and self.recipe not in REFERENCES:
            return "equal"
        if name == "normalisation" and self.dataset not in STD:
            return "measured"
        scale = PROFILES[self.profile]
        if name == "structure" and not self.model.startswith("tessier"):
            return scale[name].removeprefix("tessier_")
        if (self.profile, self.dataset) == ("paper", "imagenet"):
            scale = scale | PAPER_ON_IMAGENET
        return scale[name]

    def _check_ranges(self) -> None:
        for name in COUNTS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        self._require("above 0", lambda v: v > 0, "lr", "a", "a_min", "a_max", "clip")
        self._require("in [0, 1)", lambda v: 0 <= v < 1, "sparsity", "momentum", "holdout")
        self._require("in [0, 1]", lambda v: 0 <= v <= 1, "ramp_begin", "ramp_end")
        self._require("0 or more", lambda v: v >= 0, "weight_decay", "l1", "seed")
        self._require("below 2**63", lambda v: v < 2**63, "seed")
        self._require("false if momentum is 0", lambda v: not v or self.momentum > 0, "nesterov")

    def _require(self, allowed: str, holds: Callable[[Any], bool], *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {allowed}, not {value!r}")

    def _cuts(self) -> list[Prune]:
        return [phase for phase in self.phases() if isinstance(phase, Prune)]

    def _rank_as_published(self) -> None:
        """The publication ranks units by scale, never by the magnitude of their weights."""
        scales = self.profile == "paper" and self.structure in WITH_SCALES and not self.criterion
        if scales and all(cut.criterion is magnitude for cut in self._cuts()):
            object.__setattr__(self, "criterion", "batch_norm_scale")

    def _check_recipe(self) -> None:
        """Let the recipe check its settings, and refuse what does not go together."""
        if self.normalisation == "published" and self.dataset not in STD:
            raise ValueError(f"normalisation must be 'measured' for dataset {self.dataset!r}")
        if self.structure in published.STRUCTURES and not self.model.startswith("tessier"):
            raise ValueError(
                f"structure {self.structure!r} is for the networks tessier_..., not for model "
                f"{self.model!r}: use another, such as 'parameters' or 'filters'"
            )
        by_scale = any(cut.criterion is batch_norm_scale for cut in self._cuts())
        if by_scale and self.structure not in WITH_SCALES:
            who = f"criterion {self.criterion!r}" if self.criterion else f"recipe {self.recipe!r}"
            raise ValueError(
                f"structure must be one of {', '.join(WITH_SCALES)}, whose units have the "
                f"batch-norm scales that {who} ranks by, not {self.structure!r}"
            )

    def _blank_unused(self) -> None:
        recipes = [*RECIPES.values(), *REFERENCES.values()]
        of_recipes = {name for recipe in recipes for name in inspect.signature(recipe).parameters}
        if "structure" not in self._parameters():
            of_recipes |= {"criterion", "allocation"}
        for name in of_recipes - set(self._parameters()) - set(ALWAYS_USED):
            object.__setattr__(self, name, 0.0 if name == "sparsity" else None)

    def _recipe(self) -> Recipe:
        if self.budget == "equal":
            return RECIPES[self.recipe]
        if self.recipe in REFERENCES:
            return REFERENCES[self.recipe]
        raise ValueError(
            f"budget must be 'equal' for recipe {self.recipe!r}: {', '.join(REFERENCES)} have "
            "a published one"
        )

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self._recipe()).parameters


def type_of(kind: Any) -> Any:
    """The type that a field's annotation allows, None aside."""
    return next((t for t in get_args(kind) if t is not type(None)), kind)


def _typed(name: str, kind: Any, value: Any) -> Any:
    """The value as the field's type, so that 1 and 1.0 are one configuration."""
    wanted = type_of(kind)
    accepted = {float: numbers.Real, int: numbers.Integral}.get(wanted, wanted)
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} must be of type {wanted.__name__}, not {value!r}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, not {value!r}")
    return wanted(value)
