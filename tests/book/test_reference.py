"""What the pages to look things up in say: the field, the cheat sheet, the notation."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from torch import nn
from torch.nn.utils import prune

from swdlib import Config, criteria, masks, structures
from swdlib.cli import parser
from swdlib.masks import Masks
from swdlib.recipes import RECIPES

BOOK = Path(__file__).resolve().parents[2] / "book"
PAGE = (BOOK / "the-field.md").read_text("utf-8")


def snippets(page: str) -> list[str]:
    """Return the Python code of a page."""
    text = (BOOK / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(source: str, **given: Any) -> dict[str, Any]:
    """Run code of a page and return what it defined."""
    names: dict[str, Any] = {"__name__": "page", **given}
    exec(compile(source, "page.md", "exec"), names)
    return names


def network() -> nn.Sequential:
    """Return a network whose layers have numbers of weights that a tenth divides."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))


def theirs(cut: Callable[[nn.Module], Any], model: nn.Sequential) -> Masks:
    """Return the masks of torch after `cut` was called with each linear layer."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            cut(layer)
    return {
        name.removesuffix("_mask"): mask.bool()
        for name, mask in model.named_buffers()
        if name.endswith("_mask")
    }


# The field


def test_cut_of_the_page_is_the_same_both_ways() -> None:
    *_, cut = snippets("the-field.md")
    names = run(cut)
    assert masks.sparsity_of(names["kept"]) == pytest.approx(0.9, abs=1e-3)
    assert list(names["model"].state_dict()) == list(network().state_dict())


def test_distillation_loss_is_cross_entropy_without_and_zero_with_an_equal_teacher() -> None:
    loss = run(snippets("the-field.md")[0])["distillation_loss"]
    outputs, labels = torch.randn(8, 4), torch.arange(8) % 4
    plain = nn.functional.cross_entropy(outputs, labels)
    torch.testing.assert_close(loss(outputs, torch.randn(8, 4), labels, weight=0.0), plain)
    assert abs(float(loss(outputs, outputs, labels, weight=1.0))) < 1e-6


def test_layer_by_layer_is_the_uniform_allocation() -> None:
    model, other = network(), network()
    kept = masks.select(structures.weights(model), 0.9, allocation=masks.uniform)
    found = theirs(lambda layer: prune.l1_unstructured(layer, "weight", 0.9), other)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[name], found[name]) for name in kept)


def test_torch_leaves_the_parameters_in_another_order() -> None:
    layer = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    assert [name for name, _ in prune.remove(layer, "weight").named_parameters()] == [
        "bias",
        "weight",
    ]


def test_a_mask_of_ones_own_is_applied_by_name() -> None:
    model, mask = network(), torch.rand(30, 20) < 0.5
    expected = torch.where(mask, model.get_parameter("0.weight"), 0.0)
    masks.apply_(model, {"0.weight": mask})
    assert torch.equal(model.get_parameter("0.weight"), expected)


def test_state_dict_of_torch_grows_and_that_of_the_model_does_not() -> None:
    model = copy.deepcopy(network())
    theirs(lambda layer: prune.random_unstructured(layer, "weight", 0.5), model)
    assert {"0.weight_orig", "0.weight_mask"} < model.state_dict().keys()
    plain = network()
    kept = masks.select(structures.weights(plain), 0.5, criterion=criteria.Random(0))
    assert list(plain.state_dict()) == list(network().state_dict())
    assert masks.sparsity_of(kept) == 0.5


def test_an_amount_counts_what_is_left_and_a_sparsity_the_whole() -> None:
    model = network()
    for _ in range(2):
        found = theirs(lambda layer: prune.l1_unstructured(layer, "weight", 0.5), model)
    assert masks.sparsity_of(found) == 0.75
    assert masks.sparsity_of(masks.select(structures.weights(network()), 0.5)) == 0.5


def test_page_has_its_parts() -> None:
    sections = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert PAGE.index("In short") < PAGE.index("fig-field") < PAGE.index("## ")  # answer first
    assert sections[-1] == "Summary"


# The cheat sheet


def train(
    model: nn.Module, loader: list[tuple[torch.Tensor, torch.Tensor]], optimizer: Any
) -> None:
    """Train as the reader does, with a learning rate that falls."""
    for epoch in range(20):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / 20)
        for inputs, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def test_lines_of_the_cheat_sheet_prune_and_deploy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, loader = network(), [(torch.randn(16, 20), torch.arange(16) % 10)] * 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    given = {"model": model, "loader": loader, "optimizer": optimizer, "epochs": 20, "train": train}
    training, after = snippets("cheat-sheet.md")
    found = run(training, **given)["masks"]
    assert masks.sparsity_of(found) == 0.95
    run(after, model=model, masks=found, example=torch.randn(4, 20))
    assert {path.name for path in tmp_path.iterdir()} == {"pruned.safetensors.zlib", "small.onnx"}


def test_rising_target_of_the_cheat_sheet_is_that_of_the_recipe() -> None:
    config = Config(profile="smoke", recipe="swd_rising", sparsity=0.95)
    text = (BOOK / "cheat-sheet.md").read_text("utf-8")
    assert f"`Exponential({config.a_min:g}, 5e4)`" in text and config.a_max == 5e4
    assert (config.ramp_begin, config.ramp_end) == (0.1, 0.7)
    assert "Cubic(0, 0.95, begin=0.1, finish=0.7)" in snippets("cheat-sheet.md")[0]


def start_by_the_rule(rate: float, steps: int) -> float:
    """Return the starting strength of the book's rule, for a momentum of 0.9 and 5e-4."""
    return 10.0 ** round(math.log10(30 * (1 - 0.9) / (rate * 5e-4 * steps)))


