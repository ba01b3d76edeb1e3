"""Reading yaml configs as data: no code in them runs, and nothing is fetched."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import detectron2.model_zoo
import yaml

from resnext_det.errors import ConfigError, quoted

Tree = dict[str, Any]

BASE = "_BASE_"
_MOST_BYTES = 2**20
_MOST_BASES = 32  # one on top of the other
_MOST_LEVELS = 32  # of nesting; Detectron2's own configs have 6
_MOST_NODES = 100_000  # after aliases are expanded
_MOST_STEPS = 10_000  # of arithmetic
_LARGEST_NUMBER = 1e15
_EVAL = "tag:yaml.org,2002:python/object/apply:eval"


def read_config(file: Path) -> Tree:
    """Read a yaml config and those that it is based on.

    Args:
        file: the config. Its `_BASE_` names another file, or a list of them, by a path from its
            own folder, or as Detectron2's model zoo does, such as
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml".

    Returns:
        The values, nested as in the files; those of the file itself replace those of its bases.

    Raises:
        ConfigError: a file cannot be read, is no config, or holds code; `_BASE_` is an address,
            is not there, or leads back to the file itself.
    """
    return _read(file, ())


def _read(file: Path, above: tuple[Path, ...]) -> Tree:
    place = file.resolve()
    if place in above:
        raise ConfigError(
            f"{quoted(above[-1])}: {BASE} names {quoted(file)}, which is based on it in turn. "
            "Remove one of the two."
        )
    if len(above) >= _MOST_BASES:
        raise ConfigError(f"{quoted(above[0])} has more than {_MOST_BASES} bases above one another")
    tree = parse_config(_text(file), quoted(file))
    bases = tree.pop(BASE, [])
    found: Tree = {}
    for base in bases if isinstance(bases, list) else [bases]:
        _overlay(_read(_base(base, file), (*above, place)), found, quoted(file))
    _overlay(tree, found, quoted(file))
    return found


def _text(file: Path) -> str:
    try:
        if not file.is_file():
            raise ConfigError(f"there is no config file {quoted(file)}")
        if file.stat().st_size > _MOST_BYTES:
            raise ConfigError(
                f"{quoted(file)} has {file.stat().st_size:,} bytes; a config has at most "
                f"{_MOST_BYTES:,}."
            )
        return file.read_text(encoding="utf-8-sig")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{quoted(file)} cannot be read as a config: {quoted(error)}") from error


def _base(base: object, file: Path) -> Path:
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"{quoted(file)}: {BASE} is {quoted(base)}; it must be the path of a yaml file, or a "
            "list of such."
        )
    if "://" in base:
        raise ConfigError(
            f"{quoted(file)}: {BASE} is {quoted(base)}, an address. A config is not fetched: "
            "download the file, look at it, and name its path."
        )
    try:
        path = Path(base).expanduser()
        beside = file.parent / path
        if beside.is_file():
            return beside
        return Path(detectron2.model_zoo.get_config_file(base))
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"{quoted(file)}: {BASE} is {quoted(base)}, and there is no such file, neither from "
            f"{quoted(file.parent)} nor among Detectron2's own configs."
        ) from error


def _overlay(values: Mapping[str, Any], under: Tree, said: str) -> None:
    """Put values over those of a base, in place."""
    for name, value in values.items():
        if isinstance(value, dict) and name in under:
            if not isinstance(under[name], dict):
                raise ConfigError(
                    f"{said}: {quoted(name)} is a group of keys, and a single value in its {BASE}."
                )
            _overlay(value, under[name], said)
        else:
            under[name] = value


def parse_config(text: str, said: str) -> Tree:
    """Read the text of one yaml config.

    Args:
        text: of any content.
        said: what it is called in errors, already fit to print.

    Returns:
        The values, nested as in the text, `_BASE_` included.

    Raises:
        ConfigError: no yaml, nested too deeply, too large, or with a tag that would run code.
    """
    try:
        _check_depth(text, said)
        node = yaml.compose(text, Loader=_Loader)
        if _size(node, {}) > _MOST_NODES:
            raise ConfigError(f"{said} has more than {_MOST_NODES:,} values; no config has.")
        tree = yaml.load(text, Loader=_Loader)  # a SafeLoader: see _Loader
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{said} cannot be read as a config: {quoted(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not _has_names(tree):
        raise ConfigError(
            f"{said} cannot be read as a config: it must hold keys and values, such as "
            "SOLVER: {BASE_LR: 0.02}."
        )
    return tree


def _check_depth(text: str, said: str) -> None:
    """Refuse deep nesting from the parser's events, before anything recurses into it."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise ConfigError(
                f"{said} is nested more than {_MOST_LEVELS} levels deep; no config is."
            )


