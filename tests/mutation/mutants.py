"""The mutants of a module: its source with one operator, constant or statement changed."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """One changed source.

    Attributes
    ----------
    function
        Qualified name of the function or class that holds the change.
    line
        Line of the change in the original source.
    before, after
        The first line of the statement, as source text.
    source
        The whole module with the change.
    """

    function: str
    line: int
    before: str
    after: str
    source: str


def mutants(source: str) -> list[Mutant]:
    """All mutants of a module, in the order of its text.

    Annotations, docstrings, imports, decorators and assertions stay as they are: they do not
    decide what the module computes.

    >>> for mutant in mutants("def last(n: int | None):\\n    return n is None or n - 1 >= 0"):
    ...     print(mutant.function, mutant.line, mutant.before, "->", mutant.after)
    last 2 return n is None or n - 1 >= 0 -> return n is None and n - 1 >= 0
    last 2 return n is None or n - 1 >= 0 -> return n is not None or n - 1 >= 0
    last 2 return n is None or n - 1 >= 0 -> return n is None or n - 1 > 0
    last 2 return n is None or n - 1 >= 0 -> return n is None or n - 1 < 0
    last 2 return n is None or n - 1 >= 0 -> return n is None or n + 1 >= 0
    last 2 return n is None or n - 1 >= 0 -> return n is None or n - 2 >= 0
    last 2 return n is None or n - 1 >= 0 -> return n is None or n - 1 >= 1
    """
    tree = ast.parse(source)
    found = []
    for function, statement, parent, field, index in _walk(tree, "", tree):
        original = _get(parent, field, index)
        for changed in _changes(original, field):
            before = _text(statement)
            _set(parent, field, index, changed)
            text = ast.unparse(ast.fix_missing_locations(tree))
            after = _text(changed if statement is original else statement)
            _set(parent, field, index, original)
            found.append(Mutant(function, original.lineno, before, after, text))
    return found


def _text(node: ast.AST) -> str:
    """The first line of a statement, without its decorators."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        node = _replaced(node, decorator_list=[])
    return ast.unparse(node).partition("\n")[0]


def _walk(
    node: ast.AST, function: str, statement: ast.AST
) -> Iterator[tuple[str, ast.AST, ast.AST, str, int | None]]:
    """Where the nodes below `node` are: function, statement, parent, field, and index or None."""
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list"}:
            continue
        entries = value if isinstance(value, list) else [value]
        for index, entry in enumerate(entries):
            if not isinstance(
                entry, (ast.expr, ast.stmt, ast.arguments, ast.keyword)
            ) or isinstance(entry, (ast.Assert, ast.Import, ast.ImportFrom)):
                # What remains holds no expression, save comprehensions and handlers of exceptions.
                if isinstance(entry, (ast.comprehension, ast.ExceptHandler)):
                    yield from _walk(entry, function, statement)
                continue
            inner = function
            lowest = entry if isinstance(entry, ast.stmt) else statement
            if isinstance(entry, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{function}.{entry.name}".strip(".")
            elif isinstance(entry, (ast.expr, ast.stmt)):
                yield function, lowest, node, field, index if isinstance(value, list) else None
            if not _is_negative(entry):  # as a number: -1 is mutated to 1
                yield from _walk(entry, inner, lowest)


def _is_negative(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)


def _get(parent: ast.AST, field: str, index: int | None) -> Any:
    value = getattr(parent, field)
    return value if index is None else value[index]


def _set(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _replaced(node: Any, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _changes(node: Any, field: str) -> Iterator[ast.AST]:
    """The nodes that may take the place of `node`."""
    change = _CHANGES.get(type(node))
    if change is not None:
        yield from change(node)
    # The test of if, while and the conditional expression; others are negated by their operators.
    if field == "test" and not isinstance(node, (ast.Compare, ast.UnaryOp)):
        yield ast.UnaryOp(ast.Not(), node)


def _change_comparison(node: ast.Compare) -> Iterator[ast.AST]:
    for index, operator in enumerate(node.ops):
        for other in _COMPARISONS[type(operator)]:
            yield _replaced(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])


def _change_arithmetic(node: ast.BinOp | ast.AugAssign) -> Iterator[ast.AST]:
    if type(node.op) in _ARITHMETIC:
        yield _replaced(node, op=_ARITHMETIC[type(node.op)]())
    if isinstance(node, ast.AugAssign):
        yield ast.Pass()


def _change_boolean(node: ast.BoolOp) -> Iterator[ast.AST]:
    yield _replaced(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())


def _remove_operator(node: ast.UnaryOp) -> Iterator[ast.AST]:
    yield node.operand


def _change_constant(node: ast.Constant) -> Iterator[ast.AST]:
    if isinstance(node.value, bool):
        yield _replaced(node, value=not node.value)
    elif isinstance(node.value, (int, float)):
        yield _replaced(node, value=node.value + 1)


def _remove(node: ast.stmt) -> Iterator[ast.AST]:
    yield ast.Pass()


def _remove_call(node: ast.Expr) -> Iterator[ast.AST]:
    if isinstance(node.value, ast.Call):  # neither a docstring nor a yield
        yield ast.Pass()


def _remove_write(node: ast.Assign) -> Iterator[ast.AST]:
    """Without a local variable, the next line would fail."""
    if not isinstance(node.targets[0], (ast.Name, ast.Tuple)):
        yield ast.Pass()


_CHANGES: dict[type[ast.AST], Callable[[Any], Iterator[ast.AST]]] = {
    ast.Compare: _change_comparison,
    ast.BinOp: _change_arithmetic,
    ast.AugAssign: _change_arithmetic,
    ast.BoolOp: _change_boolean,
    ast.UnaryOp: _remove_operator,
    ast.Constant: _change_constant,
    ast.Raise: _remove,
    ast.Break: _remove,
    ast.Continue: _remove,
    ast.Expr: _remove_call,
    ast.Assign: _remove_write,
}
