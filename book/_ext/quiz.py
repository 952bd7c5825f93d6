"""Questions to check oneself: each answer of a `{quiz}` opens and says whether it is right.

    :::{quiz} How much is 1 + 1?
    - [ ] 3
      That is one too many.
    - [x] 2
      One and one more.
    :::

An answer is a <details> element, which needs no script and works with the keyboard. On paper all
are open.
"""

import re
from collections.abc import Callable
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ANSWER = re.compile(r"- \[([ x])\] (.+)")


class question(nodes.General, nodes.Element):
    """A question with its answers."""


class answer(nodes.General, nodes.Element):
    """One answer, which opens."""


class chosen(nodes.General, nodes.TextElement):
    """The text of an answer before it opens."""


class Quiz(SphinxDirective):
    """A question and its answers, just one of which is right."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the question's node."""
        answers = answers_in(list(self.content))
        if len(answers) < 2 or sum(right for right, _, _ in answers) != 1:
            raise self.error("a quiz needs two answers or more, of which one is right: - [x]")
        number = self.env.new_serialno("quiz")
        asked = nodes.paragraph(classes=["quiz-question"], ids=[f"question-{number}"])
        asked += self.text(self.arguments[0])
        whole = question("", asked, number=number)
        whole += [self.answer(number, *parts) for parts in answers]
        return [whole]

    def answer(self, number: int, right: bool, text: str, why: str) -> nodes.Node:
        """Return an answer's node."""
        verdict = nodes.paragraph("", "", nodes.strong(text="Right." if right else "No."))
        verdict += [nodes.Text(" "), *self.text(why)]
        shown = chosen("", "", *self.text(text))
        return answer("", shown, verdict, number=number, right=right)

    def text(self, source: str) -> list[nodes.Node]:
        """Return a line of Markdown as nodes."""
        found, _ = self.state.inline_text(source, self.lineno)
        return found


def answers_in(lines: list[str]) -> list[tuple[bool, str, str]]:
    """Return for each answer of a quiz whether it is right, its text, and why.

    ValueError for a line outside of any answer, and for an answer without a reason.
    """
    answers: list[tuple[bool, str, str]] = []
    for line in filter(str.strip, lines):
        if begins := ANSWER.fullmatch(line):
            answers.append((begins[1] == "x", begins[2], ""))
        elif answers and line.startswith("  "):
            right, text, why = answers[-1]
            answers[-1] = right, text, f"{why} {line.strip()}".strip()
        else:
            raise ValueError(f"a line of a quiz must begin with - [ ] or - [x], not {line!r}")
    if silent := [text for _, text, why in answers if not why]:
        raise ValueError(f"an answer must say why, on the next line: {silent[0]!r}")
    return answers


def open_question(self: Any, node: nodes.Element) -> None:
    """Begin a question: a group that is labelled by its own text."""
    name = f"question-{node['number']}"
    self.body.append(f'<div class="quiz" role="group" aria-labelledby="{name}">\n')


def open_answer(self: Any, node: nodes.Element) -> None:
    """Begin an answer; of those with the same name, the browser opens one at a time."""
    kind = "right" if node["right"] else "wrong"
    self.body.append(f'<details class="quiz-{kind}" name="quiz-{node["number"]}">\n')


def open_summary(self: Any, node: nodes.Element) -> None:
    """Begin the text of an answer."""
    self.body.append("<summary>")


def closing(tag: str) -> Callable[[Any, nodes.Element], None]:
    """Return a function that ends an element."""

    def close(self: Any, node: nodes.Element) -> None:
        self.body.append(f"</{tag}>\n")

    return close


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("quiz", Quiz)
    app.add_node(question, html=(open_question, closing("div")))
    app.add_node(answer, html=(open_answer, closing("details")))
    app.add_node(chosen, html=(open_summary, closing("summary")))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
