"""The API reference: a module's public names, their signatures and docstrings, as Markdown."""

import inspect
import re
from importlib import import_module
from types import ModuleType
from typing import Any

WIDTH = 88

# Aliases of types, which signatures would spell out, and the modules that define them.
ALIASES = {
    "Schedule": "schedules",
    "Criterion": "criteria",
    "Structure": "structures",
    "Allocation": "masks",
    "Masks": "masks",
    "Phase": "recipes",
}


def reference(name: str) -> str:
    """Return the section of the module `swdlib.<name>`, without its heading."""
    module = import_module(f"swdlib.{name}")
    parts = [_text(module)]
    for public in public_names(module):
        parts += _entry(getattr(module, public), public, "###")
    return "\n\n".join(parts)


def public_names(module: ModuleType) -> list[str]:
    """Return a module's `__all__`, or else the documented functions and classes it defines."""
    named = getattr(module, "__all__", None)
    return list(named or (n for n, thing in vars(module).items() if _is_public(n, thing, module)))


def _is_public(name: str, thing: Any, module: ModuleType) -> bool:
    own = getattr(thing, "__module__", None) == module.__name__
    kind = inspect.isfunction(thing) or inspect.isclass(thing)
    return own and kind and not name.startswith("_") and bool(inspect.getdoc(thing))


def _entry(thing: Any, name: str, level: str) -> list[str]:
    call = _code(signature(thing, name))
    parts = [f"{level} `{name}`", call, _text(thing)]
    if inspect.isclass(thing):
        own = vars(thing).keys() - getattr(thing, "__dataclass_fields__", {}).keys()
        members = ((n, vars(thing)[n]) for n in vars(thing) if n in own and not n.startswith("_"))
        # `getattr` would inherit the docstring of a base class.
        parts += [_member(m, f"{name}.{n}") for n, m in members if getattr(m, "__doc__", None)]
    return parts


def _member(member: Any, name: str) -> str:
    if isinstance(member, property):
        return f"`{name}`\n: {_indented(_text(member))}"
    plain = getattr(member, "__func__", member)  # of a class method
    if not inspect.isfunction(plain):
        return ""
    return f"`{signature(plain, name, bound=True)}`\n: {_indented(_text(plain))}"


def signature(thing: Any, name: str, bound: bool = False) -> str:
    """Return the signature of `thing`; a long one has a line for each parameter."""
    try:
        whole = inspect.signature(thing)
    except (TypeError, ValueError):  # an exception's constructor
        return name
    given = list(whole.parameters.values())[bound:]
    parameters = [_parameter(p) for p in given]
    keyword_only = [i for i, p in enumerate(given) if p.kind is p.KEYWORD_ONLY]
    if keyword_only and not any(p.kind is p.VAR_POSITIONAL for p in given):
        parameters.insert(keyword_only[0], "*")
    back = whole.return_annotation
    result = "" if back is whole.empty or inspect.isclass(thing) else f" -> {_kind(back)}"
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= WIDTH or bound:
        return line
    return "\n".join([f"{name}(", *(f"    {p}," for p in parameters), f"){result}"])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    text = dict[Any, str](stars).get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_kind(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    default = getattr(parameter.default, "__name__", repr(parameter.default)).replace("'", '"')
    if " at 0x" in default or default.startswith("<"):
        default = "..."
    return f"{text} = {default}" if ":" in text else f"{text}={default}"


def _kind(annotation: Any) -> str:
    """An annotation as it is written, without the names of modules."""
    text = _bare(annotation)
    for name, home in ALIASES.items():
        text = text.replace(_bare(getattr(import_module(f"swdlib.{home}"), name)), name)
    return text


def _bare(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b[a-z_][\w.]*\.(?=[A-Za-z_])", "", text).replace("'", '"')


def _text(thing: Any) -> str:
    """A docstring as Markdown, with its arguments as a list and its examples as code."""
    parts = []
    for block in (inspect.getdoc(thing) or "").split("\n\n"):
        if block.startswith(">>>"):
            parts.append(_code(block))
        elif block.startswith("Args:\n"):
            parts.append(_arguments(block))
        else:
            parts.append(escaped(block))
    return "\n\n".join(parts)


def _arguments(block: str) -> str:
    joined = re.sub(r"\n {8,}", " ", block)
    pairs = re.findall(r"^ {4}(\w+): (.*)$", joined, re.MULTILINE)
    return "\n".join(f"- `{name}`: {escaped(text)}" for name, text in pairs)


def escaped(text: str) -> str:
    """Return text whose only signs of Markdown are backticks."""
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*_$<\[\]|])", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")