@pytest.mark.parametrize(
    ("page", "rate", "steps", "ends"),
    [
        ("prune-your-own", 0.2, 10 * 32, "Exponential(100, 1e5)"),
        ("swd-from-scratch", 0.2, 8 * 23, "Exponential(100.0, 1e5)"),
        ("schedules", 0.2, 10 * 18, "Exponential(100, 1e5)"),
    ],
)
def test_pages_take_the_strengths_of_the_rule(
    page: str, rate: float, steps: int, ends: str
) -> None:
    assert start_by_the_rule(rate, steps) == 100
    assert ends in (BOOK / f"{page}.ipynb").read_text("utf-8")


def test_rule_for_the_strength_is_the_same_wherever_it_stands() -> None:
    sheet = (BOOK / "cheat-sheet.md").read_text("utf-8")
    cells = nbformat.read(BOOK / "schedules.ipynb", as_version=4).cells
    for text in (sheet, "\n".join(cell.source for cell in cells)):
        assert r"a_{\min} = 30\, (1 - \beta) / (\eta\, \mu\, T)" in text
        assert "two thirds of" in text and r"$a_{\max} = 10^5$" in text
        assert r"| $a_{\min}$ | 100 | 10 | 1 |" in text
    for steps, start in (
        (100, 100),
        (900, 100),
        (1_000, 10),
        (9_000, 10),
        (10_000, 1),
        (90_000, 1),
    ):
        assert start_by_the_rule(0.2, steps) == start
    assert start_by_the_rule(0.4, 10 * 391) == Config(profile="laptop", recipe="swd_rising").a_min
    assert "**C2** 75, rounded to 100." in (BOOK / "for-teachers.md").read_text("utf-8")
    assert round(30 * (1 - 0.9) / (0.2 * 5e-4 * 400)) == 75


def test_cheat_sheet_names_every_recipe_and_its_commands_are_commands() -> None:
    text = (BOOK / "cheat-sheet.md").read_text("utf-8")
    recipes = text.split("## Which recipe?")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", recipes)) == set(RECIPES)
    for command in re.findall(r"`swdlib ([^`]+)`", text):
        if command != "run":
            parser().parse_args(command.split())


# The notation and the glossary


