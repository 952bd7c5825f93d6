"""What a kernel keeps of figures: the numbers behind all that is drawn."""

from collections.abc import Iterator

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes

from book.in_kernel import figure_csv

matplotlib.use("agg")


@pytest.fixture
def ax() -> Iterator[Axes]:
    """Return empty Axes with names."""
    figure, axes = plt.subplots()
    axes.set(xlabel="step", ylabel="loss")
    yield axes
    plt.close(figure)


def test_numbers_of_lines_points_and_bars_are_kept(ax: Axes) -> None:
    ax.plot([1, 2], [0.5, 0.25], label="a")
    ax.axhline(0.0)  # across the picture: no data
    ax.scatter([3], [0.125], label="b, c")
    ax.bar([4], [2.0], width=1.0)
    ax.stairs([7, 8], [0, 1, 2], label="d")
    assert figure_csv(ax.figure) == (
        'series,step,loss\na,1,0.5\na,2,0.25\n,4.0,2.0\nd,0,7\nd,1,8\n"b, c",3.0,0.125\n'
    )


def test_name_of_its_own_goes_before_the_label(ax: Axes) -> None:
    ax.plot([1], [2], gid="cut")
    ax.plot([3], [4], label="b", gid="b of swd")
    ax.plot([5], [6])
    assert figure_csv(ax.figure) == "series,step,loss\ncut,1,2\nb of swd,3,4\n,5,6\n"


@pytest.mark.parametrize(
    ("labels", "header"),
    [
        (("", ""), "series,row,column,value"),
        (("outputs", "inputs"), "series,outputs,inputs,value"),
        ((r"weight $w_1$", r"$a_{\max}$ (%)"), "series,weight w_1,a_max (%),value"),
    ],
)
def test_numbers_of_pictures_are_kept(ax: Axes, labels: tuple[str, str], header: str) -> None:
    ax.set(ylabel=labels[0], xlabel=labels[1])
    ax.imshow([[1.0, 2.0]])
    assert figure_csv(ax.figure) == f"{header}\n0,0,0,1.0\n0,0,1,2.0\n"


def test_words_beside_numbers_have_no_marks_of_tex(ax: Axes) -> None:
    ax.set(xlabel="weight $w_1$", ylabel=r"$\|w\|$")
    ax.plot([1], [2], label=r"$a_{\min} = 3$")
    assert figure_csv(ax.figure) == "series,weight w_1,|w|\na_min = 3,1,2\n"


def test_rows_with_names_go_by_them_only_if_all_have_one(ax: Axes) -> None:
    ax.plot([1, 2], [0, -1], gid="named")
    ax.plot([3, 4], [0, -0.5], gid="between")
    ax.set_yticks([-1, 0], ["low", "high"])
    assert figure_csv(ax.figure) == (
        "series,step,loss\nnamed,1,high\nnamed,2,low\nbetween,3,0.0\nbetween,4,-0.5\n"
    )


def test_figure_without_numbers_is_empty(ax: Axes) -> None:
    assert figure_csv(ax.figure) == ""
