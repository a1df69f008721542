"""Answers that are almost right: solutions with one small change each, by rules on their syntax trees."""

import ast
import copy
from collections.abc import Iterator

OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
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
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
OTHER_FUNCTION = {"min": "max", "max": "min", "any": "all", "all": "any"}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(rule, the node instead); None instead of a statement drops it."""
    match node:
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator):
            for other in OPERATORS.get(type(operator), ()):
                yield "operator", with_field(node, op=other())
        case ast.BoolOp(op=operator):
            yield "operator", with_field(node, op=OPERATORS[type(operator)][0]())
        case ast.Compare(ops=[operator, *rest]):
            for other in OPERATORS[type(operator)]:
                yield "operator", with_field(node, ops=[other(), *rest])
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
            yield "constant", ast.Constant(value - 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(value * 2)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield "sign", operand
        case ast.Call(args=[first, second, *rest]) if not isinstance(first, ast.Starred):
            yield "arguments swapped", with_field(node, args=[second, first, *rest])
        case ast.IfExp(body=body, orelse=orelse):
            yield "branches swapped", with_field(node, body=orelse, orelse=body)
        case ast.Slice(lower=lower, upper=upper) if lower is not None or upper is not None:
            yield "slice", ast.Slice(None, None, node.step)
    match node:
        case ast.Call(func=ast.Name(id="min" | "max" | "any" | "all" as name)):
            yield "function", with_field(node, func=ast.Name(OTHER_FUNCTION[name], ast.Load()))
        case ast.Call(func=ast.Name(id="range"), args=[*before, last]):
            one = ast.BinOp(last, ast.Sub(), ast.Constant(1))
            yield "off by one", with_field(node, args=[*before, one])
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "condition", with_field(node, test=ast.UnaryOp(ast.Not(), test))
    if isinstance(
        node, ast.Assign | ast.AugAssign | ast.For | ast.If | ast.While | ast.Return | ast.Continue | ast.Break
    ):
        yield "statement dropped", None
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
        yield "statement dropped", None


def with_field(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


class Replace(ast.NodeTransformer):
    """Put one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the changed text), no two texts alike.

    What was changed reads `operator, line 12, column 8: f - b < cap -> f - b <= cap`; lines are those of the cell.
    """
    original = ast.unparse(ast.parse(text))
    seen = {original}
    for place, node in enumerate(ast.walk(ast.parse(text))):
        for number, (rule, _) in enumerate(changes(node)):
            tree = ast.parse(text)
            old = list(ast.walk(tree))[place]
            _, new = list(changes(old))[number]
            before = ast.unparse(old).split("\n")[0]
            after = "pass" if new is None else ast.unparse(ast.fix_missing_locations(new)).split("\n")[0]
            changed = Replace(old, ast.Pass() if new is None else new).visit(tree)
            mutant = ast.unparse(ast.fix_missing_locations(changed))
            if mutant not in seen:
                seen.add(mutant)
                yield f"{rule}, line {old.lineno}, column {old.col_offset}: {before} -> {after}", mutant
