"""The lines of the page on training scripts, run as their scripts would run them."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from swdlib import SelectiveWeightDecay, deploy, masks, structures

# In a dozen steps the penalty has not yet brought the weights near zero.
pytestmark = pytest.mark.filterwarnings("ignore::swdlib.swd.NotNeutral")

PAGE = Path(__file__).resolve().parents[2] / "book" / "in-your-script.md"
SECTIONS = {
    title: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(
        r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S
    )
}

DATA = TensorDataset(
    torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
)


def network() -> nn.Module:
    """Return a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def loader() -> DataLoader[Any]:
    """Return four batches."""
    return DataLoader(DATA, batch_size=8)


def train_one_epoch(model: Any, batches: Any, optimizer: Optimizer) -> None:
    """Train as a script does."""
    for inputs, labels in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


@pytest.fixture
def names() -> dict[str, Any]:
    """Return what scripts have defined where the lines stand."""
    model = network()
    return {
        **{"__name__": "script", "torch": torch, "os": __import__("os")},
        **{"SelectiveWeightDecay": SelectiveWeightDecay, "train_one_epoch": train_one_epoch},
        **{"model": model, "loader": loader(), "epochs": 3, "network": network},
        "optimizer": SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
    }


def run(source: str, names: dict[str, Any]) -> None:
    """Run lines of the page."""
    exec(compile(source, PAGE.name, "exec"), names)


def assert_pruned(model: nn.Module) -> None:
    """Nine tenths of the 192 weights are zero."""
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert zeros == round(0.9 * 192)


def test_sections_are_short() -> None:
    assert len(SECTIONS) == 6
    for blocks in SECTIONS.values():
        lines = [line for block in blocks for line in block.splitlines() if line.strip()]
        assert 0 < len(lines) <= 14


def test_any_loop(names: dict[str, Any]) -> None:
    [lines] = SECTIONS["Any loop, and accelerate"]
    run(lines, names)
    assert_pruned(names["model"])


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning(names: dict[str, Any], tmp_path: Path) -> None:
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    quiet = ("checkpointing", "progress_bar", "model_summary")
    options = {f"enable_{name}": False for name in quiet} | {"logger": False, "accelerator": "cpu"}
    options |= {"default_root_dir": tmp_path, "devices": 1}
    [lines] = SECTIONS["Lightning"]
    run(lines, names | {"Trainer": Trainer, "module": (module := Module()), "options": options})
    assert_pruned(module)


class Classifier(nn.Module):
    """A network that returns its loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.net(inputs)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def test_hugging_face(names: dict[str, Any], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    rows = [
        {"inputs": inputs, "labels": label} for inputs, label in zip(*DATA.tensors, strict=True)
    ]
    model = Classifier()
    [lines] = SECTIONS["Hugging Face's Trainer"]
    given = {"Trainer": Trainer, "arguments": arguments, "dataset": rows, "model": model}
    run(lines, names | given)
    assert_pruned(model)


def timm(names: dict[str, Any], folder: Path) -> Iterator[None]:
    """What timm's script has defined, and its loop."""
    names |= {"num_epochs": 3, "loader_train": loader(), "output_dir": str(folder)}
    names["args"] = SimpleNamespace(weight_decay=5e-4)
    yield
    for _ in range(3):
        train_one_epoch(names["model"], names["loader_train"], names["optimizer"])


def torchvision(names: dict[str, Any], folder: Path) -> Iterator[None]:
    """What torchvision's script has defined, and its loop."""
    names |= {"data_loader": loader(), "model_without_ddp": names["model"]}
    names["args"] = SimpleNamespace(epochs=3, weight_decay=5e-4, output_dir=str(folder))
    names["utils"] = SimpleNamespace(save_on_master=torch.save)
    yield
    for _ in range(3):
        train_one_epoch(names["model"], names["data_loader"], names["optimizer"])


@pytest.mark.parametrize(
    ("title", "script"),
    [
        ("timm's train.py", timm),
        ("torchvision's references/classification/train.py", torchvision),
    ],
)
def test_reference_scripts(
    title: str, script: Callable[..., Iterator[None]], names: dict[str, Any], tmp_path: Path
) -> None:
    before, after = SECTIONS[title]
    running = script(names, tmp_path)
    next(running)
    run(before, names)
    assert next(running, "ended") == "ended"
    run(after, names)
    assert_pruned(names["model"])
    stored = torch.load(tmp_path / "pruned.pth", weights_only=True)
    again = network()
    again.load_state_dict(stored.get("model", stored))
    assert_pruned(again)


def test_shrunk_network_is_fine_tuned_stored_and_found_again(
    names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, example = names["model"], DATA.tensors[0][:4]
    kept = masks.select(masks.find_groups(model, structures.channels(example)), 0.5)
    masks.apply_(model, kept)
    small = deploy.shrink(model, kept, example)
    save, load = SECTIONS["The smaller network in another process"]
    run(save, names | {"masks": kept})
    optimizer = SGD(small.parameters(), lr=0.05)
    train_one_epoch(small, loader(), optimizer)
    torch.save(small.state_dict(), "tuned.pth")
    elsewhere = {"network": network, "torch": torch, "deploy": deploy, "example": example}
    run(load, elsewhere)
    assert torch.equal(elsewhere["small"](example), small(example))  # type: ignore[operator]