def _size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return how many values a node has once aliases are expanded; infinite if it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted: who comes here meanwhile is part of it
        parts = [part for each in node.value for part in (each if type(each) is tuple else [each])]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _has_names(tree: Tree) -> bool:
    return all(
        isinstance(name, str) and (not isinstance(value, dict) or _has_names(value))
        for name, value in tree.items()
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes plain values only, and the one tag of Detectron2's own."""


def _arithmetic(loader: _Loader, node: yaml.Node) -> Any:
    """Read `!!python/object/apply:eval ["..."]`, as Base-RetinaNet.yaml has it, as arithmetic."""
    words = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    if len(words) != 1 or not isinstance(words[0], str) or len(words[0]) > 1000:
        raise ConfigError("!!python/object/apply:eval takes one expression of arithmetic as text.")
    return evaluate(words[0])


_Loader.add_constructor(_EVAL, _arithmetic)

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def evaluate(text: str) -> Any:
    """Compute an expression of numbers, lists of them, and `[... for x in [...]]`; nothing else.

    Args:
        text: such as "[[x, x * 2**(1.0/3)] for x in [32, 64]]".

    Returns:
        A number, or lists and tuples of numbers.

    Raises:
        ConfigError: anything else, such as a call, or too much to compute.
    """
    try:
        return _Arithmetic().value(ast.parse(text, mode="eval").body, {})
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"!!python/object/apply:eval {quoted(text)}: only numbers, + - * / ** and lists are "
            f"computed, and no code is run ({quoted(error)})."
        ) from error


class _Arithmetic:
    """Evaluates a syntax tree in a limited number of steps."""

    def __init__(self) -> None:
        self._left = _MOST_STEPS

    def value(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        """Return the value of an expression.

        Raises:
            ValueError: it is no arithmetic, or takes too long.
        """
        self._left -= 1
        if self._left < 0:
            raise ValueError("too much to compute")
        match node:
            case ast.Constant(value=int() | float() as number) if type(number) is not bool:
                return _checked(number)
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                values = [self.value(part, names) for part in parts]
                return values if isinstance(node, ast.List) else tuple(values)
            case ast.UnaryOp(op=sign, operand=part) if type(sign) in _OPERATORS:
                return _checked(_OPERATORS[type(sign)](_number(self.value(part, names))))
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                one, other = _number(self.value(left, names)), _number(self.value(right, names))
                if isinstance(sign, ast.Pow):
                    one = float(one) if abs(other) > 64 or isinstance(other, float) else one
                return _checked(_OPERATORS[type(sign)](one, other))
            case ast.ListComp(elt=part, generators=[loop]) if isinstance(loop.target, ast.Name):
                if loop.ifs or loop.is_async:
                    raise ValueError("a condition")
                turns = self.value(loop.iter, names)
                if not isinstance(turns, list | tuple):
                    raise ValueError("a loop over a number")
                return [self.value(part, {**names, loop.target.id: turn}) for turn in turns]
        raise ValueError(f"{type(node).__name__} is not arithmetic")


def _number(value: Any) -> int | float:
    if isinstance(value, int | float):
        return value
    raise ValueError("arithmetic with a list")


def _checked(value: Any) -> int | float:
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
        raise ValueError("a number beyond 1e15")
    return value