def test_total_decay_of_the_published_run_is_what_the_notation_says() -> None:
    config = Config(profile="paper", recipe="swd", dataset="cifar10")
    steps, rates = config.epochs * 391, (0.1, 0.01, 0.001)
    rate = [
        rates[3 * t // steps] * config.a_min * (config.a_max / config.a_min) ** (t / steps) * 5e-4
        for t in range(steps)
    ]
    text = (BOOK / "notation.md").read_text("utf-8")
    assert f"| {sum(rate) / (1 - config.momentum):,.0f} |" in text
    assert f"at most {max(rate):.2f}" in text


def test_every_term_that_a_page_links_is_in_the_glossary() -> None:
    text = (BOOK / "glossary.md").read_text("utf-8")
    terms = {line for line in text.splitlines() if line[:1].isalpha()}
    for page in [*BOOK.glob("*.md"), *BOOK.glob("*.ipynb")]:
        for link in re.findall(r"\{term\}`([^`]+)`", page.read_text("utf-8")):
            name = re.sub(r".*<(.+)>", r"\1", link.replace("\\n", " "))
            assert name.lower() in {term.lower() for term in terms}, (page.name, name)


def test_every_work_that_a_page_cites_is_in_the_bibliography() -> None:
    works = set(re.findall(r"^@\w+\{(\w+),", (BOOK / "references.bib").read_text("utf-8"), re.M))
    for page in [*BOOK.glob("*.md"), *BOOK.glob("*.ipynb")]:
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text("utf-8")):
            assert {key.strip() for key in keys.split(",")} <= works, page.name


def test_works_are_complete() -> None:
    text = (BOOK / "references.bib").read_text("utf-8")
    for work in re.findall(r"^@(\w+)\{(\w+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        kind, key, body = work
        fields = set(re.findall(r"^  (\w+) = ", body, re.MULTILINE))
        assert {"author", "title", "year"} <= fields and "others" not in body, key
        assert {"article": "journal", "inproceedings": "booktitle"}.get(kind, "year") in fields, key
        assert not re.search(r"author = .*, [A-Z]\.( and|\})", body), key  # initials alone
        assert re.search(r"year = \{" + key[-4:], body), key


def test_pages_to_look_things_up_are_in_the_contents() -> None:
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text("utf-8"))
    files = [page["file"] for part in contents["parts"] for page in part["chapters"]]
    assert files.index("worksheet") == files.index("for-teachers") - 1


# The worksheet and its answers


def test_answers_to_the_worksheet_are_right() -> None:
    text = (BOOK / "for-teachers.md").read_text("utf-8")
    hessian, trained = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 2.0])
    best = trained[1] + hessian[1, 0] / hessian[1, 1] * trained[0]
    schur = hessian[0, 0] - hessian[0, 1] ** 2 / hessian[1, 1]
    losses = [(0.5 * c * trained[0] ** 2).item() for c in (hessian[0, 0], schur)]
    assert f"the other weight moves to {best:g}" in text
    assert "costs {:g} without and {:g} with it".format(*losses) in text
    bounds = [bound / (0.05 * 5e-4) for bound in (3.8, 3.8 / 2.8)]
    assert "{:,.0f} (heavy ball), about {:,.0f} (Nesterov)".format(*bounds) in text
    decay = 500 * 0.01 * 400 * 5e-4 / (1 - 0.9)
    assert f"$P = {decay:g}$" in text
    kept = round(0.05 * 40_000)
    assert f"{kept:,} weights, {kept + 1_500:,} parameters" in text


def test_worksheet_goes_through_the_chapters_of_three_hours() -> None:
    text, teachers = ((BOOK / f"{n}.md").read_text("utf-8") for n in ("worksheet", "for-teachers"))
    plan = teachers.split("## Three hours")[1].split("\n## ")[0]
    for page in set(re.findall(r"\(([\w-]+\.ipynb)", text)):
        assert page in teachers, page
    assert text.count('class="blank') > 20 and "worksheet.md" in plan


def test_students_prune_in_the_first_hour() -> None:
    text = (BOOK / "for-teachers.md").read_text("utf-8")
    for plan in ("## One hour", "## Three hours"):
        rows = re.findall(
            r"^\| (\d+)–(\d+) \| (.*) \|$", text.split(plan)[1].split("\n## ")[0], re.M
        )
        assert all(rows[i][1] == rows[i + 1][0] for i in range(len(rows) - 1))
        assert int(next(row[1] for row in rows if "prune-your-own" in row[2])) <= 60
